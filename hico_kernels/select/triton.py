"""The Triton implementation of every operation of this folder, under its own name."""

from hico_kernels.select.triton_gather import (
    gather_many,
    gather_tokens,
    gather_tokens_backward,
    uniform_indices,
)
from hico_kernels.select.triton_norm import gather_rms_norm, rms_norm_backward
from hico_kernels.select.triton_scores import text_guided_scores, text_guided_scores_rotary
from hico_kernels.select.triton_topk import select_topk

__all__ = [
    "gather_many",
    "gather_rms_norm",
    "gather_tokens",
    "gather_tokens_backward",
    "rms_norm_backward",
    "select_topk",
    "text_guided_scores",
    "text_guided_scores_rotary",
    "uniform_indices",
]
