"""Which implementation of an operation runs, or why one cannot: a single predicate for all of
them.
"""

import warnings

import torch
from torch import Tensor

from hico_kernels import flash_backends, measured, native, ops

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda", "flash")
# of the others: ops.KERNELS
_NAMESPACE = {"reference": ops.REFERENCE, "triton": ops.TRITON, "flash": ops.FLASH}
_DEVICE = {"cpu": "cpu", "triton": "cuda", "cuda": "cuda", "flash": "cuda"}
_NARROW = frozenset({torch.float32, torch.bfloat16})
_GPU = frozenset({torch.float32, torch.bfloat16, torch.float16})
_HALF = frozenset({torch.bfloat16, torch.float16})
_ANY = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})

# What exists: (operation, implementation) -> dtypes of its first tensor. The rest has none.
_DTYPES = {
    ("gather_many", "cpu"): _ANY,
    ("gather_many", "triton"): _ANY,
    ("gather_rms_norm", "cpu"): _ANY,
    ("gather_rms_norm", "triton"): _GPU,
    ("gather_tokens", "cpu"): _ANY,
    ("gather_tokens", "cuda"): _ANY,
    ("gather_tokens", "triton"): _ANY,
    ("gather_tokens_backward", "cpu"): _NARROW,
    ("gather_tokens_backward", "triton"): _ANY,
    ("bipartite_soft_matching", "cpu"): _NARROW,
    ("bipartite_soft_matching", "triton"): _GPU,
    ("layer_norm_backward", "cpu"): _ANY,
    ("layer_norm_backward", "triton"): _GPU,
    ("layer_norm_metric", "cpu"): _ANY,
    ("layer_norm_metric", "triton"): _GPU,
    ("merge_apply", "cpu"): _NARROW,
    ("merge_apply", "triton"): _GPU,
    ("merge_backward", "cpu"): _NARROW,
    ("merge_backward", "triton"): _GPU,
    ("merge_similar", "cpu"): _NARROW,
    ("merge_similar", "triton"): _GPU,
    ("merge_tokens", "cpu"): _NARROW,
    ("merge_tokens", "triton"): _GPU,
    ("ragged_attention", "cpu"): _NARROW,
    ("ragged_attention", "triton"): _GPU,
    ("ragged_attention", "flash"): _HALF,
    ("ragged_attention_backward", "cpu"): _NARROW,
    ("ragged_attention_backward", "triton"): _GPU,
    ("ragged_attention_backward", "flash"): _HALF,
    ("ragged_decode_attention", "cpu"): _NARROW,
    ("ragged_decode_attention", "triton"): _GPU,
    ("ragged_decode_attention", "flash"): _HALF,
    ("rms_norm_backward", "cpu"): _ANY,
    ("rms_norm_backward", "triton"): _GPU,
    ("select_topk", "cpu"): frozenset({torch.float32}),
    ("select_topk", "triton"): frozenset({torch.float32}),
    ("text_guided_scores", "cpu"): _NARROW,
    ("text_guided_scores", "triton"): _GPU,
    ("text_guided_scores_rotary", "cpu"): _NARROW,
    ("text_guided_scores_rotary", "triton"): _GPU,
    ("uniform_indices", "cpu"): _ANY,
    ("uniform_indices", "triton"): _ANY,
}
# Kernels that read every tensor as float32, and keep the dtype of one that is not the first.
_CUT = frozenset({("merge_similar", "triton")})
_OVERLOADS = {
    (namespace, name): getattr(getattr(torch.ops, namespace), name).default
    for namespace in ops.NAMESPACES
    for name in ops.SCHEMAS
}  # bound once: a lookup in torch.ops on every call costs up to a microsecond
_warned: set[str] = set()  # operations


def has_implementation(operation: str, impl: str) -> bool:
    """Whether this version has the implementation at all, on some machine."""
    return impl == "reference" or (operation, impl) in _DTYPES


def namespace(impl: str) -> str:
    """The namespace of the operators of an implementation."""
    return _NAMESPACE.get(impl, ops.KERNELS)


