"""Wrong arguments are refused by name, with what was expected and what came."""

import pytest
import torch

import hico_kernels as hk
from hico_kernels.testing import cu_seqlens

X = torch.zeros(2, 9, 8)
Q, K = torch.zeros(5, 4, 8), torch.zeros(5, 2, 8)
CACHE = torch.zeros(5, 3, 2, 8)
SCORES, CU, LENGTHS = torch.zeros(5), cu_seqlens((2, 3)), torch.ones(5, dtype=torch.int32)
MATCHING = hk.bipartite_soft_matching(X, 3)


def merge(x=X, k=4, **kwargs):
    hk.merge_tokens(x, k, **kwargs)


def match(x=X, r=1, **kwargs):
    hk.bipartite_soft_matching(x, r, **kwargs)


def score(q=Q, k=K, cu_q=CU, cu_k=CU, **kwargs):
    hk.text_guided_scores(q, k, cu_q, cu_k, **kwargs)


def topk(scores=SCORES, cu=CU, keep=(1, 1)):
    hk.select_topk(scores, cu, keep)


def attend(q=Q, k=K, v=K, cu_q=CU, cu_k=CU, max_q=3, max_k=3, **kwargs):
    hk.ragged_attention(q, k, v, cu_q, cu_k, max_q, max_k, **kwargs)


def decode(q=Q, k=CACHE, v=CACHE, lengths=LENGTHS):
    hk.ragged_decode_attention(q, k, v, lengths)


