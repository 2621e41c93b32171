"""Token merging: the public functions and their checks. Equation and rules are in README.md
beside this file.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, float32, float64, int32, int64

from hico_kernels import checks
from hico_kernels.dispatch import overload
from hico_kernels.merge import cpu as _cpu  # noqa: F401  registers what is made of torch's kernels
from hico_kernels.merge import reference as _reference  # noqa: F401  registers the references
from hico_kernels.merge.autograd import LayerNormMetric, MergeApply, MergeSimilar, MergeTokens


class MergedTokens(NamedTuple):
    """What `merge_tokens` returns."""

    tokens: Tensor  # [N, K, C], dtype of x
    sizes: Tensor  # [N, K] int32, input tokens behind each token
    assignment: Tensor  # [N, T] int32, the token that every input token went into


def merge_tokens(
    x: Tensor,
    num_tokens: int,
    *,
    num_heads: int = 1,
    metric: Tensor | None = None,
    impl: str = "auto",
) -> MergedTokens:
    """Merge the tokens of every clip down to `num_tokens` by repeated bipartite soft matching.

    x [N, T, C] with C a multiple of num_heads  ->  tokens [N, K, C], sizes [N, K] int32, assignment
    [N, T] int32. The similarity is the cosine of the mean over `num_heads` groups of channels.
    Each output token is the mean of its members. Order: tokens that no pair took in the last
    round, by falling similarity, then the merge targets in their order (as VideoChat-Flash: arXiv
    2501.00574, section 3.1). Differentiable in x.

    metric [N, T, D], of any floating dtype: what to compare instead, where it is at hand, for
    instance from the layer before. It must be linear in the tokens, as the mean over groups is: the
    metric of merged tokens is taken to be the mean of their metrics. It gets no gradient.

    The smaller index wins a tie, a NaN similarity never wins, a zero token has similarity 0.
    Similarities and sums are in float32 (float64 for float64 x), sums rounded once.

    impl: "auto" takes the best kernel that can run here, else the reference; "reference", "cpu",
    "triton" and "cuda" take exactly that one or raise ValueError with the reason.
    """
    checks.tensor("x", x, "[N, T, C]")
    checks.integer("num_heads", num_heads)
    checks.integer("num_tokens", num_tokens)
    if num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(
            f"num_heads must divide the {x.shape[2]} channels of x, got num_heads={num_heads}"
        )
    if not 1 <= num_tokens <= x.shape[1]:
        raise ValueError(
            f"num_tokens must be in [1, {x.shape[1]}], the tokens of x, got {num_tokens}"
        )
    if metric is not None:
        _check_beside("metric", metric, "[N, T, D]", x)
        if num_heads != 1:
            raise ValueError(f"num_heads has no use beside metric, got num_heads={num_heads}")
        metric = metric.detach()
    return MergedTokens(*MergeTokens.apply(x, num_tokens, num_heads, metric, impl))


def _check_beside(name: str, given: Tensor, shape: str, x: Tensor) -> None:
    """Something for each of the tokens x [N, T, C], in any floating dtype."""
    checks.tensor(name, given, shape)
    checks.same(name, given, "x", x, dtype=False)
    if given.shape[:2] != x.shape[:2]:
        expected = f"{shape} with N, T = {tuple(x.shape[:2])}"
        raise ValueError(f"{name} must be {expected}, got {tuple(given.shape)}")


def _check_step(r: int, class_token: bool, distill_token: bool) -> None:
    checks.integer("r", r)
    checks.boolean("class_token", class_token)
    checks.boolean("distill_token", distill_token)
    if distill_token and not class_token:
        raise ValueError("distill_token needs class_token: it is the token after the class token")
    if r < 0:
        raise ValueError(f"r must be at least 0, got {r}")


def _weights(sizes: Tensor | None, x: Tensor) -> Tensor | None:
    """Sizes of the tokens x [N, T, C], as the operations take them."""
    if sizes is None:
        return None
    checks.tensor("sizes", sizes, "[N, T]", floating=False)
    if not sizes.is_floating_point() and sizes.dtype not in (int32, int64):
        raise TypeError(f"sizes must be floating point, int32 or int64, got {sizes.dtype}")
    checks.same("sizes", sizes, "x", x, dtype=False)
    if sizes.shape != x.shape[:2]:
        raise ValueError(f"sizes must be {tuple(x.shape[:2])}, got {tuple(sizes.shape)}")
    if not sizes.is_floating_point():
        return sizes
    return sizes.detach().to(float64 if x.dtype == float64 else float32)  # half cannot count


def layer_norm_metric(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, num_heads: int, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """An encoder's last LayerNorm, and in the same pass the metric of `merge_tokens`.

    x [N, T, C] with C a multiple of num_heads, weight and bias [C] of its dtype -> y [N, T, C], and
    metric [N, T, C / num_heads] float32 (float64 for float64), the mean over `num_heads` groups of
    the channels of y as rounded: `merge_tokens(y, K, metric=metric)` merges as `merge_tokens(y, K,
    num_heads=num_heads)` does and reads y once. In float32 (float64 for float64), rounded once.
    Differentiable in x, weight and bias; the metric is a constant. impl: as in `merge_tokens`.
    """
    checks.tensor("x", x, "[N, T, C]")
    checks.channels("weight", weight, x)
    checks.channels("bias", bias, x)
    checks.epsilon(eps)
    checks.integer("num_heads", num_heads)
    if num_heads < 1 or x.shape[2] % num_heads:
        raise ValueError(
            f"num_heads must divide the {x.shape[2]} channels of x, got num_heads={num_heads}"
        )
    weight, bias = checks.apart(weight, bias)
    return LayerNormMetric.apply(x, weight, bias, float(eps), num_heads, impl)


@dataclass(frozen=True)
class Matching:
    """Where every token goes in one merge step: `assignment` [N, T] int32 with values below
    `num_tokens`.
    """

    assignment: Tensor
    num_tokens: int

    def merge(
        self, x: Tensor, sizes: Tensor | None = None, *, impl: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Mean of the tokens that share a position, weighted by `sizes`.

        x [N, T, C], sizes [N, T] (None: all ones) -> tokens [N, K, C] with K = num_tokens and
        their sizes [N, K], int32 without `sizes`, else of its dtype. Differentiable in x only.
        """
        checks.tensor("x", x, "[N, T, C]")
        if x.shape[:2] != self.assignment.shape:
            expected = f"[N, T, C] with N, T = {tuple(self.assignment.shape)}"
            raise ValueError(f"x must be {expected}, got {tuple(x.shape)}")
        checks.same("x", x, "the matching", self.assignment, dtype=False)
        weights = _weights(sizes, x)
        into, weights = checks.apart(self.assignment, weights)
        tokens, merged = MergeApply.apply(x, into, self.num_tokens, weights, impl)
        return tokens, merged if sizes is None else merged.to(sizes.dtype)

    def unmerge(self, x: Tensor) -> Tensor:
        """Give every original token the value of the token it went into: x [N, num_tokens, C] ->
        [N, T, C].
        """
        checks.tensor("x", x, "[N, K, C]", floating=False)
        if x.shape[0] != self.assignment.shape[0] or x.shape[1] != self.num_tokens:
            expected = f"[{self.assignment.shape[0]}, {self.num_tokens}, C]"
            raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
        index = self.assignment.long()[..., None].expand(-1, -1, x.shape[2])
        return x.gather(1, index)


