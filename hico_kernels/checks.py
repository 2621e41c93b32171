"""Checks of arguments that several operations share. Each names the argument, what was expected
and what came.
"""

from itertools import pairwise

from torch import SymFloat, SymInt, Tensor, device, int32, int64


def tensor(name: str, x: Tensor, layout: str, *, floating: bool = True) -> None:
    """x must have as many dimensions as `layout` (such as "[N, T, C]") names."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}, got {type(x).__name__}")
    if x.dim() != layout.count(",") + 1:
        raise ValueError(f"{name} must be {layout}, got shape {tuple(x.shape)}")
    if floating and not x.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {x.dtype}")


def apart(*given: Tensor | None) -> list[Tensor | None]:
    """No tensor twice: a view from the second time on. torch.compile refuses a tensor in two places
    of an autograd.Function.
    """
    views: list[Tensor | None] = []
    for x in given:
        again = x is not None and any(x is y for y in views)
        views.append(x.view_as(x) if again else x)
    return views


def integer(name: str, value: int) -> None:
    """Value must be a host int: a tensor would have to be waited for."""
    if isinstance(value, bool) or not isinstance(value, int | SymInt):
        raise TypeError(f"{name} must be an int, got {value!r}")


def boolean(name: str, value: bool) -> None:
    """Value must be True or False: None or 1 may stand for something else."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def same(name: str, x: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    """x must be on the device (and of the dtype) of another argument."""
    if x.device != other.device:
        raise ValueError(
            f"{name} must be on the device of {other_name}, {other.device}, got {x.device}"
        )
    if dtype and x.dtype != other.dtype:
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def integers(name: str, x: Tensor, layout: str, on: device) -> None:
    """x must be int32 or int64, of the given layout and device."""
    tensor(name, x, layout, floating=False)
    if x.dtype not in (int32, int64):
        raise TypeError(f"{name} must be int32 or int64, got {x.dtype}")
    if x.device != on:
        raise ValueError(f"{name} must be on {on}, got {x.device}")


def cu_seqlens(name: str, x: Tensor, on: device) -> None:
    """x must be cumulative lengths [B+1]. Their values are checked by the implementation that
    reads them.
    """
    integers(name, x, "[B+1]", on)
    if x.shape[0] < 1:
        raise ValueError(f"{name} must be [B+1], so at least [0], got shape {tuple(x.shape)}")


def segments(name: str, x: Tensor, total: int) -> list[tuple[int, int]]:
    """The (first, last + 1) rows of every sequence of cumulative lengths. Reads the values, so it
    synchronises.
    """
    bounds = x.tolist()
    if bounds[0] != 0 or bounds[-1] != total or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"{name} must rise from 0 to {total}, got {bounds}")
    return list(pairwise(bounds))


def same_batch(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """Two cumulative lengths must describe the same number of sequences."""
    if x.shape != other.shape:
        expected = f"the {other.shape[0] - 1} sequences of {other_name}"
        raise ValueError(f"{name} must describe {expected}, got {x.shape[0] - 1}")


def heads(q: Tensor, name: str, k: Tensor) -> None:
    """The last two dimensions of q and k must fit: equal head width, key heads dividing query
    heads.
    """
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"{name} must have the head width of q, {q.shape[-1]}, got {k.shape[-1]}")
    if q.shape[-2] < 1:
        raise ValueError(f"q must have at least one head, got shape {tuple(q.shape)}")
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        expected = f"a number of heads that divides the {q.shape[-2]} of q"
        raise ValueError(f"{name} must have {expected}, got {k.shape[-2]}")


def scale_of(q: Tensor, scale: float | None) -> float:
    """The factor of the logits: as given, else 1 / sqrt(head width)."""
    if scale is None:
        return q.shape[-1] ** -0.5 if q.shape[-1] else 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float | SymInt | SymFloat):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    return float(scale)


def epsilon(eps: float) -> None:
    """What a norm adds to the mean square, or to the variance."""
    if isinstance(eps, bool) or not isinstance(eps, int | float | SymInt | SymFloat) or eps < 0:
        raise ValueError(f"eps must be a number, at least 0, got {eps!r}")


def channels(name: str, w: Tensor, x: Tensor) -> None:
    """w must have a number for each channel of x [..., C], on its device and of its dtype."""
    tensor(name, w, "[C]")
    same(name, w, "x", x)
    if w.shape[0] != x.shape[-1]:
        raise ValueError(f"{name} must be [{x.shape[-1]}], got {tuple(w.shape)}")
