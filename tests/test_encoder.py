import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from hico_kernels import merge_tokens
from hico_model.clips import resize, to_clips
from hico_model.config import presets
from hico_model.encoder import Encoder, position_table
from hico_model.projector import Connector

NANO = presets["nano"]


def nano(module=Encoder):
    torch.manual_seed(0)
    return module(NANO).eval()


def test_clips_are_what_pil_and_the_official_arithmetic_give():
    frames = np.random.default_rng(0).integers(0, 256, (8, 50, 90, 3), np.uint8)
    clips = to_clips(frames, 32)
    assert clips.shape == (2, 4, 3, 32, 32)
    assert clips.dtype == torch.float32
    mean = np.array([0.485, 0.456, 0.406], np.float32)
    std = np.array([0.229, 0.224, 0.225], np.float32)
    for i, frame in enumerate(frames):
        small = np.array(Image.fromarray(frame).resize((32, 32), Image.Resampling.BICUBIC))
        scaled = (small.astype(np.float64) * (1 / 255)).astype(np.float32)
        want = ((scaled - mean) / std).transpose(2, 0, 1)
        assert np.array_equal(clips[i // 4, i % 4].numpy(), want)


def test_clips_equal_those_of_the_transformers_image_functions():
    functions = pytest.importorskip("transformers.image_transforms")
    frame = np.random.default_rng(1).integers(0, 256, (40, 70, 3), np.uint8)
    x = functions.resize(frame, (32, 32), resample=Image.Resampling.BICUBIC)
    x = functions.rescale(x, 1 / 255)
    x = functions.normalize(x, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    clips = to_clips(np.stack([frame] * 4), 32)
    assert np.array_equal(clips[0, 0].numpy(), x.transpose(2, 0, 1))


def test_resizing_twice_to_one_size_changes_nothing():
    frames = np.random.default_rng(0).integers(0, 256, (3, 50, 90, 3), np.uint8)
    once = resize(frames, 24)
    assert once.shape == (3, 24, 24, 3)
    assert np.array_equal(resize(once, 24), once)


@pytest.mark.parametrize(
    "frames",
    [np.zeros((5, 8, 8, 3), np.uint8), np.zeros((4, 8, 8, 3)), np.zeros((4, 3, 8, 8), np.uint8)],
    ids=["five", "float", "channels-first"],
)
def test_clips_refuse_what_is_no_whole_clip_of_frames(frames):
    with pytest.raises(ValueError, match="frames must be"):
        to_clips(frames, 8)


def test_no_frames_give_no_clips():
    assert to_clips(np.zeros((0, 8, 8, 3), np.uint8), 16).shape == (0, 4, 3, 16, 16)


# Sums and entries of the official tables in float32.
@pytest.mark.parametrize(
    ("frames", "grid", "total"),
    [(4, 14, 195846.8099), (4, 28, 783323.2008), (1, 28, 257613.4036), (1, 14, 64419.8752)],
    ids=["video-224", "video-448", "image-448", "image-224"],
)
def test_position_tables_have_the_official_sums(frames, grid, total):
    table = position_table(frames, grid, 1024)
    assert table.shape == (1, frames * grid * grid, 1024)
    assert table.dtype == torch.float32
    assert table.double().sum().item() == pytest.approx(total, abs=0.01)


def test_position_tables_have_the_official_entries():
    def close(got, want):
        torch.testing.assert_close(got, torch.tensor(want), atol=1e-6, rtol=0)

    close(position_table(4, 14, 1024)[0, 1, :4], [0.841471, 0.540302, 0.831705, 0.555218])
    close(position_table(4, 28, 1024)[0, 1, :4], [0.108292, 1.03377, 0.106311, 1.011555])
    close(position_table(4, 28, 1024)[0, -1, -4:], [0.081243, 0.996695, 0.079797, 0.996811])


def test_the_umt_l_encoder_has_the_official_number_of_parameters():
    with torch.device("meta"):
        encoder = Encoder(presets["7b-448"])
    assert sum(p.numel() for p in encoder.parameters()) == 290_479_104


def test_nothing_but_parameters_is_in_the_state_dict():
    encoder = nano()
    assert set(encoder.state_dict()) == {name for name, _ in encoder.named_parameters()}


def direct(encoder, clips):
    """The encoder from its definition: 3-D convolution, and attention as softmax of a matrix."""
    n = len(clips)
    x = encoder.patch_embed.proj(clips.permute(0, 2, 1, 3, 4)).flatten(2).transpose(1, 2)
    x = x + position_table(clips.shape[1], 14, NANO.vision_width)
    for block in encoder.blocks:
        a, y = block.attn, block.norm1(x)
        wq, wk, wv = a.qkv.weight.split(NANO.vision_width)
        q, k, v = y @ wq.T + a.q_bias, y @ wk.T, y @ wv.T + a.v_bias
        q, k, v = (t.view(n, -1, NANO.vision_heads, 64).transpose(1, 2) for t in (q, k, v))
        y = torch.softmax(q @ k.mT * 64**-0.5, dim=-1) @ v
        x = x + a.proj(y.transpose(1, 2).reshape(n, -1, NANO.vision_width))
        y = block.mlp.fc1(block.norm2(x))
        x = x + block.mlp.fc2(y * 0.5 * (1 + torch.erf(y / 2**0.5)))
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, unbiased=False)
    norm = encoder.vision_layernorm
    return (x - mean) / torch.sqrt(var + 1e-12) * norm.weight + norm.bias


@pytest.mark.parametrize("frames", [4, 1])
def test_the_encoder_computes_its_definition(frames):
    encoder = nano().double()
    for p in encoder.parameters():  # biases that are zero could hide
        torch.nn.init.normal_(p, std=0.1)
    clips = torch.randn(2, frames, 3, 224, 224, dtype=torch.float64)
    with torch.no_grad():
        got = encoder(clips)
        assert got.shape == (2, frames * 196, 192)
        torch.testing.assert_close(got, direct(encoder, clips), atol=1e-9, rtol=1e-9)


def test_block_norms_and_the_final_norm_have_their_own_epsilons():
    encoder = nano()
    assert {encoder.blocks[0].norm1.eps, encoder.blocks[-1].norm2.eps} == {1e-6}
    assert encoder.vision_layernorm.eps == 1e-12


def test_tokens_are_frame_after_frame_and_row_after_row():
    encoder = nano()
    encoder.blocks = torch.nn.ModuleList()  # without attention a patch changes only its own token
    clips = torch.zeros(1, 4, 3, 224, 224)
    other = clips.clone()
    other[0, 2, :, 16 * 5 : 16 * 6, 16 * 3 : 16 * 4] = 1
    with torch.no_grad():
        changed = (encoder(clips) != encoder(other)).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [2 * 196 + 5 * 14 + 3]


def test_each_clip_is_encoded_on_its_own():
    encoder, clips = nano(), torch.randn(3, 4, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder(clips)[1:2], encoder(clips[1:2]), atol=1e-5, rtol=1e-5)


def test_a_model_from_the_meta_device_gives_the_same_tokens():
    encoder, clips = nano(), torch.randn(1, 4, 3, 224, 224)
    with torch.device("meta"):
        other = Encoder(NANO).eval()
    other.load_state_dict(encoder.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(encoder(clips), other(clips))


def test_a_cast_to_bfloat16_and_back_keeps_the_positions():
    encoder, clips = nano(), torch.randn(1, 4, 3, 224, 224)
    weights = copy.deepcopy(encoder.state_dict())
    with torch.no_grad():
        want = encoder(clips)
        assert encoder.bfloat16()(clips.bfloat16()).dtype == torch.bfloat16
        encoder.float().load_state_dict(weights)
        assert torch.equal(encoder(clips), want)


def test_positions_are_computed_once():
    encoder, clips = nano(), torch.randn(1, 4, 3, 224, 224)
    with torch.no_grad():
        encoder(clips)
        before = position_table.cache_info()
        encoder(clips)
    assert position_table.cache_info().misses == before.misses
    assert position_table.cache_info().hits == before.hits + 1


def test_training_works_after_positions_were_made_in_inference_mode():
    position_table.cache_clear()
    encoder, clips = nano(), torch.randn(1, 1, 3, 224, 224)
    with torch.inference_mode():
        encoder(clips)
    encoder(clips).square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_compiled_encoder_is_one_graph_that_takes_positions_from_the_cache():
    encoder, clips = nano(), torch.randn(1, 4, 3, 224, 224)
    compiled = torch.compile(encoder, backend="eager", fullgraph=True)
    with torch.no_grad():
        want = encoder(clips)
        before = position_table.cache_info()
        assert torch.equal(compiled(clips), want)
        assert torch.equal(compiled(clips + 1), encoder(clips + 1))
    assert position_table.cache_info().misses == before.misses
    assert position_table.cache_info().hits == before.hits + 2  # tracing, and the eager call


@pytest.mark.parametrize(
    "shape", [(1, 2, 3, 224, 224), (4, 3, 224, 224), (1, 4, 3, 448, 448), (1, 3, 4, 224, 224)]
)
def test_the_encoder_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="clips must be"):
        nano()(torch.zeros(shape))


def test_no_clips_give_no_tokens():
    with torch.no_grad():
        assert nano()(torch.zeros(0, 4, 3, 224, 224)).shape == (0, 784, 192)


def test_the_connector_merges_first_and_projects_what_is_left():
    connector, tokens = nano(Connector), torch.randn(2, 784, 192)
    with torch.no_grad():
        visual, merged = connector(tokens)
        up, down = connector.mlp[0], connector.mlp[2]
        want = F.gelu(merged.tokens @ up.weight.T + up.bias) @ down.weight.T + down.bias
    assert visual.shape == (2, 64, NANO.hidden_size)
    assert merged.sizes.sum(1).tolist() == [784, 784]
    assert merged.assignment.shape == (2, 784)
    torch.testing.assert_close(visual, want)
    assert torch.equal(merged.assignment, merge_tokens(tokens, 64, num_heads=3).assignment)
    members = tokens[0][merged.assignment[0] == 7].mean(0)
    torch.testing.assert_close(merged.tokens[0, 7], members, atol=1e-5, rtol=1e-5)


def test_the_connector_of_the_7b_has_the_official_number_of_parameters():
    with torch.device("meta"):
        connector = Connector(presets["7b-448"])
    assert sum(p.numel() for p in connector.parameters()) == 16_522_240
