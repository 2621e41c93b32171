"""Token merging (ToMe, arXiv 2210.09461) inside the vision towers of transformers and timm.

```python
from hico_kernels import tome

handle = tome.patch(vision_tower, r=16)  # or keep=0.5
```

Neither library is imported here.
"""

from typing import Literal, get_args

from torch import nn

from hico_kernels import checks
from hico_kernels.patch.families import UnsupportedModel
from hico_kernels.tome.handle import Handle
from hico_kernels.tome.schedule import Schedule, Settings
from hico_kernels.tome.towers import take_apart

Order = Literal["spatial", "matching"]
__all__ = ["Handle", "UnsupportedModel", "patch"]


def patch(
    vision_tower: nn.Module,
    r: int | None = None,
    *,
    keep: float | None = None,
    prop_attn: bool = True,
    order: Order = "spatial",
) -> Handle:
    """Let every block of `vision_tower` merge similar tokens from now on, until `Handle.remove`.

    Between attention and MLP, each block matches its patches by the mean over heads of their keys
    (`bipartite_soft_matching`) and merges the best pairs to means weighted by size (arXiv
    2210.09461, section 3). Class tokens and registers never merge. The tower's output is shorter;
    `Handle.sizes`, `.assignment` and `.unmerge` say what became of each token.

    Towers of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3.5, with experts or without, hold packed
    frames. They merge whole groups of those patches that their patch merger joins to one token,
    within a frame (Qwen2.5-VL: a window, in the blocks that attend in windows), by the keys of a
    group side by side. What the patch merger and DeepStack give has a token for every group again,
    so the language model goes on as it did.

    r: pairs that merge in each block, at most half of its patches (packed: pairs of groups in each
    frame or window). keep: instead, the share of the patches in (0, 1] that the last block leaves
    (packed: of the groups of each frame or window, rounded down, one at least). prop_attn: a token
    of size s counts s times in attention, softmax(QK^T / sqrt(d) + log s). order: "spatial" keeps
    the order of the input, a merged token at the place (and rotary position) of its target;
    "matching" leaves the order to the operation.

    Raises `UnsupportedModel` with the reason for a tower that is not known, does not use torch's
    fused attention or is patched already; TypeError or ValueError for the other arguments. Only
    this instance is touched.
    """
    schedule = Schedule(r, keep)
    checks.boolean("prop_attn", prop_attn)
    if order not in get_args(Order):
        raise ValueError(f"order must be 'spatial' or 'matching', got {order!r}")
    return Handle(vision_tower, take_apart(vision_tower), Settings(schedule, prop_attn, order))
