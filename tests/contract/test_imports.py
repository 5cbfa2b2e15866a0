"""The import law: which room may import which, and what importing the package costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "src" / "smolvlm_fms"
LEAVES = {"bundle", "errors", "types", "config", "config_llava", "config_presets", "startup"}

# Room -> rooms (or rooms' modules) it may import besides the leaves and itself.
LAW = {
    # inspect draws tile grids without an engine; verify and convert work on checkpoints, not through the engine.
    "cli": {
        "server",
        "engine",
        "training",
        "scale",
        "export",
        "processing",
        "hf",
        "fms_bridge",
        "documents",
        "evaluation",
    },
    # Export compares a converted checkpoint with its source, the engine's packed weights and transformers: it stands
    # over all three, and only the command line stands on it.
    "export": {"engine", "fms_bridge", "hf", "model", "modules", "processing"},
    "server": {"engine"},
    "scale": {"engine", "server"},
    "documents": {"engine", "processing"},
    # Tests ask through the engine; they read pictures and videos as the processors do.
    "evaluation": {"engine", "processing"},
    # The packed CPU path computes what the modules compute, from their weights, and shares their arithmetic.
    "engine": {"model", "modules", "processing", "fms_bridge.loading", "fms_bridge.grouped"},
    # Training writes checkpoints, and adapters in the checkpoint's own names.
    "training": {"model", "processing", "fms_bridge"},
    "model": {"modules"},
    "modules": set(),
    "processing": set(),
    "fms_bridge": {"model"},
    "hf": {"model", "modules", "processing", "fms_bridge", "engine"},
}


def room_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            module = node.module or ""
            found.add(module)
            if module.startswith("smolvlm_fms"):
                found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def allowed(target: str, room: str) -> bool:
    own = target.removeprefix("smolvlm_fms.").split(".")
    if own[0] in LEAVES or own[0] == room or not (PACKAGE / own[0]).exists():
        return True
    return any(".".join(own[: law.count(".") + 1]) == law for law in LAW[room])


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rooms_import_only_what_the_law_allows(path: Path) -> None:
    room = room_of(path)
    if room == "__init__":
        return
    ours = {name for name in imports_of(path) if name.startswith("smolvlm_fms.")}
    if room in LEAVES:
        assert {name.split(".")[1] for name in ours} <= LEAVES
        return
    # `from smolvlm_fms.fms_bridge import loading` shows up as the room and as the module: the module counts.
    specific = {n for n in ours if not any(o != n and o.startswith(n + ".") for o in ours)}
    broken = sorted(name for name in specific if not allowed(name, room))
    assert not broken, f"{room} may not import {broken}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_transformers_is_imported_in_hf_only(path: Path) -> None:
    if room_of(path) != "hf":
        assert not {n for n in imports_of(path) if n.split(".")[0] == "transformers"}


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_costs_nothing() -> None:
    loaded = modules_after("import smolvlm_fms")
    assert not loaded & {"torch", "transformers", "fms", "PIL", "numpy"}


def test_the_command_line_starts_without_torch() -> None:
    loaded = modules_after("import smolvlm_fms.cli")
    assert not loaded & {"torch", "transformers", "fms", "numpy"}


def test_the_engine_starts_without_the_costly_part_of_fms() -> None:
    """``fms.models`` imports torch's FSDP and sympy: 0.6 s that the first token would wait for."""
    loaded = modules_after("import smolvlm_fms; smolvlm_fms.load")
    assert not loaded & {"fms.models", "torch.distributed.fsdp", "sympy", "transformers"}
    later = "from fms.models import list_models; assert 'smolvlm' in list_models()"
    modules_after(f"import smolvlm_fms; smolvlm_fms.load; {later}")


def test_the_scheduler_knows_no_torch() -> None:
    assert "torch" not in {n.split(".")[0] for n in imports_of(PACKAGE / "engine" / "scheduler.py")}


def test_geometry_knows_neither_torch_nor_pillow() -> None:
    names = {n.split(".")[0] for n in imports_of(PACKAGE / "processing" / "geometry.py")}
    assert not names & {"torch", "PIL", "numpy"}
