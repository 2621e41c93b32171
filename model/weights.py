"""Weights: random ones for a model without a checkpoint, and those of the published checkpoints."""

import json
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from hico_model.errors import UserError

# Attribute of the model -> prefix of its names in a checkpoint; the language model's have none.
PREFIXES = {
    "encoder": "model.vision_tower.vision_tower.encoder.",
    "projector": "model.mm_projector.",
    "llm": "",
}
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
# Of an untrained nano on three clips, the 64 merged groups leave 12, 33 and 20 % of the pixels'
# variance inside at a gain of 1, where the position table weighs more, and 11, 26 and 12 % at 4.
PATCH_GAIN = 4.0


@torch.no_grad()
def initialise(module: nn.Module, seed: int = 0) -> None:
    """Random weights in place, from `seed` and each parameter's name in `module` and shape alone.

    Matrices are uniform with standard deviation 1 / sqrt(inputs), norms one, biases zero. Uniform:
    that takes only the generator's bits and a product, so every CPU gives the same numbers. Drawn
    on the CPU in float32.
    """
    for name, p in module.named_parameters():
        if p.dim() < 2:
            p.fill_(float(name.endswith("weight")))
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        gain = PATCH_GAIN if "patch_embed" in name else 1.0
        bound = gain * (3 / p[0].numel()) ** 0.5
        values = torch.empty(p.shape, dtype=torch.float32, device="cpu")
        p.copy_(values.uniform_(-bound, bound, generator=generator))


def official_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of `model` (attributes encoder, projector, llm) by their checkpoint names."""
    return {
        prefix + key: value
        for part, prefix in PREFIXES.items()
        for key, value in getattr(model, part).state_dict().items()
    }


def load(model: nn.Module, folder: str | Path, device: torch.device | str = "cpu") -> None:
    """Give `model` the weights of a checkpoint: model.safetensors, or shards and their index.

    The model may stand on the meta device: parameters are replaced, shard by shard, by tensors of
    the checkpoint's dtype on `device`. Raises UserError, before anything is replaced, unless names
    and shapes are exactly those of the model; only a head that repeats the embedding may be there
    or not where the model has them tied.
    """
    shards = _shards(Path(folder))
    want = {name: tuple(t.shape) for name, t in official_state(model).items()}
    have = {name: shape for names in shards.values() for name, shape in names.items()}
    if HEAD not in want:
        have.pop(HEAD, None)
    _check(folder, "lacks", want.keys() - have.keys())
    _check(folder, "has unknown", have.keys() - want.keys())
    _check(folder, "has other shapes for", [n for n in want if want[n] != have[n]])
    head = None
    for file, names in shards.items():
        with safe_open(file, framework="pt", device=str(device)) as tensors:
            found = {name: tensors.get_tensor(name) for name in names}
        head = found.pop(HEAD) if HEAD in found and HEAD not in want else head
        _assign(model, found)
    if head is not None and not torch.equal(head, official_state(model)[EMBEDDING]):
        raise UserError(
            f"{folder} has a head of its own, the model ties it to the embedding: "
            "choose another preset"
        )


def _assign(model: nn.Module, found: dict[str, Tensor]) -> None:
    for part, prefix in PREFIXES.items():  # the empty prefix comes last and takes the rest
        chunk = {name: found.pop(name) for name in list(found) if name.startswith(prefix)}
        own = {name.removeprefix(prefix): value for name, value in chunk.items()}
        getattr(model, part).load_state_dict(own, strict=False, assign=True)


def _shards(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """File -> names and shapes of its tensors, from the headers alone."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = json.loads(index.read_text())["weight_map"].values()
            files = [folder / name for name in sorted(set(names))]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{index} is damaged: download it again") from e
    elif single.is_file():
        files = [single]
    else:
        raise UserError(
            f"no weights in {folder}: it needs {single.name}, or shards and {index.name}"
        )
    shards = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                shards[file] = {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as e:
            raise UserError(f"{file} is missing or damaged ({e}): download it again") from e
    return shards


def _check(folder: str | Path, problem: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        few = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        raise UserError(f"{folder} {problem} {few}: is it a checkpoint of this preset?")
