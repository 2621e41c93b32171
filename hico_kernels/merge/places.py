"""Where the tokens of a merge step stand, for implementations that match and merge in turn."""

import torch
from torch import Tensor


def arranged(inner: Tensor, r: int, front: int, spatial: bool) -> tuple[Tensor, Tensor]:
    """inner [N, T - front]: positions below T - front - r of the tokens behind the front ones, as
    `bipartite_soft_matching` has them -> int32 assignment [N, T], places [N, T - r].
    """
    n, t = inner.shape[0], inner.shape[1] + front
    token = torch.arange(t, dtype=torch.int32, device=inner.device).repeat(n, 1)
    assignment = torch.cat([token[:, :front], inner + front], dim=1)
    places = token[:, : t - r].clone()
    for side in (front, front + 1):  # targets are on side b: they overwrite what merges into them
        places.scatter_(1, assignment[:, side::2].long(), token[:, side::2])
    if spatial:
        places, slots = places.sort(dim=1)
        ranks = torch.empty_like(places).scatter_(1, slots, token[:, : t - r])
        assignment = ranks.gather(1, assignment.long())
    return assignment, places
