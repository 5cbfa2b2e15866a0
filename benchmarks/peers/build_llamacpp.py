"""Build llama.cpp for this machine and convert the benchmark's checkpoint with its own tools.

    python benchmarks/peers/build_llamacpp.py                       # into build/peers/llamacpp; 15 processor minutes

The source is the one inside ``llama-cpp-python``'s source distribution, from the package index that pip uses. Needs a
C++ compiler; CMake and Ninja come from the index if they are missing, and the environment must have torch, transformers
and gguf for the conversion. A step whose result is there already is not done again.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import engine_checkpoint  # noqa: E402
from engine_peers import LLAMACPP  # noqa: E402

VERSION = "0.3.36"
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "GGML_NATIVE": "ON",
    "GGML_OPENMP": "ON",
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_ALL_WARNINGS": "OFF",
    "MTMD_VIDEO": "OFF",
    "GGML_CCACHE": "OFF",
}
TARGETS = ("mtmd", "llama", "llama-quantize", "llama-bench", "llama-batched-bench")


def run(*command: str | Path) -> None:
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(word) for word in command], check=True)


def source(folder: Path) -> Path:
    """Fetch and unpack the source; returns llama.cpp's folder."""
    unpacked = folder / f"llama_cpp_python-{VERSION}"
    if not unpacked.exists():
        wanted = f"llama-cpp-python=={VERSION}"
        options = ("--no-deps", "--no-binary", "llama-cpp-python", "--dest", folder)
        run(sys.executable, "-m", "pip", "download", *options, wanted)
        with tarfile.open(folder / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    return unpacked / "vendor" / "llama.cpp"


def tool(name: str, folder: Path) -> Path:
    """The program ``name``, from the index if this machine has none."""
    found = shutil.which(name)
    if found:
        return Path(found)
    if not (folder / "tools" / "bin" / name).exists():
        run(sys.executable, "-m", "pip", "install", "--target", folder / "tools", "cmake", "ninja")
    return folder / "tools" / "bin" / name


def build(llama: Path, folder: Path, jobs: int) -> None:
    """llama.cpp's libraries and tools, and the program that serves them to the benchmark."""
    cmake, target = tool("cmake", folder), folder / "build"
    if not (target / "build.ninja").exists():
        options = [f"-D{name}={value}" for name, value in OPTIONS.items()]
        ninja = f"-DCMAKE_MAKE_PROGRAM={tool('ninja', folder)}"
        run(cmake, "-S", llama, "-B", target, "-G", "Ninja", ninja, *options)
    run(cmake, "--build", target, f"-j{jobs}", "--target", *TARGETS)
    worker, code = folder / "llamacpp_worker", HERE / "llamacpp_worker.cpp"
    if worker.exists() and worker.stat().st_mtime > code.stat().st_mtime:
        return
    includes = [f"-I{llama / part}" for part in ("include", "ggml/include", "tools/mtmd", "vendor")]
    libraries = [f"-L{target / 'bin'}", "-lmtmd", "-lllama", "-lggml", "-lggml-base", "-Wl,-rpath,$ORIGIN/build/bin"]
    compiler = shutil.which("c++") or "g++"
    run(compiler, "-O2", "-std=c++17", "-Wall", "-Wextra", *includes, code, "-o", worker, *libraries)


def convert(llama: Path, checkpoint: Path, folder: Path) -> None:
    """The checkpoint as GGUF: text in f16, bf16, Q8_0 and Q4_0, vision in f16 and Q8_0."""
    for part, kind in (("text", "f16"), ("text", "bf16"), ("vision", "f16"), ("vision", "q8_0")):
        target = folder / f"{part}-{kind}.gguf"
        if not target.exists():
            options = ["--outtype", kind, "--outfile", target, *(["--mmproj"] if part == "vision" else [])]
            run(sys.executable, HERE / "convert_llamacpp.py", llama, *options, checkpoint)
    for kind in ("q8_0", "q4_0"):
        target = folder / f"text-{kind}.gguf"
        if not target.exists():
            run(folder / "build" / "bin" / "llama-quantize", folder / "text-bf16.gguf", target, kind.upper())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=LLAMACPP)
    parser.add_argument("--jobs", type=int, default=2)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    llama = source(asked.folder)
    build(llama, asked.folder, asked.jobs)
    convert(llama, engine_checkpoint.build(), asked.folder)


if __name__ == "__main__":
    main()
