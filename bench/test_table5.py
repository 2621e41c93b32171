"""Table 5 of VideoChat-Flash, measured: the vision encoders on 8 frames."""

from dataclasses import replace

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from bench import measured
from bench.conftest import DEVICE, device_seconds
from hico_model.config import presets
from hico_model.encoder import Encoder

FRAMES = 8


def umt_l(blocks: int):
    """UMT-L/16 at 224 pixels, 8 frames in one pass, as the table's FLOPs have it."""
    config = replace(presets["7b-224"], vision_layers=blocks, frames_per_clip=FRAMES)
    return Encoder(config), (1, FRAMES, 3, 224, 224)


def siglip_so400m(blocks: int):
    """SigLIP-SO400M/14 at 384 pixels with its pooling head, on images."""
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16}
    config = SiglipVisionConfig(**sizes, num_hidden_layers=blocks, image_size=384, patch_size=14)
    return SiglipVisionModel(config), (FRAMES, 3, 384, 384)


ENCODERS = {"umt_l": (umt_l, 24), "siglip_so400m": (siglip_so400m, 27)}


@pytest.mark.parametrize("impl", ENCODERS)
@torch.no_grad()
def test_encoder(observe, benchmark, timed, impl):
    make, blocks = ENCODERS[impl]
    dtype = measured.dtype_of(DEVICE)
    model, shape = make(blocks if timed else 1)
    model = model.eval().to(DEVICE, dtype)
    x = torch.randn(shape, device=DEVICE, dtype=dtype)
    benchmark.group = f"encoder-{FRAMES}frames-{measured.dtype_name(DEVICE)}"
    rounds = 20 if timed and DEVICE == "cuda" else 1

    def run():
        times = sorted(device_seconds(lambda: model(x)) for _ in range(rounds))
        latency = times[len(times) // 2]
        return {
            "seconds": latency,
            "size": f"{blocks} blocks",
            "latency_s": float(f"{latency:.4g}"),
        }

    assert observe(run)["latency_s"] > 0