MERGE = {
    "TypeError: x must be a tensor [N, T, C], got list": lambda: merge([1.0]),
    "ValueError: x must be [N, T, C], got shape (9, 8)": lambda: merge(X[0]),
    "TypeError: x must be floating point, got torch.int32": lambda: merge(X.int()),
    "ValueError: num_tokens must be in [1, 9], the tokens of x, got 0": lambda: merge(k=0),
    "ValueError: num_tokens must be in [1, 9], the tokens of x, got 10": lambda: merge(k=10),
    "ValueError: num_tokens must be in [1, 0], the tokens of x, got 1": lambda: merge(X[:, :0], 1),
    "TypeError: num_tokens must be an int, got 2.0": lambda: merge(k=2.0),
    "TypeError: num_tokens must be an int, got True": lambda: merge(k=True),
    "TypeError: num_tokens must be an int, got tensor(1": lambda: merge(k=LENGTHS[0]),
    "ValueError: num_heads must divide the 8 channels of x, got num_heads=3": (
        lambda: merge(num_heads=3)
    ),
    "ValueError: num_heads must divide the 8 channels of x, got num_heads=0": (
        lambda: merge(num_heads=0)
    ),
    "TypeError: num_heads must be an int, got 2.0": lambda: merge(num_heads=2.0),
    "ValueError: metric must be [N, T, D] with N, T = (2, 9), got (2, 8, 8)": (
        lambda: merge(metric=X[:, 1:])
    ),
    "TypeError: metric must be floating point, got torch.int32": lambda: merge(metric=X.int()),
    "ValueError: metric must be on the device of x, cpu, got meta": (
        lambda: merge(metric=X.to("meta"))
    ),
    "ValueError: num_heads has no use beside metric, got num_heads=2": (
        lambda: merge(metric=X, num_heads=2)
    ),
    "ValueError: metric must be [N, T, D], got shape (9, 8)": lambda: match(X[0]),
    "ValueError: metric must be [N, T, D] with N, T = (2, 9), got (2, 7, 8)": (
        lambda: hk.merge_similar(X, X[:, 2:], 1)
    ),
    "TypeError: metric must be a tensor [N, T, D], got NoneType": (
        lambda: hk.merge_similar(X, None, 1)
    ),
    "ValueError: other must be [N, T, E] with N, T = (2, 9), got (1, 9, 8)": (
        lambda: hk.merge_similar(X, X, 1, other=X[:1])
    ),
    "ValueError: front must be in [0, 9], the tokens of x, got 10": (
        lambda: hk.merge_similar(X, X, 1, front=10)
    ),
    "ValueError: order must be 'spatial' or 'matching', got 'input'": (
        lambda: hk.merge_similar(X, X, 1, order="input")
    ),
    "ValueError: sizes must be (2, 9), got (2, 2)": lambda: hk.merge_similar(X, X, 1, X[:, :2, 0]),
    "TypeError: weight must have the dtype of x, torch.float32, got torch.float64": (
        lambda: hk.layer_norm_metric(X, X[0, 0].double(), X[0, 0], 1e-6, 2)
    ),
    "ValueError: bias must be [8], got (7,)": (
        lambda: hk.layer_norm_metric(X, X[0, 0], X[0, 0, 1:], 1e-6, 2)
    ),
    "ValueError: num_heads must divide the 8 channels of x, got num_heads=5": (
        lambda: hk.layer_norm_metric(X, X[0, 0], X[0, 0], 1e-6, 5)
    ),
    "ValueError: eps must be a number, at least 0, got -1": (
        lambda: hk.layer_norm_metric(X, X[0, 0], X[0, 0], -1, 2)
    ),
    "ValueError: r must be at least 0, got -1": lambda: match(r=-1),
    "TypeError: r must be an int, got 1.5": lambda: match(r=1.5),
    "TypeError: class_token must be True or False, got 5": lambda: match(class_token=5),
    "TypeError: distill_token must be True or False, got None": lambda: match(distill_token=None),
    "ValueError: distill_token needs class_token": lambda: match(distill_token=True),
    "ValueError: x must be [N, T, C] with N, T = (2, 9), got (2, 8, 8)": (
        lambda: MATCHING.merge(X[:, 1:])
    ),
    "ValueError: x must be on the device of the matching, cpu, got meta": (
        lambda: MATCHING.merge(X.to("meta"))
    ),
    "ValueError: sizes must be (2, 9), got (2, 3)": lambda: MATCHING.merge(X, X[:, :3, 0]),
    "TypeError: sizes must be floating point, int32 or int64, got torch.bool": (
        lambda: MATCHING.merge(X, X[..., 0] > 0)
    ),
    "ValueError: x must be [2, 6, C], got shape (2, 9, 8)": lambda: MATCHING.unmerge(X),
}
SELECT = {
    "ValueError: q must be [R, H, D], got shape (4, 8)": lambda: score(Q[0]),
    "TypeError: k must have the dtype of q, torch.float32, got torch.float64": (
        lambda: score(k=K.double())
    ),
    "ValueError: k must have a number of heads that divides the 4 of q, got 3": (
        lambda: score(k=Q[:, :3])
    ),
    "ValueError: k must have a number of heads that divides the 4 of q, got 0": (
        lambda: score(k=Q[:, :0])
    ),
    "ValueError: k must have the head width of q, 8, got 4": lambda: score(k=K[..., :4]),
    "TypeError: cu_seqlens_q must be int32 or int64, got torch.float32": (
        lambda: score(cu_q=CU.float())
    ),
    "ValueError: cu_seqlens_k must describe the 2 sequences of cu_seqlens_q, got 1": (
        lambda: score(cu_k=CU[:2])
    ),
    "ValueError: cu_seqlens_q must be [B+1], so at least [0], got shape (0,)": (
        lambda: score(cu_q=CU[:0])
    ),
    "TypeError: sin must be a tensor [S, D], got NoneType": lambda: score(cos=K[:, 0]),
    "ValueError: cos must be (5, 8), got (4, 8)": lambda: score(cos=K[1:, 0], sin=K[:, 0]),
    "ValueError: sin must be on the device of k, cpu, got meta": (
        lambda: score(cos=K[:, 0], sin=K[:, 0].to("meta"))
    ),
    "ValueError: k must have an even head width to be rotated, got 7": (
        lambda: score(Q[..., 1:], K[..., 1:], cos=K[:, 0, 1:], sin=K[:, 0, 1:])
    ),
    "TypeError: scores must be float32 or float64, got torch.bfloat16": (
        lambda: topk(SCORES.bfloat16())
    ),
    "ValueError: keep must have one count for each of 2 sequences, got [1]": lambda: topk(keep=[1]),
    "ValueError: keep must be at least 0 for every sequence, got [1, -1]": (
        lambda: topk(keep=[1, -1])
    ),
    "TypeError: keep must be an int, got 1.0": lambda: topk(keep=[1, 1.0]),
    "TypeError: keep must be a list of ints, got tensor([2, 5]": lambda: topk(keep=CU[1:]),
    "TypeError: keep must be a list of ints, got 2": lambda: topk(keep=2),
    "ValueError: keep must be in [0, 5], the number of tokens, got 6": (
        lambda: hk.uniform_indices(5, 6)
    ),
    "ValueError: keep must be in [0, 5], the number of tokens, got -1": (
        lambda: hk.uniform_indices(5, -1)
    ),
    "TypeError: keep must be an int, got 2.0": lambda: hk.uniform_indices(5, 2.0),
    "TypeError: num_tokens must be an int, got 5.0": lambda: hk.uniform_indices(5.0, 2),
    "TypeError: index must be int64, got torch.int32": lambda: hk.gather_tokens(X[0], CU),
    "ValueError: x must be [S, C], got shape (2, 9, 8)": lambda: hk.gather_tokens(X, CU.long()),
    "ValueError: more[1] must be [9, ...], got shape (8,)": (
        lambda: hk.gather_tokens(X[0], CU.long(), X[0], X[0, 0])
    ),
    "ValueError: more[0] must be [9, ...], got shape ()": (
        lambda: hk.gather_tokens(X[0], CU.long(), X[0, 0, 0])
    ),
    "TypeError: more[0] must be a tensor [S, ...], got list": (
        lambda: hk.gather_tokens(X[0], CU.long(), [1])
    ),
    "TypeError: more[0] must be real, got torch.complex64": (
        lambda: hk.gather_tokens(X[0], CU.long(), X[0].cfloat())
    ),
    "ValueError: more[0] must be on the device of x, cpu, got meta": (
        lambda: hk.gather_tokens(X[0], CU.long(), X[0].to("meta"))
    ),
    "TypeError: x must be floating point, got torch.int32": (
        lambda: hk.gather_rms_norm(X[0].int(), CU.long(), X[0, 0], 1e-6)
    ),
    "ValueError: weight must be [8], got (9,)": (
        lambda: hk.gather_rms_norm(X[0], CU.long(), X[0, :, 0], 1e-6)
    ),
    "ValueError: eps must be a number, at least 0, got None": (
        lambda: hk.gather_rms_norm(X[0], CU.long(), X[0, 0], None)
    ),
    "TypeError: cu_seqlens must be int32 or int64, got torch.float32": (
        lambda: hk.gather_tokens(X[0], CU.long(), cu_seqlens=SCORES)
    ),
    "ValueError: index must be on the device of x, meta, got cpu": (
        lambda: hk.gather_tokens(X[0].to("meta"), CU.long())
    ),
}
ATTENTION = {
    "ValueError: q must be [Sq, H, D], got shape (4, 8)": lambda: attend(Q[0]),
    "TypeError: q must be floating point, got torch.int32": lambda: attend(Q.int()),
    "TypeError: v must have the dtype of q, torch.float32, got torch.float16": (
        lambda: attend(v=K.half())
    ),
    "ValueError: v must have the shape of k, (5, 2, 8), got (4, 2, 8)": lambda: attend(v=K[:4]),
    "ValueError: k must be on the device of q, cpu, got meta": lambda: attend(k=K.to("meta")),
    "ValueError: cu_seqlens_q must be on cpu, got meta": lambda: attend(cu_q=CU.to("meta")),
    "TypeError: max_seqlen_q must be an int, got 3.0": lambda: attend(max_q=3.0),
    "TypeError: max_seqlen_k must be an int, got tensor(2": lambda: attend(max_k=CU[1]),
    "ValueError: key_bias must be [5], got (3,)": lambda: attend(key_bias=SCORES[:3]),
    "TypeError: key_bias must be floating point, got torch.int32": (
        lambda: attend(key_bias=LENGTHS)
    ),
    "ValueError: key_bias must not require a gradient": (
        lambda: attend(key_bias=SCORES.clone().requires_grad_())
    ),
    "ValueError: k_cache must be [B, L, Hkv, D], got shape (5, 2, 8)": lambda: decode(k=K),
    "ValueError: k_cache must hold 5 sequences like q, got 4": lambda: decode(k=CACHE[:4]),
    "ValueError: v_cache must have the shape of k_cache, (5, 3, 2, 8), got (5, 2, 2, 8)": (
        lambda: decode(v=CACHE[:, :2])
    ),
    "ValueError: kv_lengths must be [5], got (3,)": lambda: decode(lengths=CU),
    "TypeError: kv_lengths must be int32 or int64, got torch.float32": (
        lambda: decode(lengths=SCORES)
    ),
}
IMPLEMENTATION = {
    "ValueError: impl must be 'auto' or one of": lambda: merge(impl="gpu"),
    "ValueError: impl must be 'auto'": lambda: merge(impl=None),
    "ValueError: operation must be one of": lambda: hk.why_not("pool", "cpu"),
}
WRONG = MERGE | SELECT | ATTENTION | IMPLEMENTATION


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_refused_by_name(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert f"{type(error.value).__name__}: {error.value}".startswith(message)


# --- what only the data shows: whoever reads it refuses it, before it touches memory --------------

ENDS = {
    "too_far": (0, 2, 6),
    "falling": (0, 6, 5),
    "not_from_0": (1, 2, 5),
    "too_short": (0, 2, 4),
    "negative": (0, -1, 5),
}


def ends_cases():
    for name, ends in ENDS.items():
        cu = torch.tensor(ends)
        text = "must rise from 0 to 5"
        for operation, call in {
            "text_guided_scores": lambda impl, cu=cu: hk.text_guided_scores(
                Q, K, CU, cu, impl=impl
            ),
            "select_topk": lambda impl, cu=cu: hk.select_topk(SCORES, cu, [1, 1], impl=impl),
            "ragged_attention": (
                lambda impl, cu=cu: hk.ragged_attention(Q, K, K, cu, cu, 5, 5, impl=impl)
            ),
        }.items():
            yield pytest.param(operation, call, text, id=f"{operation}-{name}")


def bounds_cases():
    x, rising = torch.zeros(5, 2), torch.tensor([0, 3])
    for name, ends in ENDS.items():
        yield pytest.param(
            "gather_many",
            lambda impl, cu=ends: hk.gather_tokens(
                x, rising, cu_seqlens=torch.tensor(cu), impl=impl
            ),
            "cu_seqlens must rise from 0 to 5",
            id=f"gather_many-{name}",
        )
    for name, index, text in (
        ("falls", [3, 0], "index must not fall"),
        ("outside", [0, 5], "index out of range"),
    ):
        yield pytest.param(
            "gather_many",
            lambda impl, rows=index: hk.gather_tokens(
                x, torch.tensor(rows), x, cu_seqlens=CU, impl=impl
            ),
            text,
            id=f"gather_many-index_{name}",
        )


def index_cases():
    for at in (9, -1, 2**40):
        index = torch.tensor([0, at])
        yield pytest.param(
            "gather_tokens",
            lambda impl, index=index: hk.gather_tokens(X[0], index, impl=impl),
            "index out of range",
            id=f"gather_tokens-{at}",
        )
        yield pytest.param(
            "gather_rms_norm",
            lambda impl, index=index: hk.gather_rms_norm(X[0], index, X[0, 0], 0.1, impl=impl),
            "index out of range",
            id=f"gather_rms_norm-{at}",
        )
    for to in (6, -1, 2**30):
        into = hk.Matching(torch.full((2, 9), to, dtype=torch.int32), 6)
        yield pytest.param(
            "merge_apply",
            lambda impl, into=into: into.merge(X, impl=impl),
            r"assignment must lie in \[0, 6\)",
            id=f"merge_apply-{to}",
        )
    for length in (4, -1):
        lengths = torch.tensor([1, 1, length, 1, 1])
        yield pytest.param(
            "ragged_decode_attention",
            lambda impl, n=lengths: hk.ragged_decode_attention(Q, CACHE, CACHE, n, impl=impl),
            rf"kv_lengths must lie in \[0, 3\], got {length}",
            id=f"ragged_decode_attention-{length}",
        )


HUGE = (2**62 - 1, 2**63 - 1, 2**61, -1)


def hostile_cases():
    """Sizes that only a direct call of an operator can give, of which some products overflow."""
    x, where = torch.randn(4, 4, 8), torch.zeros(4, 4, dtype=torch.int32)
    calls = {
        "merge_apply": lambda op, n: op(x, where, n, None),
        "merge_tokens": lambda op, n: op(x, n, 1),
        "merge_tokens-heads": lambda op, n: op(x, 2, n),
        "bipartite_soft_matching": lambda op, n: op(x, n, False, False),
        "select_topk": lambda op, n: op(SCORES, CU, [n, 1]),
        "uniform_indices": lambda op, n: op(n, 3 if n > 0 else n, torch.device("cpu")),
        "gather_tokens_backward": lambda op, n: op(x[0], torch.arange(4), n),
    }
    for name, call in calls.items():
        for n in HUGE:
            yield pytest.param(name.split("-")[0], call, n, id=f"{name}-{n}")


@pytest.mark.parametrize(("operation", "call", "n"), [*hostile_cases()])
def test_a_hostile_size_is_an_error_and_not_a_crash(operation, call, n):
    if hk.why_not(operation, "cpu"):
        pytest.skip(hk.why_not(operation, "cpu"))
    with pytest.raises(RuntimeError):
        call(getattr(torch.ops.hico, operation).default, n)


def count_cases():
    yield pytest.param(
        "select_topk",
        lambda impl: hk.select_topk(SCORES, CU, [3, 1], impl=impl),
        "keep must be at most .*2.* got 3",
        id="select_topk-keep",
    )
    for name, longest in (("max_seqlen_q", (2, 3)), ("max_seqlen_k", (3, 2))):
        yield pytest.param(
            "ragged_attention",
            lambda impl, n=longest: hk.ragged_attention(Q, K, K, CU, CU, *n, impl=impl),
            f"{name} must be at least",
            id=f"ragged_attention-{name}",
        )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("operation", "call", "message"),
    [*ends_cases(), *bounds_cases(), *index_cases(), *count_cases()],
)
def test_data_out_of_range_is_an_error_not_a_read(operation, call, message, impl):
    if hk.why_not(operation, impl, X):
        message = f"{operation}.* cannot run"
    with pytest.raises((ValueError, IndexError, RuntimeError), match=message):
        call(impl)
