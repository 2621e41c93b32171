"""Which tokens of a call are left, and how a drop shortens them.

All sizes are known on the host.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hico_kernels.select import select_topk, uniform_indices

IGNORED = -100  # what torch's cross entropy, and so transformers, takes for no label


@dataclass(frozen=True)
class Prompt:
    """One call's tokens, counted once on the host before the first layer."""

    visual: Tensor  # [B, q] bool
    real: Tensor | None  # [B, q] bool, False is padding; None: no padding
    lead: Tensor  # [B] padding in front of the first real token
    asking: Tensor  # [B] the last prompt token: whose attention scores the visual ones
    num_visual: list[int]
    num_text: list[int]  # tokens that always stay: all but visual ones and padding in front
    num_heard: list[int]  # text that the asking token may attend to
    num_real: list[int]  # all tokens but padding
    num_behind: int  # tokens behind the last visual one, in the sequence with the fewest
    padded: bool  # padding remains when that in front is gone

    @classmethod
    def count(
        cls, visual: Tensor, real: Tensor | None, answers: int = 1, labels: Tensor | None = None
    ) -> "Prompt | None":
        """None when there is no visual token.

        answers: logits asked for; the last prompt token is the one before the first answer, as in
        assisted decoding, where guesses follow the prompt. labels [B, q]: the same in training, the
        token before the first label behind the visual tokens.
        """
        length, device = visual.shape[1], visual.device
        both = [visual, visual if real is None else real]
        if labels is not None:
            both.append((labels != IGNORED).to(device))
        both = torch.stack(both).cpu()  # the only synchronisation: the tokens are counted here
        vis, ok = both[0], both[1] | both[0]
        if real is None:
            ok = torch.ones_like(vis)
        if not bool(vis.any()):
            return None
        at = torch.arange(length)
        lead = torch.where(ok.any(1), ok.long().argmax(1), length)
        end = torch.where(vis, at, 0).amax(1)  # the last visual token, or what follows it
        behind = length - 1 - int(end.max())
        if labels is None:
            end = end.clamp(min=length - max(answers, 1))
        else:
            labelled = both[2] & (at > end[:, None])
            end = end.maximum(torch.where(labelled, at, length).amin(1) - 1)
        heard = ok & (at <= end[:, None])
        asking = torch.where(heard, at, 0).amax(1)
        num_visual = vis.sum(1)
        return cls(
            visual,
            real,
            lead.to(device),
            asking.to(device),
            num_visual.tolist(),
            (length - lead - num_visual).tolist(),
            (heard.sum(1) - num_visual).tolist(),
            ok.sum(1).tolist(),
            behind,
            bool((ok.sum(1) != length - lead).any()),
        )


@dataclass(frozen=True)
class Rows:
    """The tokens that are left, [B, L]: aligned to the right, so the last logit stays the last."""

    index: Tensor  # [B, L] int64, their place in the call
    valid: Tensor  # [B, L] bool, False in front of the shorter rows
    full: bool  # all valid, known on the host
    visual: list[int]  # visual tokens left in each row

    def __len__(self) -> int:
        return self.index.shape[1]

    @classmethod
    def whole(cls, prompt: Prompt) -> "Rows":
        """Before the first drop."""
        index = torch.arange(prompt.visual.shape[1], device=prompt.visual.device)
        index = index.expand(prompt.visual.shape)
        return cls(index, torch.ones_like(prompt.visual), True, prompt.num_visual)

    def table(self, table: Tensor) -> Tensor:
        """Rotary tables [.., B or 1, q, D] -> [.., B, L, D]."""
        table = table.expand(*table.shape[:-3], self.index.shape[0], -1, -1)
        index = self.index.view(*[1] * (table.dim() - 3), *self.index.shape, 1)
        return table.gather(-2, index.expand(*table.shape[:-2], -1, table.shape[-1]))

    def visual_slots(self, prompt: Prompt) -> Tensor:
        """The visual tokens left, as rows of the flattened [B*L], ascending."""
        visual = prompt.visual.gather(1, self.index) & self.valid
        return ascending(visual, sum(self.visual))

    def heard_slots(self, prompt: Prompt) -> tuple[Tensor, list[int], Tensor]:
        """What the asking token attends to, as flat rows and a count per row; and its own row."""
        heard = self.valid & (self.index <= prompt.asking[:, None])
        columns = torch.arange(self.index.shape[1], device=self.index.device)
        asking = torch.where(heard, columns, 0).amax(1)
        if prompt.real is not None:
            heard = heard & (prompt.real | prompt.visual).gather(1, self.index)
        counts = [t + v for t, v in zip(prompt.num_heard, self.visual, strict=True)]
        first = torch.arange(len(counts), device=asking.device) * len(self)
        return ascending(heard, sum(counts)), counts, first + asking

    def after(self, prompt: Prompt, chosen: Tensor, keep: Sequence[int]) -> tuple["Rows", Tensor]:
        """With the visual tokens `chosen` (flat rows), `keep` in each row, and all text; and the
        flat row that each place is filled from, [B * L'].
        """
        batch, length = self.index.shape
        device = self.index.device
        visual = prompt.visual.gather(1, self.index)
        stay = self.valid & ~visual & (self.index >= prompt.lead[:, None])
        stay.view(-1)[chosen] = True
        counts = [text + kept for text, kept in zip(prompt.num_text, keep, strict=True)]
        longest = max(counts)
        first = longest - to_device(counts, device)
        valid = torch.arange(longest, device=device) >= first[:, None]
        # A place without a token is filled from its own row: some finite number, never attended to.
        source = (torch.arange(batch, device=device) * length)[:, None].expand(-1, longest)
        source = source.masked_scatter(valid, ascending(stay, sum(counts))).flatten()
        index = self.index.flatten()[source].view(batch, longest)
        return Rows(index, valid, min(counts) == longest, list(keep)), source


def evenly(slots: Tensor, counts: Sequence[int], keep: Sequence[int]) -> Tensor:
    """`keep` of every row's `counts` slots, evenly spaced."""
    parts = [
        own[uniform_indices(len(own), kept, device=slots.device)]
        for own, kept in zip(slots.split(list(counts)), keep, strict=True)
    ]
    return torch.cat(parts)


def best(slots: Tensor, scores: Tensor, counts: Sequence[int], keep: Sequence[int]) -> Tensor:
    """The `keep` best-scored of every row's `counts` slots, in their order."""
    offsets = to_device(list(accumulate(counts, initial=0)), slots.device)
    return slots[select_topk(scores, offsets, list(keep))]


def to_device(values: Sequence[int], device: torch.device) -> Tensor:
    """Host ints as an int64 tensor, copied without waiting for the device."""
    pinned = torch.tensor(values, dtype=torch.int64, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def ascending(mask: Tensor, count: int) -> Tensor:
    """Where a mask with `count` trues is true, flat and ascending; the count saves asking the
    device.
    """
    return torch.nonzero_static(mask.flatten(), size=count)[:, 0]
