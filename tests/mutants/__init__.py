"""Deliberately wrong implementations, one slip each: test_budget.py sees all of them rejected."""

from hico_kernels.testing import SPECS
from mutants import attention, merge, select  # noqa: F401  each adds its own
from mutants.slips import WRONG, on_changed, without_strides

for _operation in SPECS:
    if _operation != "uniform_indices":  # the only one without a tensor
        on_changed(
            _operation, "ignores_strides", lambda first, *rest: (without_strides(first), *rest)
        )

__all__ = ["WRONG", "without_strides"]
