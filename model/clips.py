"""Frames -> clips: what the vision encoder was trained to see (SigLIP/UMT image processor of
VideoChat-Flash).
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image
from torch import Tensor

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB
STD = (0.229, 0.224, 0.225)


def resize(frames: np.ndarray, size: int) -> np.ndarray:
    """frames [F, H, W, 3] uint8 -> [F, size, size, 3] uint8. Bicubic and straight to a square: the
    aspect is lost.
    """
    if frames.shape[1:3] == (size, size):
        return frames

    def one(frame: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(frame).resize((size, size), Image.Resampling.BICUBIC))

    out = np.empty((len(frames), size, size, 3), np.uint8)
    with ThreadPoolExecutor() as pool:  # PIL releases the GIL
        for i, frame in enumerate(pool.map(one, frames)):
            out[i] = frame
    return out


def to_clips(frames: np.ndarray, size: int, frames_per_clip: int = 4) -> Tensor:
    """frames [F, H, W, 3] uint8 RGB, F a multiple of `frames_per_clip` -> clips [F/4, 4, 3, size,
    size] float32.

    Values are pixel / 255, less the ImageNet mean, over its standard deviation.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
        raise ValueError(f"frames must be [F, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
    if len(frames) % frames_per_clip:
        raise ValueError(f"frames must be whole clips of {frames_per_clip}, got {len(frames)}")
    pixels = resize(frames, size)
    out = np.empty((len(pixels), 3, size, size), np.float32)
    for channel, values in enumerate(_normalised()):
        out[:, channel] = values[pixels[..., channel]]
    return torch.from_numpy(out).view(-1, frames_per_clip, 3, size, size)


def _normalised() -> np.ndarray:
    """[3, 256] float32: the value of each byte, to the bit that of transformers' processors."""
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    mean, std = np.float32(MEAN), np.float32(STD)
    return (scaled - mean[:, None]) / std[:, None]
