"""FLOP formulas of our operators for `torch.utils.flop_counter.FlopCounterMode`.

`import hico_kernels` is enough for a counter to see them. Torch's conventions: matrix products
only, 2 FLOPs a multiply-add, all pairs of a causal attention. For the pairs that the mask leaves:
``FlopCounterMode(custom_mapping=hico_kernels.counting.causal())``.

Work on packed rows depends on the lengths. Where these are known they count, which waits for the
device as torch's own formulas do. On the meta device and under fake tensors they are not: exact for
one sequence; of several, each counts as long as max_seqlen (torch's rule), text rows of
`text_guided_scores` as spread evenly, and a decoding cache as full.
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import partial
from importlib.abc import MetaPathFinder
from itertools import pairwise

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from hico_kernels import ops
from hico_kernels.flops import merge_flops, visible_pairs

COUNTER = "torch.utils.flop_counter"


def _values(x: Tensor) -> list[int] | None:
    """None where they are not known."""
    unknown = x.is_meta or isinstance(x, FakeTensor | FunctionalTensor)
    return None if unknown else x.tolist()


def _attention_pairs(cu_q: Tensor, cu_k: Tensor, most: tuple[int, int], causal: bool) -> int:
    """most: rows and keys of the longest sequences."""
    queries, keys = _values(cu_q), _values(cu_k)
    if queries is None or keys is None:
        return (cu_q.shape[0] - 1) * visible_pairs(*most, causal)
    lengths = (((b - a) for a, b in pairwise(ends)) for ends in (queries, keys))
    return sum(visible_pairs(rows, seen, causal) for rows, seen in zip(*lengths, strict=True))


def _attention(products: int, half: bool, q, k, v, cu_q, cu_k, max_q, max_k, causal) -> int:
    most = torch.sym_min(max_q, q.shape[0]), torch.sym_min(max_k, k.shape[0])
    pairs = _attention_pairs(cu_q, cu_k, most, half and causal)
    return 2 * products * q.shape[1] * q.shape[2] * pairs


def _ragged_attention(*args, half: bool = False, **_) -> int:
    return _attention(2, half, *args[:8])


def _ragged_attention_backward(*args, half: bool = False, **_) -> int:
    _, q, k, v, _, _, *rest = args
    return _attention(5, half, q, k, v, *rest[:5])


def _ragged_decode_attention(q, k_cache, v_cache, kv_lengths, scale, **_) -> int:
    lengths = _values(kv_lengths)
    seen = k_cache.shape[0] * k_cache.shape[1] if lengths is None else sum(lengths)
    return 4 * q.shape[1] * q.shape[2] * seen


def _text_guided_scores(q, k, cu_q, cu_k, *_, **__) -> int:
    if _values(cu_q) is None or _values(cu_k) is None:
        pairs = q.shape[0] * k.shape[0] // (cu_q.shape[0] - 1)
    else:
        pairs = _attention_pairs(cu_q, cu_k, (0, 0), causal=False)
    return 2 * q.shape[1] * q.shape[2] * pairs


def _merge_tokens(x, num_tokens, num_heads, metric=None, **_) -> int:
    width = x.shape[2] // num_heads if metric is None else metric.shape[2]
    return x.shape[0] * merge_flops(x.shape[1], num_tokens, width)


def _bipartite_soft_matching(metric, r, class_token, distill_token, **_) -> int:
    n, t, width = metric.shape
    if not isinstance(r, torch.SymInt) and r == 0:
        return 0
    return 2 * n * (t - t // 2 - class_token) * (t // 2 - distill_token) * width


def _merge_similar(x, metric, r, sizes, other, front, class_token, distill_token, *_, **__) -> int:
    return _bipartite_soft_matching(metric[:, front:], r, class_token, distill_token)


FORMULAS: dict[str, Callable[..., int]] = {  # by operation; the others multiply no matrices
    "merge_tokens": _merge_tokens,
    "bipartite_soft_matching": _bipartite_soft_matching,
    "merge_similar": _merge_similar,
    "text_guided_scores": _text_guided_scores,
    "text_guided_scores_rotary": _text_guided_scores,
    "ragged_attention": _ragged_attention,
    "ragged_attention_backward": _ragged_attention_backward,
    "ragged_decode_attention": _ragged_decode_attention,
}


def _operators(name: str) -> list:
    return [getattr(getattr(torch.ops, space), name) for space in ops.NAMESPACES]


def causal() -> dict[object, Callable[..., int]]:
    """A `custom_mapping` that counts of causal attention the pairs which the mask leaves."""
    out = {}
    for name in ("ragged_attention", "ragged_attention_backward"):
        formula = partial(FORMULAS[name], half=True)
        formula._get_raw = True  # torch then gives it tensors, not shapes
        out |= dict.fromkeys(_operators(name), formula)
    return out


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        register_flop_formula(_operators(name), get_raw=True)(formula)


class _WhenImported(MetaPathFinder):
    """Registers the formulas once somebody imports torch's counter.

    Importing it ourselves would bring Triton with it: a third of a second on every
    `import hico_kernels`, for those who never count.
    """

    def find_spec(self, name, path, target=None):
        if name != COUNTER or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module) -> None:
            run(module)
            _register()

        spec.loader.exec_module = run_and_register
        return spec


def install() -> None:
    """Register the formulas now, or when torch's counter is imported."""
    if COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _WhenImported())
