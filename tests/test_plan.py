"""Drop plans: what they accept, how they count, that they survive JSON and work as keys."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hico_kernels import DropPlan, PerFrame, TextTopK, Uniform

PAPER = DropPlan({4: Uniform(keep=0.75), 18: TextTopK(keep=0.25)})


def test_ratios_count_from_the_prompt_and_not_from_what_is_left():
    assert PAPER.counts(8192) == {4: 6144, 18: 2048}
    assert DropPlan({0: Uniform(0.5), 2: Uniform(0.5)}).counts(10) == {0: 5, 2: 5}


@pytest.mark.parametrize(("tokens", "kept"), [(0, 0), (1, 0), (3, 2), (4, 3), (1023, 767)])
def test_a_ratio_is_rounded_down(tokens, kept):
    assert DropPlan({1: Uniform(0.75)}).counts(tokens) == {1: kept}


def test_a_count_keeps_at_most_that_many_and_never_brings_tokens_back():
    plan = DropPlan({3: Uniform(100), 5: TextTopK(400), 9: Uniform(1)})
    assert plan.counts(1000) == {3: 100, 5: 100, 9: 1}
    assert plan.counts(7) == {3: 7, 5: 7, 9: 1}
    assert plan.counts(0) == {3: 0, 5: 0, 9: 0}


def test_keeping_everything_is_a_ratio_of_one():
    assert DropPlan({0: TextTopK(1.0)}).counts(77) == {0: 77}


def test_a_number_per_frame_is_a_budget_of_the_sequence():
    plan = DropPlan({0: Uniform(PerFrame(16)), 2: TextTopK(0.25), 3: TextTopK(PerFrame(1))})
    assert plan.counts(1000, 20) == {0: 320, 2: 250, 3: 20}
    assert plan.counts(100, 20) == {0: 100, 2: 25, 3: 20}
    with pytest.raises(ValueError, match="num_frames must be given for a plan with PerFrame"):
        plan.counts(1000)


def test_a_plan_without_drops_counts_nothing():
    assert DropPlan({}).counts(5) == {}


def test_drops_are_sorted_by_layer_and_the_given_dict_is_left_alone():
    given_drops = {18: TextTopK(0.25), 4: Uniform(0.75)}
    plan = DropPlan(given_drops)
    given_drops[1] = Uniform(0.5)
    assert list(plan.drops) == [4, 18]
    assert plan == PAPER


def test_equal_plans_are_one_key():
    again = DropPlan({18: TextTopK(0.25), 4: Uniform(0.75)})
    assert {PAPER: 1}[again] == 1
    assert DropPlan(PAPER.drops, positions="renumber") != PAPER
    assert len({PAPER, again, DropPlan({}), DropPlan(PAPER.drops, "renumber")}) == 3


def test_plans_and_rules_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.positions = "renumber"
    with pytest.raises(dataclasses.FrozenInstanceError):
        PAPER.drops[4].keep = 0.5
    assert PAPER.counts(8192) == {4: 6144, 18: 2048}


RULES = st.builds(
    lambda rule, keep: rule(keep),
    st.sampled_from([Uniform, TextTopK]),
    st.integers(1, 10**6) | st.builds(PerFrame, st.integers(1, 99)),
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    st.dictionaries(st.integers(0, 99), RULES, max_size=5), st.sampled_from(["keep", "renumber"])
)
def test_json_gives_an_equal_plan_back(drops, positions):
    plan = DropPlan(drops, positions)
    again = DropPlan.from_json(plan.to_json())
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.counts(5000, 7) == plan.counts(5000, 7)


def test_json_keeps_ratios_and_counts_apart():
    plan = DropPlan({1: Uniform(1.0), 2: Uniform(1)})
    again = DropPlan.from_json(plan.to_json())
    assert [type(rule.keep) for rule in again.drops.values()] == [float, int]
    assert json.loads(PAPER.to_json()) == {
        "drops": {
            "4": {"rule": "Uniform", "keep": 0.75},
            "18": {"rule": "TextTopK", "keep": 0.25},
        },
        "positions": "keep",
    }


WRONG = {
    "ValueError: Uniform: keep as a ratio must be in (0, 1], got 0.0": lambda: Uniform(0.0),
    "ValueError: Uniform: keep as a ratio must be in (0, 1], got 1.5": lambda: Uniform(1.5),
    "ValueError: Uniform: keep as a ratio must be in (0, 1], got nan": lambda: Uniform(
        float("nan")
    ),
    "ValueError: TextTopK: keep as a ratio must be in (0, 1], got -0.1": lambda: TextTopK(-0.1),
    "ValueError: TextTopK: keep as a count must be at least 1, got 0": lambda: TextTopK(0),
    "TypeError: Uniform: keep must be a ratio (float), a count (int) or PerFrame, got True": (
        lambda: Uniform(True)
    ),
    "TypeError: TextTopK: keep must be a ratio (float), a count (int) or PerFrame, got '0.5'": (
        lambda: TextTopK("0.5")
    ),
    "TypeError: PerFrame: tokens must be an int, got 1.5": lambda: PerFrame(1.5),
    "ValueError: PerFrame: tokens must be at least 1, got 0": lambda: PerFrame(0),
    "ValueError: drops: a layer must be >= 0, got -1": lambda: DropPlan({-1: Uniform(0.5)}),
    "TypeError: drops must map layers to rules, got [4]": lambda: DropPlan([4]),
    "TypeError: drops: a layer must be an int, got '4'": lambda: DropPlan({"4": Uniform(0.5)}),
    "TypeError: drops: a layer must be an int, got True": lambda: DropPlan({True: Uniform(0.5)}),
    "TypeError: drops[4] must be Uniform or TextTopK, got 0.5": lambda: DropPlan({4: 0.5}),
    "ValueError: drops: keep ratios count from all tokens and cannot rise, got [0.25, 0.75]": (
        lambda: DropPlan({4: Uniform(0.25), 18: TextTopK(0.75)})
    ),
    "ValueError: positions must be 'keep' or 'renumber', got 'shift'": (
        lambda: DropPlan({}, "shift")
    ),
    "ValueError: drops: layer 18 is out of range, the model has layers 0 to 17": (
        lambda: PAPER.check_layers(18)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_plan_is_refused_by_name(message):
    with pytest.raises((ValueError, TypeError)) as error:
        WRONG[message]()
    assert f"{type(error.value).__name__}: {error.value}".startswith(message)


def test_a_plan_fits_a_model_with_enough_layers():
    PAPER.check_layers(19)
    DropPlan({}).check_layers(0)


def test_a_plan_cannot_be_changed_but_copied_and_pickled():
    with pytest.raises(TypeError, match="does not support item assignment"):
        PAPER.drops[4] = Uniform(0.5)
    assert pickle.loads(pickle.dumps(PAPER)) == copy.deepcopy(PAPER) == PAPER


def test_a_count_of_one_is_not_the_ratio_one():
    assert Uniform(1) != Uniform(1.0)
    assert DropPlan({0: TextTopK(1)}) != DropPlan({0: TextTopK(1.0)})
    assert len({Uniform(1), Uniform(1.0)}) == 2
