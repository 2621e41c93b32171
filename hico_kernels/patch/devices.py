"""Models whose layers are on several devices, as `device_map="auto"` spreads them."""

from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn


def device_of(module: nn.Module, given: torch.device) -> torch.device:
    """Where a module runs: with its weights; where these are offloaded, on the `given` device."""
    weight = next(iter(module._parameters.values()), None)  # quickly, of a norm
    if weight is None:
        weight = next(module.parameters(), None)
    return given if weight is None or weight.is_meta else weight.device


def moved(value: Any, device: torch.device) -> Any:
    """A copy with all tensors of it on the device; as it is where they are there."""
    if torch.is_tensor(value):
        # To the host it must wait: that copy could be read before it is there.
        return value.to(device, non_blocking=device.type != "cpu")
    if isinstance(value, tuple | list):
        return type(value)(moved(part, device) for part in value)
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if is_dataclass(value):
        return replace(
            value, **{f.name: moved(getattr(value, f.name), device) for f in fields(value)}
        )
    return value
