"""How many frames of a video are looked at, and which ones."""

import numpy as np

from hico_model.config import SAMPLINGS
from hico_model.errors import UserError

FRAMES_PER_CLIP = 4
DENSE_FPS = 15  # "e.g. 15 fps" for short videos: arXiv 2501.00574, section 3.1


def frame_indices(
    num_frames: int,
    fps: float,
    *,
    rule: str = SAMPLINGS[0],
    min_frames: int = 64,
    max_frames: int = 512,
    local: int = 8,
) -> list[int]:
    """Indices of the frames to read: ascending, evenly spread, always a whole number of clips of 4.

    num_frames, fps: of the video.  rule says how many frames, for a video of D seconds:

    "dynamic_fps1"  what VideoChat-Flash runs: D rounded down to a multiple of `local` (8; 4 in its
                    training), between `min_frames` and `max_frames`. Where these contradict each
                    other `min_frames` wins, as there.
    "paper"         T = min(max_frames, max(D, min_frames)); `max_frames` wins.
    "dense"         15 frames per second for short clips, `max_frames` at most.

    `max_frames` is rounded down and `min_frames` up to whole clips. A video with fewer frames than
    that gives those it has, rounded down to whole clips (to `local` for "dynamic_fps1"); only one
    shorter than such a group repeats its last frame. Raises UserError for a video without frames
    and for limits below one clip.
    """
    if num_frames < 1 or not fps > 0:
        raise UserError(f"the video has no frames to sample: {num_frames} frames at {fps} fps")
    if min_frames < 1 or max_frames < FRAMES_PER_CLIP:
        raise UserError(
            f"min_frames must be at least 1 and max_frames at least {FRAMES_PER_CLIP} (one clip), "
            f"got {min_frames} and {max_frames}"
        )
    if local < 1 or local % FRAMES_PER_CLIP:
        raise UserError(f"local must be a multiple of {FRAMES_PER_CLIP} frames, got {local}")
    low = -_whole_clips(-min_frames)
    high = _whole_clips(max_frames)
    seconds = num_frames / fps
    if rule == "dynamic_fps1":
        if low > num_frames:
            low = num_frames // local * local
        count = max(low, min(high, max(local, int(seconds // local) * local)))
    elif rule == "paper":
        count = min(high, _available(max(seconds, low), num_frames))
    elif rule == "dense":
        count = min(high, _available(seconds * DENSE_FPS, num_frames))
    else:
        raise UserError(f"the rule of sampling must be one of {', '.join(SAMPLINGS)}, got {rule!r}")
    return _spread(num_frames, count)


def _whole_clips(frames: float) -> int:
    return int(frames // FRAMES_PER_CLIP) * FRAMES_PER_CLIP


def _available(wanted: float, num_frames: int) -> int:
    return max(FRAMES_PER_CLIP, _whole_clips(min(wanted, num_frames)))


def _spread(num_frames: int, count: int) -> list[int]:
    """The middle of each of `count` equal stretches; where too few, the last frame again."""
    edges = np.linspace(0, num_frames, min(count, num_frames) + 1).astype(int)
    middles = ((edges[:-1] + edges[1:] - 1) // 2).tolist()
    return middles + middles[-1:] * (count - len(middles))
