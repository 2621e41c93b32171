"""Question -> the token ids before and after the video."""

from collections.abc import Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from hico_model.errors import UserError, shown

VIDEO = "<image>"  # the name of the placeholder in the training data, for videos too
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{content}<|im_end|>\n"
    "<|im_start|>assistant\n"
)


def time_message(duration: float, num_frames: int) -> str:
    """What the model is told about time. duration in seconds."""
    return f"{_lasts(duration, num_frames)} from it."


def long_time_message(duration: float, times: Sequence[float]) -> str:
    """As `time_message`, with the time of each frame in seconds. An option in training."""
    at = ", ".join(str(round(float(t), 1)) for t in times)
    return f"{_lasts(duration, len(times))} at {at} seconds."


def _lasts(duration: float, num_frames: int) -> str:
    return (
        f"The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled"
    )


def chat_prompt(question: str, message: str) -> str:
    """The whole prompt to the byte, with `VIDEO` where the visual tokens go.

    message: one of the time messages. The system line is fixed: the chat templates of some
    checkpoints' tokenizers have another one, which the model was not trained with.
    """
    return _CHAT.replace("{content}", f"{VIDEO}\n{message} {question}")


def check_question(question: str) -> None:
    """Raises UserError unless `question` is text: a tokenizer takes nothing else."""
    try:
        question.encode()
    except UnicodeEncodeError as e:
        at = shown(question[: e.start + 1])
        raise UserError(f"the question is not UTF-8 after {at[:-1]!r}: type it again") from e


class Tokenizer:
    """Text <-> ids for ChatML. Adds no token of its own accord."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self.eos_ids = tuple(tokenizer.token_to_id(t) for t in END_TOKENS)
        if None in self.eos_ids:
            raise UserError(
                f"the tokenizer lacks {END_TOKENS[self.eos_ids.index(None)]}: use the model's own"
            )

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it become themselves."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without the special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def answer(self, ids: Sequence[int]) -> str:
        """What was said: `ids` up to the first end token, without white space around it."""
        end = next((i for i, token in enumerate(ids) if token in self.eos_ids), len(ids))
        return self.decode(ids[:end]).strip()


def tokenize(tokenizer: Tokenizer, prompt: str) -> tuple[list[int], list[int]]:
    """prompt -> ids before the video, ids after it. An `<image>` in the question is plain text."""
    before, _, after = prompt.partition(VIDEO)
    return tokenizer.encode(before), tokenizer.encode(after)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, or what transformers makes of it."""
    file = Path(folder) / "tokenizer.json"
    if file.is_file():
        try:
            found = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # tokenizers raises no narrower class
            raise UserError(f"{file} is damaged: download it again") from e
        return Tokenizer(found)
    from transformers import AutoTokenizer

    try:
        return Tokenizer(
            AutoTokenizer.from_pretrained(folder, local_files_only=True).backend_tokenizer
        )
    except (OSError, ValueError, AttributeError) as e:
        raise UserError(
            f"no tokenizer in {folder}: copy tokenizer.json from the checkpoint into it"
        ) from e


def nano_tokenizer() -> Tokenizer:
    """One token per byte and the three special ones, 259 ids: for models with random weights."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return Tokenizer(tokenizer)
