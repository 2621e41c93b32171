"""Token merging against the literal algorithm, against naive loops, and by its invariants."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from hico_kernels import bipartite_soft_matching, merge_tokens, ops, why_not
from hico_kernels.merge.reference import merge_rounds, merge_tokens_round_by_round
from hico_kernels.testing import CLIPS, assert_same_bits
from hico_kernels.testing.samples import Draw

EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None)
SEEDS = st.integers(0, 2**31 - 1)


def implementations(operation: str) -> list[str]:
    """Those for float32 on the CPU."""
    x = torch.zeros(1)
    return [impl for impl in ("reference", "cpu") if why_not(operation, impl, x) is None]


def normal(*shape: int, seed: int = 0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# --- the rounds -----------------------------------------------------------------------------------

ROUNDS = {  # as the schedule of VideoChat-Flash's connector gives them
    (784, 64): [392, 196, 98, 34],
    (3136, 64): [1568, 784, 392, 196, 98, 34],
    (1024, 64): [512, 256, 128, 64],
    (196, 64): [98, 34],
    (256, 64): [128, 64],
    (729, 64): [364, 182, 91, 28],
    (65, 64): [1],
    (64, 64): [],
    (5, 1): [2, 1, 1],
}


@pytest.mark.parametrize(("shape", "rounds"), ROUNDS.items(), ids=lambda x: str(x))
def test_tokens_halve_until_the_last_round(shape, rounds):
    assert merge_rounds(*shape) == rounds


@given(st.integers(1, 4000), st.data())
@EXAMPLES
def test_rounds_merge_what_is_too_much_and_never_more_than_half(tokens, data):
    target = data.draw(st.integers(1, tokens))
    left = tokens
    for r in merge_rounds(tokens, target):
        assert 1 <= r <= left // 2
        left -= r
    assert left == target


# --- planning all rounds on the metric is the literal algorithm -----------------------------------


def assert_is_round_by_round(x, num_tokens, num_heads):
    tokens, sizes, assignment = merge_tokens(x, num_tokens, num_heads=num_heads, impl="reference")
    literal_tokens, literal_sizes, literal_assignment = merge_tokens_round_by_round(
        x, num_tokens, num_heads
    )
    assert torch.equal(assignment, literal_assignment)
    assert torch.equal(sizes, literal_sizes)
    torch.testing.assert_close(tokens, literal_tokens, rtol=1e-12, atol=1e-13)


@given(st.data(), SEEDS)
@EXAMPLES
def test_planning_on_the_metric_is_the_literal_algorithm(data, seed):
    n, t = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40))
    heads, width = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 6))
    num_tokens = data.draw(st.integers(1, t))
    assert_is_round_by_round(normal(n, t, heads * width, seed=seed), num_tokens, heads)


@pytest.mark.parametrize("name", [*CLIPS, "internvideo2_image", "power_of_two"])
def test_planning_on_the_metric_is_the_literal_algorithm_at_real_sizes(name):
    tokens = CLIPS[name].tokens if name in CLIPS else {"internvideo2_image": 256}.get(name, 1024)
    assert_is_round_by_round(normal(1, tokens, 128, seed=tokens), 64, 16)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
def test_every_implementation_takes_the_tokens_of_the_literal_algorithm(impl):
    x = normal(2, 784, 128, seed=3, dtype=torch.float32)
    _, sizes, assignment = merge_tokens(x, 64, num_heads=16, impl=impl)
    _, literal_sizes, literal = merge_tokens_round_by_round(x.double(), 64, 16)
    assert torch.equal(assignment, literal)
    assert torch.equal(sizes, literal_sizes)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_metric_that_is_given_is_compared_instead_of_the_head_mean(impl, dtype):
    x = normal(2, 61, 24, dtype=torch.float32)
    metric = x.unflatten(-1, (3, 8)).mean(dim=2)
    scaled = (64 * metric).to(dtype)
    rounded = scaled.float().repeat(1, 1, 3)  # its own head mean
    expected = merge_tokens(rounded, 17, num_heads=3, impl=impl)
    given = merge_tokens(x, 17, metric=scaled, impl=impl)
    assert torch.equal(given.assignment, expected.assignment)
    means = torch.stack([x[0, given.assignment[0] == k].mean(dim=0) for k in range(17)])
    torch.testing.assert_close(given.tokens[0], means, rtol=1e-6, atol=1e-6)


def test_a_metric_gets_no_gradient():
    x, metric = normal(1, 9, 4).requires_grad_(), normal(1, 9, 3, seed=1).requires_grad_()
    merge_tokens(x, 4, metric=metric, impl="reference").tokens.sum().backward()
    assert x.grad is not None
    assert metric.grad is None


# --- one step against loops over pairs ------------------------------------------------------------


def naive_matching(metric: list[list[float]], r: int, class_token=False, distill_token=False):
    """The new position of every token: evens take their best odd one, the r best pairs merge."""

    def unit(row):
        length = math.sqrt(sum(v * v for v in row))
        return [v / length for v in row] if length else row

    rows, t = [unit(row) for row in metric], len(metric)
    evens, odds = range(2 * class_token, t, 2), range(1 + 2 * distill_token, t, 2)
    best = {}
    for i in evens:
        best[i] = (-math.inf, odds[0]) if odds else None
        for j in odds:
            similarity = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
            if similarity > best[i][0]:  # false for NaN, and for a later equal one
                best[i] = (similarity, j)
    ranked = sorted(evens, key=lambda i: -best[i][0]) if r else list(evens)
    merged, stay = ranked[:r], ranked[r:]
    if r == 0:
        return list(range(t))
    if class_token:
        stay = [0, *sorted(stay)]
    order = stay + list(range(1, t, 2))
    if distill_token:
        order = [0, 1, *stay[1:], *odds]
    position = {token: place for place, token in enumerate(order)}
    return [position[best[i][1] if i in merged else i] for i in range(t)]


def tokens_of(kind: str, n: int, t: int, seed: int):
    draw = Draw("cpu", torch.float64, seed)
    x = draw.unit_grid(n, t, 6)  # ties everywhere, and exact
    if kind == "normal":
        return draw.normal(n, t, 6)
    if kind == "nan":
        x[draw.whole(0, 4, n, t) == 0] = torch.nan
    if kind == "zero":
        x[draw.whole(0, 2, n, t) == 0] = 0
    if kind == "inf":
        x[draw.whole(0, 4, n, t) == 0] *= torch.inf
    return x


@pytest.mark.parametrize("impl", implementations("bipartite_soft_matching"))
@pytest.mark.parametrize("kind", ["normal", "ties", "zero", "nan", "inf"])
@given(st.integers(0, 15), st.integers(0, 9), st.sampled_from([(0, 0), (1, 0), (1, 1)]), SEEDS)
@EXAMPLES
def test_one_step_is_the_naive_loop(kind, impl, t, r, protected, seed):
    class_token, distill_token = map(bool, protected)
    t += sum(protected)
    metric = tokens_of(kind, 2, t, seed)
    dtype = torch.float64 if impl == "reference" else torch.float32
    matching = bipartite_soft_matching(
        metric.to(dtype), r, class_token=class_token, distill_token=distill_token, impl=impl
    )
    r = min(r, (t - sum(protected)) // 2)
    expected = [naive_matching(clip.tolist(), r, *protected) for clip in metric]
    assert matching.num_tokens == t - r
    assert matching.assignment.tolist() == expected


def naive_merge_tokens(tokens: list[list[float]], k: int, heads: int):
    """Tokens, sizes and assignment of one clip, by loops over rounds, tokens and channels."""
    sizes, into, width = [1] * len(tokens), list(range(len(tokens))), len(tokens[0]) // heads
    while len(tokens) > k:
        r = min(len(tokens) - k, len(tokens) // 2)
        metric = [[sum(row[d::width]) / heads for d in range(width)] for row in tokens]
        position = naive_matching(metric, r)
        sums = [[0.0] * len(tokens[0]) for _ in range(len(tokens) - r)]
        counts = [0] * len(sums)
        for row, size, place in zip(tokens, sizes, position, strict=True):
            counts[place] += size
            sums[place] = [a + size * b for a, b in zip(sums[place], row, strict=True)]
        tokens = [[v / n for v in row] for row, n in zip(sums, counts, strict=True)]
        sizes, into = counts, [position[place] for place in into]
    return tokens, sizes, into


def assert_is_naive(x, k, heads, impl):
    tokens, sizes, assignment = merge_tokens(x, k, num_heads=heads, impl=impl)
    for clip, rows in enumerate(x.tolist()):
        naive_tokens, naive_sizes, into = naive_merge_tokens(rows, k, heads)
        assert assignment[clip].tolist() == into
        assert sizes[clip].tolist() == naive_sizes
        expected = torch.tensor(naive_tokens, dtype=torch.float64)
        torch.testing.assert_close(tokens[clip].double(), expected, rtol=0, atol=4e-7)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@given(st.integers(1, 14), st.sampled_from([1, 2, 3]), st.data(), SEEDS)
@EXAMPLES
def test_all_rounds_are_the_naive_loops(impl, t, heads, data, seed):
    k = data.draw(st.integers(1, t))
    assert_is_naive(normal(2, t, 6, seed=seed, dtype=torch.float32), k, heads, impl)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@pytest.mark.parametrize("run", [2, 4, 8])
def test_ties_of_all_rounds_go_to_the_smaller_index(run, impl):
    x = Draw("cpu", torch.float32, run).directions(3, 8 * run, 3, run=run)
    assert_is_naive(x, 8, 1, impl)
    assert_is_naive(x, 4 * run - 3, 1, impl)


# --- order ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
def test_after_exact_halvings_the_order_is_positional(impl):
    assignment = merge_tokens(normal(2, 1024, 32, dtype=torch.float32), 64, impl=impl).assignment
    assert torch.equal(assignment[:, 15::16], torch.arange(64, dtype=torch.int32).expand(2, 64))


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
def test_unmerged_tokens_come_first_by_falling_similarity(impl):
    x = normal(1, 98, 16, seed=5, dtype=torch.float32)
    tokens, sizes, assignment = merge_tokens(x, 64, impl=impl)
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    best = (unit[:, ::2] @ unit[:, 1::2].mT).max(dim=-1).values[0]
    ranked = best.argsort(descending=True)
    assert torch.equal(tokens[0, :15], x[0, ::2][ranked[34:]])
    assert sizes[0, :15].tolist() == [1] * 15
    assert torch.equal(assignment[0, 1::2], torch.arange(15, 64, dtype=torch.int32))


def test_a_class_token_keeps_the_unmerged_in_their_own_order():
    matching = bipartite_soft_matching(normal(1, 21, 8), 6, class_token=True)
    kept = [p for p in matching.assignment[0, ::2].tolist() if p < 5]
    assert kept == list(range(5)), "class token first, then rising"


@pytest.mark.parametrize("impl", implementations("bipartite_soft_matching"))
def test_protected_tokens_stay_alone_in_front(impl):
    x = normal(2, 12, 8, dtype=torch.float32)
    x[:, :] = x[:, :1]  # everything is the same, so only protection keeps them apart
    one = bipartite_soft_matching(x, 99, class_token=True, impl=impl)
    two = bipartite_soft_matching(x, 99, class_token=True, distill_token=True, impl=impl)
    assert (one.num_tokens, two.num_tokens) == (12 - 5, 12 - 5)
    for matching, alone in ((one, 1), (two, 2)):
        for place in range(alone):
            assert (matching.assignment == place).nonzero().tolist() == [[0, place], [1, place]]


# --- invariants -----------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@given(st.data(), SEEDS)
@EXAMPLES
def test_sizes_count_and_sums_are_conserved(impl, data, seed):
    n, t, c = (
        data.draw(st.integers(0, 3)),
        data.draw(st.integers(1, 33)),
        data.draw(st.integers(0, 9)),
    )
    k = data.draw(st.integers(1, t))
    x = normal(n, t, c, seed=seed, dtype=torch.float32)
    tokens, sizes, assignment = merge_tokens(x, k, impl=impl)
    counts = torch.stack([(assignment == place).sum(dim=1) for place in range(k)], dim=1)
    assert torch.equal(sizes, counts.int())
    assert (sizes >= 1).all()
    total = (tokens.double() * sizes[..., None]).sum(dim=1)
    torch.testing.assert_close(total, x.double().sum(dim=1), rtol=0, atol=2e-6 * t)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeping_all_tokens_gives_back_the_same_bits(impl, dtype):
    x = normal(2, 7, 5, dtype=dtype)
    x[0, 0] = torch.nan
    tokens, sizes, assignment = merge_tokens(x, 7, impl=impl)
    assert_same_bits(tokens, x, "tokens")
    assert (sizes == 1).all()
    assert torch.equal(assignment, torch.arange(7, dtype=torch.int32).expand(2, 7))


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
@pytest.mark.parametrize(("t", "k"), [(784, 64), (49, 20), (13, 1)])
def test_a_clip_does_not_depend_on_its_neighbours(impl, t, k):
    x = normal(5, t, 48, dtype=torch.float32)
    x[1] = torch.nan
    together = merge_tokens(x, k, num_heads=4, impl=impl)
    turned = merge_tokens(x.flip(0), k, num_heads=4, impl=impl)
    for i in range(5):
        alone = merge_tokens(x[i : i + 1], k, num_heads=4, impl=impl)
        for name, a, b, c in zip(
            together._fields, together, turned.__class__(*turned), alone, strict=True
        ):
            assert_same_bits(a[i : i + 1], c, f"{name} of clip {i}")
            assert_same_bits(b[4 - i : 5 - i], c, f"{name} of clip {i}, batch reversed")


@pytest.mark.parametrize("impl", implementations("merge_apply"))
def test_two_weighted_steps_are_the_mean_of_all_members(impl):
    x, metric = normal(2, 24, 5, dtype=torch.float32), normal(2, 24, 8, seed=1)
    first = bipartite_soft_matching(metric, 9)
    tokens, sizes = first.merge(x, impl=impl)
    second = bipartite_soft_matching(normal(2, 15, 8, seed=2), 6)
    tokens, sizes = second.merge(tokens, sizes, impl=impl)
    into = second.assignment.gather(1, first.assignment.long())
    for clip in range(2):
        for place in range(9):
            members = x[clip, into[clip] == place].double()
            assert sizes[clip, place] == len(members)
            torch.testing.assert_close(
                tokens[clip, place].double(), members.mean(0), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("impl", implementations("merge_apply"))
@pytest.mark.parametrize(
    "sizes", [torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64]
)
def test_sizes_of_any_dtype_are_added_exactly_and_rounded_once(impl, sizes):
    matching = bipartite_soft_matching(torch.ones(1, 600, 4), 300)
    assert matching.assignment.unique().numel() == 300  # one target takes 301 tokens
    weights = torch.full((1, 600), 3, dtype=sizes)
    x = normal(1, 600, 3, dtype=torch.float32)
    tokens, merged = matching.merge(x, weights, impl=impl)
    assert merged.dtype == sizes
    assert merged[0, 0] == torch.tensor(3 * 301).to(sizes)
    mean = x[0, matching.assignment[0] == 0].double().mean(0)
    torch.testing.assert_close(tokens[0, 0].double(), mean, rtol=0, atol=2e-7)


@pytest.mark.parametrize("namespace", [ops.REFERENCE, ops.KERNELS])
def test_the_operator_itself_counts_in_float32(namespace):
    if namespace == ops.KERNELS and why_not("merge_apply", "cpu"):
        pytest.skip(why_not("merge_apply", "cpu"))
    merge_apply = getattr(torch.ops, namespace).merge_apply
    into, x = torch.zeros(1, 600, dtype=torch.int32), normal(1, 600, 3, dtype=torch.float32)
    _, merged = merge_apply(x, into, 1, torch.full((1, 600), 3, dtype=torch.bfloat16))
    assert merged.dtype == torch.bfloat16
    assert merged.item() == torch.tensor(1800.0).bfloat16(), "a bfloat16 sum would stop at 1024"


def test_the_definition_adds_narrow_sizes_in_the_precision_of_x():
    x, sizes = normal(1, 50, 3), (1 + normal(1, 50, seed=1).abs()).float()
    tokens, _ = torch.ops.hico_reference.merge_apply(x, torch.zeros(1, 50).int(), 1, sizes)
    weights = sizes.double()[..., None]
    expected = (x * weights).sum(dim=1) / weights.sum(dim=1)
    torch.testing.assert_close(tokens[:, 0], expected, rtol=1e-13, atol=0)


def test_the_gradient_divides_by_the_sum_before_it_is_rounded():
    matching = bipartite_soft_matching(torch.ones(1, 600, 4), 300)  # one target takes 301 tokens
    x = normal(1, 600, 3).requires_grad_()
    tokens, merged = matching.merge(x, torch.full((1, 600), 3, dtype=torch.bfloat16))
    assert merged[0, 0] == 904  # 903 in bfloat16
    (grad,) = torch.autograd.grad(tokens[0, 0].sum(), x)
    assert grad.max().item() == pytest.approx(1 / 301, rel=1e-12)


def test_unmerge_gives_every_token_its_merged_value():
    matching = bipartite_soft_matching(normal(2, 9, 4), 3)
    x = normal(2, 6, 5, seed=1)
    back = matching.unmerge(x)
    for clip in range(2):
        for token in range(9):
            assert torch.equal(back[clip, token], x[clip, matching.assignment[clip, token]])
    assert torch.equal(matching.merge(back)[0], x)


# --- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("t", "k", "heads"), [(9, 4, 2), (8, 1, 1), (6, 6, 3), (1, 1, 1)])
def test_gradient_of_merge_tokens(t, k, heads):
    x = normal(2, t, 6).requires_grad_()
    assert gradcheck(lambda x: merge_tokens(x, k, num_heads=heads, impl="reference").tokens, x)


@pytest.mark.parametrize("sizes", ["none", "int", "float", "float32"])
def test_gradient_of_a_step(sizes):
    matching = bipartite_soft_matching(normal(2, 9, 4), 3)
    weights = 1 + normal(2, 9, seed=2).abs()
    weights = {"none": None, "int": weights.int(), "float": weights, "float32": weights.float()}[
        sizes
    ]
    x = normal(2, 9, 5, seed=1).requires_grad_()
    assert gradcheck(lambda x: matching.merge(x, weights, impl="reference")[0], x)
    assert gradcheck(matching.unmerge, normal(2, 6, 5).requires_grad_())


@pytest.mark.parametrize("impl", implementations("merge_apply"))
def test_every_implementation_has_the_gradient_of_the_definition(impl):
    matching = bipartite_soft_matching(normal(2, 29, 8), 13)
    sizes = 1 + normal(2, 29, seed=2).abs().int()
    x = normal(2, 29, 5, seed=1)
    grads = []
    for dtype, one in ((torch.float64, "reference"), (torch.float32, impl)):
        leaf = x.to(dtype).requires_grad_()
        tokens, merged = matching.merge(leaf, sizes, impl=one)
        assert not merged.requires_grad
        grads.append(torch.autograd.grad(tokens.square().sum(), leaf)[0].double())
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("impl", implementations("merge_tokens"))
def test_a_metric_is_compared_in_the_precision_of_the_tokens(impl):
    """Token 0 is like token 3, and like token 1 as well where 5e-11 cannot be seen."""
    metric = torch.tensor([[[1, 0], [1, 1e-5], [0, 1], [1, 0]]], dtype=torch.float64)
    x = normal(1, 4, 3)
    narrow = merge_tokens(x.float(), 3, metric=metric, impl=impl).assignment[0]
    wide = merge_tokens(x, 3, metric=metric, impl="reference").assignment[0]
    assert narrow[0] == narrow[1]
    assert wide[0] == wide[3]


def test_sizes_and_assignment_carry_no_gradient():
    merged = merge_tokens(normal(1, 6, 4).requires_grad_(), 3)
    assert [y.requires_grad for y in merged] == [True, False, False]
