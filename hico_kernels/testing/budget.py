"""How far a result may be from the truth."""

import torch
from torch import Tensor


def assert_within_budget(actual: Tensor, exact: Tensor, same_precision: Tensor, name: str) -> None:
    """`actual` errs at most twice as much as plain torch in its own precision plus one rounding.

    exact: the definition in float64. same_precision: the definition in the dtype of the call. Whole numbers must
    be equal to the exact ones. Infinities and NaN must stand exactly where the truth has them, nowhere else.
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
    rounding = torch.finfo(actual.dtype).eps * truth.abs().max().item()
    reference_error = (same_precision[finite].double() - truth).abs().max().item()
    error, budget = (actual[finite].double() - truth).abs().max().item(), 2 * (reference_error + rounding)
    assert error <= budget, (
        f"{name}: error {error:.3e} exceeds {budget:.3e} (plain torch errs by {reference_error:.3e})"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal dtype, shape and bits, so that NaN equals NaN and 0.0 does not equal -0.0."""
    assert actual.dtype == expected.dtype, f"{name}: dtype {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} is not {tuple(expected.shape)}"
    )
    bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (actual, expected)]
    assert torch.equal(*bits), f"{name}: not the same bits"
