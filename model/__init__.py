"""A thin VideoChat-Flash on top of `hico_kernels`: ask a question about a video."""

import warnings
from typing import TYPE_CHECKING, Any

with warnings.catch_warnings():  # torch says on two lines that numpy is missing; `hico` on one
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    import torch  # noqa: F401

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_model.config import Config, presets
from hico_model.errors import UserError

if TYPE_CHECKING:
    from hico_model.model import VideoChatFlash
    from hico_model.pipeline import answer

__all__ = [
    "Config",
    "DropPlan",
    "TextTopK",
    "Uniform",
    "UserError",
    "VideoChatFlash",
    "answer",
    "presets",
]


def __getattr__(name: str) -> Any:
    """`VideoChatFlash` and `answer` import transformers and a video decoder: only when used."""
    if name == "VideoChatFlash":
        from hico_model.model import VideoChatFlash

        return VideoChatFlash
    if name == "answer":
        from hico_model.pipeline import answer

        return answer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
