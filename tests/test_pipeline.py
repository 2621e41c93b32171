"""A video and a question through the whole model, and what the trace says about it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("av")

from hico_model import DropPlan, TextTopK, Uniform, UserError, VideoChatFlash, answer, presets
from hico_model import pipeline as pipeline_module
from hico_model import trace as trace_module
from hico_model.clips import to_clips
from hico_model.model import read_config, read_penalty
from hico_model.prompt import nano_tokenizer
from hico_model.video import probe, read_frames
from hico_model.weights import official_state

VIDEO = Path(pipeline_module.__file__).with_name("data") / "big_buck_bunny.mp4"
QUESTION = "What is the rabbit doing?"
TINY = replace(
    presets["nano"],
    vision_layers=1,
    num_layers=6,
    plan=DropPlan({1: Uniform(0.75), 4: TextTopK(0.25)}, "renumber"),
)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Everything is small: more threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model():
    return VideoChatFlash(TINY)


@pytest.fixture(scope="module")
def result(model):
    return answer(VIDEO, QUESTION, model, max_frames=24, max_new_tokens=5)


def test_stages_are_named_and_counted(result):
    trace = result.trace
    n, text = 6 * 64, trace.num_text
    assert [(s.name, s.shape, s.tokens) for s in trace.stages] == [
        ("frames", (24, 224, 224, 3), 0),
        ("clips", (6, 4, 3, 224, 224), 0),
        ("encoder", (6, 784, 192), 6 * 784),
        ("merge", (6, 64, 192), n),
        ("projector", (6, 64, 128), n),
        ("LLM layers 0-0", (n + text, 128), n + text),
        ("drop @1 uniform", (288 + text, 128), 288 + text),
        ("LLM layers 1-3", (288 + text, 128), 288 + text),
        ("drop @4 text", (96 + text, 128), 96 + text),
        ("LLM layers 4-5", (96 + text, 128), 96 + text),
        ("decode", (len(trace.new_tokens),), len(trace.new_tokens)),
    ]
    assert all(s.seconds > 0 for s in trace.stages)


def test_the_trace_holds_together(model, result):
    trace = result.trace
    assert trace.video == probe(VIDEO)
    assert trace.num_visual == 384
    assert trace.layer_tokens == [trace.num_text + v for v in (384, 288, 288, 288, 96, 96)]
    room = [rows + 5 for rows in trace.layer_tokens]
    assert trace.kv_bytes == sum(room) * 2 * 2 * 32 * 4
    assert trace.assignment.shape == (6, 784)
    assert trace.assignment.dtype == trace.sizes.dtype == torch.int32
    for assignment, sizes in zip(trace.assignment, trace.sizes, strict=True):
        assert torch.equal(assignment.bincount(minlength=64), sizes.long())
    assert [len(trace.kept[layer]) for layer in (1, 4)] == [288, 96]
    assert torch.isin(trace.kept[4], trace.kept[1]).all()
    assert list(trace.scores) == [4]
    best = trace.scores[4].topk(96).indices.sort().values
    assert torch.equal(trace.kept[4], trace.kept[1][best])
    assert result.text == model.tokenizer.answer(trace.new_tokens)
    assert "and 24 frames are uniformly sampled from it. " + QUESTION in trace.prompt
    text = trace.prompt.replace("<image>", "")
    assert trace.num_text == len(model.tokenizer.encode(text))


def test_times_are_those_of_the_frames(result):
    trace = result.trace
    indices = [round(t * trace.video.fps) for t in trace.times]
    assert len(indices) == 24
    assert np.array_equal(trace.frames, read_frames(VIDEO, indices, size=224))
    assert trace.times == sorted(trace.times)
    assert 0 <= trace.times[0] < 60 / 24 < 60 - 60 / 24 < trace.times[-1] < 60.1


def test_the_same_question_gets_the_same_answer(model, result):
    again = answer(str(VIDEO), QUESTION, VideoChatFlash(TINY), max_frames=24, max_new_tokens=5)
    assert again.trace.new_tokens == result.trace.new_tokens
    assert torch.equal(again.trace.scores[4], result.trace.scores[4])
    other = answer(VIDEO, "Is it night?", model, max_frames=24, max_new_tokens=5)
    assert not torch.equal(other.trace.scores[4], result.trace.scores[4])
    assert VideoChatFlash(TINY, seed=1).weights == "random weights (seed 1)"


def test_batches_of_clips_change_nothing(model, result, monkeypatch):
    monkeypatch.setattr(pipeline_module, "TOKENS_PER_BATCH", 4 * 784)
    again = answer(VIDEO, QUESTION, model, max_frames=24, max_new_tokens=5)
    named = [(s.name, s.shape, s.tokens) for s in again.trace.stages]
    assert named == [(s.name, s.shape, s.tokens) for s in result.trace.stages]
    assert torch.equal(again.trace.assignment, result.trace.assignment)
    torch.testing.assert_close(again.trace.scores[4], result.trace.scores[4])


def test_merge_and_projection_are_those_of_the_connector(model, result):
    record = trace_module.Recorder(model.device)
    with torch.no_grad():
        visual, _, sizes = pipeline_module.encode(result.trace.frames[:8], model, record)
        want, merged = model.projector(model.encoder(to_clips(result.trace.frames[:8], 224)))
    assert torch.equal(visual, want.flatten(0, 1))
    assert torch.equal(sizes, merged.sizes)


@pytest.mark.parametrize(("max_frames", "frames"), [(None, 64), (6, 4)], ids=["default", "few"])
def test_a_limit_of_frames_is_obeyed(model, max_frames, frames):
    """VideoChat-Flash looks at no fewer than 64 frames, whatever the limit."""
    trace = answer(VIDEO, QUESTION, model, max_frames=max_frames, max_new_tokens=1).trace
    assert len(trace.times) == frames
    assert f"and {frames} frames are" in trace.prompt


@pytest.mark.parametrize(
    ("sampling", "frames"), [("dynamic_fps1", 56), ("paper", 60), ("dense", 72)]
)
def test_the_rule_of_sampling_is_obeyed(model, monkeypatch, sampling, frames):
    """60 s: a frame per second in groups of 8, in groups of 4, and 15 a second up to the limit."""
    monkeypatch.setattr(model, "config", replace(TINY, min_frames=4))
    few = {"max_frames": 72, "max_new_tokens": 1}
    assert len(answer(VIDEO, QUESTION, model, sampling=sampling, **few).trace.times) == frames


def test_a_plan_replaces_that_of_the_config(model):
    few = {"max_frames": 4, "max_new_tokens": 1}
    trace = answer(VIDEO, QUESTION, model, plan=DropPlan({}), **few).trace
    assert trace.kept == {}
    assert [s.name for s in trace.stages[5:]] == ["LLM layers 0-5", "decode"]
    plan = DropPlan({0: Uniform(0.5), 5: TextTopK(2)})
    trace = answer(VIDEO, QUESTION, model, plan=plan, **few).trace
    names = ["drop @0 uniform", "LLM layers 0-4", "drop @5 text", "LLM layers 5-5", "decode"]
    assert [s.name for s in trace.stages[5:]] == names
    assert {layer: len(kept) for layer, kept in trace.kept.items()} == {0: 32, 5: 2}


def test_options_reach_the_generation(model, monkeypatch):
    def tokens(**options):
        return answer(VIDEO, QUESTION, model, max_frames=4, **options).trace.new_tokens

    greedy = tokens(max_new_tokens=8)
    assert tokens(max_new_tokens=8, temperature=2.0, top_p=1e-6) == greedy
    drawn = tokens(max_new_tokens=8, temperature=2.0)
    assert drawn != greedy
    assert tokens(max_new_tokens=8, temperature=2.0, seed=1) != drawn
    weakened = tokens(max_new_tokens=8, repetition_penalty=1e6)
    assert len(set(weakened)) == 8 > len(set(greedy))
    monkeypatch.setattr(model, "repetition_penalty", 1e6)
    assert tokens(max_new_tokens=8) == weakened
    assert tokens(max_new_tokens=8, repetition_penalty=1.0) == greedy
    monkeypatch.setattr(model.tokenizer, "eos_ids", (greedy[0],))
    assert tokens(max_new_tokens=8) == []


def test_what_cannot_work_is_said_before_the_video_is_read(model, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        answer(tmp_path / "no.mp4", QUESTION, model)
    with pytest.raises(ValueError, match="layer 6 is out of range"):
        answer(tmp_path / "no.mp4", QUESTION, model, plan=DropPlan({6: Uniform(0.5)}))
    with pytest.raises(UserError, match="URLs are not read"):
        answer("https://example.org/a.mp4", QUESTION, model)
    with pytest.raises(UserError, match="path of the video is empty"):
        answer("", QUESTION, model)
    with pytest.raises(UserError, match="not UTF-8 after 'a'"):
        answer(tmp_path / "no.mp4", "a\udcff", model)
    with pytest.raises(UserError, match="dynamic_fps1, paper, dense, got 'all'"):
        answer(VIDEO, QUESTION, model, sampling="all")
    with pytest.raises(UserError, match="max_frames"):
        answer(VIDEO, QUESTION, model, max_frames=3)


def test_the_model_is_the_same_after_an_answer(model):
    names = {name: set(vars(m)) for name, m in model.named_modules()}
    before = {name: value.clone() for name, value in official_state(model).items()}
    answer(VIDEO, QUESTION, model, max_frames=4, max_new_tokens=2)
    assert {name: set(vars(m)) for name, m in model.named_modules()} == names
    assert all(torch.equal(v, before[name]) for name, v in official_state(model).items())


def test_half_precision_runs_through():
    model = VideoChatFlash(TINY, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    trace = answer(VIDEO, QUESTION, model, max_frames=4, max_new_tokens=2).trace
    assert trace.scores[4].dtype == torch.float32
    assert trace.kv_bytes == sum(n + 2 for n in trace.layer_tokens) * 2 * 2 * 32 * 2


def test_a_stage_in_batches_adds_up(monkeypatch):
    clock = iter([10.0, 11.0, 13.0, 16.0])
    monkeypatch.setattr(trace_module.time, "perf_counter", lambda: next(clock))
    record = trace_module.Recorder(torch.device("cpu"))
    record("encoder", (2, 8, 4), 16)
    record("merge", (2, 1, 4), 2)
    record("encoder", (3, 8, 4), 24)
    first, second = record.stages
    assert (first.name, first.shape, first.tokens, first.seconds) == ("encoder", (5, 8, 4), 40, 4)
    assert second.seconds == 2


def write_config(folder, config, tower):
    sizes = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_word_embeddings,
        "mm_vision_tower": tower,
    }
    (folder / "config.json").write_text(json.dumps(sizes))


def write_tokenizer(folder):
    nano_tokenizer()._tokenizer.save(str(folder / "tokenizer.json"))


def test_a_checkpoint_gives_the_answers_of_its_model(model, tmp_path):
    trained = VideoChatFlash(TINY, seed=7)
    trained.tokenizer._tokenizer.add_tokens(["rabbit"])  # which the tokenizer of `model` spells
    trained.tokenizer._tokenizer.save(str(tmp_path / "tokenizer.json"))
    state = {name: value.clone() for name, value in official_state(trained).items()}
    save_file(state, tmp_path / "model.safetensors")
    loaded = VideoChatFlash.from_pretrained(tmp_path, TINY)
    assert loaded.weights == str(tmp_path)
    assert loaded.trained > trained.trained
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    few = {"max_frames": 4, "max_new_tokens": 3}
    want, got, other = (answer(VIDEO, QUESTION, m, **few).trace for m in (trained, loaded, model))
    assert torch.equal(got.scores[4], want.scores[4])
    assert got.new_tokens == want.new_tokens
    assert got.num_text == want.num_text == other.num_text - 5
    assert not torch.equal(got.scores[4], other.scores[4])
    half = VideoChatFlash.from_pretrained(tmp_path, TINY, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("preset", "tower"),
    [
        ("2b-448", "umt-hd-large"),
        ("7b-448", "umt-hd-large"),
        ("7b-224", "umt-large"),
        ("7b-1m-224", "umt-large"),
    ],
)
def test_a_published_config_is_its_preset(tmp_path, preset, tower):
    write_config(tmp_path, presets[preset], tower)
    assert read_config(tmp_path) is presets[preset]


def test_another_config_is_named_after_its_folder(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    write_config(folder, replace(presets["7b-448"], num_layers=30), "umt-hd-large")
    assert read_config(folder) == replace(presets["7b-448"], name="mine", num_layers=30)


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        VideoChatFlash.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        VideoChatFlash.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"mm_vision_tower": "umt-large"}')
    with pytest.raises(UserError, match="lacks hidden_size"):
        VideoChatFlash.from_pretrained(tmp_path)
    write_config(tmp_path, presets["7b-448"], "internvideo2")
    with pytest.raises(UserError, match="vision tower 'internvideo2': only Qwen2 with umt-large"):
        VideoChatFlash.from_pretrained(tmp_path)
    write_config(tmp_path, presets["7b-448"], "umt-hd-large")
    with pytest.raises(UserError, match="no tokenizer in"):
        VideoChatFlash.from_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    with pytest.raises(UserError, match="no weights in"):
        VideoChatFlash.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[]", "null", '"x"', "3", "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_object_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name} is damaged"):
        (read_config if name == "config.json" else read_penalty)(tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("mm_vision_tower", ["umt-large"], r"vision tower \['umt-large'\]"),
        ("mm_vision_tower", None, "vision tower None"),
        ("hidden_size", "3584", "hidden_size must be int above 0, got '3584'"),
        ("hidden_size", 3584.0, "hidden_size must be int above 0"),
        ("hidden_size", 3590, "28 heads must divide hidden_size 3590"),
        ("hidden_size", 28 * 3, "into even parts"),
        ("num_hidden_layers", 0, "num_hidden_layers must be int above 0, got 0"),
        ("num_hidden_layers", True, "num_hidden_layers must be int above 0, got True"),
        ("num_attention_heads", None, "num_attention_heads must be int"),
        ("num_key_value_heads", 3, "3 key-value heads the heads"),
        ("num_key_value_heads", -4, "num_key_value_heads must be int above 0, got -4"),
        ("vocab_size", [1], "vocab_size must be int"),
        ("rms_norm_eps", "1e-6", "rms_norm_eps must be float above 0"),
        ("rope_theta", float("inf"), "rope_theta must be float above 0, got inf"),
        ("rope_theta", float("nan"), "rope_theta must be float above 0, got nan"),
        ("tie_word_embeddings", 1, "tie_word_embeddings must be true or false, got 1"),
    ],
)
def test_a_wrong_field_of_a_config_is_named(tmp_path, name, value, says):
    write_config(tmp_path, presets["7b-448"], "umt-hd-large")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    with pytest.raises(UserError, match=says) as e:
        read_config(tmp_path)
    assert "\n" not in str(e.value)


def test_a_whole_number_will_do_for_rope_theta(tmp_path):
    write_config(tmp_path, replace(presets["7b-448"], rope_theta=1_000_000), "umt-hd-large")
    assert read_config(tmp_path) is presets["7b-448"]


def test_the_penalty_of_a_checkpoint_is_its_models(tmp_path):
    """And nothing else of generation_config.json: published ones would draw at random."""
    write_tokenizer(tmp_path)
    trained = VideoChatFlash(TINY, seed=7)
    save_file(
        {n: v.clone() for n, v in official_state(trained).items()}, tmp_path / "model.safetensors"
    )
    file, few = tmp_path / "generation_config.json", {"max_frames": 4, "max_new_tokens": 8}
    assert VideoChatFlash.from_pretrained(tmp_path, TINY).repetition_penalty == 1
    file.write_text(json.dumps({"do_sample": True, "temperature": 9.0, "repetition_penalty": 1.5}))
    loaded = VideoChatFlash.from_pretrained(tmp_path, TINY)
    assert loaded.repetition_penalty == 1.5
    own, free = (answer(VIDEO, QUESTION, m, **few).trace.new_tokens for m in (loaded, trained))
    assert own == answer(VIDEO, QUESTION, trained, repetition_penalty=1.5, **few).trace.new_tokens
    assert own != free
    file.write_text('{"repetition_penalty": "1.05"}')
    with pytest.raises(UserError, match=r"penalty must be float above 0, got '1\.05'"):
        VideoChatFlash.from_pretrained(tmp_path, TINY)


@pytest.mark.parametrize("preset", presets.values(), ids=presets)
def test_parameters_are_counted_to_a_thousandth(preset):
    built = sum(p.numel() for p in VideoChatFlash(preset, device="meta").parameters())
    assert preset.parameters == pytest.approx(built, rel=1e-2 if preset.name == "nano" else 1e-3)


def test_importing_the_package_is_light():
    code = (
        "import sys, hico_model; print(*{'transformers', 'av', 'decord', 'PIL'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""
    import hico_model

    for name in hico_model.__all__:
        assert getattr(hico_model, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        hico_model.nonsense  # noqa: B018
