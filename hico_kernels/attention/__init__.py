"""Attention over packed sequences: the public functions and their checks. Rules are in README.md
beside this file.
"""

from torch import Tensor

from hico_kernels import checks
from hico_kernels.attention import reference as _reference  # noqa: F401  registers the references
from hico_kernels.attention.autograd import RaggedAttention
from hico_kernels.dispatch import overload


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every sequence of a packed batch to itself, in flash-attn's varlen layout.

    q [Sq, H, D], k and v [Sk, Hkv, D] with Hkv dividing H, packed by cu_seqlens_q and
    cu_seqlens_k [B+1] (int32 or int64); max_seqlen_*: host ints, at least the longest
    sequence -> out [Sq, H, D], and with return_lse the log-sum-exp [H, Sq] float32 of the logits
    (not differentiable).

    causal: aligned bottom right, so the last query sees every key. A query that sees no key gives
    zeros and an lse of -inf. scale: 1/sqrt(D) when None. key_bias [Sk] is added to the logits of
    a key in every head and row: log of a merged token's size makes attention proportional (ToMe,
    arXiv 2210.09461, eq. 1). Differentiable in q, k and v. impl: as in `merge_tokens`, and
    "flash" for the kernels of flash-attn or of torch itself (bfloat16 and float16, no key_bias).
    """
    checks.tensor("q", q, "[Sq, H, D]")
    for name, x in (("k", k), ("v", v)):
        checks.tensor(name, x, "[Sk, Hkv, D]")
        checks.same(name, x, "q", q)
        checks.heads(q, name, x)
    if v.shape != k.shape:
        raise ValueError(f"v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    checks.cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
    checks.cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
    checks.same_batch("cu_seqlens_k", cu_seqlens_k, "cu_seqlens_q", cu_seqlens_q)
    checks.integer("max_seqlen_q", max_seqlen_q)
    checks.integer("max_seqlen_k", max_seqlen_k)
    checks.boolean("causal", causal)
    checks.boolean("return_lse", return_lse)
    if key_bias is not None:
        checks.tensor("key_bias", key_bias, "[Sk]")
        checks.same("key_bias", key_bias, "k", k, dtype=False)
        if key_bias.shape[0] != k.shape[0]:
            raise ValueError(f"key_bias must be [{k.shape[0]}], got {tuple(key_bias.shape)}")
        if key_bias.requires_grad:
            raise ValueError("key_bias must not require a gradient: it is a constant of attention")
    scale = checks.scale_of(q, scale)
    rest = (max_seqlen_q, max_seqlen_k, causal, scale, key_bias)
    ends = None if cu_seqlens_k is cu_seqlens_q else cu_seqlens_k
    q, k, v = checks.apart(q, k, v)
    out, lse = RaggedAttention.apply(q, k, v, cu_seqlens_q, ends, rest, impl)
    return (out, lse) if return_lse else out


def ragged_decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    kv_lengths: Tensor,
    *,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention of one new token per sequence over a cache in which every sequence has its own
    length.

    q [B, H, D], k_cache and v_cache [B, L, Hkv, D] with Hkv dividing H, kv_lengths [B] (int32 or
    int64, at most L): entries from kv_lengths[b] on are not read -> [B, H, D]. A length of 0 gives
    zeros. scale: 1/sqrt(D) when None. Not differentiable. impl: as in `ragged_attention`.
    """
    checks.tensor("q", q, "[B, H, D]")
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        checks.tensor(name, x, "[B, L, Hkv, D]")
        checks.same(name, x, "q", q)
        checks.heads(q, name, x)
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must hold {q.shape[0]} sequences like q, got {x.shape[0]}")
    if v_cache.shape != k_cache.shape:
        expected = tuple(k_cache.shape)
        raise ValueError(
            f"v_cache must have the shape of k_cache, {expected}, got {tuple(v_cache.shape)}"
        )
    checks.integers("kv_lengths", kv_lengths, "[B]", q.device)
    if kv_lengths.shape[0] != q.shape[0]:
        raise ValueError(f"kv_lengths must be [{q.shape[0]}], got {tuple(kv_lengths.shape)}")
    scale = checks.scale_of(q, scale)
    run = overload("ragged_decode_attention", impl, q, k_cache, v_cache)
    return run(q.detach(), k_cache.detach(), v_cache.detach(), kv_lengths, scale)
