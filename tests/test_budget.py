"""The checkers themselves: they reject what is wrong and accept what is right."""

import itertools

import mutants
import pytest
import torch

from hico_kernels.testing import SPECS, Sample, assert_same_bits, assert_within_budget, promises
from hico_kernels.testing.poison import layouts
from hico_kernels.testing.specs import tensors_in


def check_numbers(spec, implementation):
    def run(sample):
        return tensors_in(implementation(*spec.arguments(sample)))

    for dtype in spec.dtypes:
        for sample in spec.samples("cpu", dtype):
            promises.right_numbers(spec, sample, run)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_the_definition_passes(spec):
    check_numbers(spec, spec.registered())


@pytest.mark.parametrize("name", mutants.WRONG)
def test_a_wrong_implementation_is_rejected(name):
    operation, implementation = mutants.WRONG[name]
    with pytest.raises(AssertionError, match=rf"^{operation} "):
        check_numbers(SPECS[operation], implementation)


# --- promises other than the numbers --------------------------------------------------------------

GATHER = SPECS["gather_tokens"]


def usual():
    return next(iter(GATHER.samples("cpu", torch.float32)))


def gathered(sample):
    x, index = sample.args
    return (x[index],)


def writes_to_its_input(sample):
    sample.args[0][0, 0] += 1
    return gathered(sample)


def turns_zero_negative(sample):
    sample.args[0].mul_(-1).mul_(-1).abs_().neg_()
    return gathered(sample)


def returns_its_input(sample):
    return (sample.args[0],)


def returns_a_view(sample):
    return (sample.args[0][3:9],)


def returns_it_transposed_in_memory(sample):
    return (gathered(sample)[0].T.contiguous().T,)


def returns_one_memory_twice():
    y = torch.zeros(8)
    return lambda sample: (y[:4], y[4:])


def adds_in_another_order_every_time():
    calls = itertools.count()
    return lambda sample: (sample.args[0].roll(next(calls), 0).sum(dim=0),)


def wrong_once_in_twenty():
    calls = itertools.count(1)
    return lambda sample: (gathered(sample)[0] + (next(calls) % 20 == 0),)


def depends_on_the_threads(sample):
    return (sum(part.sum(dim=0) for part in sample.args[0].chunk(torch.get_num_threads())),)


def keeps_state_between_calls():
    left = []

    def run(sample):
        left[:] = [sample.args[0].clone()]
        torch.ones(300, 300) @ torch.ones(300, 300)  # lets another caller in between
        return (left.pop() if left else torch.zeros(1),)

    return run


BROKEN = [
    (promises.untouched_inputs, writes_to_its_input),
    (promises.untouched_inputs, turns_zero_negative),
    (promises.own_outputs, returns_its_input),
    (promises.own_outputs, returns_a_view),
    (promises.own_outputs, returns_it_transposed_in_memory),
    (promises.own_outputs, returns_one_memory_twice()),
    (promises.same_bits_again, adds_in_another_order_every_time()),
    (promises.same_bits_again, wrong_once_in_twenty()),
    (promises.same_bits_with_any_threads, depends_on_the_threads),
    (promises.same_bits_called_together, keeps_state_between_calls()),
]


@pytest.mark.parametrize(("promise", "run"), BROKEN, ids=lambda f: f.__name__)
def test_a_broken_promise_is_noticed(promise, run):
    promise(GATHER, usual(), gathered)
    with pytest.raises((AssertionError, IndexError)):
        promise(GATHER, usual(), run)


def test_a_stride_that_is_ignored_is_noticed_in_every_tensor():
    for position in (0, 1):

        def run(sample, position=position):
            args = list(sample.args)
            args[position] = mutants.without_strides(args[position])
            if position == 1:
                args[1] = args[1].clamp(min=0)
            return gathered(Sample("", tuple(args)))

        with pytest.raises(AssertionError, match=f"argument{position}"):
            promises.any_layout(GATHER, usual(), run)


