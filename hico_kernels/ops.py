"""The op table: every schema and shape rule of hico_kernels on one page, without kernels.

Each operation is declared four times with one schema and one fake: ``hico::name`` takes the
kernels of csrc/cpu (CPU; a few are made of others, in cpu.py) and csrc/cuda (CUDA),
``hico_reference::name`` the plain-torch definition from the operation's reference.py, on any
device, ``hico_triton::name`` the Triton kernels of triton.py beside it, ``hico_flash::name`` other
packages' kernels by flash.py beside it, which only attention has. So all are opaque to
torch.compile and traced by the same shape rule. Importing this needs only torch.

Dimension letters: N clips, T tokens of a clip, K tokens kept, C channels; S packed rows, R text
rows, H heads, Hkv key/value heads, D head width, B sequences.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

KERNELS, REFERENCE, TRITON, FLASH = "hico", "hico_reference", "hico_triton", "hico_flash"
NAMESPACES = KERNELS, REFERENCE, TRITON, FLASH
SCHEMAS: dict[str, str] = {}  # operation -> schema without the name


def _op(schema: str) -> Callable:
    """Declare the operation named like the decorated fake in every namespace."""

    def declare(fake: Callable) -> Callable:
        name = fake.__name__
        SCHEMAS[name] = schema
        for namespace in NAMESPACES:
            torch.library.define(
                f"{namespace}::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,)
            )
            torch.library.register_fake(f"{namespace}::{name}", fake)
        return fake

    return declare


def register_reference(reference: Callable) -> Callable:
    """Make `<operation>_reference` the implementation of ``hico_reference::<operation>``, and
    `<operation>` of triton.py and flash.py in the same folder that of ``hico_triton::<operation>``
    and ``hico_flash::<operation>``.
    """
    name = reference.__name__.removesuffix("_reference")
    folder = reference.__module__.removesuffix(".reference")
    _register_later(f"{TRITON}::{name}", f"{folder}.triton")
    _register_later(f"{FLASH}::{name}", f"{folder}.flash")

    run = _in_given_precision(reference)
    torch.library.impl(f"{REFERENCE}::{name}", "CompositeExplicitAutograd")(run)
    return reference


def register_cpu(composition: Callable) -> Callable:
    """Make `<operation>_cpu`, plain torch around kernels of csrc/cpu, the implementation of
    ``hico::<operation>`` on the CPU.
    """
    name = composition.__name__.removesuffix("_cpu")

    torch.library.impl(f"{KERNELS}::{name}", "CPU")(_in_given_precision(composition))
    return composition


def _in_given_precision(function: Callable) -> Callable:
    """Without autocast: the precision is part of the definition."""

    @functools.wraps(function)
    def run(*arguments):
        tensors = (x for x in arguments if isinstance(x, Tensor))
        device = next((x.device.type for x in tensors), "cpu")
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


def _register_later(name: str, module: str) -> None:
    """`module` is imported by the first call: Triton costs a second, and may not be there."""

    def launch(*arguments):
        run = getattr(importlib.import_module(module), name.partition("::")[2])
        given = (x.device if isinstance(x, Tensor) else x for x in arguments)
        device = next(x for x in given if isinstance(x, torch.device))
        if device.type != "cuda":  # interpreted
            return run(*arguments)
        with torch.cuda.device(device):  # Triton launches on the current one
            return run(*arguments)

    torch.library.impl(name, "CompositeExplicitAutograd")(launch)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# --- merging


@_op(
    "(Tensor x, SymInt num_tokens, SymInt num_heads, Tensor? metric=None)"
    " -> (Tensor, Tensor, Tensor)"
)
def merge_tokens(
    x: Tensor, num_tokens: int, num_heads: int, metric: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, T, C], metric [N, T, D] -> tokens [N, K, C], int32 sizes [N, K], assignment [N, T]."""
    n, t, c = x.shape
    return (
        x.new_empty(n, num_tokens, c),
        x.new_empty(n, num_tokens, dtype=torch.int32),
        x.new_empty(n, t, dtype=torch.int32),
    )


@_op("(Tensor metric, SymInt r, bool class_token, bool distill_token) -> Tensor")
def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool, distill_token: bool
) -> Tensor:
    """Metric [N, T, D] -> assignment [N, T] int32 with values below T - r."""
    return metric.new_empty(metric.shape[:2], dtype=torch.int32)


