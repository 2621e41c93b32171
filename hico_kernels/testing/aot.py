"""Compiles what the Triton implementations launch, without a GPU: ``python -m
hico_kernels.testing.aot`` prints JSON with the resources of every kernel; with numbers such
as 90 behind it only for those architectures.

The functions of triton.py run on tensors of real shapes (aot_cases.py); Triton sees a driver that
knows an architecture and nothing else, and compiles each launch instead of making it. So block
sizes, warps and specialisation are those that a GPU would get. Not for use under TRITON_INTERPRET.
"""

import argparse
import ast
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Container, Iterable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from hico_kernels import dispatch, ops
from hico_kernels.testing.aot_cases import cases
from hico_kernels.testing.specs import SPECS

PACKAGE = Path(__file__).resolve().parents[1]
TARGETS = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}  # and their matrix product
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a program may have
DTYPES = {  # each kernel for sm_90 in all; elsewhere it differs in the instructions only
    80: (torch.bfloat16,),
    90: (torch.bfloat16, torch.float32),
    100: (torch.bfloat16,),
}
SMALL_LOAD = re.compile(r"ld\.global(?!\S*\.v[248]\.)\S*\.[bu]16\s")  # value by value
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


class Architecture:
    """What Triton asks its driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self) -> GPUTarget:  # noqa: D102
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """The key of Triton's caches."""
        return self.capability

    def get_current_stream(self, device: int) -> int:  # noqa: D102
        return 0


def kernels() -> list[JITFunction]:
    """Every kernel of the package; not the functions that only kernels call."""
    found = []
    for file in sorted(PACKAGE.glob("*/triton*.py")):
        name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)
        members = vars(importlib.import_module(name)).values()
        found += [f for f in members if isinstance(f, JITFunction) and f.__module__ == name]
    called = {
        node.func.id
        for f in found
        for node in ast.walk(f.parse())
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return [f for f in found if f.__name__ not in called]


def implementation(operation: str):
    """The function that launches the kernels of an operation."""
    names = (f"hico_kernels.{f.parent.name}.triton" for f in PACKAGE.glob("*/triton.py"))
    for module in map(importlib.import_module, names):
        if hasattr(module, operation):
            return getattr(module, operation)
    raise LookupError(f"no triton.py has a function {operation}")


def _resources(compiled) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    return {key.lower(): int(value) for key, value in numbers.items()}


def _row(kernel: JITFunction, compiled, capability: int, operation: str, dtype) -> dict:
    dots = re.findall(r"tt\.dot\b.*", compiled.asm["ttir"])
    exact = [dot for dot in dots if re.search(r"xf32[,>].*\*", dot) and "tf32" not in dot]
    return {
        "kernel": f"{kernel.__module__}.{kernel.__name__}",
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "capability": capability,
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED[capability],
        "dots": len(dots) - len(exact),  # that are meant for the matrix units
        "matrix_products": compiled.asm["ptx"].count(TARGETS[capability]),
        "small_matrix_products": compiled.asm["ptx"].count(TARGETS[80]),
        "loads_of_2_bytes": len(SMALL_LOAD.findall(compiled.asm["ptx"])),
        **_resources(compiled),
    }


def compile_all(capabilities: Iterable[int], dtypes: Container[torch.dtype]) -> list[dict]:
    """A row for each kernel, architecture, dtype and set of block sizes."""
    rows, seen, now = [], set(), None
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup=False, **kwargs):
        compiled = run(self, *args, grid=grid, warmup=True, **kwargs)
        key = (now[0], compiled.hash)
        if key not in seen:
            seen.add(key)
            rows.append(_row(self, compiled, *now))
        return compiled

    JITFunction.run = compile_only
    for capability in capabilities:
        driver.set_active(Architecture(capability))
        for operation in ops.SCHEMAS:
            if not dispatch.has_implementation(operation, "triton"):
                continue
            for dtype in filter(dtypes.__contains__, DTYPES[capability]):
                for sample in cases(operation, dtype):
                    now = (capability, operation, dtype)
                    implementation(operation)(*SPECS[operation].arguments(sample))
    JITFunction.run = run
    return rows


def main() -> int:
    """Print what was compiled, and the kernels that nothing launched."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("capabilities", nargs="*", type=int, help="80, 90, 100; default: all")
    parser.add_argument("--bfloat16", action="store_true", help="in this dtype alone")
    asked = parser.parse_args()
    dtypes = (torch.bfloat16,) if asked.bfloat16 else (torch.bfloat16, torch.float32)
    rows = compile_all(asked.capabilities or DTYPES, dtypes)
    launched = {row["kernel"] for row in rows}
    missing = [f"{f.__module__}.{f.__name__}" for f in kernels()]
    found = {"triton": triton.__version__, "rows": rows}
    json.dump(found | {"not_launched": sorted({*missing} - launched)}, sys.stdout, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
