"""The page and the report say what the trace says."""

import base64
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from hico_kernels.flops import rows_per_layer
from hico_model import VideoChatFlash, answer, page, presets, report
from hico_model.cli import DEMO_VIDEO

QUESTION = 'Is <b>this</b> "it"? %DATA% %TITLE%</script><script>alert(1)</script>'
NEW_TOKENS = 2


@pytest.fixture(scope="module")
def run() -> report.Run:
    model = VideoChatFlash(presets["nano"])
    plan = model.config.plan
    return report.Run(
        answer=answer(str(DEMO_VIDEO), QUESTION, model, plan=plan, max_new_tokens=NEW_TOKENS),
        question=QUESTION,
        video="video.mp4",
        config=model.config,
        plan=plan,
        weights=model.weights,
        trained=model.trained,
        value_bytes=4,
        credit="a credit line",
    )


@pytest.fixture(scope="module")
def html(run) -> str:
    return page.render(run)


@pytest.fixture(scope="module")
def data(html) -> dict:
    blocks = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert len(blocks) == 1
    return json.loads(blocks[0])


def test_the_page_needs_nothing_else(html):
    assert "http://" not in html
    assert "https://" not in html
    assert not re.search(r"<link|@import|<iframe|<object|fetch\(|XMLHttpRequest", html)
    for url in re.findall(r"""(?:src|href|url)\s*[=(:]\s*["']?([\w/.:]+)""", html):
        assert url.startswith("data:") or not re.search(r"[/:]", url), url
    assert len(html.encode()) < 2.5e6


def test_text_from_outside_stays_text(html, data):
    assert html.count("<script") == 2
    assert "<b>this</b>" not in html
    assert data["question"] == QUESTION
    assert html.count("%DATA%") == html.count("%TITLE%") == 2  # in the title and in the data


def test_counts_are_those_of_the_trace(run, data):
    trace = run.answer.trace
    kept = [trace.num_visual, *(len(v) for v in trace.kept.values())]
    assert kept == [1024, 768, 256]
    assert [s["tokens"] for s in data["stages"]] == kept
    assert [s["tokens"] for s in data["funnel"]] == [0, trace.assignment.numel(), *kept]
    per_clip = run.config.tokens_per_clip
    for stage, indices in zip(data["stages"][1:], trace.kept.values(), strict=True):
        counts = torch.bincount(indices // per_clip, minlength=len(trace.assignment))
        assert stage["clips"] == counts.tolist()
    for stage in data["stages"]:
        assert sum(stage["frames"]) == pytest.approx(stage["tokens"], abs=1)
        assert sum(stage["map"]) == pytest.approx(stage["tokens"], abs=1)
    assert len(data["times"]) == len(trace.times) == len(data["stages"][0]["frames"])


def test_assignment_and_fate_round_trip(run, data):
    trace = run.answer.trace
    assert [c["index"] for c in data["clips"]] == list(range(len(trace.assignment)))
    kept = [set(v.tolist()) for v in trace.kept.values()]
    for clip in data["clips"]:
        group = np.frombuffer(base64.b64decode(clip["assignment"]), "<u2")
        assert group.tolist() == trace.assignment[clip["index"]].tolist()
        first = clip["index"] * run.config.tokens_per_clip
        levels = [sum(first + t in k for k in kept) for t in range(run.config.tokens_per_clip)]
        assert clip["level"] == levels
        assert len(base64.b64decode(clip["colors"])) == 3 * run.config.tokens_per_clip
        assert len(clip["images"]) == len(clip["times"]) == run.config.frames_per_clip


def test_a_token_may_come_through_ten_drops(run):
    trace = run.answer.trace
    kept = {layer: torch.tensor([0]) for layer in range(10)}
    many = replace(run, answer=replace(run.answer, trace=replace(trace, kept=kept)))
    level = page._clips(many)[0]["level"]
    assert level == [10] + [0] * (run.config.tokens_per_clip - 1)


def test_names_that_are_no_utf8_can_be_written(run):
    named = page.render(replace(run, video="a\udcff.mp4", weights="/b\udcff"))
    assert "a\ufffd.mp4" in named
    assert "/b\ufffd" in named
    named.encode()


def test_colours_are_means_of_the_patches(run, data):
    trace, clip = run.answer.trace, data["clips"][3]
    frames = np.asarray(trace.frames[12:16], dtype=np.float64)
    patches = frames.reshape(4, 14, 16, 14, 16, 3).mean((2, 4)).reshape(-1, 3)
    members = trace.assignment[3].numpy() == 5
    colour = list(base64.b64decode(clip["colors"])[15:18])
    assert colour == pytest.approx(patches[members].mean(0), abs=0.51)


def test_savings_start_with_what_was_run(run):
    trace, plan, config = run.answer.trace, run.plan, run.config
    counted = rows_per_layer(trace.num_visual, trace.num_text, 28, plan.counts(trace.num_visual))
    assert counted == trace.layer_tokens
    (ours, full, longva, longvila), real = report.savings(run).values()
    assert [c.tokens for c in (ours, full, longva, longvila)] == [1024, 1024, 9216, 12544]
    kv_bytes = config.decoder.kv_bytes
    assert ours.kv_bytes == kv_bytes(counted, value_bytes=4)
    with_answer = [rows + NEW_TOKENS for rows in counted]  # the cache has room for it
    assert trace.kv_bytes == kv_bytes(with_answer, value_bytes=4)
    assert ours.kv_bytes < full.kv_bytes < longva.kv_bytes < longvila.kv_bytes
    assert ours.flops < full.flops < longva.flops < longvila.flops
    assert real[1].kv_bytes == (1024 + report.REAL_TEXT) * 57_344


def test_shares_of_the_time_add_up(run):
    table = report.stage_table(run.answer.trace)
    assert sum(table.shares) == pytest.approx(1)
    assert [r[0] for r in table.rows] == [*(s.name for s in run.answer.trace.stages), "total"]


def test_report_is_aligned_and_colours_only_when_asked(run):
    plain = report.text(run, colour=False)
    assert "\033" not in plain
    assert re.sub(r"\033\[\d+m", "", report.text(run, colour=True)) == plain
    lines = plain.splitlines()
    assert len({len(line) for line in lines[: len(run.answer.trace.stages) + 4]}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (57_344, "57.3 kB"), (999_900, "1.00 MB")],
)
def test_si(value, text):
    assert report.si(value, "B") == text


def test_printable_escapes_what_a_terminal_would_obey():
    assert report.printable("a\x1b[31m\tb\nc\x00é") == "a\\x1b[31m\\tb\nc\\x00é"
