"""How many frames every sequence of a call has, for plans that count per frame."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hico_kernels.patch.families import Parts

_GRIDS = {"pixel_values": "image", "pixel_values_videos": "video"}


def frames(parts: Parts, given: Mapping[str, Any], visual: Tensor) -> list[int]:
    """Frames per sequence, as the language model sees them: time steps of videos, and images.

    given: the arguments of the model; visual [B, q] bool. Where the model is told the grids of its
    videos, a sequence has those whose tokens fill its own; elsewhere all frames of a call have the
    same number of tokens. Raises `ValueError` where neither tells.
    """
    total, ids = [0] * len(visual), given.get("input_ids")
    for source, token in parts.family.visual.items():
        items = _items(given, source, parts)
        if items is None:
            continue
        mine = visual if ids is None else visual & (ids == getattr(parts.inner.config, token))
        for row, number in enumerate(_shared(items, mine.sum(1).tolist(), source)):
            total[row] += number
    if any(bool(own.any()) and not number for own, number in zip(visual, total, strict=True)):
        raise ValueError(
            "plan: PerFrame needs pixels, or the grids of videos, to count frames; give a count"
        )
    return total


def _items(given: Mapping[str, Any], source: str, parts: Parts) -> list[tuple[int, int]] | None:
    """(frames, tokens) of every video or image in order. Tokens 0: all frames have as many as each
    other; -1: not known.
    """
    kind, pixels = _GRIDS.get(source), given.get(source)
    grids = given.get(f"{kind}_grid_thw")
    if grids is not None:
        sizes = grids.prod(1).tolist()  # waits for the device; so does the model's rotary index
        merges = given.get(f"{kind}_merge_sizes")
        if merges is None:
            merges = torch.full((len(sizes),), parts.inner.config.vision_config.spatial_merge_size)
        sizes = [size // side**2 for size, side in zip(sizes, merges.tolist(), strict=True)]
        compressed = given.get("video_compression_mask") if kind == "video" else None
        if compressed is not None:
            sizes = [int(own.sum()) for own in compressed.split(sizes)]
        return list(zip(grids[:, 0].tolist(), sizes, strict=True))
    if pixels is None or kind is None:
        return None
    at = given.get(f"{kind}_position_ids")
    if at is not None:  # Gemma 4: of every patch, -1 for padding
        side = parts.inner.config.vision_config.pooling_kernel_size
        return [(1, n) for n in ((at >= 0).all(-1).sum(-1) // side**2).flatten().tolist()]
    if kind == "image" and given.get("image_sizes") is not None:  # of various numbers of tiles
        return [(1, -1)] * len(given["image_sizes"])
    if kind == "image" and pixels.dim() == 5:  # a sequence's images, padded with empty ones
        return [(n, 0) for n in pixels.flatten(2).ne(0).any(2).sum(1).tolist()]
    return [(pixels.shape[1] if pixels.dim() == 5 else 1, 0)] * len(pixels)


def _shared(items: list[tuple[int, int]], tokens: list[int], source: str) -> list[int]:
    """Frames per sequence, of which each has so many tokens."""
    number = sum(frames for frames, _ in items)
    if len(tokens) == 1:
        return [number]
    out, rest = [], iter(items)
    for own in tokens:
        if not items[0][1]:
            mine, missing = divmod(number * own, max(sum(tokens), 1))
        else:
            mine, missing = 0, own
            while missing > 0:
                frames, size = next(rest, (0, -1))
                mine, missing = mine + frames, missing - size if size > 0 else -1
        if missing:
            raise ValueError(
                f"plan: PerFrame cannot tell which frames of {source} belong to which sequence; "
                "give a count, or one sequence at a time"
            )
        out.append(mine)
    return out
