"""What the benchmarks compute from their measurements: fits, drawings, shares of pages; and that they run."""

from __future__ import annotations

import importlib
import mmap
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_fit_tells_its_worst_point(load: Any) -> None:
    cost = load("engine_cost")
    line = cost.fit([(x, 0.5 + 2.0 * x) for x in (1, 2, 5, 50)], 1)
    assert line["coefficients"] == pytest.approx([2.0, 0.5]) and line["worst_share"] < 1e-9
    bent = [(x, 1e-3 * x + 1e-6 * x * x) for x in (64, 512, 2048, 8064)]
    assert cost.fit(bent, 1)["worst_share"] > 0.2
    assert cost.fit(bent, 2)["worst_share"] < 1e-6


def test_panels_are_drawn_as_they_come(load: Any, tmp_path: Path) -> None:
    """Also with the points that JSON gives back, lists of two."""
    cost = load("engine_cost")
    points = [[x, 0.1 * x] for x in (1, 2, 5)]
    whole = {name: {"points": points, "line": cost.fit(points, 1)} for name in ("tiles", "frames", "tokens")}
    whole["tokens"]["parabola"] = cost.fit([(1, 1.0), (2, 4.0), (3, 9.0)], 2)
    for count in (1, 3):
        target = tmp_path / f"{count}.svg"
        cost.draw(dict(list(whole.items())[:count]), target, "a caption")
        root = ElementTree.parse(target).getroot()
        names = [child.tag.split("}")[1] for child in root]
        assert names.count("circle") == 3 * count
        assert names.count("polyline") == (4 if count == 3 else 1)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_resident_pages_are_counted(load: Any) -> None:
    memory = load("engine_memory")
    # straight from the kernel: an allocator may hand out memory that was used before
    tensor = torch.frombuffer(mmap.mmap(-1, 2**27), dtype=torch.uint8)
    assert memory._resident_share([tensor]) < 0.2
    tensor[: 2**26] = 1
    assert 0.4 < memory._resident_share([tensor]) < 0.7
    tensor[:] = 1
    assert memory._resident_share([tensor]) == 1.0
    assert memory.resident_bytes() > 2**27
