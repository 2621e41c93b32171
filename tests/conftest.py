"""One thread per test: the inputs are small, and runs side by side do not slow each other down.

What happens inside an operation with several threads is a test of its own, which sets their number.
Without a CUDA device the Triton kernels run in Triton's interpreter, which has to be said before
Triton is imported. What is compiled is a test of its own too (test_aot.py).
"""

import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True, scope="session")
def _bfloat16_in_the_interpreter():
    from hico_kernels import native

    if native.TRITON_INTERPRETED and native.HAS_TRITON:
        from hico_kernels.testing import interpreter

        interpreter.mend()
