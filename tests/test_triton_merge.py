"""Merging in Triton where the contracts of all implementations do not look: drawn shapes, ties and
rounds, and what a GPU cannot check. In the interpreter where there is no GPU.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hico_kernels as hk
from hico_kernels.testing import SPECS, Sample, assert_same_bits, promises
from hico_kernels.testing.samples import Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = hk.why_not("merge_tokens", "triton", torch.empty(0, device=DEVICE))
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
EXAMPLES = settings(max_examples=25, derandomize=True, deadline=None)


def same(actual, expected, name):
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        if a.is_floating_point():
            torch.testing.assert_close(
                a, b, rtol=1e-6, atol=1e-6, msg=lambda m, i=i: f"{name} {i}: {m}"
            )
        else:
            assert_same_bits(a, b, f"{name} {i}")


def both(function, *args, **kwargs):
    for impl in ("triton", "reference"):
        yield function(*args, **kwargs, impl=impl)


@given(st.data(), st.integers(0, 2**31 - 1))
@EXAMPLES
def test_all_rounds_are_those_of_the_reference(data, seed):
    n, t = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 150))
    k, d = data.draw(st.integers(1, t)), data.draw(st.integers(1, 40))
    x = Draw(DEVICE, torch.float32, seed).normal(n, t, 3 * d)
    same(*both(hk.merge_tokens, x, k, num_heads=3), f"{n}x{t}to{k}")


@given(st.data(), st.integers(0, 2**31 - 1))
@EXAMPLES
def test_one_step_is_that_of_the_reference(data, seed):
    protected = data.draw(st.integers(0, 2))
    t = data.draw(st.integers(protected + 1, 200))
    r = data.draw(st.integers(0, (t - protected) // 2))
    metric = Draw(DEVICE, torch.float32, seed).normal(2, t, data.draw(st.integers(1, 100)))
    kind = {"class_token": protected > 0, "distill_token": protected > 1}
    ours, theirs = both(hk.bipartite_soft_matching, metric, r, **kind)
    assert_same_bits(
        ours.assignment, theirs.assignment, f"{t} tokens, r {r}, {protected} protected"
    )


@pytest.mark.parametrize("kind", [{}, {"class_token": True}])
@pytest.mark.parametrize("r", [1, 33, 64])
def test_ties_across_tiles_go_to_the_smaller_index(r, kind):
    """Equal similarities in all tiles of 64 columns, and of ranks."""
    metric = Draw(DEVICE, torch.float32, r).unit_grid(2, 300, 4)
    ours, theirs = both(hk.bipartite_soft_matching, metric, r, **kind)
    assert_same_bits(ours.assignment, theirs.assignment, "ties")


def test_a_round_of_nan_and_one_of_equal_tokens():
    x = Draw(DEVICE, torch.float32).normal(3, 140, 6)
    x[0], x[1], x[2, 7] = torch.nan, torch.eye(6)[1], torch.inf
    ours, theirs = both(hk.merge_tokens, x, 21)
    assert_same_bits(ours.assignment, theirs.assignment, "assignment")
    assert_same_bits(ours.tokens.isnan(), theirs.tokens.isnan(), "where NaN is")


def test_positions_outside_are_no_members_and_get_no_gradient():
    x = Draw(DEVICE, torch.float32).normal(1, 6, 5)
    into = torch.tensor([[0, -1, 2, 7, 2, -(2**31)]], dtype=torch.int32, device=DEVICE)
    run = hk.dispatch.overload("merge_apply", "triton", x)
    tokens, sizes = run(x, into, 3, None)
    assert sizes.tolist() == [[1, 0, 2]]
    expected = torch.stack([x[0, 0], 0 * x[0, 0], (x[0, 2] + x[0, 4]) / 2])
    torch.testing.assert_close(tokens[0], expected)
    back = hk.dispatch.overload("merge_backward", "triton", tokens)
    given = back(tokens, into, sizes, None)[0]
    assert given.count_nonzero(dim=-1).tolist() == [5, 0, 5, 0, 5, 0]


@pytest.mark.parametrize("n", [-(2**63), -1, 0, 7, 2**62])
def test_a_hostile_size_is_an_error(n):
    x = Draw(DEVICE, torch.float32).normal(1, 6, 4)
    merge, match = torch.ops.hico_triton.merge_tokens, torch.ops.hico_triton.bipartite_soft_matching
    with pytest.raises(ValueError, match="num_tokens must be in"):
        merge(x, n, 1)
    with pytest.raises(ValueError, match="num_heads must divide 4"):
        merge(x, 2, n)
    if n:
        with pytest.raises(ValueError, match="r must be in"):
            match(x, n, False, False)


def test_the_gradient_is_that_of_the_reference():
    x = Draw(DEVICE, torch.float32).normal(2, 45, 10).requires_grad_()
    gradients = []
    for impl in ("triton", "reference"):
        tokens = hk.merge_tokens(x, 11, num_heads=2, impl=impl).tokens
        gradients += torch.autograd.grad(tokens.square().sum(), x)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("programs", [1, 3])
def test_a_program_may_have_several_tiles_of_tokens_to_normalise(monkeypatch, programs):
    from hico_kernels import triton_tiles

    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    d, spec = Draw(DEVICE, torch.float32), SPECS["layer_norm_backward"]
    sample = Sample("", (*(d.normal(2, 65, 40) for _ in range(2)), d.normal(40), 1e-6))
    promises.right_numbers(spec, sample, lambda sample: spec.run(sample, "triton"))


def test_whole_sizes_are_added_exactly():
    x = Draw(DEVICE, torch.float32).normal(1, 3, 2)
    into = torch.zeros(1, 3, dtype=torch.int32, device=DEVICE)
    sizes = torch.tensor([[2**31 - 3, 1, 1]], device=DEVICE)
    for dtype in (torch.int32, torch.int64):
        matching = hk.Matching(into, 1)
        assert matching.merge(x, sizes.to(dtype), impl="triton")[1].tolist() == [[2**31 - 1]]
