"""What the contracts do not ask of the Triton kernels for attention: tiles of the sizes that a GPU
gets, lengths that are wrong, what cancels, parts of a cache. Run by Triton's interpreter.
"""

import os

import pytest
import torch

from hico_kernels.attention.reference import (
    ragged_attention_backward_reference,
    ragged_attention_reference,
    ragged_decode_attention_reference,
)
from hico_kernels.testing import assert_same_bits, assert_within_budget, cu_seqlens

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from hico_kernels.attention import triton as kernels
from hico_kernels.attention import triton_decode

HALF = (torch.float16, torch.bfloat16)


def packed(rows, keys, heads, groups, width, dtype):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q = normal(sum(rows), heads, width)
    k, v = normal(sum(keys), groups, width), normal(sum(keys), groups, width)
    return q, k, v, cu_seqlens(rows), cu_seqlens(keys), max(rows), max(keys)


def wide(arguments):
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
            for x in arguments]  # fmt: skip


def check(kernel, reference, arguments):
    results = kernel(*arguments), reference(*wide(arguments)), reference(*arguments)
    if isinstance(results[0], torch.Tensor):
        results = [(x,) for x in results]
    for i, (actual, exact, plain) in enumerate(zip(*results, strict=True)):
        assert_within_budget(actual, exact, plain, f"{kernel.__name__} output {i}")


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("width", [72, 80, 96, 192, 256])
def test_every_width_of_a_head(width, dtype):
    arguments = *packed((70, 3), (75, 130), 2, 1, width, dtype), True, width**-0.5, None
    check(kernels.ragged_attention, ragged_attention_reference, arguments)
    q, k, v, *rest = arguments
    saved = ragged_attention_reference(*arguments)
    grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    dq, dk, dv = kernels.ragged_attention_backward(grad, q, k, v, *saved, *rest)
    exact = ragged_attention_backward_reference(*wide((grad, q, k, v, *saved, *rest)))
    plain = ragged_attention_backward_reference(grad, q, k, v, *saved, *rest)
    for name, *three in zip(("dq", "dk", "dv"), (dq, dk, dv), exact, plain, strict=True):
        assert_within_budget(*three, name)
    cache = torch.stack([k[:75], v[:75]])  # two sequences, whose rows of the same kind differ
    arguments = q[:2], cache, cache.flip(0), torch.tensor([75, 9]), width**-0.5
    check(kernels.ragged_decode_attention, ragged_decode_attention_reference, arguments)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_at_every_offset_of_the_diagonal(causal):
    """Lengths around the sizes of tiles, more and fewer queries than keys."""
    rows, keys = (127, 128, 129, 64, 1, 128), (128, 127, 65, 200, 129, 129)
    arguments = *packed(rows, keys, 1, 1, 16, torch.float16), causal, 0.25, None
    check(kernels.ragged_attention, ragged_attention_reference, arguments)


@pytest.mark.parametrize("dtype", HALF)
def test_what_all_keys_share_cancels_in_the_gradient_of_q(dtype):
    q, k, v, *ends = packed((60,), (60,), 2, 1, 16, dtype)
    k = k / 16 + 8
    rest = *ends, True, 0.25, None
    saved = ragged_attention_reference(q, k, v, *rest)
    arguments = torch.ones_like(q), q, k, v, *saved, *rest
    exact = ragged_attention_backward_reference(*wide(arguments))
    plain = ragged_attention_backward_reference(*arguments)
    actual = kernels.ragged_attention_backward(*arguments)
    assert_within_budget(actual[0], exact[0], plain[0], "dq")


def test_a_sequence_does_not_depend_on_its_neighbours():
    q, k, v, *_ = packed((20, 40, 9), (20, 40, 9), 2, 2, 16, torch.float16)
    alone = slice(20, 60)
    one = kernels.ragged_attention(
        q[alone], k[alone], v[alone], *[cu_seqlens((40,))] * 2, 40, 40, True, 0.25, None
    )
    k[:20], v[60:] = torch.nan, torch.inf
    ends = cu_seqlens((20, 40, 9))
    out, lse = kernels.ragged_attention(q, k, v, ends, ends, 40, 40, True, 0.25, None)
    assert_same_bits(out[alone], one[0], "out")
    assert_same_bits(lse[:, alone], one[1], "lse")


@pytest.mark.parametrize("ends", [[0, 500, 9], [-7, 3, 900], [9, 0, 9]])
def test_wrong_lengths_touch_no_other_memory(ends):
    """What comes out is not defined. Out of bounds, the interpreter would crash or meet NaN."""
    around = torch.full((90, 2, 16), torch.nan, dtype=torch.float16)
    around[40:49] = 1
    x, ends = around[40:49], torch.tensor(ends)
    out, lse = kernels.ragged_attention(x, x, x, ends, ends, 9, 9, True, 0.25, None)
    right = cu_seqlens((4, 5))
    out, lse = kernels.ragged_attention(x, x, x, right, right, 5, 5, True, 0.25, None)
    for grad in kernels.ragged_attention_backward(
        x, x, x, x, out, lse, ends, ends, 9, 9, True, 0.25, None
    ):
        assert grad.shape == x.shape
    assert around[:40].isnan().all()
    assert around[49:].isnan().all()
    cache, long = around[None, 40:49], torch.tensor([2**31])
    assert (kernels.ragged_decode_attention(x[:1], cache, cache, long, 0.25) == 1).all()
    assert not kernels.ragged_decode_attention(x[:1], cache, cache, -long, 0.25).any()


@pytest.mark.parametrize("programs", [1, 12, 512])
def test_a_cache_is_shared_out_whatever_the_lengths(monkeypatch, programs):
    monkeypatch.setattr(triton_decode, "_PROGRAMS", programs)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 6, 20, generator=generator)
    k, v = (torch.randn(3, 700, 2, 20, generator=generator) for _ in "kv")
    arguments = q, k, v, torch.tensor([700, 0, 129]), 0.3
    check(kernels.ragged_decode_attention, ragged_decode_attention_reference, arguments)


def test_weights_that_cancel_in_decoding_keep_their_precision():
    """Values that add to almost nothing under weights that bfloat16 would round."""
    q, k = torch.zeros(1, 1, 16), torch.zeros(1, 3, 1, 16)
    q[..., 0] = 1
    k[0, :, 0, 0] = torch.tensor([0.0, 0.0, -1.0])
    v = torch.zeros(1, 3, 1, 16)
    v[0, :, 0, 0] = torch.tensor([64.0, -52.0, -33.0])
    arguments = q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.tensor([3]), 1.0
    check(kernels.ragged_decode_attention, ragged_decode_attention_reference, arguments)
