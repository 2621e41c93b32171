"""Visual-token compression for long video: token merging, text-guided selection, ragged
attention.
"""

from hico_kernels import ops as _ops  # noqa: F401  schemas and fakes first, no native code needed
from hico_kernels import patch, tome  # patch is callable: patch(model, plan)
from hico_kernels.attention import ragged_attention, ragged_decode_attention
from hico_kernels.counting import install as _count
from hico_kernels.dispatch import why_not
from hico_kernels.merge import (
    Matching,
    MergedTokens,
    bipartite_soft_matching,
    layer_norm_metric,
    merge_similar,
    merge_tokens,
)
from hico_kernels.native import load as _load
from hico_kernels.patch import (
    DropPlan,
    PerFrame,
    PreLLM,
    TextTopK,
    Uniform,
    UnsupportedModel,
    compress,
    presets,
    selfcheck,
    supports,
)
from hico_kernels.select import (
    gather_rms_norm,
    gather_tokens,
    select_topk,
    text_guided_scores,
    uniform_indices,
)

__version__ = "0.1.0"
__all__ = [
    "DropPlan",
    "Matching",
    "MergedTokens",
    "PerFrame",
    "PreLLM",
    "TextTopK",
    "Uniform",
    "UnsupportedModel",
    "bipartite_soft_matching",
    "compress",
    "gather_rms_norm",
    "gather_tokens",
    "layer_norm_metric",
    "merge_similar",
    "merge_tokens",
    "patch",
    "presets",
    "ragged_attention",
    "ragged_decode_attention",
    "select_topk",
    "selfcheck",
    "supports",
    "text_guided_scores",
    "tome",
    "uniform_indices",
    "why_not",
]

_load()
_count()
