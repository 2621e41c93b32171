"""Measuring the papers' tables: sizes, stages, and what is said of one that does not fit."""

import pytest
import torch

pytest.importorskip("transformers")

from bench import measured
from hico_kernels import DropPlan
from hico_model.paper_tables import TABLE1


def test_the_systems_have_the_papers_tokens_and_published_sizes():
    real, nano = (measured.systems(device) for device in ("cuda", "cpu"))
    tokens = {line.model: line.tokens_per_frame for line in TABLE1}
    assert real["longva"].tokens_per_frame == tokens["LongVA"]
    assert real["longvila"].tokens_per_frame == tokens["LongVILA"]
    assert real["videochat_flash"].tokens_per_frame == 16
    assert real["longva"].config.decoder.parameters == 7_615_616_512  # Qwen2-7B
    llama = real["longvila"].config.decoder
    bias = llama.layers * (llama.hidden + 2 * llama.kv_width)
    assert llama.parameters - bias == 8_030_261_248  # Llama-3-8B, which has no bias
    for name, system in nano.items():
        assert system.tokens_per_frame == real[name].tokens_per_frame // 8
        assert system.plan == real[name].plan
        assert system.config.num_layers == 28
    assert real["videochat_flash_drop"].plan.drops
    assert not real["videochat_flash"].plan.drops


def test_a_gpu_measures_every_length_and_a_cpu_what_takes_minutes():
    every = {(name, n) for name in measured.systems("cuda") for n in (64, 256, 1000, 10_000)}
    on_gpu = measured.cases("cuda", timed=True)
    assert set(on_gpu) == every
    assert on_gpu.index(("longvila", 256)) < on_gpu.index(("videochat_flash", 10_000))
    there = measured.cases("cpu", timed=True)
    assert set(there) == every - {("longva", 10_000), ("longvila", 10_000)}
    assert {n for _, n in measured.cases("cpu", timed=False)} == {64}


def test_the_stages_add_up_to_the_first_token():
    found = measured.first_token(measured.systems("cpu")["videochat_flash_drop"], 16, "cpu")
    stages = ("clips_s", "encode_s", "merge_s", "project_s", "prefill_s", "drop_s")
    assert all(found[stage] > 0 for stage in stages)
    assert sum(found[stage] for stage in stages) == pytest.approx(found["first_token_s"], rel=0.01)
    assert found["frames_per_s"] == pytest.approx(16 / found["first_token_s"], rel=0.01)
    assert found["decode_tokens_per_s"] > 0
    assert found["peak_gb"] is None  # not known of a CPU


def test_a_plan_takes_the_place_of_the_systems_own():
    system = measured.systems("cpu")["videochat_flash_drop"]
    assert measured.first_token(system, 16, "cpu", plan=DropPlan({}))["drop_s"] == 0
    fewer = measured.first_token(system, 16, "cpu")["kv_gb"]
    assert fewer < measured.first_token(system, 16, "cpu", plan=DropPlan({}))["kv_gb"]


def test_what_does_not_fit_is_a_result(monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(measured, "_warm_up", full)
    found = measured.first_token(measured.systems("cpu")["longva"], 64, "cpu")
    assert found["oom_at_gb"] == 80
    assert "first_token_s" not in found


@pytest.mark.parametrize(("total", "fraction"), [(140e9, 80 / 140), (40e9, 1.0)])
def test_the_process_gets_no_more_than_the_papers_card_has(monkeypatch, total, fraction):
    given = []
    properties = type("Properties", (), {"total_memory": total})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", given.append)
    measured.limit_memory()
    assert given == [pytest.approx(fraction)]