def test_a_layout_equals_the_tensor_and_only_it():
    x = torch.arange(24.0).view(2, 3, 4)
    views = dict(layouts(x))
    assert set(views) == {"offset", "stepped", "reach", "sliced", "transposed", "outer_swapped"}
    for name, view in views.items():
        assert torch.equal(view, x), name
        assert (name == "offset") == view.is_contiguous(), name
        assert view.data_ptr() % 16 or name != "offset"
        around = torch.empty(0).set_(view.untyped_storage())
        assert int(around.isnan().sum()) == len(around) - 24, name


# --- the budget -----------------------------------------------------------------------------------

EXACT = torch.tensor([1.0, -0.3, 1024.0, 0.125], dtype=torch.float64)
LSE = torch.tensor([0.5, -torch.inf, 2.0], dtype=torch.float64)


def test_the_budget_takes_two_roundings_and_no_three():
    plain = EXACT.float()
    assert_within_budget(plain + 2 * 1024 * 2**-23, EXACT, plain, "two roundings")
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_within_budget(plain + 3 * 1024 * 2**-23, EXACT, plain, "three roundings")


def test_the_budget_grows_with_the_error_of_plain_torch():
    plain = EXACT.float() + 0.01
    assert_within_budget(EXACT.float() + 0.02, EXACT, plain, "twice as wrong")
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_within_budget(EXACT.float() + 0.021, EXACT, plain, "more than twice as wrong")


def test_the_budget_counts_one_rounding_of_the_accumulator_where_terms_cancel():
    exact = torch.tensor([2.0**-10], dtype=torch.float64)
    for dtype in (torch.float32, torch.bfloat16):
        plain = exact.to(dtype)
        off = plain + 2 * 2**-23 + 2**-31  # two roundings at the size of terms of 1
        with pytest.raises(AssertionError, match=r"error .* exceeds"):
            assert_within_budget(plain + 0.001, exact, plain, "too far", terms=1.0)
        assert_within_budget(off.to(dtype), exact, plain, "terms", terms=1.001)
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_within_budget(exact.float() + 2 * 2**-23, exact, exact.float(), "without terms")


WRONG_VALUES = {
    "nan": (EXACT.float().index_fill(0, torch.tensor(2), torch.nan), EXACT),
    "inf": (EXACT.float().index_fill(0, torch.tensor(2), torch.inf), EXACT),
    "shape": (EXACT.float()[:3], EXACT),
    "broadcastable_shape": (EXACT.float()[None], EXACT),
    "dtype": (EXACT, EXACT),
    "finite_where_infinite": (torch.tensor([0.5, -1e38, 2.0]), LSE),
    "infinite_elsewhere": (torch.tensor([-torch.inf, 0.5, 2.0]), LSE),
    "wrong_sign_of_infinity": (torch.tensor([0.5, torch.inf, 2.0]), LSE),
    "nan_where_infinite": (torch.tensor([0.5, torch.nan, 2.0]), LSE),
    "finite_part_wrong": (torch.tensor([0.6, -torch.inf, 2.0]), LSE),
    "one_index": (torch.tensor([1, 2, 4]), torch.tensor([1, 2, 3])),
    "index_dtype": (torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor([1, 2, 3])),
}


@pytest.mark.parametrize(("actual", "exact"), WRONG_VALUES.values(), ids=WRONG_VALUES)
def test_the_budget_rejects(actual, exact):
    plain = exact.float() if exact.is_floating_point() else exact
    assert_within_budget(plain, exact, plain, "right")
    with pytest.raises(AssertionError, match=r"^wrong: "):
        assert_within_budget(actual, exact, plain, "wrong")


def test_same_bits_tell_zeros_apart_and_take_nan_for_itself():
    assert_same_bits(torch.tensor([torch.nan]), torch.tensor([torch.nan]), "nan")
    assert_same_bits(torch.zeros(0, 3), torch.zeros(0, 3), "empty")
    for other in (torch.tensor([-0.0]), torch.tensor([0.0, 0.0]), torch.tensor([0])):
        with pytest.raises(AssertionError, match=r"^zero: "):
            assert_same_bits(torch.tensor([0.0]), other, "zero")
