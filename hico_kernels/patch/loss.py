"""Labels of a prompt whose tokens were dropped on the way: they follow the tokens that are left."""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hico_kernels.patch.rows import IGNORED, Rows


def why_not_labels(model: nn.Module) -> str | None:
    """Why the loss of this model cannot follow: its forward must ask `model.loss_function`."""
    forward = inspect.unwrap(type(model).forward)
    if "loss_function" in forward.__code__.co_names:
        return None
    name = type(model).__name__
    return f"this transformers computes the loss of {name} by itself; 5.18 or newer does not"


def with_loss(model: nn.Module, left: Callable[[], Rows | None]) -> Callable[[], None]:
    """Let `model.loss_function` pick the labels of the tokens that are left; returns the undo."""
    saved, stock = model.__dict__.get("_loss_function"), model.loss_function

    def loss(logits: Tensor, labels: Tensor, *args: object, **kwargs: object) -> Tensor:
        rows = left()
        return stock(logits, labels if rows is None else labels_left(labels, rows), *args, **kwargs)

    def undo() -> None:
        del model._loss_function
        if saved is not None:
            model._loss_function = saved

    model._loss_function = loss  # what transformers' own setter of `loss_function` does
    return undo


def labels_left(labels: Tensor, rows: Rows) -> Tensor:
    """Labels [B, q] of a whole prompt -> [B, L] of its rows left, for a loss that shifts by one.

    A token is to predict what followed it in the whole prompt; a dropped one neither predicts nor
    is predicted.
    """
    index, valid = rows.index.to(labels.device), rows.valid.to(labels.device)
    stays = torch.zeros_like(labels).scatter_add(1, index, valid.to(labels.dtype)) > 0
    follows = nn.functional.pad(labels.masked_fill(~stays, IGNORED)[:, 1:], (0, 1), value=IGNORED)
    targets = follows.gather(1, index).masked_fill(~valid, IGNORED)
    return nn.functional.pad(targets[:, :-1], (1, 0), value=IGNORED)
