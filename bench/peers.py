"""What else runs on a GPU: other kernels of torch, and other packages where they are installed. The
varlen kernels of torch and flash-attn are not here: they are impl="flash".

None of them is asked for on a CPU. Signatures: torch.nn.attention of torch 2.11 to 2.13,
flashinfer/topk.py (0.6), flash_colreduce/flash.py (0.2), flash_kmeans/kmeans_triton_impl.py (0.3).
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

from bench import alternatives
from hico_kernels.merge.reference import merge_rounds

_SDPA = {"sdpa_cudnn": SDPBackend.CUDNN_ATTENTION, "sdpa_flash": SDPBackend.FLASH_ATTENTION}
_PACKAGES = {
    "flash_colreduce": "flash_colreduce",
    "flash_kmeans": "flash_kmeans",
    "flashinfer_topk_and_sort": "flashinfer",
}


def on_gpu(*names: str) -> list[str]:
    """Those of `names` that can run here: none without CUDA, a package's where it is installed."""
    if not torch.cuda.is_available():
        return []
    return [name for name in names if find_spec(_PACKAGES.get(name, "torch"))]


@functools.cache
def compiled(function: Callable) -> Callable:
    """By torch.compile, for the shapes it is called with. Called late: Dynamo takes seconds to
    import.
    """
    return torch.compile(function, dynamic=False)


def attention(
    name: str, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]
) -> Callable[[], Tensor]:
    """Causal ragged_attention by SDPA with torch's own choice (`sdpa_each`), with one backend of it
    (RuntimeError where that cannot run), or by FlexAttention, whose mask is made beforehand.
    """
    if name == "flex":
        return _flex(q, k, v, lengths)

    def each() -> Tensor:
        if name not in _SDPA:
            return alternatives.sdpa_each(q, k, v, lengths)
        with sdpa_kernel(_SDPA[name]):
            return alternatives.sdpa_each(q, k, v, lengths)

    return each


@functools.cache
def _compiled_flex() -> Callable:
    return torch.compile(flex_attention.flex_attention, dynamic=False)


def _flex(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...]) -> Callable[[], Tensor]:
    rows = q.shape[0]
    each = torch.tensor(lengths, device=q.device)
    sequence = torch.arange(len(lengths), device=q.device).repeat_interleave(each)

    def visible(batch, head, i, j):
        return (sequence[i] == sequence[j]) & (i >= j)

    mask = flex_attention.create_block_mask(visible, None, None, rows, rows, device=q.device)
    batched = [x.transpose(0, 1)[None] for x in (q, k, v)]

    def run() -> Tensor:
        out = _compiled_flex()(*batched, block_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run


def flash_colreduce(q: Tensor, k: Tensor) -> Tensor:
    """text_guided_scores of one sequence. It wants as many key heads as query heads: one call for
    each key head, repeated by a stride of 0.
    """
    from flash_colreduce import flash_colreduce as reduce

    means = []
    for own, keys in zip(q.unflatten(1, (k.shape[1], -1)).unbind(1), k.unbind(1), strict=True):
        heads = own.transpose(0, 1)[None]
        means.append(reduce(heads, keys.expand(1, heads.shape[1], -1, -1), "mean"))
    return torch.cat(means, dim=1)[0].float().mean(dim=0)


def flashinfer_topk_and_sort(scores: Tensor, keep: int) -> Tensor:
    """select_topk of one sequence; which of two equal scores wins is left to FlashInfer."""
    import flashinfer

    return flashinfer.top_k(scores[None], keep)[1][0].long().sort().values


def flash_kmeans(x: Tensor, keep: int, heads: int) -> Tensor:
    """What some merge by instead: k-means of the metric, as many iterations as merging has rounds,
    and the means of the tokens. The tokens are others: a cluster is no tree of pairs.
    """
    from flash_kmeans import batch_kmeans_Euclid

    metric = x.unflatten(-1, (heads, -1)).mean(dim=2)
    rounds = len(merge_rounds(x.shape[1], keep))
    into = batch_kmeans_Euclid(metric, keep, max_iters=rounds)[0].long()
    sizes = x.new_zeros(len(x), keep).scatter_add_(1, into, torch.ones_like(into, dtype=x.dtype))
    sums = x.new_zeros(len(x), keep, x.shape[2])
    sums.scatter_add_(1, into[..., None].expand_as(x), x)
    return sums / sizes.clamp(min=1)[..., None]
