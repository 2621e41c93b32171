"""A run as one HTML file that needs nothing else: what was merged, what survived, what it saved."""

import base64
import html
import io
import json
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hico_model import report
from hico_model.errors import shown
from hico_model.report import TIMES, Run
from hico_model.trace import Trace

MAX_CLIPS = 16  # shown with their frames, evenly spread
SHOWN_SIZE = 224  # pixels of a frame on the page
QUALITY = 80  # of its JPEG


def render(run: Run) -> str:
    """The page. Loads nothing from anywhere; the numbers are in its JSON block."""
    blob = json.dumps(page_data(run), ensure_ascii=False, separators=(",", ":"))
    template = Path(__file__).with_name("data").joinpath("page.html").read_text(encoding="utf-8")
    title = html.escape(f"hico: {run.question}")
    # "<" as an escape: no text in the data can end the block
    parts = {"%TITLE%": title, "%DATA%": blob.replace("<", "\\u003c")}
    # In one pass, so that a question which contains %DATA% stays a question.
    return shown(re.sub("|".join(parts), lambda found: parts[found[0]], template))


def survived(trace: Trace) -> Tensor:
    """[num_visual] int64: how many drops each visual token came through."""
    level = torch.zeros(trace.num_visual, dtype=torch.int64)
    for kept in trace.kept.values():
        level[kept.cpu()] += 1
    return level


def tokens_per_place(trace: Trace, drops: int) -> Tensor:
    """Tokens that came through `drops` drops, by where they are from: [clips, patches] float64.

    A token counts 1 in all, in equal parts for its patches; patches are frame after frame.
    """
    assignment = trace.assignment.long().cpu()
    alive = (survived(trace) >= drops).view(trace.sizes.shape)
    return (alive / trace.sizes.cpu().double()).gather(1, assignment)


def page_data(run: Run) -> dict:
    """What the page shows, as JSON."""
    trace, config = run.answer.trace, run.config
    stages = _stages(run)
    video, frames = trace.video, len(trace.times)
    table = report.stage_table(trace)
    first, last = stages[0]["tokens"], stages[-1]["tokens"]
    headline = f"{trace.assignment.numel():,} patches become {first:,} tokens"
    if trace.kept:
        headline += f", {last:,} reach the last layers"
    return {
        "about": f"{run.video} · {video.duration:.1f} s · {video.width} {TIMES} {video.height} · "
        f"{frames} frames · model {config.name}",
        "question": run.question,
        "answer": report.answer(run),
        "trained": run.trained,
        "weights": run.weights
        if run.trained
        else f"{run.weights}: "
        "the answer means nothing, and neither does which tokens the text asked for.",
        "headline": headline,
        "funnel": _funnel(run, stages),
        "duration": video.duration,
        "aspect": video.width / video.height,
        "times": [round(t, 2) for t in trace.times],
        "tokens_per_clip": config.tokens_per_clip,
        "grid": round(config.patches_per_frame**0.5),
        "stages": stages,
        "frame_scale": max(stages[0]["frames"]),
        "time_lead": f"Tokens left per clip of {config.frames_per_clip} frames and, below, "
        "per frame; on the right, from where in the picture.",
        "clips": _clips(run),
        "table": {
            "head": report.HEAD,
            "rows": table.rows,
            "shares": table.shares,
            "note": report.table_note(trace),
        },
        "savings": [
            {"title": title, "cases": [_case(c, group[0]) for c in group]}
            for title, group in report.savings(run).items()
        ],
        "footer": [run.credit] * bool(run.credit)
        + [f"Weights: {run.weights}. Times are of this one run."],
    }


