"""Stand-ins for packages with flash-attention kernels: they take what the real functions take (the
signatures are those of the sources named in attention/flash.py), keep it, and compute by the
definition. Rows that see nothing get the log-sum-exp that the real ones give.
"""

import inspect
from types import SimpleNamespace

import torch

from hico_kernels.attention.reference import (
    ragged_attention_backward_reference,
    ragged_attention_reference,
    ragged_decode_attention_reference,
)

CALLS: list[tuple[str, dict]] = []  # function and arguments by name, newest last


def kept(function, arguments: inspect.BoundArguments) -> dict:
    arguments.apply_defaults()
    CALLS.append((function, dict(arguments.arguments)))
    for name, x in arguments.arguments.items():
        if isinstance(x, torch.Tensor) and x.dim() >= 3:  # what vector loads and TMA need
            assert x.stride(-1) == 1, name
            assert x.data_ptr() % 16 == 0, name
            steps = zip(x.stride()[:-1], x.shape[:-1], strict=True)
            assert all(s > 0 and s % 8 == 0 for s, n in steps if n != 1), name
        if isinstance(x, torch.Tensor) and not x.is_floating_point() and x.dim() == 1:
            assert name == "rng_state" or (x.dtype == torch.int32 and x.is_contiguous()), name
    return arguments.arguments


def stub(name: str, signature: str, run):
    """A function of this name and signature; `run` gets its arguments by name."""
    parameters = inspect.signature(eval(f"lambda {signature}: 0"))

    def function(*args, **kwargs):
        return run(**kept(name, parameters.bind(*args, **kwargs)))

    function.__signature__ = parameters
    function.__name__ = name
    return function


def forward(blind: float):
    """The forward pass, with `blind` as the lse of rows that see nothing and of those with NaN."""

    def run(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **rest):
        longest = rest["max_seqlen_q"], rest["max_seqlen_k"]
        if longest[0] == 1 and blind == torch.inf:  # heads become rows, without asking
            assert len(q) == len(cu_seqlens_q) - 1
        ends = cu_seqlens_q, cu_seqlens_k
        out, lse = ragged_attention_reference(q, k, v, *ends, *longest, causal, softmax_scale, None)
        lse[lse.isneginf() | lse.isnan()] = blind
        return out, lse

    return run


def fa2(**parts) -> SimpleNamespace:
    """flash_attn/flash_attn_interface.py of flash-attn 2.8."""
    run = forward(torch.inf)

    def varlen(return_attn_probs, **arguments):
        assert return_attn_probs
        return *run(**arguments), None

    def backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, softmax_scale, causal, **rest):
        assert not softmax_lse.isneginf().any()
        lse = softmax_lse.masked_fill(softmax_lse.isposinf(), -torch.inf)
        ends = rest["cu_seqlens_q"], rest["cu_seqlens_k"]
        longest = rest["max_seqlen_q"], rest["max_seqlen_k"]
        grads = ragged_attention_backward_reference(
            dout, q, k, v, out, lse, *ends, *longest, causal, softmax_scale, None
        )
        for to, grad in zip((dq, dk, dv), grads, strict=True):
            to.copy_(grad)
        return torch.empty(0)

    def decode(q, k_cache, v_cache, cache_seqlens, softmax_scale, **rest):
        assert q.shape[1] == 1
        assert all(rest[name] is None for name in ("k", "v", "block_table"))
        return ragged_decode_attention_reference(
            q[:, 0], k_cache, v_cache, cache_seqlens, softmax_scale
        )[:, None]

    functions = {
        "flash_attn_varlen_func": stub(
            "fa2.flash_attn_varlen_func",
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,"
            " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
            " alibi_slopes=None, deterministic=False, return_attn_probs=False, block_table=None",
            varlen,
        ),
        "_flash_attn_varlen_backward": stub(
            "fa2._flash_attn_varlen_backward",
            "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k,"
            " max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, window_size_left,"
            " window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,"
            " zero_tensors=False",
            backward,
        ),
        "flash_attn_with_kvcache": stub(
            "fa2.flash_attn_with_kvcache",
            "q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None,"
            " cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None,"
            " softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,"
            " rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False",
            decode,
        ),
    }
    return SimpleNamespace(**functions | parts)


def fa3() -> SimpleNamespace:
    """hopper/flash_attn_interface.py."""
    run = forward(-torch.inf)

    def varlen(return_attn_probs, **arguments):
        assert return_attn_probs
        return run(**arguments)

    return SimpleNamespace(
        flash_attn_varlen_func=stub(
            "fa3.flash_attn_varlen_func",
            "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None,"
            " seqused_k=None, softmax_scale=None, causal=False, qv=None, q_descale=None,"
            " k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,"
            " softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,"
            " return_attn_probs=False",
            varlen,
        )
    )


def fa4() -> SimpleNamespace:
    """flash_attn/cute/interface.py."""
    run = forward(-torch.inf)

    def varlen(return_lse, **arguments):
        assert return_lse
        return run(**arguments)

    return SimpleNamespace(
        flash_attn_varlen_func=stub(
            "fa4.flash_attn_varlen_func",
            "q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,"
            " seqused_q=None, seqused_k=None, page_table=None, softmax_scale=None, causal=False,"
            " window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,"
            " pack_gqa=None, deterministic=False, return_lse=False",
            varlen,
        )
    )


def torch_ops() -> SimpleNamespace:
    """torch.ops.aten; each call is also made with meta tensors, to the operator there is."""
    run = forward(torch.inf)

    def through_torch(name, arguments):
        meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments.values()]
        getattr(torch.ops.aten, name)(*meta[:-1], scale=meta[-1])

    def forward_op(**a):
        through_torch("_flash_attention_forward", a)
        assert a["dropout_p"] == 0
        assert not a["return_debug_mask"]
        ends = {"cu_seqlens_q": a["cum_seq_q"], "cu_seqlens_k": a["cum_seq_k"]}
        longest = {"max_seqlen_q": a["max_q"], "max_seqlen_k": a["max_k"]}
        qkv = a["query"], a["key"], a["value"]
        rest = {"softmax_scale": a["scale"], "causal": a["is_causal"]}
        return *run(*qkv, **ends, **longest, **rest), None, None, None

    def backward_op(**a):
        through_torch("_flash_attention_backward", a)
        assert torch.are_deterministic_algorithms_enabled()
        given = [a[x] for x in ("grad_out", "query", "key", "value", "out")]
        lse = a["logsumexp"].masked_fill(a["logsumexp"].isposinf(), -torch.inf)
        rest = [a[x] for x in ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "is_causal", "scale")]
        return ragged_attention_backward_reference(*given, lse, *rest, None)

    common = "cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal"
    return SimpleNamespace(
        _flash_attention_forward=stub(
            "torch._flash_attention_forward",
            f"query, key, value, {common}, return_debug_mask, *, scale=None",
            forward_op,
        ),
        _flash_attention_backward=stub(
            "torch._flash_attention_backward",
            "grad_out, query, key, value, out, logsumexp, "
            f"{common}, rng_state, unused, *, scale=None",
            backward_op,
        ),
    )
