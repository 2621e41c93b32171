"""Precision in Triton's interpreter as a GPU has it.

The interpreter (3.6 to 3.9) keeps bfloat16 as 16-bit integers: it cuts float32 off instead of
rounding to nearest, and multiplies matrices of the integers (triton-lang/triton issue 11584, not to
be mended there). And it takes tf32x3, float32 in three products of the tf32 unit, for float32.
Everything else it does is left as it is.
"""

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter


def _widened(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    nearest = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    return nearest.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 without its last 13 bits, to nearest."""
    return ((x.view(np.uint32) + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def _halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    high = _tf32(np.ascontiguousarray(x))
    return high, _tf32(x - high)


def mend() -> None:
    """Round to nearest when a kernel converts to bfloat16, multiply bfloat16 as numbers, and split
    the factors of a tf32x3 product.
    """
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            return handle(_rounded(x.data), tl.bfloat16)
        return cast(self, x, dtype)

    def create_dot(self, a, b, added, precision, *rest):
        a, b = (
            handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        if precision == ir.INPUT_PRECISION.TF32x3 and a.dtype.scalar == tl.float32:
            (high_a, low_a), (high_b, low_b) = _halves(a.data), _halves(b.data)
            small = low_a @ high_b + high_a @ low_b
            product = added.data + np.where(np.isnan(small), 0, small) + high_a @ high_b
            return handle(product.astype(added.data.dtype), added.dtype.scalar)
        return dot(self, a, b, added, precision, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
