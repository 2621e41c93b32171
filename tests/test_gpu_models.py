"""Patched models and towers on a CUDA device are those of the CPU; and faster paths keep to them.

One family runs here on the CPU too, beside itself, so that the tests cannot rot without a GPU.
"""

import copy

import patch_models as tiny
import pytest
import tome_towers as towers
import torch

import hico_kernels
from hico_kernels import DropPlan, PreLLM, TextTopK, Uniform, tome

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ("cuda",) if torch.cuda.is_available() else ()
PLAN = DropPlan({0: Uniform(0.75), 1: TextTopK(0.5), 3: TextTopK(2)})
# Float64 runs references; float32 our kernels, whose sums have another order on each device.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
ALWAYS = "llava_onevision"


@pytest.fixture(autouse=True)
def _convolutions_in_full_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_devices(names, always):
    """(device, name): all on CUDA, one of them on the CPU."""
    cases = [("cpu", always), *((device, name) for device in DEVICES for name in names)]
    return pytest.mark.parametrize(("device", "name"), cases)


def moved(inputs, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in inputs.items()}


def both(name, dtype, device):
    """A model here and on the device."""
    return tiny.fresh(name, dtype), tiny.fresh(name, dtype).to(device)


def logits(out):
    return torch.stack(out.logits).cpu()


rows = pytest.mark.parametrize("rows", ["padded", "packed"])
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@rows
@on_devices(tiny.MODELS, ALWAYS)
def test_a_patched_model_says_the_same(device, name, rows, dtype):
    here, there = both(name, dtype, device)
    inputs = tiny.prompt(name, (0, 3), dtype=dtype)
    with hico_kernels.compress(here, PLAN, rows) as handle:
        want, kept = tiny.generate(here, inputs), handle.kept
    with hico_kernels.compress(there, PLAN, rows) as handle:
        got = tiny.generate(there, moved(inputs, device))
        for layer, left in handle.kept.items():
            assert all(map(torch.equal, [x.cpu() for x in left], kept[layer]))
        report = handle.report()
    assert report.milliseconds.keys() >= {"scoring", "compacting", "attention"}
    assert torch.equal(got.sequences.cpu(), want.sequences)
    torch.testing.assert_close(logits(got), logits(want), rtol=0, atol=TOLERANCE[dtype])


@rows
@on_devices(tiny.MODELS, ALWAYS)
def test_in_bfloat16_a_patched_model_is_near_the_masked_reference(device, name, rows):
    model = tiny.fresh(name, torch.bfloat16).to(device)
    found = hico_kernels.selfcheck(model, rows=rows)
    assert found["error"] <= found["allowed"]


@on_devices(tiny.MODELS, ALWAYS)
def test_keeping_everything_changes_no_bit(device, name):
    model = tiny.fresh(name, torch.float32).to(device)
    inputs = moved(tiny.prompt(name, (0, 3), dtype=torch.float32), device)
    want = tiny.generate(model, inputs)
    with hico_kernels.compress(model, DropPlan({0: Uniform(1.0), 2: TextTopK(1.0)})):
        got = tiny.generate(model, inputs)
    assert tiny.difference(got, want) == 0


MERGING = ("qwen2_vl", "qwen3_vl", "llava_onevision", "internvl")


@dtypes
@on_devices(MERGING, ALWAYS)
def test_merging_and_dropping_say_the_same(device, name, dtype):
    plan = DropPlan(PLAN.drops, pre_llm=PreLLM(merge_to=7, per_frames=2))
    here, there = both(name, dtype, device)
    inputs = tiny.prompt(name, (0, 3), dtype=dtype)
    with hico_kernels.compress(here, plan):
        want = tiny.generate(here, inputs)
    with hico_kernels.compress(there, plan):
        got = tiny.generate(there, moved(inputs, device))
    torch.testing.assert_close(logits(got), logits(want), rtol=0, atol=TOLERANCE[dtype])


@on_devices(("qwen2_vl", "llava_onevision"), ALWAYS)
def test_gradients_are_the_same(device, name):
    inputs = tiny.prompt(name, (0, 3))
    found = []
    for model in both(name, torch.float64, device):
        given = moved(inputs, model.device)
        with hico_kernels.compress(model.train(), PLAN):
            model(**given, labels=given["input_ids"], use_cache=False).loss.backward()
        named = model.named_parameters()
        found.append({n: w.grad.cpu() for n, w in named if w.grad is not None})
    assert found[0].keys() == found[1].keys()
    for weight, want in found[0].items():
        assert (found[1][weight] - want).norm() <= 1e-5 * want.norm() + 1e-12, weight


@CUDA
def test_a_compiled_language_model_says_the_same():
    """By Inductor, in one graph."""
    plain = tiny.fresh(ALWAYS, torch.float32).cuda()
    compiled = copy.deepcopy(plain)
    tiny.decoder(compiled).compile(fullgraph=True)
    inputs = moved(tiny.prompt(ALWAYS, (0, 3), dtype=torch.float32), "cuda")
    with hico_kernels.compress(plain, PLAN), hico_kernels.compress(compiled, PLAN), torch.no_grad():
        want = plain(**inputs, use_cache=False).logits
        got = compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[torch.float32])


KINDS = towers.HF | towers.PACKED


@dtypes
@on_devices(KINDS, "siglip")
def test_a_tower_that_merges_says_the_same(device, name, dtype):
    kind = KINDS[name]
    r = 1 if name in towers.PACKED else 4
    outputs = []
    for place in ("cpu", device):
        tower = towers.tower(kind).to(place, dtype)
        given = towers.inputs(kind)
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
        handle = tome.patch(tower, r=r)
        with torch.no_grad():
            outputs.append(towers.last(tower(**moved(given, place))).cpu())
        handle.remove()
    want, got = outputs
    torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE[dtype] * float(want.abs().max()))


@CUDA
def test_the_command_line_answers_on_the_device(capsys):
    pytest.importorskip("av")
    from hico_model.cli import DEMO_VIDEO, main

    question = ["ask", str(DEMO_VIDEO), "What is there?", "--device", "cuda"]
    assert main([*question, "--frames", "16", "--max-new-tokens", "2"]) == 0
    assert "merge" in capsys.readouterr().out
