"""Builds the C++ kernels into one shared library that needs no Python headers, and the wheel for all Python versions.

Everything else about the package is in setup.cfg. Without a C++ compiler the package installs all the same, and its hot
loops are torch operations.
"""

from __future__ import annotations

import os
import platform
import runpy
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.dist import Distribution

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

SOURCES = Path("hvd_compress/kernels/native")
DIGEST = runpy.run_path("hvd_compress/kernels/sources.py")["digest"](SOURCES)
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=off", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wextra"]
LEVELS = {"plain": []}
if platform.machine() in ("x86_64", "AMD64"):
    LEVELS["avx2"] = ["-mavx2", "-mf16c", "-mbmi2"]


class BuildKernels(build_ext):
    """Compiles level.cpp once for each instruction set and links it with api.cpp."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, extension: Extension) -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.unlink(missing_ok=True)
        objects = Path(self.build_temp)
        for folder in (target.parent, objects):
            folder.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX", "c++")
        extra = os.environ.get("CXXFLAGS", "").split()
        compile_ = [compiler, *FLAGS, *extra, "-c"]
        commands = [
            [*compile_, *flags, f"-DHC_LEVEL={level}", SOURCES / "level.cpp", "-o", objects / f"{level}.o"]
            for level, flags in LEVELS.items()
        ]
        known = [f'-DHC_SOURCES="{DIGEST}"', *(["-DHC_AVX2"] if "avx2" in LEVELS else [])]
        commands.append([*compile_, *known, SOURCES / "api.cpp", "-o", objects / "api.o"])
        linked = [objects / f"{name}.o" for name in (*LEVELS, "api")]
        # libstdc++ is there wherever torch is; its static form would ask for a glibc as new as this machine's.
        commands.append([compiler, "-shared", "-static-libgcc", *extra, *linked, "-lm", "-o", f"{target}.new"])
        try:
            for command in commands:
                subprocess.run([str(part) for part in command], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"hvd_compress: no C++ kernels, torch operations take their place: {error}", file=sys.stderr)
            return
        os.replace(f"{target}.new", target)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).exists()]


class PlatformWheel(bdist_wheel):
    """For any Python 3, on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BinaryDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=BinaryDistribution,
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
    ext_modules=[Extension("hvd_compress.kernels._native", [str(SOURCES / "api.cpp")], optional=True)],
)
