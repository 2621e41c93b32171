"""One row per operation: how to call it, on what, what is right and what it must cost at least."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import hico_kernels as hk
from hico_kernels import checks, dispatch, ops
from hico_kernels.testing import attention_samples, fused_samples, samples
from hico_kernels.testing.cost import COSTS, Cost
from hico_kernels.testing.samples import Sample, Samples

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class OpSpec:
    """An operation, by the name under which it is registered."""

    name: str
    public: Callable  # takes the arguments of a sample and impl=
    samples: Callable[[str, torch.dtype], Samples]
    differentiable: tuple[str, ...] = ()  # its arguments that get a gradient
    dtypes: tuple[torch.dtype, ...] = FLOATS
    # How much larger than the output what is rounded on the way is, where that is unavoidable.
    conditioning: Callable[..., float] = lambda *arguments: 0.0

    def arguments(self, sample: Sample) -> tuple:
        """The arguments of the registered operation, in the order of its schema."""
        bound = inspect.signature(self.public).bind(*sample.args, **sample.kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if given.get("scale", 0) is None:
            given["scale"] = checks.scale_of(given["q"], None)
        if "device" in given:
            given["device"] = torch.device(given["device"])
        return tuple(given[a.name] for a in self.registered().default._schema.arguments)

    def registered(self, namespace: str = ops.REFERENCE):
        """The operator in ``hico`` (kernels) or ``hico_reference``."""
        return getattr(getattr(torch.ops, namespace), self.name)

    def run(self, sample: Sample, impl: str) -> tuple[Tensor, ...]:
        """What the public function gives, as a tuple of tensors."""
        return tensors_in(self.public(*sample.args, **sample.kwargs, impl=impl))

    def truth(self, sample: Sample) -> tuple[Tensor, ...]:
        """The definition in float64."""
        wide = [in_float64(x) for x in self.arguments(sample)]
        return tensors_in(self.registered()(*wide))

    def same_precision(self, sample: Sample) -> tuple[Tensor, ...]:
        """The definition in the dtype of the sample: plain torch."""
        return tensors_in(self.registered()(*self.arguments(sample)))

    def cost(self, sample: Sample) -> Cost:
        """Bytes and arithmetic that no implementation can avoid, for the roofline."""
        return COSTS[self.name](*self.arguments(sample))

    def implementations(self, sample: Sample) -> list[str]:
        """Those that can run this sample here."""
        tensors = [x for x in self.arguments(sample) if isinstance(x, Tensor)]
        return [
            impl
            for impl in dispatch.IMPLEMENTATIONS
            if dispatch.why_not(self.name, impl, *tensors) is None
        ]


def tensors_in(result) -> tuple[Tensor, ...]:
    """The tensors of a result: one, several, or those of a `Matching`."""
    if isinstance(result, hk.Matching):
        result = result.assignment
    return (result,) if isinstance(result, Tensor) else tuple(result)


def tensors_among(arguments) -> list[Tensor]:
    """The tensors of a call, those in lists too."""
    each = (x if isinstance(x, list) else [x] for x in arguments)
    return [x for several in each for x in several if isinstance(x, Tensor)]


def in_float64(x):
    """A floating tensor in float64, of a list each; anything else as it is."""
    if isinstance(x, list):
        return [in_float64(y) for y in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _merge_apply(x, assignment, num_tokens, sizes=None, *, impl="auto"):
    return hk.Matching(assignment, num_tokens).merge(x, sizes, impl=impl)


def _merge_similar(
    x, metric, r, sizes=None, other=None, front=0, class_token=False, distill_token=False,
    spatial=True, *, impl="auto",
):  # fmt: skip
    out = hk.merge_similar(
        x, metric, r, sizes, other=other, front=front, class_token=class_token,
        distill_token=distill_token, order="spatial" if spatial else "matching", impl=impl,
    )  # fmt: skip
    others = x.new_empty(0) if out.other is None else out.other
    return out.tokens, out.sizes, out.matching.assignment, out.places, others


def _merge_backward(grad, assignment, merged_sizes, sizes=None, *, impl="auto"):
    run = dispatch.overload("merge_backward", impl, grad)
    return run(grad, assignment, merged_sizes, sizes)


def _gather_tokens_backward(grad, index, num_rows, *, impl="auto"):
    return dispatch.overload("gather_tokens_backward", impl, grad, index)(grad, index, num_rows)


def _rms_norm_backward(grad_rows, grad_normed, rows, weight, eps, *, impl="auto"):
    run = dispatch.overload("rms_norm_backward", impl, grad_rows, grad_normed, rows, weight)
    return run(grad_rows, grad_normed, rows, weight, eps)


def _layer_norm_backward(grad, x, weight, eps, *, impl="auto"):
    run = dispatch.overload("layer_norm_backward", impl, grad, x, weight)
    return run(grad, x, weight, eps)


def _gather_many(x, index, more, cu_seqlens=None, *, impl="auto"):
    return hk.gather_tokens(x, index, *more, cu_seqlens=cu_seqlens, impl=impl)


def _ragged_attention_backward(
    grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, scale,
    key_bias=None, *, impl="auto",
):  # fmt: skip
    bias = () if key_bias is None else (key_bias,)
    run = dispatch.overload("ragged_attention_backward", impl, grad, q, k, v, *bias)
    ends = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return run(grad, q, k, v, out, lse, *ends, causal, scale, key_bias)


def _text_guided_scores_rotary(
    q, k, cu_seqlens_q, cu_seqlens_k, cos, sin, *, scale=None, impl="auto"
):
    ends = cu_seqlens_q, cu_seqlens_k
    return hk.text_guided_scores(q, k, *ends, scale=scale, cos=cos, sin=sin, impl=impl)


_s, _f, _a = samples, fused_samples, attention_samples
SPECS = {
    spec.name: spec
    for spec in (
        OpSpec("merge_tokens", hk.merge_tokens, _s.merge_tokens, ("x",)),
        OpSpec("bipartite_soft_matching", hk.bipartite_soft_matching, _s.bipartite_soft_matching),
        OpSpec("merge_apply", _merge_apply, _s.merge_apply, ("x",)),
        OpSpec("merge_similar", _merge_similar, _f.merge_similar, ("x", "other")),
        OpSpec("merge_backward", _merge_backward, _s.merge_backward),
        OpSpec(
            "layer_norm_metric",
            hk.layer_norm_metric,
            _f.layer_norm_metric,
            ("x", "weight", "bias"),
        ),
        OpSpec("layer_norm_backward", _layer_norm_backward, _f.layer_norm_backward),
        OpSpec("text_guided_scores", hk.text_guided_scores, _s.text_guided_scores),
        OpSpec(
            "text_guided_scores_rotary", _text_guided_scores_rotary, _f.text_guided_scores_rotary
        ),
        OpSpec("select_topk", hk.select_topk, _s.select_topk, dtypes=(FLOATS[0], FLOATS[3])),
        OpSpec("uniform_indices", hk.uniform_indices, _s.uniform_indices, dtypes=FLOATS[:1]),
        OpSpec("gather_tokens", hk.gather_tokens, _s.gather_tokens, ("x",)),
        OpSpec("gather_many", _gather_many, _f.gather_many, ("x", "more")),
        OpSpec("gather_rms_norm", hk.gather_rms_norm, _f.gather_rms_norm, ("x", "weight")),
        OpSpec("rms_norm_backward", _rms_norm_backward, _f.rms_norm_backward),
        OpSpec("gather_tokens_backward", _gather_tokens_backward, _s.gather_tokens_backward),
        OpSpec("ragged_attention", hk.ragged_attention, _a.ragged_attention, ("q", "k", "v")),
        OpSpec(
            "ragged_attention_backward",
            _ragged_attention_backward,
            _a.ragged_attention_backward,
            conditioning=_a.largest_logit,
        ),
        OpSpec("ragged_decode_attention", hk.ragged_decode_attention, _a.ragged_decode_attention),
    )
}
