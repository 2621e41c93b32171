"""The operations of this folder by flash-attention kernels of other packages, in the layout and by
the rules of README.md: which package is flash_backends.py's answer.

Signatures are those of flash_attn_interface.py and hopper/flash_attn_interface.py in flash-attn 2.7
and later, flash_attn/cute/interface.py, and torch/nn/attention/varlen.py. Of torch the operators
behind `varlen_attn` are called: they have had the same arguments since before 2.11, while
`varlen_attn` itself may choose cuDNN.
"""

import torch
from torch import Tensor

from hico_kernels import flash_backends


def _backend(operation: str, *tensors: Tensor | None):
    """Name and module of the backend of a call."""
    name, reason = flash_backends.serving(operation, *(x for x in tensors if x is not None))
    if name is None:
        raise ValueError(f"{operation} cannot run by flash attention: {reason}")
    return name, flash_backends.load(name)


def _aligned(x: Tensor) -> Tensor:
    """x where rows start at 16 bytes and lie apart, as vector loads and TMA want them; a copy where
    they do not.
    """
    steps = [s for s, n in zip(x.stride(), x.shape, strict=True) if n != 1][:-1]
    if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 8 == 0 for s in steps):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _int32(x: Tensor) -> Tensor:
    return x.to(torch.int32).contiguous()


def _longest(name: str, longest: int, rows: int, sequences: int) -> int:
    """With one query each FlashAttention-2 folds the heads of a group into rows, and then takes it
    for granted that no sequence is empty.
    """
    return max(longest, 2) if name in ("fa2", "torch") and rows != sequences else longest


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
    """q [Sq, H, D], k and v [Sk, G, D] -> out [Sq, H, D], lse [H, Sq]."""
    name, module = _backend("ragged_attention", q, k, v, key_bias)
    rows, heads, _ = q.shape
    sequences = cu_seqlens_q.shape[0] - 1
    if not (rows and k.shape[0] and sequences):
        lse = q.new_full((heads, rows), -torch.inf, dtype=torch.float32)
        return torch.zeros_like(q, memory_format=torch.contiguous_format), lse
    qkv = [_aligned(x) for x in (q, k, v)]
    ends = _int32(cu_seqlens_q), _int32(cu_seqlens_k)
    longest = _longest(name, max_seqlen_q, rows, sequences), max_seqlen_k
    if name == "torch":
        found = module._flash_attention_forward(
            *qkv, *ends, *longest, 0.0, causal, False, scale=scale
        )
    else:
        wanted = {"return_lse" if name == "fa4" else "return_attn_probs": True}
        found = module.flash_attn_varlen_func(
            *qkv,
            cu_seqlens_q=ends[0],
            cu_seqlens_k=ends[1],
            max_seqlen_q=longest[0],
            max_seqlen_k=longest[1],
            softmax_scale=scale,
            causal=causal,
            **wanted,
        )
    out, lse = found[:2]
    # Of a row that sees nothing (out is 0) and of one with a NaN (out is NaN) the lse is infinity
    # in FlashAttention-2 and -infinity in 3 and 4: 0 - inf and NaN - inf are what it should be.
    lse = torch.where(lse.isinf(), out[..., 0].mT.float() - torch.inf, lse)
    return out.contiguous(), lse.contiguous()


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
    """Grad and out [Sq, H, D], lse [H, Sq] -> gradients of q, k and v."""
    name, module = _backend("ragged_attention_backward", q, k, v, key_bias)
    sequences = cu_seqlens_q.shape[0] - 1
    if not (q.shape[0] and k.shape[0] and sequences):
        return tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    given = [_aligned(x) for x in (grad, q, k, v, out)]
    lse = lse.masked_fill(lse.isneginf(), torch.inf).contiguous()  # FlashAttention-2's own mark
    ends = _int32(cu_seqlens_q), _int32(cu_seqlens_k)
    longest = max(max_seqlen_q, 1), max(max_seqlen_k, 1)
    if name == "torch":
        random = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of a dropout that is not
        unused = torch.empty(0, device=q.device)
        found = module._flash_attention_backward(
            *given, lse, *ends, *longest, 0.0, causal, random, unused, scale=scale
        )
        return tuple(x.contiguous() for x in found)
    found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given[1:4])
    module._flash_attn_varlen_backward(
        *given,
        lse,
        *found,
        cu_seqlens_q=ends[0],
        cu_seqlens_k=ends[1],
        max_seqlen_q=longest[0],
        max_seqlen_k=longest[1],
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        deterministic=True,
    )
    return found


def ragged_decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, kv_lengths: Tensor, scale: float
) -> Tensor:
    """q [B, H, D], caches [B, L, G, D], kv_lengths [B] -> [B, H, D]."""
    _, module = _backend("ragged_decode_attention", q, k_cache, v_cache)
    if not (q.shape[0] and k_cache.shape[1]):
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    q, k_cache, v_cache = (_aligned(x) for x in (q, k_cache, v_cache))
    out = module.flash_attn_with_kvcache(
        q[:, None], k_cache, v_cache, cache_seqlens=_int32(kv_lengths), softmax_scale=scale
    )
    return out[:, 0].contiguous()
