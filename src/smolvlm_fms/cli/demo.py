"""``smolvlm demo``: the bundled model answers questions about bundled pictures."""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from smolvlm_fms.engine.api import VLM
    from smolvlm_fms.types import Answer


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("demo", help="The bundled model answers questions about bundled pictures.")(demo)


def demo(json: bool = typer.Option(False, "--json", help="One JSON object on standard output.")) -> None:
    started = time.perf_counter()
    import smolvlm_fms as sv
    from smolvlm_fms.bundle import bundled

    pictures = bundled("pictures")
    questions = jsonlib.loads((pictures / "questions.json").read_text(encoding="utf-8"))
    vlm = sv.load("demo")
    if not json:
        typer.echo(
            f"The bundled model, loaded in {time.perf_counter() - started:.1f} s. "
            "These pictures were kept out of its training.\n"
        )
    results = []
    for item in questions:
        answer, right = ask(vlm, pictures, item)
        results.append({**item, "text": answer.text, "right": right, "seconds": round(answer.timings.total_s, 3)})
        if not json:
            names = f"{item['images'][0]} …" if item.get("video") else ", ".join(item["images"])
            typer.echo(f"  {names:<28} {item['question']}")
            mark = typer.style("✓", fg="green") if right else typer.style(f"✗ ({item['answers'][0]})", fg="red")
            typer.echo(f"  {'':<28} {typer.style(answer.text.strip(), bold=True)}  {mark}\n")
    correct = sum(result["right"] for result in results)
    if json:
        typer.echo(jsonlib.dumps({"answers": results, "right": correct, "of": len(results)}, ensure_ascii=False))
        return
    typer.echo(f"{correct} of {len(results)} right. Ask your own: smolvlm ask PICTURE 'What shape is this?'")
    typer.echo(f"The pictures are in {pictures}")


def ask(vlm: VLM, folder: Path, item: dict[str, Any]) -> tuple[Answer, bool]:
    """The answer to an entry of ``questions.json`` about pictures in ``folder``, and whether it is one of its answers.

    With ``"video": true`` the images are the frames of one video.
    """
    paths = [folder / name for name in item["images"]]
    if item.get("video"):
        from PIL import Image

        frames = [Image.open(path).convert("RGB") for path in paths]
        content = [{"type": "video", "video": frames, "fps": 24}, {"type": "text", "text": item["question"]}]
        answer = vlm.chat([{"role": "user", "content": content}], max_tokens=24)
    else:
        answer = vlm.ask(paths, item["question"], max_tokens=24)
    return answer, answer.text.strip().rstrip(".").lower() in [wanted.lower() for wanted in item["answers"]]
