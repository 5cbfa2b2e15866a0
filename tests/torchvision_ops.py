"""Lets a torchvision wheel that was built for another torch be imported: ``pytest -p tests.torchvision_ops``.

transformers' tensor back end needs torchvision's Python code only, but torchvision registers shapes for two compiled
operators while it is imported and fails where its library could not be loaded. Declaring the two is enough; nothing
here runs them.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

_declared = torch.library.Library("torchvision", "FRAGMENT")  # forgotten again if nothing holds it


def declare() -> None:
    """Declare the operators, unless a torchvision that works has done so."""
    if "torchvision" in sys.modules:
        return
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def available() -> bool:
    """Whether torchvision is on the path at all."""
    return importlib.util.find_spec("torchvision") is not None


if available():
    declare()
