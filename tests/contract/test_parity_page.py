"""docs/parity.md has the families, columns and checks that its generator makes now; its figures are not compared."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers

from smolvlm_fms.hf.certificate_table import COLUMNS, STAGES
from tests import parity_page
from tests.parity_page import DTYPES, FULL, INTRODUCTION, TARGET, TINY, page, section
from tests.verify_families import FAMILIES

DOCUMENT = TARGET.read_text(encoding="utf-8")


def table(text: str) -> list[list[str]]:
    """Cells of the rows of a Markdown table, the line under the header left out."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows if not set(row[0]) <= {"-"}]


def test_it_is_the_generators_introduction() -> None:
    assert DOCUMENT.startswith(INTRODUCTION)


def test_every_family_is_there_in_every_dtype_and_passes() -> None:
    header, *rows = table(section(DOCUMENT, TINY))
    assert header == ["family", "dtype", *STAGES, "logits' bound", "verdict"]
    assert [row[:2] for row in rows] == [[family, dtype] for family in FAMILIES for dtype in DTYPES]
    assert {row[-1] for row in rows} == {"ok"}
    for row in rows:
        ids, *differences, greedy = row[2:7]
        assert all(re.fullmatch(r"0|\d\.\de-\d\d", cell) for cell in differences), row
        assert ids == "100%" and (greedy == "100%" or row[1] == "bfloat16"), row


def test_the_full_shape_has_every_check_and_passes() -> None:
    header, *rows = table(section(DOCUMENT, FULL))
    assert header == list(COLUMNS)
    pictures = [f"{case}: {stage}" for case in ("small picture", "wide picture", "two pictures") for stage in STAGES]
    texts = [f"text only: {stage}" for stage in ("ids", "logits", "greedy text")]
    assert [row[0] for row in rows] == [*texts, *pictures]
    assert {row[-1] for row in rows} == {"ok"}


@pytest.mark.skipif(transformers.__version__ < "5", reason="verify needs transformers 5")
def test_the_generator_makes_such_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = next(iter(FAMILIES))
    monkeypatch.setattr(parity_page, "FAMILIES", {first: FAMILIES[first]})
    made = page(parity_page.tiny_reports(tmp_path, lambda _: None, ("float32",)), section(DOCUMENT, FULL))
    assert made.startswith(INTRODUCTION) and section(made, FULL).strip() == section(DOCUMENT, FULL).strip()
    (header, row), (wanted, *_) = table(section(made, TINY)), table(section(DOCUMENT, TINY))
    assert header == wanted and row[:2] == [first, "float32"]
