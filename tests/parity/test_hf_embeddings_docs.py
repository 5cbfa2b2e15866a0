"""Every snippet of docs/embeddings.md runs, and gives what the text beside it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

TEXT = (Path(__file__).parents[2] / "docs" / "embeddings.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, colour in (("red.jpg", "red"), ("blue.jpg", "blue")):
        picture = Image.new("RGB", (200, 200), "white")
        picture.paste(colour, (60, 60, 140, 140))
        picture.save(name, quality=95)
    Image.open("red.jpg").resize((180, 180)).save("query.png")


def run(index: int) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(SNIPPETS[index], names)
    return names


def test_all_of_them_run() -> None:
    assert len(SNIPPETS) == 4


def test_pooled(capsys: pytest.CaptureFixture[str]) -> None:
    names = run(0)
    lines = capsys.readouterr().out.split()
    assert lines[1] == "red.jpg" and lines[3] == "blue.jpg" and float(lines[0]) > float(lines[2])
    vectors = names["embed"]([Path("red.jpg"), Path("blue.jpg")])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    assert not any("layers" in name for name, _ in names["model"].text_model.named_parameters())


def test_late_interaction() -> None:
    names = run(1)
    assert names["scores"].shape == (1, 2)
    pages = names["pages"]
    own = torch.einsum("qtd,psd->qpts", pages, pages).amax(-1).sum(-1)
    assert bool((own.diagonal() >= own.amax(1) - 1e-4).all()), "nothing is closer to a page than itself"
    loss = names["vectors"](**names["vlm"].processor(text=["a"], return_tensors="pt")).sum()
    loss.backward()
    assert names["vlm"].model.text_model.base_model.layers[0].attn.dense.weight.grad is not None


def test_keys_and_values() -> None:
    names = run(2)
    text, length = names["vlm"].model.config.text, names["inputs"]["input_ids"].shape[1]
    shape = (text.num_hidden_layers // 2, 1, text.num_key_value_heads, length, text.head_dim)
    assert names["keys"].shape == names["values"].shape == shape
    assert len(names["states"]) == text.num_hidden_layers + 1


def test_transformers_names() -> None:
    names = run(3)
    with torch.no_grad():
        _, states = names["vlm"].model(**names["inputs"], output_hidden_states=True)
        expected = names["vlm"].model.encode_images(names["inputs"]["pixel_values"]).features
    torch.testing.assert_close(names["output"].hidden_states[-1], states[-1], rtol=0, atol=1e-5)
    features = getattr(names["features"], "pooler_output", names["features"])
    torch.testing.assert_close(features[0], expected[0], rtol=0, atol=1e-5)
