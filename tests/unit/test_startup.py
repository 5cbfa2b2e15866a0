"""Pausing the garbage collector: nothing of it remains afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from smolvlm_fms.startup import collection_paused


class Ring:
    """Garbage that only the collector can free."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector_as_before() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


def test_no_pass_during_and_all_of_it_afterwards() -> None:
    before = sum(generation["collections"] for generation in gc.get_stats())
    with collection_paused():
        assert not gc.isenabled()
        rings = [Ring() for _ in range(20_000)]
        watched = weakref.ref(rings[0])
        del rings
        assert sum(generation["collections"] for generation in gc.get_stats()) == before
        assert watched() is not None
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert watched() is None


def test_a_failure_inside_leaves_the_collector_on() -> None:
    with pytest.raises(ValueError, match="inside"), collection_paused():
        raise ValueError("inside")
    assert gc.isenabled()


def test_a_caller_who_switched_it_off_keeps_it_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    frozen = gc.get_freeze_count()
    assert frozen
    with collection_paused():
        pass
    assert gc.get_freeze_count() >= frozen - 5  # frozen objects may die, but are not thawed


def test_the_package_is_imported_without_passes() -> None:
    code = (
        "import gc; count = lambda: gc.get_stats()[2]['collections']; before = count(); import smolvlm_fms;"
        "smolvlm_fms.load; assert count() == before, count() - before; assert gc.isenabled()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
