"""A patched model elsewhere than on the CPU makes nothing on the CPU.

Fake tensors of another device stand in for a GPU: they have shapes and places but no values, and
refuse what mixes devices. What a prompt holds is counted on the host before, as it is in a call.
"""

import copy
import dataclasses

import patch_models as tiny
import pytest
import tome_towers as towers
import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import hico_kernels
from hico_kernels import DropPlan, TextTopK, Uniform, tome
from hico_kernels.patch.families import take_apart, why_not_packed
from hico_kernels.patch.rows import Prompt

ELSEWHERE = "lazy:0"  # a device that this torch has a name for, and nothing else
LENGTH, STEPS = 48, 3
PLAN = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
# One of each way; Gemma 4 and models with experts ask for values in their own code.
FAMILIES = ("qwen2_vl", "qwen3_vl", "llava_onevision", "gemma3", "qwen3_5")
TOWERS = ("vit", "siglip", "dinov2_registers", "internvl_norms")


def away(mode, tensor):
    """A fake of it on the other device."""
    with unset_fake_temporarily():
        fake = mode.from_tensor(tensor.detach())
    with mode:
        return fake.to(ELSEWHERE)


def emptied(mode, module):
    """A copy on the other device."""
    module = copy.deepcopy(module)
    for part in module.modules():
        for table in (part._parameters, part._buffers, vars(part)):
            for name, value in list(table.items()):
                if isinstance(value, torch.nn.Parameter):
                    table[name] = torch.nn.Parameter(away(mode, value), requires_grad=False)
                elif torch.is_tensor(value):
                    table[name] = away(mode, value)
    return module


@pytest.fixture
def mode():
    return FakeTensorMode()


@pytest.mark.parametrize("rows", ["padded", "packed"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name in tiny.MODELS])
def test_reading_and_decoding_stay_on_the_device(name, rows, mode, monkeypatch):
    model = emptied(mode, tiny.model(name, torch.float32))
    if rows == "packed" and why_not_packed(take_apart(model)) is not None:
        pytest.skip("refused, with the reason")
    mask, visual = torch.ones(2, LENGTH + STEPS, dtype=torch.long), torch.zeros(2, LENGTH).bool()
    mask[1, :4], visual[:, 6:38] = 0, True
    counted = Prompt.count(visual, mask[:, :LENGTH].bool())
    fields = {f.name: getattr(counted, f.name) for f in dataclasses.fields(counted)}
    fields = {k: away(mode, v) if torch.is_tensor(v) else v for k, v in fields.items()}
    monkeypatch.setattr(Prompt, "count", classmethod(lambda cls, *_: Prompt(**fields)))
    mask, visual = away(mode, mask), away(mode, visual)
    decoder = tiny.decoder(model)
    with mode, torch.no_grad(), hico_kernels.compress(model, PLAN, rows) as handle:
        handle.announce(visual, [4, 4])
        embeds = torch.randn(2, LENGTH + STEPS, decoder.config.hidden_size, device=ELSEWHERE)
        cache, start = None, 0
        for end in range(LENGTH, LENGTH + STEPS + 1):
            given = {"inputs_embeds": embeds[:, start:end], "attention_mask": mask[:, :end]}
            out = decoder(**given, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
            assert out.last_hidden_state.device == torch.device(ELSEWHERE)
    assert handle.report().rows[-1] < LENGTH


@pytest.mark.parametrize("name", TOWERS)
def test_towers_that_merge_stay_on_the_device(name, mode):
    kind = towers.HF[name]
    tower = emptied(mode, towers.tower(kind).float())
    (pixels,) = towers.inputs(kind).values()
    pixels = away(mode, pixels.float())
    tome.patch(tower, r=4)
    with mode, torch.no_grad():
        out = towers.last(tower(pixels))
    assert out.device == torch.device(ELSEWHERE)
