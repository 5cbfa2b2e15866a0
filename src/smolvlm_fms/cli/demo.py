"""``smolvlm demo``: the bundled model answers questions about bundled pictures."""

from __future__ import annotations

import json as jsonlib
import time

import typer


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
        answer = vlm.ask([pictures / name for name in item["images"]], item["question"], max_tokens=24)
        right = answer.text.strip().rstrip(".").lower() in [a.lower() for a in item["answers"]]
        results.append({**item, "text": answer.text, "right": right, "seconds": round(answer.timings.total_s, 3)})
        if not json:
            names = ", ".join(item["images"])
            typer.echo(f"  {names:<28} {item['question']}")
            mark = typer.style("✓", fg="green") if right else typer.style(f"✗ ({item['answers'][0]})", fg="red")
            typer.echo(f"  {'':<28} {typer.style(answer.text.strip(), bold=True)}  {mark}\n")
    correct = sum(result["right"] for result in results)
    if json:
        typer.echo(jsonlib.dumps({"answers": results, "right": correct, "of": len(results)}, ensure_ascii=False))
        return
    typer.echo(f"{correct} of {len(results)} right. Ask your own: smolvlm ask PICTURE 'What shape is this?'")
    typer.echo(f"The pictures are in {pictures}")