def _not_loaded(operation: str, impl: str) -> str | None:
    """Why this installation has no such kernel."""
    if impl == "triton":
        return None if native.HAS_TRITON else "triton is not installed"
    if impl == "flash":
        return flash_backends.serving(operation)[1] or None
    module = f"_C_{impl}"
    if module in native.reasons:
        return f"hico_kernels.{module}: {native.reasons[module]}"
    if (operation, impl) not in native.registered:
        return f"hico_kernels.{module} was built from other sources: build it again"
    return None


def why_not(operation: str, impl: str, *tensors: Tensor, device: str | None = None) -> str | None:
    """Why `impl` cannot run `operation`; None when it can.

    tensors: the tensors of the call, the one whose dtype counts first. device: the device type of a
    call without any. Without either, the answer is about this installation only. Raises ValueError
    for an operation or implementation that does not exist.
    """
    if operation not in ops.SCHEMAS:
        raise ValueError(f"operation must be one of {', '.join(ops.SCHEMAS)}, got {operation!r}")
    if impl != "auto" and impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl must be 'auto' or one of {IMPLEMENTATIONS}, got {impl!r}")
    if impl in ("auto", "reference"):
        return None
    if not has_implementation(operation, impl):
        return f"{operation} has no {impl} implementation in this version"
    if reason := _not_loaded(operation, impl):
        return reason
    devices = [x.device.type for x in tensors] + ([device] if device else [])
    interpreted = impl == "triton" and native.TRITON_INTERPRETED
    wanted = _DEVICE[impl]
    if wanted == "cuda" and not (devices or interpreted or torch.cuda.is_available()):
        return "torch sees no CUDA device here"
    for found in devices:
        if found != wanted and not (interpreted and found == "cpu"):
            return f"tensors must be on {wanted}, got {found}"
    if tensors and tensors[0].dtype not in _DTYPES[operation, impl]:
        allowed = ", ".join(sorted(str(d).removeprefix("torch.") for d in _DTYPES[operation, impl]))
        return f"dtype must be one of {allowed}, got {tensors[0].dtype}"
    if (operation, impl) in _CUT and any(x.dtype == torch.float64 for x in tensors):
        return "every tensor is read as float32, got one of float64"
    if tensors and impl == "flash":
        return flash_backends.serving(operation, *tensors)[1] or None
    return None


def overload(operation: str, impl: str, *tensors: Tensor, device: str | None = None):
    """The registered operator to call. "auto" takes the best that can run, else the reference.

    device: the device type where there is no tensor to tell it. Raises ValueError with the reason
    when an implementation that was asked for cannot run; nothing ever falls back from one.
    """
    if impl == "auto":
        impl = _best(operation, device or tensors[0].device.type, tensors)
    elif reason := why_not(operation, impl, *tensors, device=device):
        raise ValueError(f"{operation}(impl={impl!r}) cannot run: {reason}")
    return _OVERLOADS[namespace(impl), operation]


def backward_overload(operation: str, impl: str, *tensors: Tensor):
    """The operator of a gradient: of the implementation that its forward pass was asked for where
    there is one that can run, else of the best.
    """
    own = why_not(operation, impl, *tensors) is None
    return overload(operation, impl if own else "auto", *tensors)


def _order(operation: str, device: str, tensors: tuple[Tensor, ...]) -> tuple[str, ...]:
    """What "auto" tries on a device, in turn, before the reference."""
    if device == "cuda":
        return measured.order(operation, tensors[0].device.index if tensors else None)
    return ("cpu",) if device == "cpu" else ()


def _best(operation: str, device: str, tensors: tuple[Tensor, ...]) -> str:
    reasons = []
    for impl in _order(operation, device, tensors):
        reason = why_not(operation, impl, *tensors, device=device)
        if reason is None:
            return impl
        if has_implementation(operation, impl):
            reasons.append(f"{impl}: {reason}")
    told = operation in _warned or torch.compiler.is_compiling()
    if device == "cuda" and reasons and not told:
        _warned.add(operation)
        message = f"{operation} runs as plain torch on this GPU ({'; '.join(reasons)})"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return "reference"