@_op("(Tensor x, Tensor assignment, SymInt num_tokens, Tensor? sizes) -> (Tensor, Tensor)")
def merge_apply(
    x: Tensor, assignment: Tensor, num_tokens: int, sizes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """x [N, T, C], assignment [N, T], sizes [N, T] -> tokens [N, K, C], sizes [N, K]."""
    n, _, c = x.shape
    dtype = torch.int32 if sizes is None else sizes.dtype
    return x.new_empty(n, num_tokens, c), x.new_empty(n, num_tokens, dtype=dtype)


@_op(
    "(Tensor x, Tensor metric, SymInt r, Tensor? sizes, Tensor? other, SymInt front,"
    " bool class_token, bool distill_token, bool spatial)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def merge_similar(
    x: Tensor,
    metric: Tensor,
    r: int,
    sizes: Tensor | None,
    other: Tensor | None,
    front: int,
    class_token: bool,
    distill_token: bool,
    spatial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x [N, T, C], metric [N, T, D], sizes [N, T], other [N, T, E] -> tokens [N, K, C], sizes
    [N, K], int32 assignment [N, T] and places [N, K], other [N, K, E] or [0]; K = T - r.
    """
    n, t, c = x.shape
    return (
        x.new_empty(n, t - r, c),
        x.new_empty(n, t - r, dtype=torch.int32 if sizes is None else sizes.dtype),
        x.new_empty(n, t, dtype=torch.int32),
        x.new_empty(n, t - r, dtype=torch.int32),
        x.new_empty(0) if other is None else other.new_empty(n, t - r, other.shape[2]),
    )


@_op("(Tensor grad, Tensor assignment, Tensor merged_sizes, Tensor? sizes) -> Tensor")
def merge_backward(
    grad: Tensor, assignment: Tensor, merged_sizes: Tensor, sizes: Tensor | None
) -> Tensor:
    """Grad [N, K, C] -> gradient of x [N, T, C]."""
    return grad.new_empty(*assignment.shape, grad.shape[2])


@_op("(Tensor x, Tensor weight, Tensor bias, float eps, SymInt num_heads) -> (Tensor, Tensor)")
def layer_norm_metric(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int
) -> tuple[Tensor, Tensor]:
    """x [N, T, C], weight and bias [C] -> y [N, T, C], metric [N, T, C / num_heads]."""
    n, t, c = x.shape
    return x.new_empty(n, t, c), x.new_empty(n, t, c // num_heads, dtype=_wide_dtype(x))


@_op("(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)")
def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad and x [N, T, C], weight [C] -> gradients of x, weight and bias."""
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


# --- selection


@_op("(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale) -> Tensor")
def text_guided_scores(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, scale: float
) -> Tensor:
    """q [R, H, D], k [S, Hkv, D] -> [S]."""
    return k.new_empty(k.shape[0], dtype=_wide_dtype(q))


@_op(
    "(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale, Tensor cos,"
    " Tensor sin) -> Tensor"
)
def text_guided_scores_rotary(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """The same for keys without rotary positions: cos and sin [S, D]."""
    return k.new_empty(k.shape[0], dtype=_wide_dtype(q))


@_op("(Tensor scores, Tensor cu_seqlens, SymInt[] keep) -> Tensor")
def select_topk(scores: Tensor, cu_seqlens: Tensor, keep: list[int]) -> Tensor:
    """Scores [S] -> [sum(keep)] int64."""
    return scores.new_empty(sum(keep), dtype=torch.int64)


@_op("(SymInt num_tokens, SymInt keep, Device device) -> Tensor")
def uniform_indices(num_tokens: int, keep: int, device: torch.device) -> Tensor:
    """Two host ints -> [keep] int64."""
    return torch.empty(keep, dtype=torch.int64, device=device)


@_op("(Tensor x, Tensor index) -> Tensor")
def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x [S, C], index [M] -> [M, C]."""
    return x.new_empty(index.shape[0], x.shape[1])


@_op("(Tensor x, Tensor index, Tensor[] more, Tensor? cu_seqlens) -> Tensor[]")
def gather_many(
    x: Tensor, index: Tensor, more: list[Tensor], cu_seqlens: Tensor | None
) -> list[Tensor]:
    """x and each of more [S, ...] -> [M, ...]; and cu_seqlens [B+1] -> int32 [B+1]."""
    rows = [t.new_empty(index.shape[0], *t.shape[1:]) for t in (x, *more)]
    if cu_seqlens is not None:
        rows.append(cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int32))
    return rows


@_op("(Tensor grad, Tensor index, SymInt num_rows) -> Tensor")
def gather_tokens_backward(grad: Tensor, index: Tensor, num_rows: int) -> Tensor:
    """Grad [M, C], index [M] -> [S, C]."""
    return grad.new_empty(num_rows, grad.shape[1])


@_op("(Tensor x, Tensor index, Tensor weight, float eps) -> (Tensor, Tensor)")
def gather_rms_norm(x: Tensor, index: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [S, C], index [M], weight [C] -> rows [M, C], and the same normalised."""
    rows = x.new_empty(index.shape[0], x.shape[1])
    return rows, torch.empty_like(rows)


@_op(
    "(Tensor grad_rows, Tensor grad_normed, Tensor rows, Tensor weight, float eps)"
    " -> (Tensor, Tensor)"
)
def rms_norm_backward(
    grad_rows: Tensor, grad_normed: Tensor, rows: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of rows and of their norm [M, C] -> of rows with both [M, C], of weight [C]."""
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


# --- attention


@_op(
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q,"
    " SymInt max_seqlen_k, bool causal, float scale, Tensor? key_bias) -> (Tensor, Tensor)"
)
def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q [Sq, H, D], k and v [Sk, Hkv, D] -> out [Sq, H, D], lse [H, Sq]."""
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=_wide_dtype(q))


@_op(
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale,"
    " Tensor? key_bias) -> (Tensor, Tensor, Tensor)"
)
def ragged_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    scale: float,
    key_bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@_op("(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lengths, float scale) -> Tensor")
def ragged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_lengths: Tensor, scale: float
) -> Tensor:
    """q [B, H, D], caches [B, L, Hkv, D], kv_lengths [B] -> [B, H, D]."""
    return q.new_empty(q.shape)


# --- for tests: the machine code of the CPU kernels. A name forces it, "best" undoes that, "" asks.
torch.library.define(f"{KERNELS}::use_cpu_path", "(str force) -> str")
