"""Flash-attention kernels of other packages: which of them can serve a call here, or why none can.

`dispatch.why_not` asks `serving`, and so does attention/flash.py, which calls them. Nothing is
imported before the first question, and a package that does not load is a reason, not an error.
"""

import functools
import importlib
import inspect
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from hico_kernels.measured import constant

_MULTIPLES_OF_8 = tuple(range(8, 257, 8))
_VARLEN = (
    "cu_seqlens_q",
    "cu_seqlens_k",
    "max_seqlen_q",
    "max_seqlen_k",
    "softmax_scale",
    "causal",
)


class Backend(NamedTuple):
    """A package, and what its kernels take."""

    module: str
    title: str
    majors: tuple[int, ...]  # of the compute capability of GPUs that it has kernels for
    widths: tuple[int, ...]  # of a head
    # operation -> the function that serves it and the parameters that it must have, or why none
    functions: dict[str, tuple[str, tuple[str, ...]] | str]


_ANY_ORDER = "adds up gradients in no fixed order"
_WHOLE_TILES = "loads whole tiles of a cache, so also what lies behind a length"  # issue 1745
# Best first, by what others measured on H100: 2 has about half the FLOP/s of 3 and 4.
BACKENDS = {
    "fa3": Backend(
        "flash_attn_interface",
        "FlashAttention-3",
        (9,),
        _MULTIPLES_OF_8,
        {
            "ragged_attention": ("flash_attn_varlen_func", (*_VARLEN, "return_attn_probs")),
            "ragged_attention_backward": _ANY_ORDER,
            "ragged_decode_attention": _WHOLE_TILES,
        },
    ),
    "fa4": Backend(
        "flash_attn.cute",
        "FlashAttention-4",
        (9, 10),
        (64, 96, 128),
        {
            "ragged_attention": ("flash_attn_varlen_func", (*_VARLEN, "return_lse")),
            "ragged_attention_backward": _ANY_ORDER,
            "ragged_decode_attention": "has no function for a cache",
        },
    ),
    "fa2": Backend(
        "flash_attn.flash_attn_interface",
        "FlashAttention-2",
        (8, 9, 10, 12),
        _MULTIPLES_OF_8,
        {
            "ragged_attention": ("flash_attn_varlen_func", (*_VARLEN, "return_attn_probs")),
            "ragged_attention_backward": (
                "_flash_attn_varlen_backward",
                (*_VARLEN, "window_size_left", "window_size_right", "softcap", "deterministic"),
            ),
            "ragged_decode_attention": (
                "flash_attn_with_kvcache",
                ("cache_seqlens", "softmax_scale"),
            ),
        },
    ),
    "torch": Backend(
        "torch.ops.aten",
        "torch's FlashAttention-2",
        (8, 9, 10, 12),
        _MULTIPLES_OF_8,
        {
            "ragged_attention": ("_flash_attention_forward", ()),
            "ragged_attention_backward": ("_flash_attention_backward", ()),
            "ragged_decode_attention": "does not split a cache among programs",
        },
    ),
}
OPERATIONS = tuple(BACKENDS["fa2"].functions)


@functools.cache
def load(name: str) -> ModuleType | str:
    """The module of a backend, or why it is not here."""
    module = BACKENDS[name].module
    if name == "torch":
        if torch.backends.cuda.is_flash_attention_available() and torch.version.cuda:
            return torch.ops.aten
        return "is not built with flash attention"
    try:
        return importlib.import_module(module)
    except Exception as e:  # not here, built for another torch, or without what it needs
        if isinstance(e, ModuleNotFoundError) and module.startswith(e.name or module):
            return "is not installed"
        return f"does not load: {type(e).__name__}: {e}"


def _major(index: int | None) -> int | None:
    """Of the compute capability of a CUDA device; None where there is no device to ask."""
    return torch.cuda.get_device_capability(index)[0] if torch.cuda.is_available() else None


def _lacks(name: str, operation: str, index: int | None) -> str | None:
    """Why a backend serves no call of an operation on a device."""
    backend, module = BACKENDS[name], load(name)
    if isinstance(module, str):
        return f"{backend.title} ({backend.module}) {module}"
    function = backend.functions[operation]
    if isinstance(function, str):
        return f"{backend.title} {function}"
    if index is not None and _major(index) not in backend.majors:
        return f"{backend.title} has no kernels for this GPU"
    missing = [p for p in function[1] if not _takes(getattr(module, function[0], None), p)]
    if missing:
        return f"{backend.title} is of another version: {function[0]} takes no {missing[0]}"
    return None


def _takes(function, parameter: str) -> bool:
    if function is None:
        return False
    known = inspect.signature(getattr(function, "_init_fn", function)).parameters  # custom_op's
    return parameter in known or any(p.kind is p.VAR_KEYWORD for p in known.values())


@functools.cache
def _known(operation: str, index: int | None) -> tuple[tuple[str, ...], str]:
    """Backends that serve an operation on a device, best first, and what is said where none do."""
    reasons = {name: _lacks(name, operation, index) for name in BACKENDS}
    names = tuple(name for name, reason in reasons.items() if reason is None)
    return names, "; ".join(reason for reason in reasons.values() if reason)


@constant  # imports cannot be traced, and do not change
def _names(operation: str, index: int | None) -> tuple[str, ...]:
    return _known(operation, index)[0]


@constant
def _reason(operation: str, index: int | None) -> str:
    return _known(operation, index)[1]


@constant
def _warn_only() -> bool:
    return torch.is_deterministic_algorithms_warn_only_enabled()


def serving(operation: str, *tensors: Tensor) -> tuple[str | None, str]:
    """The backend that serves a call with these tensors, or None and why.

    Without tensors, the best one of this installation on any GPU.
    """
    index = tensors[0].device.index if tensors else None
    names = _names(operation, index)
    if not names:
        return None, _reason(operation, index)
    if not tensors:
        return names[0], ""
    for x in tensors:
        if x.dim() == 1 and x.is_floating_point():
            return None, "flash attention takes no key_bias"
    width = tensors[0].shape[-1]
    reason = ""
    for name in names:
        backend = BACKENDS[name]
        if width not in backend.widths:
            allowed = "a multiple of 8 up to 256" if len(backend.widths) > 3 else backend.widths
            reason = f"{backend.title} takes heads of width {allowed}, got {width}"
        elif name == "torch" and operation == "ragged_attention_backward" and not _ordered():
            reason = f"{backend.title} {_ANY_ORDER} unless torch.use_deterministic_algorithms(True)"
        else:
            return name, ""
    return None, reason


def _ordered() -> bool:
    """Whether torch's gradients are the same bits every time."""
    return torch.are_deterministic_algorithms_enabled() and not _warn_only()
