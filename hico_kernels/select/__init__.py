"""Choosing visual tokens: scores, top-k, even spacing, gathering. Rules are in README.md beside
this file.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hico_kernels import checks
from hico_kernels.dispatch import overload
from hico_kernels.select import cpu as _cpu  # noqa: F401  registers what is made of other kernels
from hico_kernels.select import reference as _reference  # noqa: F401  registers the references
from hico_kernels.select.autograd import GatherMany, GatherRmsNorm, GatherTokens


def text_guided_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    scale: float | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """How much the text attends to every key: softmax over all keys of the sequence, mean over
    heads and rows.

    q [R, H, D] text rows and k [S, Hkv, D] keys, both with RoPE applied, packed by cu_seqlens_q
    [B+1] and cu_seqlens_k [B+1] (int32 or int64); Hkv divides H -> scores [S] float32 (float64 for
    float64). The scores of a sequence sum to 1; they are 0 where it has no text row. scale:
    1/sqrt(D) when None. Not differentiable. VideoChat-Flash, arXiv 2501.00574, section 3.1. impl:
    as in `merge_tokens`.

    cos and sin [S, D], of any floating dtype: given, k has no RoPE yet and gets it while it is
    read, k * cos + rotate_half(k) * sin with rotate_half(x) = [-x[D/2:], x[:D/2]] as in Qwen2 and
    Llama, in float32 (float64 for float64) and rounded once to the dtype of k. q has RoPE applied
    all the same.
    """
    checks.tensor("q", q, "[R, H, D]")
    checks.tensor("k", k, "[S, Hkv, D]")
    checks.same("k", k, "q", q)
    checks.heads(q, "k", k)
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    checks.same_batch("cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q", cu_seqlens_q)
    scale = checks.scale_of(q, scale)
    arguments = q.detach(), k.detach(), cu_seqlens_q, cu_seqlens_k, scale
    if cos is None and sin is None:
        return overload("text_guided_scores", impl, q, k, cu_seqlens_q, cu_seqlens_k)(*arguments)
    _check_tables(k, cos, sin)
    run = overload("text_guided_scores_rotary", impl, q, k, cu_seqlens_q, cu_seqlens_k, cos, sin)
    return run(*arguments, cos.detach(), sin.detach())


def _check_tables(k: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Rotary tables of the keys."""
    if k.shape[2] % 2:
        raise ValueError(f"k must have an even head width to be rotated, got {k.shape[2]}")
    for name, table in (("cos", cos), ("sin", sin)):
        checks.tensor(name, table, "[S, D]")
        checks.same(name, table, "k", k, dtype=False)
        if table.shape != k.shape[::2]:
            raise ValueError(f"{name} must be {tuple(k.shape[::2])}, got {tuple(table.shape)}")


def select_topk(
    scores: Tensor, cu_seqlens: Tensor, keep: Sequence[int], *, impl: str = "auto"
) -> Tensor:
    """The rows with the largest scores of each sequence, in ascending order.

    scores [S] float32 (or float64), packed by cu_seqlens [B+1]; keep: one host int per sequence,
    at most its length -> rows of `scores` [sum(keep)] int64. A smaller index wins a tie, NaN ranks
    with -inf, below every other score. impl: as in `merge_tokens`.
    """
    checks.tensor("scores", scores, "[S]")
    if scores.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"scores must be float32 or float64, got {scores.dtype}")
    checks.cu_seqlens("cu_seqlens", cu_seqlens, scores.device)
    if not isinstance(keep, list | tuple):
        raise TypeError(f"keep must be a list of ints, got {keep!r}")
    keep = list(keep)
    for count in keep:
        checks.integer("keep", count)
    if len(keep) != cu_seqlens.shape[0] - 1:
        raise ValueError(
            f"keep must have one count for each of {cu_seqlens.shape[0] - 1} sequences, got {keep}"
        )
    if any(count < 0 for count in keep):
        raise ValueError(f"keep must be at least 0 for every sequence, got {keep}")
    run = overload("select_topk", impl, scores, cu_seqlens)
    return run(scores.detach(), cu_seqlens, keep)


