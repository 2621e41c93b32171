"""video -> frames -> clips -> encoder -> merge -> projector -> LLM layers { drop } -> answer."""

from os import PathLike

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hico_kernels import DropPlan, merge_tokens
from hico_model.clips import to_clips
from hico_model.config import SAMPLINGS
from hico_model.generate import generate
from hico_model.llm import Prompt
from hico_model.model import VideoChatFlash
from hico_model.prompt import chat_prompt, check_question, time_message, tokenize
from hico_model.sampling import frame_indices
from hico_model.trace import Answer, Recorder, Stage, Trace
from hico_model.video import probe, read_frames

__all__ = ["Answer", "Stage", "Trace", "answer"]

TOKENS_PER_BATCH = 50_000  # encoder tokens: fills a GPU, about 1 GB of activations in UMT-L
PROGRESS_AFTER = 3.0  # seconds


@torch.no_grad()
def answer(
    video: str | PathLike[str],
    question: str,
    model: VideoChatFlash,
    *,
    max_frames: int | None = None,
    sampling: str = SAMPLINGS[0],
    plan: DropPlan | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    repetition_penalty: float | None = None,
    seed: int = 0,
) -> Answer:
    """Answer a question about a video file.

    max_frames: look at no more than that (None: the config's).  sampling: how many frames, a `rule`
    of `frame_indices`.  plan: where visual tokens are dropped (None: the config's; `DropPlan({})`
    for nowhere).  repetition_penalty: None takes the model's own.  The rest: as in `generate`.

    Unlike in VideoChat-Flash, a `max_frames` below the config's `min_frames` is obeyed. Raises
    UserError if the video cannot be read or an option is out of range, ValueError if the plan has
    layers that the model lacks.
    """
    config, record = model.config, Recorder(model.device)
    plan = config.plan if plan is None else plan
    plan.check_layers(config.num_layers)
    if repetition_penalty is None:
        repetition_penalty = model.repetition_penalty
    check_question(question)

    info = probe(video)
    most = config.max_frames if max_frames is None else max_frames
    least = min(config.min_frames, most // config.frames_per_clip * config.frames_per_clip)
    limits = {"min_frames": least, "max_frames": most}
    indices = frame_indices(info.num_frames, info.fps, rule=sampling, **limits)
    frames = read_frames(video, indices, size=config.image_size)
    record("frames", frames.shape, 0)

    visual, assignment, sizes = encode(frames, model, record)

    prompt = chat_prompt(question, time_message(info.duration, len(indices)))
    before, after = tokenize(model.tokenizer, prompt)
    (new_tokens,), prefill = generate(
        model.llm,
        [Prompt(before, visual, after)],
        plan,
        max_new_tokens=max_new_tokens,
        eos_ids=model.tokenizer.eos_ids,
        temperature=temperature,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        watch=lambda name, hidden: record(name, hidden.shape, len(hidden)),
    )
    record("decode", (len(new_tokens),), len(new_tokens))

    trace = Trace(
        stages=record.stages,
        video=info,
        times=[i / info.fps for i in indices],
        frames=frames,
        assignment=assignment.cpu(),
        sizes=sizes.cpu(),
        kept={layer: own.cpu() for layer, (own,) in prefill.kept.items()},
        scores={layer: own.cpu() for layer, (own,) in prefill.scores.items()},
        num_visual=len(visual),
        num_text=len(before) + len(after),
        layer_tokens=[rows for (rows,) in prefill.cache.prompt_lengths],
        kv_bytes=prefill.cache.bytes,
        new_tokens=new_tokens,
        prompt=prompt,
    )
    return Answer(model.tokenizer.answer(new_tokens), trace)


def encode(
    frames: np.ndarray, model: VideoChatFlash, record: Recorder
) -> tuple[Tensor, Tensor, Tensor]:
    """frames [F, S, S, 3] uint8 -> visual tokens [N * K, D], and the merge that made them.

    That is the assignment [N, T] and the sizes [N, K], both int32, of the N = F / 4 clips. They go
    through encoder and merge in batches, whose size does not grow with the video.
    """
    config, parts = model.config, []
    batch = max(1, TOKENS_PER_BATCH // config.patches_per_frame // config.frames_per_clip)
    total = len(frames) // config.frames_per_clip
    # Of a terminal only, and not for what is done in a moment.
    with tqdm(total=total, unit="clip", delay=PROGRESS_AFTER, disable=None, leave=False) as bar:
        for i in range(0, total, batch):
            chunk = frames[i * config.frames_per_clip : (i + batch) * config.frames_per_clip]
            clips = to_clips(chunk, config.image_size, config.frames_per_clip)
            clips = clips.to(model.device, model.dtype)
            record("clips", clips.shape, 0)
            tokens = model.encoder(clips)
            record("encoder", tokens.shape, tokens.shape[:2].numel())
            merged = merge_tokens(tokens, config.tokens_per_clip, num_heads=config.merge_heads)
            record("merge", merged.tokens.shape, merged.sizes.numel())
            visual = model.projector.mlp(merged.tokens)
            record("projector", visual.shape, visual.shape[:2].numel())
            parts.append((visual.flatten(0, 1), merged.assignment, merged.sizes))
            bar.update(len(clips))
    visual, assignment, sizes = (torch.cat(part) for part in zip(*parts, strict=True))
    return visual, assignment, sizes
