"""Loads the compiled modules and remembers why one could not be loaded."""

import importlib.util
import os
from types import ModuleType

import torch

from hico_kernels import ops

MODULES = ("_C_cpu", "_C_cuda", "_host")
reasons: dict[str, str] = {}  # module -> why it is not loaded; absent when it is
loaded: dict[str, ModuleType] = {}
registered: set[tuple[str, str]] = set()  # (operation, "cpu" or "cuda") of all kernels loaded


def _has_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        return False


HAS_TRITON = _has_triton()  # asked once, and without importing it
# Triton's own variable, read when it is imported: kernels run as Python, on tensors of the CPU too.
TRITON_INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "yes", "on"}


def load() -> None:
    """Import every module of MODULES that can be; each registers its kernels with torch."""
    for name in MODULES:
        if name == "_C_cuda" and torch.version.cuda is None:
            reasons[name] = "this torch is a CPU build"
            continue
        try:
            loaded[name] = importlib.import_module(f"hico_kernels.{name}")
        except ModuleNotFoundError:
            reasons[name] = "not built; see Install in README.md"
        except ImportError as e:  # built for something else; why_not() tells those who ask for it
            reasons[name] = f"built, but does not load with torch {torch.__version__}: {e}"
    # Without a tensor nothing tells the dispatcher the device: such a kernel stands for all.
    keys = (("cpu", "CPU"), ("cpu", "CompositeExplicitAutograd"), ("cuda", "CUDA"))
    for operation in ops.SCHEMAS:
        for impl, key in keys:
            if torch._C._dispatch_has_kernel_for_dispatch_key(f"{ops.KERNELS}::{operation}", key):
                registered.add((operation, impl))
