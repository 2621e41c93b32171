"""The examples of docs/patching.md run as printed, on tiny random models of their families."""

import re
from pathlib import Path

import patch_models as tiny
import pytest
import transformers

import hico_kernels
from hico_kernels.patch.families import FAMILIES

TEXT = (Path(__file__).parents[1] / "docs" / "patching.md").read_text()
SECTIONS = dict(re.findall(r"^### ([^\n]+)\n(.*?)(?=^##)", TEXT, re.DOTALL | re.MULTILINE))


def code(text):
    return re.search(r"```python\n(.*?)```", text, re.DOTALL).group(1)


class Inputs(dict):
    """What a processor returns."""

    def to(self, device):
        return self


class Processor:
    """Makes the same random prompt of any messages."""

    def __init__(self, name):
        self.name = name

    def apply_chat_template(self, messages, **settings):
        assert [part["type"] for part in messages[0]["content"]][-1] == "text"
        return Inputs(tiny.prompt(self.name))


def test_every_family_has_an_example():
    assert set(SECTIONS) == {family.name for family in FAMILIES.values()} | {"VideoChat-Flash"}


@pytest.mark.skipif(tiny.VERSION < (5, 3), reason="token types came with 5.3")
def test_the_first_example_runs(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code(TEXT), "patching.md", "exec"), names)
    out = capsys.readouterr().out
    assert re.search(r"^0 +44 +32\n1-2 +36 +24\n3 +20 +8$", out, re.MULTILINE)
    assert "'supported': True" in out
    whole = TEXT.partition("## Merging as well")[2]
    exec(compile(code(whole), "patching.md", "exec"), names)
    assert re.search(r"^0 +20 +8$\n^1-2 +18 +6$\n^3 +14 +2$", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.skipif(tiny.VERSION < (5, 4), reason="towers know flash attention by its exact name")
def test_the_example_of_a_vision_tower_runs():
    example = code(TEXT.partition("## One attention call")[2])
    names = {"model": tiny.fresh("qwen2_vl"), "inputs": tiny.prompt("qwen2_vl")}
    exec(compile(example, "patching.md", "exec"), {"hico_kernels": hico_kernels, **names})
    assert names["model"].model.visual.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind in tiny.MODELS])
def test_the_example_of_a_family_runs(kind, monkeypatch, capsys):
    model = tiny.fresh(kind)
    for auto, made in (
        (transformers.AutoModelForImageTextToText, model),
        (transformers.AutoProcessor, Processor(kind)),
    ):
        monkeypatch.setattr(auto, "from_pretrained", lambda *args, made=made, **kwargs: made)
    exec(compile(code(SECTIONS[FAMILIES[kind].name]), "patching.md", "exec"), {})
    assert "KV cache" in capsys.readouterr().out


def test_the_example_of_our_own_model_runs(monkeypatch, capsys):
    pytest.importorskip("av")
    hico_model = pytest.importorskip("hico_model")
    video = Path(hico_model.__file__).with_name("data") / "big_buck_bunny.mp4"
    model = hico_model.VideoChatFlash(hico_model.presets["nano"])
    monkeypatch.setattr(hico_model.VideoChatFlash, "from_pretrained", lambda folder: model)
    example = code(SECTIONS["VideoChat-Flash"]).replace("holiday.mp4", str(video))
    exec(compile(example, "patching.md", "exec"), {})
    assert "KV cache" in capsys.readouterr().out
