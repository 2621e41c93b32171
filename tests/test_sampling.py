from itertools import pairwise

import numpy as np
import pytest

from hico_model.errors import UserError
from hico_model.sampling import frame_indices

# fps, frames, limits -> count, first indices, last, sum: what the official sampler returned.
GOLDEN = [
    (30, 300, {}, 64, [1, 6, 11, 15, 20], 297, 9528),
    (30, 900, {}, 64, [6, 20, 34, 48, 62], 892, 28708),
    (25, 2500, {}, 96, [12, 38, 64, 90, 116], 2486, 119860),
    (30, 18000, {}, 512, [17, 52, 87, 122, 157], 17981, 4607456),
    (24, 86400, {}, 512, [83, 252, 421, 590, 758], 86315, 22117888),
    (30, 63, {}, 56, [], None, 1708),
    (30, 64, {}, 64, [], None, 2016),
    (30, 50, {}, 48, [], None, 1152),
    (30, 7, {}, 8, [0, 1, 2, 3, 4, 5, 6, 6], 6, 27),
    (1, 600, {}, 512, [], None, 153048),
    (29.97, 17982, {}, 512, [], None, 4602850),
    (30, 900, {"max_frames": 32}, 64, [6, 20], 892, 28708),  # min_frames wins
    (30, 108000, {"max_frames": 640}, 640, [], None, 34559360),
    (30, 3000, {"max_frames": 100}, 96, [], None, 143904),
    (10, 45, {}, 40, [], None, 860),
    (30, 7, {"local": 4}, 4, [0, 1, 3, 5], 5, 9),
    (25, 2500, {"local": 4}, 100, [], None, None),
]


@pytest.mark.parametrize(
    ("fps", "frames", "limits", "count", "first", "last", "total"),
    GOLDEN,
    ids=[f"{g[1]}-frames-{g[0]}fps-{g[2]}" for g in GOLDEN],
)
def test_dynamic_fps1_gives_the_official_indices(fps, frames, limits, count, first, last, total):
    got = frame_indices(frames, fps, **limits)
    assert len(got) == count
    assert got[: len(first)] == first
    assert last is None or got[-1] == last
    assert total is None or sum(got) == total


def official_indices(vlen, fps, low, high, local):
    """The sampler step by step; valid for limits that are whole clips."""
    if low > vlen:
        low = vlen // local * local
    segments = int(vlen / fps // local)
    n = local if segments == 0 else local * segments
    n = max(low, min(n, high))
    edges = np.linspace(0, vlen, min(n, vlen) + 1).astype(int)
    got = [(int(a) + int(b) - 1) // 2 for a, b in pairwise(edges)]
    return got + [got[-1]] * (n - len(got))


def test_dynamic_fps1_follows_the_official_steps_for_any_video():
    draw = np.random.default_rng(0)
    for _ in range(500):
        frames, fps = (
            int(draw.integers(1, 20000)),
            float(draw.choice([1, 10, 23.976, 25, 29.97, 60])),
        )
        local = int(draw.choice([4, 8]))
        low, high = local * int(draw.integers(1, 20)), local * int(draw.integers(1, 200))
        got = frame_indices(frames, fps, min_frames=low, max_frames=high, local=local)
        assert got == official_indices(frames, fps, low, high, local), (frames, fps, low, high)


def test_every_rule_gives_whole_clips_of_existing_frames_for_any_limits():
    draw = np.random.default_rng(1)
    for _ in range(1000):
        frames, fps = int(draw.integers(1, 5000)), float(draw.uniform(0.5, 120))
        limits = {"min_frames": int(draw.integers(1, 90)), "max_frames": int(draw.integers(4, 600))}
        for rule in ("dynamic_fps1", "paper", "dense"):
            got = frame_indices(frames, fps, rule=rule, **limits)
            assert len(got) % 4 == 0
            assert len(got) >= 4
            assert got == sorted(got)
            assert 0 <= got[0] <= got[-1] < frames
            if rule != "dynamic_fps1":
                assert len(got) <= limits["max_frames"]
                assert len(set(got)) == len(got) or frames < 4


@pytest.mark.parametrize(
    ("seconds", "count"), [(10, 64), (64, 64), (100, 100), (101.9, 100), (511, 508), (3600, 512)]
)
def test_the_paper_rule_takes_a_frame_per_second_between_its_limits(seconds, count):
    assert len(frame_indices(int(seconds * 30), 30, rule="paper")) == count


def test_max_frames_wins_over_min_frames_in_the_paper_rule():
    assert len(frame_indices(3000, 30, rule="paper", max_frames=32)) == 32


def test_dense_takes_15_frames_per_second():
    got = frame_indices(240, 30, rule="dense")
    assert len(got) == 120
    assert set(np.diff(got)) == {2}


def test_dense_spreads_max_frames_over_a_long_video():
    got = frame_indices(30_000, 30, rule="dense", max_frames=100)
    assert len(got) == 100
    assert got[-1] > 29_000


def test_a_maximum_that_is_no_whole_clip_is_rounded_down():
    assert len(frame_indices(90_000, 30, max_frames=510)) == 508


def test_a_video_of_one_frame_repeats_it():
    assert frame_indices(1, 30) == [0] * 8
    assert frame_indices(1, 30, rule="paper") == [0] * 4


@pytest.mark.parametrize(
    ("args", "limits", "words"),
    [
        ((0, 30), {}, "no frames"),
        ((10, 0), {}, "0 fps"),
        ((10, float("nan")), {}, "nan fps"),
        ((10, 30), {"max_frames": 0}, "max_frames at least 4"),
        ((10, 30), {"max_frames": -1}, "max_frames at least 4"),
        ((10, 30), {"max_frames": 3}, "max_frames at least 4"),
        ((10, 30), {"min_frames": 0}, "min_frames must be at least 1"),
        ((10, 30), {"local": 6}, "multiple of 4"),
        ((10, 30), {"rule": "fps2"}, "'fps2'"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_one_line(args, limits, words):
    with pytest.raises(UserError, match=words) as e:
        frame_indices(*args, **limits)
    assert "\n" not in str(e.value)
