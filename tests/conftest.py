"""One thread per test: the inputs are small, and runs side by side do not slow each other down.

What happens inside an operation with several threads is a test of its own, which sets their number.
"""

import torch

torch.set_num_threads(1)
