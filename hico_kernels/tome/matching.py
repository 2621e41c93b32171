"""One merge step inside a block: which tokens become one, and where it goes."""

import torch
from torch import Tensor

from hico_kernels.merge import Matching, bipartite_soft_matching


def match(metric: Tensor, r: int, prefix: int, order: str) -> tuple[Matching, Tensor]:
    """Match the tokens behind the `prefix` first ones, which never merge.

    metric [N, T, D] -> the matching onto K = T - r tokens, and kept [N, K]: the token, of those T,
    whose place each of the K takes (the target of a merge, or itself). order: "spatial" leaves
    tokens in the order of these places; "matching" in that of `bipartite_soft_matching`.
    """
    # All but the last protected token are cut off: so with a class token alone, tokens alternate as
    # in arXiv 2210.09461, and any number of registers is treated alike.
    front = max(prefix - 1, 0)
    inner = bipartite_soft_matching(metric[:, front:], r, class_token=prefix > 0)
    assignment, left = inner.assignment.long(), inner.num_tokens
    n, t = assignment.shape
    places = torch.arange(t, device=metric.device).expand(n, t)
    kept = places.new_empty(n, left)
    for side in (0, 1):  # targets are at odd places: they overwrite what merges into them
        kept.scatter_(1, assignment[:, side::2], places[:, side::2])
    if order == "spatial":
        kept, slots = kept.sort(dim=1)
        ranks = torch.empty_like(slots).scatter_(1, slots, places[:, :left])
        assignment = ranks.gather(1, assignment)
    if front:
        protected = torch.arange(front, device=metric.device).expand(n, front)
        assignment = torch.cat([protected, assignment + front], dim=1)
        kept = torch.cat([protected, kept + front], dim=1)
    return Matching(assignment.int(), front + left), kept