def bipartite_soft_matching(
    metric: Tensor,
    r: int,
    *,
    class_token: bool = False,
    distill_token: bool = False,
    impl: str = "auto",
) -> Matching:
    """One step of token merging (ToMe: arXiv 2210.09461, section 3), for use between the parts of
    a ViT block.

    metric [N, T, D], usually the mean of the attention keys over heads  ->  a `Matching` onto T - r
    tokens. r: pairs to merge; at most half of the unprotected tokens can, and a larger r merges
    that many. class_token: token 0 is never merged. distill_token: neither is token 1; needs
    class_token. Order of the result: unmerged even tokens, then the odd ones; unmerged tokens
    come by falling similarity, with a class token in their own order; protected tokens stay in
    front. r = 0 leaves everything as it is. Not differentiable. Ties, NaN, zero tokens and impl:
    as in `merge_tokens`.
    """
    checks.tensor("metric", metric, "[N, T, D]")
    _check_step(r, class_token, distill_token)
    t = metric.shape[1]
    protected = int(class_token) + int(distill_token)  # torch 2.11 traces no difference with a bool
    r = min(r, max(t - protected, 0) // 2)
    metric = metric.detach()
    run = overload("bipartite_soft_matching", impl, metric)
    return Matching(run(metric, r, class_token, distill_token), t - r)


class MergedStep(NamedTuple):
    """What `merge_similar` returns."""

    tokens: Tensor  # [N, K, C], dtype of x
    sizes: Tensor  # [N, K] int32, or the dtype given
    matching: Matching
    places: Tensor  # [N, K] int32, the token whose place each has: the target of a merge, or itself
    other: Tensor | None  # [N, K, E]


def merge_similar(
    x: Tensor,
    metric: Tensor,
    r: int,
    sizes: Tensor | None = None,
    *,
    other: Tensor | None = None,
    front: int = 0,
    class_token: bool = False,
    distill_token: bool = False,
    order: str = "spatial",
    impl: str = "auto",
) -> MergedStep:
    """`bipartite_soft_matching` and `Matching.merge` of x in one operation: a whole step inside a
    ViT block, one launch on a GPU for up to 1024 tokens with a metric of up to 128 numbers.

    x [N, T, C], metric [N, T, D], r, sizes [N, T] (None: all ones), class_token, distill_token: as
    there -> a `MergedStep` of K = T - r tokens. other [N, T, E], of any floating dtype, is merged
    in the same way, such as what attention adds to x. front: tokens before the class token, such as
    registers, that take no part and stay in front. order: "spatial" leaves tokens in the order of
    the input, a merged one at the place of its target; "matching" in that of
    `bipartite_soft_matching`. Matching is in float32 (float64 for float64 x).
    Differentiable in x and other. impl: as in `merge_tokens`.
    """
    checks.tensor("x", x, "[N, T, C]")
    _check_beside("metric", metric, "[N, T, D]", x)
    if other is not None:
        _check_beside("other", other, "[N, T, E]", x)
    _check_step(r, class_token, distill_token)
    checks.integer("front", front)
    if not 0 <= front <= x.shape[1]:
        raise ValueError(f"front must be in [0, {x.shape[1]}], the tokens of x, got {front}")
    if order not in ("spatial", "matching"):
        raise ValueError(f"order must be 'spatial' or 'matching', got {order!r}")
    weights = _weights(sizes, x)
    x, other = checks.apart(x, other)
    protected = front + int(class_token) + int(distill_token)
    r = min(r, max(x.shape[1] - protected, 0) // 2)
    rest = (front, class_token, distill_token, order == "spatial")
    tokens, others, merged, assignment, places = MergeSimilar.apply(
        x, other, metric.detach(), r, weights, rest, impl
    )
    merged = merged if sizes is None else merged.to(sizes.dtype)
    matching = Matching(assignment, x.shape[1] - r)
    return MergedStep(tokens, merged, matching, places, None if other is None else others)
