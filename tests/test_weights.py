import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hico_kernels import merge_tokens
from hico_model.config import presets
from hico_model.encoder import Encoder
from hico_model.errors import UserError
from hico_model.projector import Connector
from hico_model.weights import initialise, load, official_state

transformers = pytest.importorskip("transformers")

TINY = dataclasses.replace(
    presets["nano"], vision_layers=1, num_layers=2, vocab_size=32, tie_word_embeddings=False
)
TIED = dataclasses.replace(TINY, tie_word_embeddings=True)


def qwen2(c):
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            tie_word_embeddings=False,
        )
    )


class Model(nn.Module):
    """Laid out as the model of the package; a tied language model has no head of its own."""

    def __init__(self, config):
        super().__init__()
        self.encoder = Encoder(config)
        self.projector = Connector(config)
        self.llm = qwen2(config)
        if config.tie_word_embeddings:
            self.llm.lm_head = None


def on_meta(config):
    with torch.device("meta"):
        return Model(config)


def checkpoint(c, dtype=torch.bfloat16):
    """Tensors of a checkpoint of config `c`, with the names spelled out, not asked of the model."""
    g = torch.Generator().manual_seed(1)
    w, d, m = c.vision_width, c.hidden_size, c.intermediate_size
    kv = d // c.num_heads * c.num_kv_heads
    shapes = {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    shapes["lm_head.weight"] = (c.vocab_size, d)
    for i in range(c.num_layers):
        at = f"model.layers.{i}."
        shapes |= {at + f"{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        shapes |= {at + f"mlp.{n}_proj.weight": (m, d) for n in ("gate", "up")}
        shapes |= {at + "mlp.down_proj.weight": (d, m), at + "self_attn.o_proj.weight": (d, d)}
        for n, rows in (("q", d), ("k", kv), ("v", kv)):
            shapes[at + f"self_attn.{n}_proj.weight"] = (rows, d)
            shapes[at + f"self_attn.{n}_proj.bias"] = (rows,)
    shapes |= {"model.mm_projector.mlp.0.weight": (d, w), "model.mm_projector.mlp.0.bias": (d,)}
    shapes |= {"model.mm_projector.mlp.2.weight": (d, d), "model.mm_projector.mlp.2.bias": (d,)}
    root = "model.vision_tower.vision_tower.encoder."
    shapes[root + "patch_embed.proj.weight"] = (w, 3, 1, 16, 16)
    shapes[root + "patch_embed.proj.bias"] = (w,)
    norms = [root + "vision_layernorm"]
    for i in range(c.vision_layers):
        at = f"{root}blocks.{i}."
        norms += [at + "norm1", at + "norm2"]
        shapes |= {at + "attn.qkv.weight": (3 * w, w)}
        shapes |= {at + f"attn.{n}": (w,) for n in ("q_bias", "v_bias", "proj.bias")}
        shapes |= {at + "attn.proj.weight": (w, w), at + "mlp.fc1.weight": (4 * w, w)}
        shapes |= {at + "mlp.fc1.bias": (4 * w,), at + "mlp.fc2.weight": (w, 4 * w)}
        shapes |= {at + "mlp.fc2.bias": (w,)}
    shapes |= {f"{n}.{p}": (w,) for n in norms for p in ("weight", "bias")}
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


def write(folder, tensors, shards=1):
    """One file, or shards dealt out name by name, with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {n: f"model-{i % shards + 1}.safetensors" for i, n in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_the_7b_has_the_646_tensors_of_the_official_index():
    state = official_state(on_meta(presets["7b-448"]))
    names = set(checkpoint_names(presets["7b-448"]))
    assert set(state) == names
    assert len(names) == 646
    assert sum(t.numel() for t in state.values()) == 7_922_617_856


def checkpoint_names(config):
    """Names as `checkpoint` has them, from a small one with as many layers."""
    small = dataclasses.replace(
        TINY, vision_layers=config.vision_layers, num_layers=config.num_layers, vocab_size=1
    )
    small = dataclasses.replace(small, vision_width=2, hidden_size=4, intermediate_size=1)
    return checkpoint(small)


@pytest.mark.parametrize("shards", [1, 3])
def test_every_tensor_lands_under_its_name_with_its_dtype(tmp_path, shards):
    tensors = checkpoint(TINY)
    model = on_meta(TINY)
    load(model, write(tmp_path, tensors, shards))
    state = official_state(model)
    assert state.keys() == tensors.keys()
    for name, value in tensors.items():
        assert state[name].dtype == torch.bfloat16
        assert torch.equal(state[name], value), name
    assert all(not p.is_meta for p in model.parameters())


def test_a_loaded_model_computes_with_the_checkpoint(tmp_path):
    tensors = {n: t * 0.1 for n, t in checkpoint(TINY, dtype=torch.float32).items()}
    model = on_meta(TINY)
    load(model, write(tmp_path, tensors))
    other = Model(TINY)
    for name, value in official_state(other).items():
        value.copy_(tensors[name])
    clips = torch.randn(1, 4, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got, want = (m.projector(m.encoder(clips))[0] for m in (model, other))
    assert torch.equal(got, want)


@pytest.mark.parametrize("with_head", [True, False])
def test_a_tied_head_may_be_absent_or_repeat_the_embedding(tmp_path, with_head):
    tensors = checkpoint(TIED)
    tensors.pop("lm_head.weight")
    if with_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    model = on_meta(TIED)
    load(model, write(tmp_path, tensors, 2))
    embedding = official_state(model)["model.embed_tokens.weight"]
    assert torch.equal(embedding, tensors["model.embed_tokens.weight"])


def test_a_head_of_its_own_is_refused_by_a_tied_model(tmp_path):
    with pytest.raises(UserError, match="head of its own"):
        load(on_meta(TIED), write(tmp_path, checkpoint(TIED)))


def test_an_untied_head_must_be_there(tmp_path):
    tensors = checkpoint(TINY)
    del tensors["lm_head.weight"]
    with pytest.raises(UserError, match=r"lacks lm_head\.weight:"):
        load(on_meta(TINY), write(tmp_path, tensors))


def test_missing_unknown_and_misshapen_tensors_are_named_and_nothing_is_replaced(tmp_path):
    norm, spare = (
        "model.layers.1.input_layernorm.weight",
        "model.vision_tower.vision_tower.cls_token",
    )
    cases = {
        "lacks model.layers.1.input": lambda t: t.pop(norm),
        "has unknown model.vision_tower.vision_tower.cls_token": lambda t: t.update(
            {spare: torch.zeros(1)}
        ),
        "has other shapes for model.norm.weight": lambda t: t.update(
            {"model.norm.weight": torch.zeros(3)}
        ),
    }
    for i, (words, spoil) in enumerate(cases.items()):
        folder = tmp_path / str(i)
        folder.mkdir()
        tensors = checkpoint(TINY)
        spoil(tensors)
        model = on_meta(TINY)
        with pytest.raises(UserError, match=words):
            load(model, write(folder, tensors))
        assert all(p.is_meta for p in model.parameters())


def test_many_missing_names_are_counted_rather_than_listed(tmp_path):
    tensors = {n: t for n, t in checkpoint(TINY).items() if "layers.0.self_attn" not in n}
    with pytest.raises(UserError, match=r"lacks (\S+, ){2}\S+ and 4 more: is it"):
        load(on_meta(TINY), write(tmp_path, tensors))


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no weights in .*model\.safetensors"):
        load(on_meta(TINY), tmp_path)


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1, "b": "c"}}']
)
def test_a_damaged_index_is_named(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=r"index\.json is damaged: download it again$"):
        load(on_meta(TINY), tmp_path)


def test_a_missing_or_damaged_shard_is_named(tmp_path):
    write(tmp_path, checkpoint(TINY), 2)
    shard = tmp_path / "model-2.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing or damaged"):
        load(on_meta(TINY), tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors is missing or damaged"):
        load(on_meta(TINY), tmp_path)


def test_random_weights_depend_on_the_seed_and_the_name_alone():
    a, b, c = (Model(TINY) for _ in range(3))
    initialise(a, 5)
    torch.manual_seed(123)
    initialise(b, 5)
    initialise(c, 6)
    weight = "encoder.blocks.0.attn.qkv.weight"
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not torch.equal(a.get_parameter(weight), c.get_parameter(weight))
    deeper = Model(dataclasses.replace(TINY, vision_layers=2))
    initialise(deeper, 5)
    assert torch.equal(a.get_parameter(weight), deeper.get_parameter(weight))


def test_random_weights_are_these_numbers():
    linear = nn.Linear(4, 2)
    initialise(linear, 0)
    assert linear.bias.tolist() == [0, 0]
    want = [
        [0.6565648, 0.3842898, -0.8179132, -0.1571575],
        [0.7872024, -0.621955, 0.4983602, -0.0147649],
    ]
    torch.testing.assert_close(linear.weight.data, torch.tensor(want), atol=1e-6, rtol=0)


def test_random_matrices_keep_the_scale_of_what_goes_through_them():
    encoder = Encoder(presets["nano"])
    initialise(encoder, 0)
    with torch.no_grad():
        out = encoder.blocks[0].mlp.fc1(torch.randn(500, 192))
    assert out.std().item() == pytest.approx(1, abs=0.05)
    assert encoder.blocks[0].norm1.weight.unique().tolist() == [1]


def left_inside(pixels, groups):
    """Share of the variance of pixels [T, D] that lies within `groups` [T]."""
    sums = torch.zeros(64, pixels.shape[1]).index_add_(0, groups, pixels)
    means = sums / torch.bincount(groups, minlength=64)[:, None].clamp(min=1)
    within, total = pixels - means[groups], pixels - pixels.mean(0)
    return (within.square().sum() / total.square().sum()).item()


def test_an_untrained_encoder_groups_by_the_picture_and_not_by_position():
    g = torch.Generator().manual_seed(0)
    colours = torch.randn(12, 3, generator=g)
    where = torch.randint(
        12, (1, 4, 14, 14), generator=g
    )  # colours strewn about: position says nothing
    clips = colours[where].permute(0, 1, 4, 2, 3)
    clips = clips.repeat_interleave(16, -1).repeat_interleave(16, -2)
    encoder = Encoder(presets["nano"])
    initialise(encoder, 0)
    with torch.no_grad():
        groups = merge_tokens(encoder(clips), 64, num_heads=3).assignment[0].long()
    pixels = colours[where.flatten()]
    mixed = groups[torch.randperm(784, generator=g)]
    assert left_inside(pixels, groups) < 0.1 < 0.8 < left_inside(pixels, mixed)
