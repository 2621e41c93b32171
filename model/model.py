"""The whole model: encoder, projector, language model and tokenizer, with weights or without."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from hico_model.config import Config, presets
from hico_model.encoder import Encoder
from hico_model.errors import UserError
from hico_model.llm import LanguageModel
from hico_model.projector import Connector
from hico_model.prompt import load_tokenizer, nano_tokenizer
from hico_model.weights import initialise, load

IMAGE_SIZES = {"umt-large": 224, "umt-hd-large": 448}  # pixels, by mm_vision_tower
LANGUAGE_FIELDS = {  # of Config, and their names in config.json
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "max_positions": "max_position_embeddings",
    "tie_word_embeddings": "tie_word_embeddings",
}


class VideoChatFlash(nn.Module):
    """`VideoChatFlash(presets["nano"])` has random weights; `from_pretrained` a checkpoint's.

    `encoder`, `projector` and `llm` are the parts, `config` their sizes, `tokenizer` that of the
    language model, and `weights` says in one line where they are from. Nothing is downloaded.
    """

    def __init__(
        self,
        config: Config,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        super().__init__()
        with torch.device("meta"):  # memory once, in the right dtype and place
            self.encoder = Encoder(config)
            self.projector = Connector(config)
            self.llm = LanguageModel(config)
        self.config = config
        self.tokenizer = nano_tokenizer()
        self.weights = f"random weights (seed {seed})"
        self.eval().to(dtype)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            initialise(self, seed)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        config: Config | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> "VideoChatFlash":
        """The model of a checkpoint in `folder`: config.json, tokenizer.json, *.safetensors.

        config: its sizes; None reads them from config.json.  dtype: None leaves that of the file.
        Raises UserError if something is missing or does not fit.
        """
        model = cls(read_config(folder) if config is None else config, device="meta")
        load(model, folder, device)
        model.tokenizer = load_tokenizer(folder)
        model.weights = str(folder)
        return model if dtype is None else model.to(dtype)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.llm.model.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.llm.model.norm.weight.dtype


def read_config(folder: str | Path) -> Config:
    """Sizes from a checkpoint's config.json: a preset, or else named after the folder."""
    file = Path(folder) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{file} cannot be read: give the folder of a checkpoint") from e
    except ValueError as e:
        raise UserError(f"{file} is damaged: download it again") from e
    tower = found.get("mm_vision_tower")
    missing = [name for name in LANGUAGE_FIELDS.values() if name not in found]
    if tower not in IMAGE_SIZES or missing:
        why = f"lacks {missing[0]}" if missing else f"has the vision tower {tower!r}"
        known = " or ".join(IMAGE_SIZES)
        raise UserError(f"{file} {why}: only Qwen2 with {known} is supported")
    sizes = {field: found[name] for field, name in LANGUAGE_FIELDS.items()}
    config = Config(Path(folder).resolve().name, image_size=IMAGE_SIZES[tower], **sizes)
    return next((p for p in presets.values() if replace(config, name=p.name) == p), config)
