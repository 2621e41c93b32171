"""The Triton implementation of every operation of this folder, under its own name."""

from hico_kernels.attention.triton_backward import ragged_attention_backward
from hico_kernels.attention.triton_decode import ragged_decode_attention
from hico_kernels.attention.triton_forward import ragged_attention

__all__ = ["ragged_attention", "ragged_attention_backward", "ragged_decode_attention"]
