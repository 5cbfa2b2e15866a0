"""Every command and every snippet of docs/documents.md runs, with a tiny checkpoint in place of granite-docling."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from smolvlm_fms.cli import app
from tests.pdfs import pdf
from tests.scripted import build_docling_checkpoint

TEXT = (Path(__file__).parents[2] / "docs" / "documents.md").read_text(encoding="utf-8")
RELEASED = "ibm-granite/granite-docling-258M"
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_docling_checkpoint(tmp_path_factory.mktemp("docling"))


@pytest.fixture(autouse=True)
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("report.pdf").write_bytes(pdf([0.2, 0.8]))
    Image.new("RGB", (60, 80), "white").save("page.png")
    for name, colour in (("photo.jpg", "red"), ("other.jpg", "blue")):
        picture = Image.new("RGB", (200, 200), "white")
        picture.paste(colour, (60, 60, 140, 140))
        picture.save(name)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command: str, checkpoint: Path) -> None:
    words = shlex.split(command)
    assert words[0] == "smolvlm" and len(COMMANDS) == 3
    done = CliRunner().invoke(app, [*words[1:], "--model", str(checkpoint), "--max-tokens", "12"])
    assert done.exit_code == 0, done.output
    written = [Path(word) for word in words if word in ("report.md", "report.html")]
    assert all(path.read_text() for path in written)
    assert written or done.stdout.startswith("<doctag>")


def test_the_pipeline_from_python(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(SNIPPETS[0].replace(RELEASED, str(checkpoint)).replace("2000", "12"), names)
    assert sorted(names["document"].pages) == [1, 2]  # type: ignore[attr-defined]


def test_the_embeddings(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, torch.Tensor] = {}
    exec(SNIPPETS[1], names)
    pooled, states, mask = names["pooled_BD"], names["states"], names["batch"]["attention_mask"]
    assert pooled.shape == (2, states[0].shape[-1])
    torch.testing.assert_close(pooled.norm(dim=-1), torch.ones(2))
    assert float(pooled[0] @ pooled[1]) < 0.9999, "two pictures, two embeddings"
    torch.testing.assert_close(names["vectors_BTD"].norm(dim=-1), mask.float())
    assert names["scores"][0] >= names["scores"][1] - 1e-4, "nothing is closer to a picture than itself"
    assert len(re.findall(r"^(cosine|late)", capsys.readouterr().out, re.MULTILINE)) == 2
