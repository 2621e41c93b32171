"""The same values at other addresses, poison in between: who ignores a stride reads the poison."""

from collections.abc import Iterator

import torch
from torch import Tensor


def poisoned(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory of the dtype of x full of what must not be read: NaN, or -1 where there is none."""
    return x.new_full(shape, torch.nan if x.is_floating_point() else -1)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Views that equal x and are stored differently, each with its name."""
    *outer, last = x.shape

    def view(name: str, of: Tensor) -> tuple[str, Tensor]:
        return name, of.copy_(x)

    flat = poisoned(x, (x.numel() + 1,))
    yield view("offset", flat[1:].view(x.shape))  # first element off any vector boundary
    yield view("stepped", poisoned(x, (*outer, 3 * last))[..., ::3])
    yield view("reach", poisoned(x, (2 * len(x), *x.shape[1:]))[::2])
    if x.dim() > 1:
        yield view("sliced", poisoned(x, (*outer, last + 5))[..., 2 : 2 + last])
        yield view("transposed", poisoned(x, x.mT.shape).mT)
    if x.dim() > 2:
        yield view("outer_swapped", poisoned(x, x.transpose(0, 1).shape).transpose(0, 1))
