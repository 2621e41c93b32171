"""Builds the native extensions. Everything else about the package is in pyproject.toml.

    hico_kernels._C_cpu    always                          CPU kernels, libtorch stable ABI
    hico_kernels._C_cuda   nvcc and a CUDA build of torch  CUDA kernels, libtorch stable ABI
    hico_kernels._host     pybind11                        what needs no tensor

HICO_CUDA=0|1 overrides the choice for _C_cuda (1 compiles and links it for a CPU torch too),
HICO_DEBUG=1 builds -O0 -g, HICO_SANITIZE=1 builds _C_cpu and _host with ASAN and UBSAN. There are
no other switches.
"""

import importlib.util
import os
import re
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent


def find_torch() -> bool:
    """This environment's torch, or under isolation that of the environment we install into."""
    if importlib.util.find_spec("torch") is None:
        sys.path.append(sysconfig.get_path("purelib"))  # last: the isolated setuptools still wins
    return importlib.util.find_spec("torch") is not None


if not find_torch():  # pip asks what the build needs: torch. It calls again once that is there.
    setup(setup_requires=["torch>=2.11"])
    sys.exit(0)

import torch
import torch.utils.cpp_extension as ce

try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError:  # pip brings it; a machine without network may not have it
    Pybind11Extension = None
    print("hico_kernels: pybind11 is not installed: _host is left out")

DEBUG = os.environ.get("HICO_DEBUG") == "1"
SANITIZE = os.environ.get("HICO_SANITIZE") == "1"
CXX = [
    "-std=c++20",
    *(["-O0", "-g"] if DEBUG else ["-O3"]),
    f"-ffile-prefix-map={ROOT}/=",
    "-Wall",
    "-Wextra",
    "-Wno-unused-parameter",
]
STABLE = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]  # use only what torch 2.11 promises to keep
NVCC = [
    "-std=c++20",
    "-O3",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",  # with PTX for cards not named here
    *(f"-gencode=arch=compute_{a},code=sm_{a}" for a in ("90a", "100a")),
    "--expt-relaxed-constexpr",
    "-lineinfo",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
    "-DUSE_CUDA",
]
GUARD = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"] if SANITIZE else []


def sources(folder: str, suffix: str) -> list[str]:
    """Every source below csrc/`folder`, relative to this file."""
    found = glob(f"{ROOT}/csrc/{folder}/**/*{suffix}", recursive=True)
    return sorted(os.path.relpath(f, ROOT) for f in found)


def torch_extension(name: str, files: list[str], *, guard: list[str], include=(), **link):
    """A module of kernels that register themselves with torch when imported."""
    return ce.CppExtension(
        f"hico_kernels.{name}",
        ["csrc/module.cpp", *files],
        include_dirs=[str(ROOT / "csrc"), *include],
        py_limited_api=True,
        extra_compile_args={
            "cxx": [*CXX, *STABLE, *guard, f"-DHICO_MODULE={name}"],
            "nvcc": [*NVCC, *STABLE],
        },
        extra_link_args=guard,
        **link,
    )


def cuda_home() -> str | None:
    """The CUDA toolkit: by CUDA_HOME, where torch finds nvcc, or in the usual place."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # A CPU torch clears its CUDA_HOME; and torch takes the folder above any nvcc for the toolkit.
    for home in [asked] if asked else [ce.CUDA_HOME, ce._find_cuda_home(), "/usr/local/cuda"]:
        if home and Path(home, "include/cuda_runtime.h").exists():
            return home
    return None


def want_cuda(home: str | None) -> bool:
    """Whether to build _C_cuda: by HICO_CUDA, else where the toolkit fits torch's own CUDA."""
    ask = os.environ.get("HICO_CUDA", "auto")
    if ask not in ("0", "1", "auto"):
        raise RuntimeError(f"HICO_CUDA must be 0, 1 or unset, got {ask!r}")
    if ask == "1" and home is None:
        raise RuntimeError("HICO_CUDA=1 needs nvcc: set CUDA_HOME to the toolkit (found none)")
    if ask != "auto" or home is None or torch.version.cuda is None:
        return ask == "1"
    shown = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release (\d+)", shown.stdout)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = f"CUDA {release[1]}" if release else "no working nvcc"
        print(f"hico_kernels: no CUDA kernels: {home} has {found}, torch {torch.version.cuda}")
        return False
    return True


def extensions() -> list:
    """The modules to build here."""
    found = [torch_extension("_C_cpu", sources("cpu", ".cpp"), guard=GUARD)]
    if Pybind11Extension is not None:
        host = Pybind11Extension(
            "hico_kernels._host",
            sources("host", ".cpp"),
            include_dirs=[str(ROOT / "csrc")],
            cxx_std=20,
            extra_compile_args=[*CXX, *GUARD],
            extra_link_args=GUARD,
        )
        found.append(host)
    home = cuda_home()
    if want_cuda(home):
        ce.CUDA_HOME = home
        found.append(
            torch_extension(
                "_C_cuda",
                sources("cuda", ".cu"),
                guard=[],
                include=[f"{home}/include"],
                library_dirs=[f"{home}/lib64"],
                libraries=["cudart"] + ["torch_cuda"] * (torch.version.cuda is not None),
            )
        )
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": ce.BuildExtension})
