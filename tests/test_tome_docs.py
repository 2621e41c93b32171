"""The examples of docs/tome.md run as printed, on tiny random models."""

import re
from pathlib import Path
from types import SimpleNamespace

import patch_models as tiny
import pytest
import tome_towers as towers
import torch
import transformers
from test_patch_docs import Processor

from hico_kernels.patch.families import FAMILIES
from hico_kernels.patch.prellm import LAYOUTS
from hico_kernels.tome.towers import TOWERS

TEXT = (Path(__file__).parents[1] / "docs" / "tome.md").read_text()
SECTIONS = dict(re.findall(r"^##+ ([^\n]+)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE))
HF = {
    "ViT": "vit",
    "CLIP": "clip",
    "SigLIP": "siglip",
    "SigLIP 2": "siglip2",
    "VideoMAE": "videomae",
    "DINOv2": "dinov2",
    "DINOv2 with registers": "dinov2_registers",
    "DINOv3": "dinov3",
    "InternVL's vision tower": "internvl",
}
PACKED = {
    "Qwen2-VL's vision tower": "qwen2_vl",
    "Qwen2.5-VL's vision tower": "qwen2_5_vl",
    "Qwen3-VL's vision tower": "qwen3_vl",
    "Qwen3.5's vision tower": "qwen3_5",
}
WITH_EXPERTS = {"qwen3_vl_moe", "qwen3_5_moe"}  # as those without, but for the name
TIMM = {
    "timm: ViT": "vit",
    "timm: CLIP": "clip",
    "timm: SigLIP": "siglip",
    "timm: DeiT III": "deit3",
    "timm: DINOv2": "dinov2",
    "timm: EVA-02": "eva02",
    "timm: DINOv3": "dinov3",
}
OTHERS = {
    "In a vision tower",
    "A dense map for what comes after",
    "Qwen-VL: whole groups, and tokens for all of them",
    "What is refused",
    "Towers",
    "In front of a language model",
}
VIDEO = {FAMILIES[kind].name: kind for kind in LAYOUTS}


def run(section, **names):
    code = re.search(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL).group(1)
    exec(compile(code, "tome.md", "exec"), names)
    return names


def test_every_kind_has_an_example():
    assert set(SECTIONS) == {*HF, *PACKED, *TIMM, *VIDEO, *OTHERS}
    assert set(HF.values()) == set(towers.HF) - {"internvl_norms"}
    assert {*PACKED.values(), *WITH_EXPERTS} >= set(towers.PACKED)


def test_every_tower_is_in_the_table():
    table = re.findall(r"^\| (?!class)(.*?) \|", SECTIONS["Towers"], re.MULTILINE)
    named = [name for row in table for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(name for towers in TOWERS.values() for name in towers)


def test_the_example_of_a_tower_runs():
    names = run("In a vision tower")
    assert names["out"].shape == (1, 33, 32)
    assert names["handle"].sizes.sum() == 65
    assert names["dense"].shape == (1, 65, 32)


@pytest.mark.parametrize("section", HF)
def test_the_example_of_a_transformers_tower_runs(section, monkeypatch, capsys):
    kind = towers.HF[HF[section]]
    tower, inputs = towers.tower(kind), towers.inputs(kind)
    model = SimpleNamespace(model=SimpleNamespace(vision_tower=tower))
    for made, what in (
        (type(tower), tower),
        (transformers.AutoModelForImageTextToText, model),
    ):
        monkeypatch.setattr(made, "from_pretrained", lambda name, what=what: what)
    # The class itself: some releases have only a stand-in for it where torchvision is missing.
    processor = SimpleNamespace(from_pretrained=lambda name: lambda images, return_tensors: inputs)
    monkeypatch.setattr("transformers.AutoImageProcessor", processor)
    run(section, images=[])
    assert capsys.readouterr().out.startswith("torch.Size([2, ")


@pytest.mark.parametrize("section", TIMM)
def test_the_example_of_a_timm_tower_runs(section, monkeypatch, capsys):
    timm_towers = pytest.importorskip("test_tome_timm", reason="timm does not import")
    kind = timm_towers.TIMM[TIMM[section]]
    tower = towers.tower(kind)
    monkeypatch.setattr("timm.create_model", lambda name, pretrained: tower)
    run(section, images=towers.inputs(kind)["x"])
    assert capsys.readouterr().out.startswith("torch.Size([2, 7]) torch.Size([2, ")


@torch.no_grad()
def test_the_example_of_a_dense_map_runs():
    model, inputs = tiny.fresh("internvl"), tiny.prompt("internvl")
    stock = model(**inputs).logits
    names = run("A dense map for what comes after", model=model, inputs=inputs)
    assert names["logits"].shape == stock.shape
    assert not torch.equal(names["logits"], stock)
    assert names["handle"].sizes.shape[1] == 1 + 8
    names["hook"].remove()
    with pytest.raises((RuntimeError, ValueError)):
        model(**inputs)
    names["handle"].remove()
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.skipif(tiny.VERSION < (5, 3), reason="token types came with 5.3")
def test_the_example_of_clips_runs(capsys):
    run("In front of a language model")
    assert re.search(r"^0-3 +20 +8$", capsys.readouterr().out, re.MULTILINE)


def with_model(monkeypatch, kind):
    model = tiny.fresh(kind)
    for auto, made in (
        (transformers.AutoModelForImageTextToText, model),
        (transformers.AutoProcessor, Processor(kind)),
    ):
        monkeypatch.setattr(auto, "from_pretrained", lambda *args, made=made, **kwargs: made)


@pytest.mark.parametrize("section", [name for name, kind in PACKED.items() if kind in tiny.MODELS])
def test_the_example_of_a_packed_tower_runs(section, monkeypatch, capsys):
    with_model(monkeypatch, PACKED[section])
    run(section)
    assert capsys.readouterr().out == "torch.Size([24])\n"  # of 48 patches


@pytest.mark.parametrize("section", [name for name, kind in VIDEO.items() if kind in tiny.MODELS])
def test_the_example_of_a_family_runs(section, monkeypatch, capsys):
    with_model(monkeypatch, VIDEO[section])
    run(section)
    assert "KV cache" in capsys.readouterr().out
