"""In which order "auto" tries the implementations of an operation on a GPU.

measured.json, written by `make report` from bench/results, has the order on every kind of GPU that
was measured, by compute capability. It is empty as long as none was.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FILE = Path(__file__).with_name("measured.json")
# On a GPU of a kind that was not measured. Flash attention comes first there because others have
# measured it on many GPUs and our kernels on none; a CUDA kernel before Triton's because its first
# call does not wait for a compiler.
UNMEASURED = ("cuda", "triton")
UNMEASURED_ATTENTION = ("flash", "triton")
_ATTENTION = ("ragged_attention", "ragged_attention_backward", "ragged_decode_attention")


def constant(function: Callable) -> Callable:
    """torch.compile calls it and keeps the result. As torch.compiler.assume_constant_result, which
    would import Dynamo, and Triton with it, at every `import hico_kernels`.
    """
    function._dynamo_marked_constant = True
    return function


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """Compute capability, such as "9.0" -> device, date, commit, and order: operation ->
    implementations, fastest first.
    """
    return json.loads(FILE.read_text())


@functools.cache
def capability(index: int | None) -> str:
    """Of a CUDA device, the current one for None; "none" where there is no device."""
    if not torch.cuda.is_available():
        return "none"
    return "{}.{}".format(*torch.cuda.get_device_capability(index))


@constant  # reads a file and asks a device: neither can be traced
def order(operation: str, index: int | None) -> tuple[str, ...]:
    """What "auto" tries on a CUDA device, in turn: what was measured there, then the rest."""
    first = table().get(capability(index), {}).get("order", {}).get(operation, ())
    rest = UNMEASURED_ATTENTION if operation in _ATTENTION else UNMEASURED
    return (*first, *(impl for impl in rest if impl not in first))


def source(index: int | None) -> str:
    """Where the order on a CUDA device comes from."""
    found = table().get(capability(index))
    if found is None:
        return (
            f"not measured on such a GPU: attention {', then '.join(UNMEASURED_ATTENTION)}; "
            f"all else {', then '.join(UNMEASURED)}"
        )
    return f"measured on {found['device']}, {found['date']}, commit {found['commit']}"
