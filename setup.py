"""Builds the CPU kernels (``csrc`` in ``smolvlm_fms/engine/kernels`` and ``smolvlm_fms/processing``) with the plain C
and C++ compilers, without torch's headers.

Everything else about the package is in pyproject.toml. The kernels are optional: without a compiler, or on a platform
that they do not know, the package installs all the same, says so loudly and runs on torch alone.
``SMOLVLM_KERNEL_FLAGS`` adds flags to every compile and link step (scripts/asan-kernels uses it).
"""

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

SOURCES = Path("src/smolvlm_fms/engine/kernels/csrc")
PIXELS = Path("src/smolvlm_fms/processing/csrc/resample.c")
PIXEL_FLAGS = ["-std=c11", "-O3", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
COMMON_FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-g0", "-Wall", "-Wextra"]
# GCC's own AVX-512 headers trip this one.
COMMON_FLAGS += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# What the others are compared with answers alike on every architecture, also where products and sums could be fused.
PORTABLE_FLAGS = ["-ffp-contract=off"]
AVX2_FLAGS = ["-mavx2", "-mfma"]
# GCC's scheduler moves all rows of a tile to its front, and then accumulators no longer fit the registers.
NEON_FLAGS = ["-march=armv8.2-a+bf16+i8mm", "-fno-schedule-insns"]
AVX512_FLAGS = [*AVX2_FLAGS, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "bf16", "vnni"))]


def instruction_sets(machine: str) -> dict[str, list[str]]:
    """Source file to the compiler flags of the instruction set it is written for, on an architecture."""
    every = {"dispatch.cpp": [], "pack.cpp": [], "isa_portable.cpp": PORTABLE_FLAGS}
    if machine.lower() in ("x86_64", "amd64"):
        return every | {"dispatch.cpp": ["-DSVK_X86"], "isa_avx512.cpp": AVX512_FLAGS, "isa_avx2.cpp": AVX2_FLAGS}
    if machine.lower() in ("aarch64", "arm64"):
        return every | {"dispatch.cpp": ["-DSVK_ARM"], "isa_neon.cpp": NEON_FLAGS}
    return every


def pieces(ext: Extension) -> dict[Path, list[str]]:
    """Source file to all its compiler flags. Resizing picks its instruction set by itself (``target_clones``)."""
    if Path(ext.sources[0]) == PIXELS:
        return {PIXELS: PIXEL_FLAGS}
    return {SOURCES / name: [*COMMON_FLAGS, *flags] for name, flags in instruction_sets(platform.machine()).items()}


class BuildKernels(build_ext):
    """One object file for each instruction set, each with its own flags, linked into a library without Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            self.compile_and_link(ext)
        except (CCompilerError, ExecError, PlatformError, OSError) as error:
            print(
                f"\n*** smolvlm-fms: THE CPU KERNELS WERE NOT BUILT ({error}).\n"
                "*** The package works without them, on torch alone, more slowly. Install a C++17 compiler with\n"
                "*** OpenMP (for instance g++) and reinstall to have them.\n",
                file=sys.stderr,
            )

    def compile_and_link(self, ext: Extension) -> None:
        if sys.platform == "win32":
            raise PlatformError("the kernels need GCC or Clang")
        extra = os.environ.get("SMOLVLM_KERNEL_FLAGS", "").split()
        objects = []
        for source, flags in pieces(ext).items():
            objects += self.compiler.compile(
                [str(source)],
                output_dir=self.build_temp,
                depends=ext.depends,
                extra_postargs=[*flags, *extra],
            )
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.compiler.link_shared_object(
            objects, str(target), extra_postargs=["-fopenmp", *extra], target_lang="c++", build_temp=self.build_temp
        )

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self) -> dict[str, str]:
        return {built: place for built, place in super().get_output_mapping().items() if Path(built).exists()}


if __name__ == "__main__":  # scripts/neon-kernels asks for the flags alone
    setup(
        ext_modules=[
            Extension(
                "smolvlm_fms.engine.kernels.libsvk",
                sources=[str(source) for source in sorted(SOURCES.glob("*.cpp"))],
                depends=[str(header) for header in sorted(SOURCES.glob("*.h"))],  # so that an sdist has them
                language="c++",
                optional=True,
            ),
            Extension("smolvlm_fms.processing.libresample", sources=[str(PIXELS)], optional=True),
        ],
        cmdclass={"build_ext": BuildKernels},
    )
