"""Numbers of a dtype that few kernels know, as whole numbers of as many bytes."""

import torch
from torch import Tensor

_SIGNED = {torch.uint16: torch.int16, torch.uint32: torch.int32, torch.uint64: torch.int64}


def copyable(x: Tensor) -> Tensor:
    """A view of x that can be gathered: x itself, but for floats of one byte (index_select and
    Triton do not know all of them) and unsigned numbers of more (index_select does not).
    """
    if x.is_floating_point() and x.element_size() == 1:
        return x.view(torch.uint8)
    return x.view(_SIGNED[x.dtype]) if x.dtype in _SIGNED else x
