"""The sizes of a VideoChat-Flash: one frozen dataclass, with the published models as presets."""

from dataclasses import dataclass, field

from hico_kernels.flops import Decoder, VisionEncoder
from hico_kernels.patch.plan import DropPlan, TextTopK, Uniform

# Rules of `sampling.frame_indices`; the first is what VideoChat-Flash runs.
SAMPLINGS = ("dynamic_fps1", "paper", "dense")


def _paper_plan() -> DropPlan:
    return DropPlan({4: Uniform(keep=0.75), 18: TextTopK(keep=0.25)}, positions="renumber")


@dataclass(frozen=True)
class Config:
    """Sizes are those of the checkpoints; `vision_layers` counts the blocks that are built."""

    name: str
    # vision encoder: UMT-L, one clip of 4 frames at a time
    image_size: int
    vision_width: int = 1024
    vision_layers: int = 23  # 24 nominal, features are taken after the second to last
    vision_heads: int = 16
    vision_mlp_ratio: int = 4
    patch_size: int = 16
    frames_per_clip: int = 4
    # merging connector
    tokens_per_clip: int = 64  # 16 per frame
    merge_heads: int = 16
    # language model: Qwen2
    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_layers: int = 28
    num_heads: int = 28
    num_kv_heads: int = 4
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    max_positions: int = 32768
    tie_word_embeddings: bool = False
    # sampling and dropping
    min_frames: int = 64
    max_frames: int = 512
    plan: DropPlan = field(default_factory=_paper_plan)

    @property
    def patches_per_frame(self) -> int:
        """Encoder tokens of one frame."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        """Width of one attention head of the language model."""
        return self.hidden_size // self.num_heads

    @property
    def decoder(self) -> Decoder:
        """The language model, for `hico_kernels.flops.cost`."""
        return Decoder(
            self.num_layers,
            self.hidden_size,
            self.intermediate_size,
            self.num_heads,
            self.num_kv_heads,
            self.vocab_size,
            tied=self.tie_word_embeddings,
        )

    @property
    def vision(self) -> VisionEncoder:
        """The encoder and its merge, for `hico_kernels.flops.cost`."""
        return VisionEncoder(
            self.vision_layers,
            self.vision_width,
            self.vision_mlp_ratio * self.vision_width,
            patches=self.patches_per_frame,
            patch_values=3 * self.patch_size**2,
            frames=self.frames_per_clip,
            merge_heads=self.merge_heads,
        )

    @property
    def parameters(self) -> int:
        """Numbers in all weights, but for the biases and norms of encoder and projector."""
        width, vision = self.vision_width, self.vision
        blocks = vision.layers * (4 * width**2 + 2 * width * vision.mlp_width)
        projector = width * self.hidden_size + self.hidden_size**2
        return self.decoder.parameters + blocks + vision.patch_values * width + projector


presets = {
    c.name: c
    for c in (
        # A few million parameters, the same code path and depth: seconds on two CPU cores.
        Config(
            "nano",
            image_size=224,
            vision_width=192,
            vision_layers=3,
            vision_heads=3,
            merge_heads=3,
            hidden_size=128,
            intermediate_size=344,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=512,
            tie_word_embeddings=True,
        ),
        Config(
            "2b-448",
            image_size=448,
            hidden_size=1536,
            intermediate_size=8960,
            num_heads=12,
            num_kv_heads=2,
            vocab_size=151936,
            tie_word_embeddings=True,
        ),
        Config("7b-224", image_size=224),
        Config("7b-448", image_size=448),
        Config(
            "7b-1m-224",
            image_size=224,
            rms_norm_eps=1e-5,
            rope_theta=1e7,
            max_positions=1_010_000,
        ),
    )
}
