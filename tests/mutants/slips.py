"""Three ways to be wrong: do another thing, change the arguments, spoil the result.

A wrong implementation takes the arguments of the registered operation.
"""

import torch

from hico_kernels.testing import SPECS

WRONG = {}  # operation-slip -> (operation, implementation)


def wrong(operation, name, **slip):
    """Register the decorated function, with this slip."""

    def keep(implementation):
        def slipping(*args):
            return implementation(*args, **slip)

        WRONG[f"{operation}-{name}"] = operation, slipping
        return implementation

    return keep


def on_changed(operation, name, change):
    """The right thing, done to changed arguments."""
    right = SPECS[operation].registered()
    WRONG[f"{operation}-{name}"] = operation, lambda *args: right(*change(*args))


def on_result(operation, name, change):
    """The right thing, its result changed."""
    right = SPECS[operation].registered()
    WRONG[f"{operation}-{name}"] = operation, lambda *args: change(right(*args), *args)


def truncated(operation):
    """The right thing, with bfloat16 results made by cutting bits off: a drift towards zero."""
    right = SPECS[operation].registered()

    def cut(*args):
        half = [isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 for x in args]
        first, *others = right(
            *(x.float() if is_half else x for x, is_half in zip(args, half, strict=True))
        )
        if half[0]:
            first = (first.view(torch.int32) & ~0xFFFF).view(torch.float32).bfloat16()
        return first, *others

    WRONG[f"{operation}-truncates"] = operation, cut


def without_strides(x):
    """What a kernel reads that takes x for contiguous; 0 where it would leave the memory of x."""
    flat = torch.zeros(x.storage_offset() + x.numel(), dtype=x.dtype)
    there = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    size = min(len(flat), len(there))
    flat[:size] = there[:size]
    return flat[x.storage_offset() :].view(x.shape)
