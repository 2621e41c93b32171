"""Tokens -> fewer tokens -> the language model's space: HiCo's clip-level compression."""

from torch import Tensor, nn

from hico_kernels import MergedTokens, merge_tokens
from hico_model.config import Config


class Connector(nn.Module):
    """Merges the tokens of each clip (or image) down to 64, then Linear, GELU (exact), Linear.

    Parameter names are those of the checkpoints below `model.mm_projector.`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.tokens_per_clip = config.tokens_per_clip
        self.merge_heads = config.merge_heads
        self.mlp = nn.Sequential(
            nn.Linear(config.vision_width, config.hidden_size),
            nn.GELU(),
            nn.Linear(config.hidden_size, config.hidden_size),
        )

    def forward(self, tokens: Tensor) -> tuple[Tensor, MergedTokens]:
        """tokens [N, P, C] of the encoder -> visual tokens [N, K, D], and the merge that made them.

        The merge (`.tokens` [N, K, C], `.sizes` [N, K], `.assignment` [N, P]) says which patches a
        token is made of.
        """
        merged = merge_tokens(tokens, self.tokens_per_clip, num_heads=self.merge_heads)
        return self.mlp(merged.tokens), merged
