"""What every operation promises, whatever it computes, as checks that raise AssertionError.

Each takes the operation's row, a sample and `run`, which maps a sample to a tuple of tensors. So
the tests can apply them to every implementation, and to deliberately wrong ones.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from hico_kernels.testing.budget import assert_same_bits, assert_within_budget
from hico_kernels.testing.poison import layouts
from hico_kernels.testing.samples import Sample
from hico_kernels.testing.specs import OpSpec, tensors_among

Run = Callable[[Sample], tuple[Tensor, ...]]


def right_numbers(spec: OpSpec, sample: Sample, run: Run) -> None:
    """Every output is within the error budget of the definition in float64."""
    expected = zip(spec.truth(sample), spec.same_precision(sample), strict=True)
    factor = spec.conditioning(*spec.arguments(sample))
    for i, (actual, (exact, plain)) in enumerate(zip(run(sample), expected, strict=True)):
        terms = factor * exact.abs().max().item() if factor and exact.numel() else 0.0
        name = f"{spec.name} {sample.id} output {i}"
        assert_within_budget(actual, exact, plain, name, terms=terms)


def other_layouts(sample: Sample) -> Iterator[Sample]:
    """The same call with one tensor at a time stored differently."""
    for i, x in enumerate(sample.args):
        for j, t in enumerate(x if isinstance(x, list) else [x]):
            for name, view in layouts(t) if isinstance(t, Tensor) else ():
                new = [*x[:j], view, *x[j + 1 :]] if isinstance(x, list) else view
                args = (*sample.args[:i], new, *sample.args[i + 1 :])
                yield Sample(f"{sample.id}-argument{i}-{name}", args, sample.kwargs)


def any_layout(spec: OpSpec, sample: Sample, run: Run) -> None:
    """Every tensor may be strided: whole numbers too."""
    for strided in other_layouts(sample):
        right_numbers(spec, strided, run)


def untouched_inputs(spec: OpSpec, sample: Sample, run: Run) -> None:
    """No input is written to."""
    tensors = tensors_among(spec.arguments(sample))
    before = [x.clone() for x in tensors]
    run(sample)
    for i, (x, old) in enumerate(zip(tensors, before, strict=True)):
        assert_same_bits(x, old, f"{spec.name} {sample.id} input {i}")


def own_outputs(spec: OpSpec, sample: Sample, run: Run) -> None:
    """No output shares memory with an input or with another output, and each is contiguous."""
    owned = {}
    tensors = tensors_among(spec.arguments(sample))
    for x, name in [(x, f"input {i}") for i, x in enumerate(tensors) if x.numel()]:
        owned[x.untyped_storage().data_ptr()] = name
    for i, y in enumerate(run(sample)):
        assert y.is_contiguous(), f"{spec.name} {sample.id}: output {i} is not contiguous"
        if y.numel():
            other = owned.setdefault(y.untyped_storage().data_ptr(), f"output {i}")
            assert other == f"output {i}", (
                f"{spec.name} {sample.id}: output {i} shares with {other}"
            )


def same_bits_again(spec: OpSpec, sample: Sample, run: Run, repeats: int = 20) -> None:
    """Repeated calls give the same bits."""
    first = run(sample)
    for _ in range(repeats):
        _assert_equal(spec, sample, run(sample), first)


def same_bits_with_any_threads(spec: OpSpec, sample: Sample, run: Run) -> None:
    """One thread inside the operation, or as many as there are: the same bits."""
    threads = torch.get_num_threads()
    expected = run(sample)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            _assert_equal(spec, sample, run(sample), expected)
    finally:
        torch.set_num_threads(threads)


def same_bits_called_together(spec: OpSpec, sample: Sample, run: Run, callers: int = 8) -> None:
    """Several threads may call at once."""
    expected = run(sample)
    with ThreadPoolExecutor(callers) as pool:
        for result in pool.map(run, [sample] * 4 * callers):
            _assert_equal(spec, sample, result, expected)


def _assert_equal(spec: OpSpec, sample: Sample, actual, expected) -> None:
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_same_bits(a, b, f"{spec.name} {sample.id} output {i}")
