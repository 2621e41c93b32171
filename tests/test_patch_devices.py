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
from hico_kernels.patch.devices import moved
from hico_kernels.patch.rows import Prompt

ELSEWHERE, SECOND = "lazy:0", "lazy:1"  # devices that this torch has names for, and nothing else
LENGTH, STEPS = 48, 3
PLAN = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
# One of each way; Gemma 4 and models with experts ask for values in their own code.
FAMILIES = ("qwen2_vl", "qwen3_vl", "llava_onevision", "gemma3", "qwen3_5")
TOWERS = ("vit", "siglip", "dinov2_registers", "internvl_norms")


def away(mode, value):
    """Fakes on the other device of the tensors in it."""
    if dataclasses.is_dataclass(value):
        parts = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return type(value)(**{name: away(mode, part) for name, part in parts.items()})
    if not torch.is_tensor(value):
        return value
    with unset_fake_temporarily():
        fake = mode.from_tensor(value.detach())
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
    if tiny.VERSION < (5, 23):
        pytest.skip("this transformers asks masks for values, and such a device for autocast")
    return FakeTensorMode()


def spread(mode, model, monkeypatch):
    """The later half of the layers on a second device, as accelerate has it: each layer's forward
    fetches what it is given. So do the last norm and the rotary tables, which stay on the first.
    """
    decoder = tiny.decoder(model)
    layers = decoder.layers[len(decoder.layers) // 2 :]
    there = {module for layer in layers for module in layer.modules()}
    for module in there:
        for name, value in module._parameters.items():
            if value is not None:
                with mode:
                    other = torch.nn.Parameter(value.data.to(SECOND), requires_grad=False)
                module._parameters[name] = other
    for module in (*decoder.layers, decoder.norm, decoder.rotary_emb):
        place = torch.device(SECOND if module in there else ELSEWHERE)

        def fetch(*args, stock=module.forward, place=place, **kwargs):
            return stock(*moved(args, place), **moved(kwargs, place))

        monkeypatch.setattr(module, "forward", fetch)


def read_and_decode(mode, model, rows, plan, monkeypatch):
    """The patched model's last state."""
    mask, visual = torch.ones(2, LENGTH + STEPS, dtype=torch.long), torch.zeros(2, LENGTH).bool()
    mask[1, :4], visual[:, 6:38] = 0, True
    counted = away(mode, Prompt.count(visual, mask[:, :LENGTH].bool()))
    monkeypatch.setattr(Prompt, "count", classmethod(lambda cls, *_: counted))
    mask, visual = away(mode, mask), away(mode, visual)
    decoder = tiny.decoder(model)
    with mode, torch.no_grad(), hico_kernels.compress(model, plan, rows) as handle:
        handle.announce(visual, [4, 4])
        embeds = torch.randn(2, LENGTH + STEPS, decoder.config.hidden_size, device=ELSEWHERE)
        cache, start = None, 0
        for end in range(LENGTH, LENGTH + STEPS + 1):
            given = {"inputs_embeds": embeds[:, start:end], "attention_mask": mask[:, :end]}
            out = decoder(**given, past_key_values=cache, use_cache=True)
            cache, start = out.past_key_values, end
    assert handle.report().rows[-1] < LENGTH
    return out.last_hidden_state


rows = pytest.mark.parametrize("rows", ["padded", "packed"])
families = pytest.mark.parametrize("name", [name for name in FAMILIES if name in tiny.MODELS])


@rows
@families
def test_reading_and_decoding_stay_on_the_device(name, rows, mode, monkeypatch):
    model = emptied(mode, tiny.model(name, torch.float32))
    state = read_and_decode(mode, model, rows, PLAN, monkeypatch)
    assert state.device == torch.device(ELSEWHERE)


BEHIND = DropPlan({2: TextTopK(0.5), 3: Uniform(0.5)})  # on the second device alone
RENUMBERED = DropPlan(PLAN.drops, positions="renumber")


@rows
@pytest.mark.parametrize("plan", [PLAN, BEHIND], ids=["both", "behind"])
@families
def test_layers_may_be_on_two_devices(name, rows, plan, mode, monkeypatch):
    model = emptied(mode, tiny.model(name, torch.float32))
    spread(mode, model, monkeypatch)
    state = read_and_decode(mode, model, rows, plan, monkeypatch)
    assert state.device == torch.device(ELSEWHERE)


@rows
def test_renumbered_positions_follow_to_the_second_device(rows, mode, monkeypatch):
    model = emptied(mode, tiny.model("llava_onevision", torch.float32))
    spread(mode, model, monkeypatch)
    read_and_decode(mode, model, rows, RENUMBERED, monkeypatch)


def test_a_copy_to_the_host_is_waited_for(monkeypatch):
    waits, stock = {}, torch.Tensor.to

    def to(self, device, non_blocking=False):
        waits[device.type] = not non_blocking
        return stock(self, "cpu")

    monkeypatch.setattr(torch.Tensor, "to", to)
    for device in ("cpu", "cuda"):
        moved([torch.ones(1)], torch.device(device))
    assert waits == {"cpu": True, "cuda": False}


def test_under_tensor_parallelism_text_guided_drops_are_refused(monkeypatch):
    model = tiny.model("llava_onevision")
    monkeypatch.setattr(model, "_tp_size", 2, raising=False)
    with hico_kernels.compress(model, DropPlan({1: Uniform(0.5)})):
        pass
    with pytest.raises(hico_kernels.patch.UnsupportedModel, match=r"drops\[1\]: under tensor"):
        hico_kernels.patch(model, DropPlan({1: TextTopK(0.5)}))


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
