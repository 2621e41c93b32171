"""How far a result may be from the truth."""

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, exact: Tensor, same_precision: Tensor, name: str, *, terms: float = 0.0
) -> None:
    """`actual` errs at most twice as much as plain torch in its own precision plus one rounding.

    Results of half precision may also not drift towards or away from zero, as truncated ones do.

    exact: the definition in float64. same_precision: the definition in the dtype of the call.
    terms: the size of what is added up, where so little is added that it may cancel: one rounding
    of the accumulator (float32, float64 for float64) at that size is part of the budget.
    Whole numbers must be equal to the exact ones. Infinities and NaN must stand where the truth
    has them and nowhere else.
    """
    assert actual.dtype == same_precision.dtype, (
        f"{name}: dtype {actual.dtype}, expected {same_precision.dtype}"
    )
    assert actual.shape == exact.shape, (
        f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    if not actual.is_floating_point():
        wrong = actual != exact
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} values differ, the first at"
            f" {wrong.nonzero()[0].tolist()}: {actual[wrong][0]}, expected {exact[wrong][0]}"
        )
        return
    finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: non-finite values in wrong places"
    odd, expected = actual[~finite].double(), exact[~finite].double()
    assert torch.equal(odd.nan_to_num(2.0, 1.0, -1.0), expected.nan_to_num(2.0, 1.0, -1.0)), (
        f"{name}: wrong kind of non-finite value"
    )
    if not finite.any():
        return
    truth = exact[finite].double()
    inside = torch.float64 if actual.dtype == torch.float64 else torch.float32
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max().item()
    rounding += torch.finfo(inside).eps * terms
    reference_error = (same_precision[finite].double() - truth).abs().max().item()
    error, budget = (
        (actual[finite].double() - truth).abs().max().item(),
        2 * (reference_error + rounding),
    )
    assert error <= budget, (
        f"{name}: error {error:.3e} exceeds {budget:.3e}, plain torch errs by {reference_error:.3e}"
    )
    if actual.element_size() == 2 and truth.numel() >= 200:
        drift, own = (_drift(y[finite], truth) for y in (actual, same_precision))
        limit = 2 * abs(own) + torch.finfo(actual.dtype).eps / 8
        assert abs(drift) <= limit, (
            f"{name}: drifts by {drift:.3e} of its size, allowed {limit:.3e}"
        )


def _drift(y: Tensor, truth: Tensor) -> float:
    """Mean error away from zero, as a part of the mean size: near 0 when rounded to nearest."""
    size = truth.abs().sum().item()
    return (y.double().abs() - truth.abs()).sum().item() / size if size else 0.0


def assert_same_bits(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal dtype, shape and bits, so that NaN equals NaN and 0.0 does not equal -0.0."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    )
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    assert torch.equal(*bits), f"{name}: not the same bits"
