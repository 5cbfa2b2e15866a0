"""Install what only the peers need into folders of their own, so that our environment stays as it is.

    python benchmarks/peers/install.py openvino onnxruntime         # into .peers/openvino, .peers/onnxruntime

Each is installed without its dependencies: numpy is ours, and protobuf and onnx come with onnxruntime's folder where
the environment lacks them.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from engine_peers import OVERLAYS  # noqa: E402

PACKAGES = {
    "openvino": {"openvino": "openvino"},
    "onnxruntime": {
        "onnxruntime": "onnxruntime",
        "onnx": "onnx",
        "onnxscript": "onnxscript",
        "onnx_ir": "onnx-ir",
        "google.protobuf": "protobuf",
        "flatbuffers": "flatbuffers",
        "ml_dtypes": "ml_dtypes",
    },
}
"""Peer to the modules that it needs and the packages that they come in."""


def lacking(peer: str) -> list[str]:
    """The packages of ``peer`` that the environment does not have."""
    return [package for module, package in PACKAGES[peer].items() if not _present(module)]


def _present(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=f"of {', '.join(PACKAGES)}; all if none is named")
    peers = parser.parse_args().peers or list(PACKAGES)
    unknown = [peer for peer in peers if peer not in PACKAGES]
    if unknown:
        parser.error(f"no such peer: {', '.join(unknown)}; there are {', '.join(PACKAGES)}")
    for peer in peers:
        packages = lacking(peer)
        if not packages:
            print(f"{peer}: the environment has everything already")
            continue
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--upgrade", "--target", str(OVERLAYS / peer)]
        subprocess.run([*command, *packages], check=True)


if __name__ == "__main__":
    main()
