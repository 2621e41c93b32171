"""What tests and benchmarks share: operations with samples, the budget, real shapes."""

from hico_kernels.testing.budget import assert_same_bits, assert_within_budget
from hico_kernels.testing.samples import Sample
from hico_kernels.testing.shapes import CLIPS, LLMS, RAGGED, cu_seqlens
from hico_kernels.testing.specs import SPECS, OpSpec

__all__ = [
    "CLIPS",
    "LLMS",
    "RAGGED",
    "SPECS",
    "OpSpec",
    "Sample",
    "assert_same_bits",
    "assert_within_budget",
    "cu_seqlens",
]
