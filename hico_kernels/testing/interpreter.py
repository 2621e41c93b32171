"""bfloat16 in Triton's interpreter as a GPU does it.

The interpreter (3.6 to 3.9) keeps bfloat16 as 16-bit integers: it cuts float32 off instead of
rounding to nearest, and multiplies matrices of the integers (triton-lang/triton issue 11584, not to
be mended there). Everything else it does is left as it is.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _widened(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << 16).view(np.float32)


def _rounded(x: np.ndarray) -> np.ndarray:
    nearest = torch.from_numpy(np.ascontiguousarray(x)).bfloat16()
    return nearest.view(torch.int16).numpy().view(np.uint16).reshape(x.shape)


def mend() -> None:
    """Round to nearest when a kernel converts to bfloat16, and multiply bfloat16 as numbers."""
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def cast_impl(self, x, dtype):
        if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            return handle(_rounded(x.data), tl.bfloat16)
        return cast(self, x, dtype)

    def create_dot(self, a, b, *rest):
        wide = [
            handle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        ]
        return dot(self, *wide, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
