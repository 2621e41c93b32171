"""Merging the visual tokens of every clip in front of the language model.

This is the first half of HiCo (VideoChat-Flash, arXiv 2501.00574, section 3.1): similar tokens of a
few neighbouring frames become one, before the first layer. `premerge.py` does it to a model.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from hico_kernels.patch.families import Parts, UnsupportedModel


@dataclass(frozen=True)
class PreLLM:
    """Every clip of `per_frames` frames has `merge_to` tokens in the language model.

    Frames are those of the processor's output. A video's last clip may be shorter and has as many
    tokens per frame, rounded up. Clips with fewer tokens, and images, stay as they are.
    """

    merge_to: int
    per_frames: int = 4

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"PreLLM: {name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"PreLLM: {name} must be at least 1, got {value}")

    def to_json(self) -> str:
        """As text, for a model's config; `from_json` gives an equal one back."""
        return json.dumps({"prellm": asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "PreLLM":
        """What `to_json` wrote."""
        return cls(**json.loads(text)["prellm"])


@dataclass(frozen=True)
class Layout:
    """How a family lays videos out among its tokens.

    videos: the places [L] bool of one sequence's videos, rotary positions of height and width
    [2, L] where there are any, and tokens per frame -> the places [steps, tokens] of each video.
    All on the host.
    """

    videos: Callable[[Tensor, Tensor | None, int], list[Tensor]]
    token: str  # whose placeholders are frames of a video
    tokens: Callable[[Any], int] = lambda config: 0  # of a frame
    frames: Callable[[Any], int] = lambda config: 1  # in a time step


def _runs(places: Tensor) -> list[Tensor]:
    """Where placeholders follow each other without a gap."""
    at = places.nonzero()[:, 0]
    return list(at.tensor_split(((at.diff() != 1).nonzero()[:, 0] + 1).tolist()))


def _grids(places: Tensor, positions: Tensor | None, tokens: int) -> list[Tensor]:
    """Every time step starts anew in height and width."""
    if positions is None:
        raise ValueError(
            "video_grid_thw: PreLLM needs the grids of the videos that are in this call, or "
            "position_ids of time, height and width"
        )
    videos = []
    for run in _runs(places):
        inside = positions[:, run]
        steps = int((inside == inside[:, :1]).all(0).sum())
        videos.append(_frames(run, len(run) // steps))
    return videos


def _apart(places: Tensor, positions: Tensor | None, tokens: int) -> list[Tensor]:
    """Text between the time steps: neighbours of one size are one video."""
    by_size = groupby(_runs(places), key=len)
    return [torch.stack(list(steps)) for _, steps in by_size]


def _with_newline(places: Tensor, positions: Tensor | None, tokens: int) -> list[Tensor]:
    """Videos of equal length, each with one more token behind its frames, which stays."""
    videos = []
    for run in _runs(places):
        number = len(run) % tokens
        each = run.view(number, -1)[:, :-1] if number and not len(run) % number else run[None]
        videos += [_frames(video, tokens) for video in each]
    return videos


def _one_after_another(places: Tensor, positions: Tensor | None, tokens: int) -> list[Tensor]:
    return [_frames(run, tokens) for run in _runs(places)]


def _all(places: Tensor, positions: Tensor | None, tokens: int) -> list[Tensor]:
    """Text between the frames: all of them are one video."""
    return [_frames(places.nonzero()[:, 0], tokens)]


def _frames(places: Tensor, tokens: int) -> Tensor:
    if not tokens or len(places) % tokens:
        raise ValueError(
            f"input_ids: {len(places)} placeholders in a row are no whole number of frames of "
            f"{tokens} tokens"
        )
    return places.view(-1, tokens)


def _announced(places: Tensor, frames: int) -> Tensor:
    if not frames or len(places) % frames:
        raise ValueError(f"announce: {len(places)} visual tokens cannot be {frames} equal frames")
    return places.view(frames, -1)


def _side(config: Any) -> int:
    return config.vision_config.image_size // config.vision_config.patch_size


def _internvl_tokens(config: Any) -> int:
    vision, ratio = config.vision_config, config.downsample_ratio
    sides = zip(vision.image_size, vision.patch_size, strict=True)
    return math.prod(int(size // patch * ratio) for size, patch in sides)


def _temporal_patch(config: Any) -> int:
    return config.vision_config.temporal_patch_size


LAYOUTS = {
    "qwen2_vl": Layout(_grids, "video_token_id", frames=_temporal_patch),
    "qwen2_5_vl": Layout(_grids, "video_token_id", frames=_temporal_patch),
    "qwen3_vl": Layout(_apart, "video_token_id", frames=_temporal_patch),
    "qwen3_5": Layout(_apart, "video_token_id", frames=_temporal_patch),
    "qwen3_5_moe": Layout(_apart, "video_token_id", frames=_temporal_patch),
    "llava_onevision": Layout(
        _with_newline, "video_token_id", lambda config: math.ceil(_side(config) / 2) ** 2
    ),
    "llava_next_video": Layout(
        _one_after_another,
        "video_token_id",
        lambda config: (_side(config) // config.spatial_pool_stride) ** 2,
    ),
    "internvl": Layout(_all, "image_token_id", _internvl_tokens),
}


def layout_of(parts: Parts) -> Layout:
    """The layout of a model; raises `UnsupportedModel` where it is not known."""
    kind = parts.inner.config.model_type
    if kind not in LAYOUTS:
        raise UnsupportedModel(
            f"model: PreLLM knows where the frames of {', '.join(LAYOUTS)} are, not those of {kind}"
        )
    return LAYOUTS[kind]


def check_merging(parts: Parts, plan: PreLLM) -> None:
    """Raise `UnsupportedModel` or `ValueError` where `plan` cannot be."""
    step = layout_of(parts).frames(parts.inner.config)
    if plan.per_frames % step:
        raise ValueError(
            f"PreLLM: per_frames must be a multiple of the {step} frames in a time step of "
            f"{parts.family.name}, got {plan.per_frames}"
        )


@dataclass(frozen=True)
class Clips:
    """Clips of one size, as places in the flattened [B * L] tokens of a call."""

    places: Tensor  # [N, T] on the host
    merge_to: int


def clips(
    layout: Layout,
    config: Any,
    plan: PreLLM,
    places: Tensor,
    positions: Tensor | None,
    frames: Sequence[int] | None,
) -> tuple[list[Clips], list[int]]:
    """What merges, and how many tokens each sequence has fewer.

    places [B, L] bool of videos, positions [2, B, L] or None: both on the host. frames: of each
    sequence, whose videos are then one, with as many tokens in each frame; None: as laid out.
    """
    per_clip = plan.per_frames // layout.frames(config)
    by_size: dict[tuple[int, int], list[Tensor]] = {}
    fewer = []
    for row, own in enumerate(places):
        fewer.append(0)
        if not bool(own.any()):
            continue
        if frames is None:
            inside = None if positions is None else positions[:, row]
            videos = layout.videos(own, inside, layout.tokens(config))
        else:
            videos = [_announced(own.nonzero()[:, 0], frames[row])]
        for video in videos:
            for clip in video.split(per_clip):
                target = math.ceil(plan.merge_to * len(clip) / per_clip)
                if target < clip.numel():
                    flat = clip.flatten() + row * places.shape[1]
                    by_size.setdefault((clip.numel(), target), []).append(flat)
                    fewer[-1] += clip.numel() - target
    return [Clips(torch.stack(own), target) for (_, target), own in by_size.items()], fewer
