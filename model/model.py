"""The whole model: encoder, projector, language model and tokenizer, with weights or without."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hico_kernels import DropPlan
from hico_model.config import Config, presets
from hico_model.encoder import Encoder
from hico_model.errors import UserError
from hico_model.llm import LanguageModel
from hico_model.projector import Connector
from hico_model.prompt import load_tokenizer, nano_tokenizer
from hico_model.weights import initialise, load

if TYPE_CHECKING:
    from hico_model.patched import Patched

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
FIELD_TYPES = {"rms_norm_eps": float, "rope_theta": float, "tie_word_embeddings": bool}  # else int


class VideoChatFlash(nn.Module):
    """`VideoChatFlash(presets["nano"])` has random weights; `from_pretrained` a checkpoint's.

    `encoder`, `projector` and `llm` are the parts, `config` their sizes, `tokenizer` that of the
    language model, and `weights` says in one line where they are from; `trained` tells random ones
    from others. `repetition_penalty` is for answers that ask for no other. Nothing is downloaded.
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
        self.weights, self.trained = f"random weights (seed {seed})", False
        self.repetition_penalty = 1.0
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
        """The model of a checkpoint in `folder`: config.json, tokenizer.json, *.safetensors and, if
        there, generation_config.json.

        config: its sizes; None reads them from config.json.  dtype: None leaves that of the file.
        Raises UserError if something is missing or does not fit.
        """
        model = cls(read_config(folder) if config is None else config, device="meta")
        model.tokenizer = load_tokenizer(folder)
        model.repetition_penalty = read_penalty(folder)
        load(model, folder, device)  # last: it may take minutes
        model.weights, model.trained = str(folder), True
        return model if dtype is None else model.to(dtype)

    def hico_patch(self, plan: DropPlan) -> "Patched":
        """What `hico_kernels.patch` calls: answers drop by `plan` until `remove` on the result."""
        from hico_model.patched import Patched

        return Patched(self, plan)

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
    found = _read_object(file)
    tower = found.get("mm_vision_tower")
    missing = [name for name in LANGUAGE_FIELDS.values() if name not in found]
    if not isinstance(tower, str) or tower not in IMAGE_SIZES or missing:
        why = f"lacks {missing[0]}" if missing else f"has the vision tower {tower!r}"
        known = " or ".join(IMAGE_SIZES)
        raise UserError(f"{file} {why}: only Qwen2 with {known} is supported")
    sizes = {field: found[name] for field, name in LANGUAGE_FIELDS.items()}
    for field, value in sizes.items():
        _check_field(file, LANGUAGE_FIELDS[field], value, FIELD_TYPES.get(field, int))
    config = Config(Path(folder).resolve().name, image_size=IMAGE_SIZES[tower], **sizes)
    _check_heads(file, config)
    return next((p for p in presets.values() if replace(config, name=p.name) == p), config)


def read_penalty(folder: str | Path) -> float:
    """`repetition_penalty` of a checkpoint's generation_config.json; 1 where there is none.

    The rest of that file is about drawing tokens at random.
    """
    file, name = Path(folder) / "generation_config.json", "repetition_penalty"
    if not file.exists():
        return 1.0
    penalty = _read_object(file).get(name, 1.0)
    _check_field(file, name, penalty, float)
    return penalty


def _read_object(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"{file} cannot be read: give the folder of a checkpoint") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file} is damaged: download it again") from e
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged, it has no JSON object: download it again")
    return found


def _check_field(file: Path, name: str, value: Any, kind: type) -> None:
    is_bool = isinstance(value, bool)  # which is an int, too
    right = is_bool if kind is bool else isinstance(value, (int, kind)) and not is_bool
    if not right or (kind is not bool and not 0 < value < math.inf):
        want = "true or false" if kind is bool else f"{kind.__name__} above 0"
        raise UserError(f"{file}: {name} must be {want}, got {value!r}: download it again")


def _check_heads(file: Path, c: Config) -> None:
    if c.hidden_size % (2 * c.num_heads) or c.num_heads % c.num_kv_heads:
        raise UserError(
            f"{file}: {c.num_heads} heads must divide hidden_size {c.hidden_size} into even parts, "
            f"and {c.num_kv_heads} key-value heads the heads: download it again"
        )