def _stages(run: Run) -> list[dict]:
    """After merging and after each drop: tokens by clip, by frame and by place in the picture."""
    trace = run.answer.trace
    names = ["merged", *(f"after {s.name}" for s in trace.stages if s.name.startswith("drop "))]
    out = []
    for drops, name in enumerate(names):
        parts = tokens_per_place(trace, drops).view(len(trace.times), -1)
        clips = parts.view(len(trace.assignment), -1).sum(1)
        out.append(
            {
                "name": name,
                "tokens": round(float(clips.sum())),
                "clips": [round(v) for v in clips.tolist()],
                "frames": [round(v, 2) for v in parts.sum(1).tolist()],
                "map": [round(v, 3) for v in parts.sum(0).tolist()],
            }
        )
    return out


def _funnel(run: Run, stages: list[dict]) -> list[dict]:
    trace, config = run.answer.trace, run.config
    clips, patches = trace.assignment.shape
    size = f"{config.image_size} {TIMES} {config.image_size}"
    first, *drops = stages

    def step(name: str, tokens: int, *notes: str) -> dict:
        return {"name": name, "value": f"{tokens:,}", "tokens": tokens, "notes": notes}

    out = [
        step(
            "frames",
            len(trace.times),
            f"{size} pixels",
            f"{clips} clip{'s' * (clips > 1)} of {config.frames_per_clip}",
        )
        | {"tokens": 0},
        step("encoder", clips * patches, "patches", f"{patches:,} a clip"),
        step("merge", first["tokens"], "tokens", f"{config.tokens_per_clip} a clip"),
    ]
    for layer, stage in zip(trace.kept, drops, strict=True):
        rule = stage["name"].removeprefix("after ")
        out.append(
            step(
                rule,
                stage["tokens"],
                f"from layer {layer} on",
                f"{stage['tokens'] / clips:.0f} a clip",
            )
        )
    return out


def _clips(run: Run) -> list[dict]:
    """Up to MAX_CLIPS clips: frames, the token of each patch, and each token's fate and colour."""
    trace, config = run.answer.trace, run.config
    count, length = len(trace.assignment), config.frames_per_clip
    shown = np.unique(np.linspace(0, count - 1, min(MAX_CLIPS, count)).round().astype(int)).tolist()
    level = survived(trace).view(trace.sizes.shape)
    out = []
    for i in shown:
        frames = np.asarray(trace.frames[i * length : (i + 1) * length])
        assignment = trace.assignment[i].long().cpu()
        out.append(
            {
                "index": i,
                "times": [round(t, 2) for t in trace.times[i * length : (i + 1) * length]],
                "images": [_jpeg(f) for f in frames],
                "assignment": _base64(assignment.numpy().astype("<u2").tobytes()),
                "level": level[i].tolist(),
                "colors": _base64(
                    _mean_colors(frames, assignment, trace.sizes[i].cpu(), config.patch_size)
                ),
            }
        )
    return out


def _mean_colors(frames: np.ndarray, assignment: Tensor, sizes: Tensor, patch: int) -> bytes:
    """RGB of every token, one byte each: the mean of its patches in frames [F, S, S, 3]."""
    count, side = len(frames), frames.shape[1] // patch
    pixels = torch.from_numpy(frames.astype(np.float32))
    mean = pixels.view(count, side, patch, side, patch, 3).mean((2, 4)).view(-1, 3)
    total = torch.zeros(len(sizes), 3).index_add_(0, assignment, mean)
    return (total / sizes[:, None]).round().to(torch.uint8).numpy().tobytes()


def _case(case: report.Case, first: report.Case) -> dict:
    def quantity(name: str, unit: str) -> dict:
        value, to = getattr(case, name), getattr(first, name)
        return {"value": value, "text": report.si(value, unit), "ratio": report.ratio(value, to)}

    return {
        "label": case.label,
        "kv": quantity("kv_bytes", "B"),
        "flops": quantity("flops", "FLOP"),
    }


def _jpeg(frame: np.ndarray) -> str:
    image, out = Image.fromarray(frame), io.BytesIO()
    if image.width != SHOWN_SIZE:
        image = image.resize((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.LANCZOS)
    image.save(out, "JPEG", quality=QUALITY, optimize=True)
    return f"data:image/jpeg;base64,{_base64(out.getvalue())}"


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
