"""What was typed after `hico`, checked before anything heavy is loaded."""

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from hico_kernels import DropPlan, TextTopK, Uniform
from hico_model.config import Config, presets
from hico_model.errors import UserError

if TYPE_CHECKING:
    import torch

RULES = {"uniform": Uniform, "text": TextTopK}
DROP_EXAMPLE = "4:uniform:0.75,18:text:0.25"


def path(text: str, name: str) -> str:
    """A path that was typed, `~` expanded: a shell leaves the one in --html=~/page.html."""
    if not text:
        raise UserError(f"{name} is empty: give a path")
    return os.path.expanduser(text)


def check_output(file: str, video: str) -> None:
    """Raises UserError unless a page can be written to `file`; leaves no trace of the attempt."""
    try:
        if not Path(file).absolute().parent.is_dir():
            raise UserError(f"--html: {Path(file).parent} is no folder: create it first")
        there = os.path.lexists(file)
        if os.path.exists(file) and not stat.S_ISREG(os.stat(file).st_mode):
            raise UserError(f"--html: {file} is not a file: name one that is, or a new one")
        if os.path.exists(video) and there and os.path.samefile(file, video):
            raise UserError(f"--html: {file} is the video itself: name another file")
        with open(file, "ab"):
            pass
        if not there:
            os.unlink(file)
    except OSError as e:
        raise UserError(f"--html: {file} cannot be written: {e.strerror}") from e


def parse_drop(text: str) -> DropPlan:
    """The plan that --drop says. Raises UserError with what is wrong with it."""
    drops = {}
    for part in text.split(",") if text != "none" else ():
        fields = part.split(":")
        try:
            layer, rule, keep = int(fields[0]), RULES[fields[1]], float(fields[2])
        except (ValueError, KeyError, IndexError):
            fields = []
        if len(fields) != 3:
            raise UserError(
                f"--drop: {part!r} is not LAYER:RULE:KEEP with RULE uniform or text, "
                f"as in {DROP_EXAMPLE}"
            )
        if not 0 < keep <= 1:
            raise UserError(f"--drop: {part!r} must keep a share above 0 and up to 1, got {keep:g}")
        if layer in drops:
            raise UserError(f"--drop: layer {layer} is there twice, name every layer once")
        drops[layer] = rule(keep=keep)
    try:
        return DropPlan(drops, positions="renumber")
    except ValueError as e:
        raise UserError(_drop_message(e)) from e


def check_layers(plan: DropPlan, config: Config) -> None:
    """Raises UserError if the model lacks a layer that --drop names."""
    try:
        plan.check_layers(config.num_layers)
    except ValueError as e:
        raise UserError(_drop_message(e)) from e


def _drop_message(e: ValueError) -> str:
    return f"--drop: {str(e).removeprefix('drops: ')}"


def find_device(name: str | None) -> "torch.device":
    """The device called `name`; None takes a GPU if there is one."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which the meta device cannot do either
    except (RuntimeError, AssertionError, ImportError) as e:  # torch raises any of them
        here = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise UserError(f"--device: {name!r} is unknown or not there: choose {here}") from e
    return device


def check_memory(config: Config, device: "torch.device") -> None:
    """Raises UserError if random weights of `config`, in float32, do not fit in what is free."""
    need, free = 4 * config.parameters, free_bytes(device)
    if need > free:
        fit = ", ".join(name for name, c in presets.items() if 4 * c.parameters <= free)
        raise UserError(
            f"--preset: random weights of {config.name} take {need / 1e9:.1f} GB, {free / 1e9:.1f} "
            f"GB are free on {device}: choose one that fits ({fit or 'none does'})"
        )


def free_bytes(device: "torch.device") -> int:
    """Free memory of a GPU, else of the machine with what its caches could give back."""
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable:")) * 1024
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