def uniform_indices(
    num_tokens: int, keep: int, *, device: torch.device | str = "cpu", impl: str = "auto"
) -> Tensor:
    """`keep` indices at even spacing over `num_tokens`, first and last included.

    Equal to ``torch.linspace(0, num_tokens - 1, keep, dtype=torch.long)`` on the CPU, on every
    device: -> [keep] int64, rising. 0 <= keep <= num_tokens. impl: as in `merge_tokens`.
    """
    checks.integer("num_tokens", num_tokens)
    checks.integer("keep", keep)
    if not 0 <= keep <= num_tokens:
        raise ValueError(f"keep must be in [0, {num_tokens}], the number of tokens, got {keep}")
    device = torch.device(device)
    return overload("uniform_indices", impl, device=device.type)(num_tokens, keep, device)


def gather_tokens(
    x: Tensor,
    index: Tensor,
    *more: Tensor,
    cu_seqlens: Tensor | None = None,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, ...]:
    """Rows of x.

    x [S, C] of any dtype, index [M] int64 in [0, S) -> [M, C] contiguous. Differentiable
    in x. An index outside is an error on the CPU. impl: as in `merge_tokens`.

    more: what else belongs to the rows, such as position ids [S] or rotary tables [S, D]: tensors
    [S, ...] of any real dtype, gathered in the same launch on a GPU. cu_seqlens [B+1] (int32 or
    int64): bounds of the sequences in x, for an index that does not fall; then those of the rows
    that were taken come last, int32 [B+1]. With either the result is a tuple: the rows of x, of
    each of more, and the bounds. Differentiable in every floating tensor of more too.
    """
    checks.tensor("x", x, "[S, C]", floating=False)
    _check_index(index, x)
    if not more and cu_seqlens is None:
        return GatherTokens.apply(x, index, impl)
    for i, t in enumerate(more):
        _check_companion(f"more[{i}]", t, x)
    if cu_seqlens is not None:
        checks.cu_seqlens("cu_seqlens", cu_seqlens, x.device)
    x, index, cu_seqlens, *more = checks.apart(x, index, cu_seqlens, *more)
    return GatherMany.apply(x, index, cu_seqlens, impl, *more)


def _check_companion(name: str, t: Tensor, x: Tensor) -> None:
    """A tensor with something for each row of x."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor [S, ...], got {type(t).__name__}")
    if t.dim() == 0 or t.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must be [{x.shape[0]}, ...], got shape {tuple(t.shape)}")
    if t.is_complex():
        raise TypeError(f"{name} must be real, got {t.dtype}")
    checks.same(name, t, "x", x, dtype=False)


def gather_rms_norm(
    x: Tensor, index: Tensor, weight: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Rows of x, and their RMSNorm: what the layer after a drop adds to, and what it reads.

    x [S, C], index [M] int64 in [0, S), weight [C] of the dtype of x -> rows [M, C] as in
    `gather_tokens`, normed [M, C]. As transformers' RMSNorm (Qwen2, Llama): x / sqrt(mean(x^2) +
    eps) in float32 (float64 for float64), rounded to the dtype of x, times weight, rounded again.
    Differentiable in x and weight. An index outside is an error on the CPU. impl: as in
    `merge_tokens`.
    """
    checks.tensor("x", x, "[S, C]")
    _check_index(index, x)
    checks.channels("weight", weight, x)
    checks.epsilon(eps)
    return GatherRmsNorm.apply(x, index, weight, float(eps), impl)


def _check_index(index: Tensor, x: Tensor) -> None:
    checks.tensor("index", index, "[M]", floating=False)
    if index.dtype != torch.int64:
        raise TypeError(f"index must be int64, got {index.dtype}")
    checks.same("index", index, "x", x, dtype=False)
