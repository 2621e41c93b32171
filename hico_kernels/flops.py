"""What a long video costs a multimodal language model: FLOPs and bytes, by named conventions.

`cost` is the model. All of it follows from the rows (tokens) that each layer sees, so a drop shows
as fewer rows in the layers after it. One multiply-add (MAC) is 2 FLOPs and one sequence is counted;
norms, rotary positions, activations and softmax are left out, as torch's own counter leaves them
out. Letters: L layers, h hidden, I intermediate, k = KV heads x head size, V vocabulary,
n rows of a layer, N rows of the prompt, P parameters. The query width equals h, as in Qwen2 and
Llama 3.

"VideoChat-Flash" is arXiv 2501.00574. It prints results, no formulas: what is marked *inferred*
was found by fitting its printed figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from hico_kernels.merge.reference import merge_rounds
from hico_kernels.patch.plan import DropPlan, TextTopK

Convention = Literal["paper", "prefill_causal", "prefill_full", "profiler"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)
CARD_BYTES = 80 * 10**9  # the A100 of VideoChat-Flash, section 4.1: above it Table 1 prints "oom"
TRAINING_GPUS = 32  # inferred: what its training scripts and Table 1's train column agree on


def rows_per_layer(
    num_visual: int, num_text: int, num_layers: int, counts: Mapping[int, int] | None = None
) -> list[int]:
    """Rows of each layer in the prefill.

    counts: layer -> visual tokens in it and after it (`DropPlan.counts`); None drops nothing.
    """
    left, rows = num_visual, []
    for layer in range(num_layers):
        left = (counts or {}).get(layer, left)
        rows.append(left + num_text)
    return rows


def visible_pairs(rows: int, keys: int, causal: bool = True) -> int:
    """How many (query, key) pairs attention has; causal is aligned bottom right."""
    if not causal:
        return rows * keys
    seeing = min(rows, keys)  # queries that see at least one key: keys - seeing + 1, ..., keys
    return seeing * keys - seeing * (seeing - 1) // 2


def merge_flops(num_tokens: int, target: int, width: int) -> int:
    """FLOPs of merging one clip down to `target` tokens: the similarity of every even token with
    every odd one, in every round, on a metric of `width` channels. Nothing else multiplies
    matrices.
    """
    flops, left = 0, num_tokens
    for merged in merge_rounds(num_tokens, target):
        flops += 2 * (left - left // 2) * (left // 2) * width
        left -= merged
    return flops


@dataclass(frozen=True)
class Decoder:
    """Sizes of a Qwen2- or Llama-shaped language model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = False  # the head is the embedding
    qkv_bias: bool = True  # Qwen2 has it, Llama does not

    @property
    def kv_width(self) -> int:
        """k: numbers in one key, of all heads."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def layer_macs(self) -> int:
        """m, multiply-adds of one row in the matrices of one layer.

        2h^2 (query, output) + 2hk (key, value) + 3hI (gate, up, down). Qwen2-7B: 233,046,016.
        """
        return self.hidden * (2 * self.hidden + 2 * self.kv_width + 3 * self.intermediate)

    @property
    def parameters(self) -> int:
        """P. Matrices, QKV biases, norms, embedding and head. Qwen2-7B: 7,615,616,512."""
        bias = (self.hidden + 2 * self.kv_width) * self.qkv_bias
        layers = self.layers * (self.layer_macs + bias + 2 * self.hidden)
        return layers + self.hidden + (2 - self.tied) * self.hidden * self.vocab

    def kv_bytes(self, rows: Sequence[int], value_bytes: int = 2) -> int:
        """KV cache of a prompt: a key and a value for every row of every layer.

        value_bytes: 2 for bfloat16, 4 for float32.
        """
        return sum(rows) * 2 * self.kv_width * value_bytes

    def prefill_flops(
        self, rows: Sequence[int], *, causal: bool = True, head_rows: int = 1
    ) -> dict[str, int]:
        """FLOPs by part, with `rows[l]` rows in layer l.

        matrices 2mn; attention 4h for each visible pair (QK^T and PV), n(n + 1)/2 of them when
        causal, else n^2; head 2hV for each of the `head_rows` rows that get logits: generating
        needs one.
        """
        pairs = sum(visible_pairs(n, n, causal) for n in rows)
        return {
            "matrices": 2 * self.layer_macs * sum(rows),
            "attention": 4 * self.hidden * pairs,
            "head": 2 * self.hidden * self.vocab * head_rows,
        }

    def scoring_flops(self, rows: int) -> int:
        """FLOPs of scoring `rows` rows for a text-guided drop.

        The layer's keys of all rows, the query of the last one, and their products.
        """
        return 2 * self.hidden * (self.kv_width * rows + self.hidden + rows)


@dataclass(frozen=True)
class VisionEncoder:
    """Sizes of a vision transformer, which attends over all `frames` of a pass together."""

    layers: int  # that run: features are often taken before the last
    width: int
    mlp_width: int
    patches: int  # per frame
    patch_values: int  # numbers in one: pixels x 3
    frames: int = 1  # per pass
    class_token: bool = False
    pooling_head: bool = False  # SigLIP's: one learned query attends over all tokens, then an MLP
    merge_heads: int = 16  # channel groups whose mean is the metric of merging

    def macs(self) -> dict[str, int]:
        """Multiply-adds of one pass: of its matrices, and of QK^T and PV."""
        c, patches = self.width, self.frames * self.patches
        n = patches + self.class_token
        matrices = patches * self.patch_values * c
        matrices += self.layers * n * (4 * c**2 + 2 * c * self.mlp_width)
        attention = self.layers * 2 * c * n**2
        if self.pooling_head:
            matrices += 2 * c**2 * (n + 1) + 2 * c * self.mlp_width
            attention += 2 * c * n
        return {"matrices": matrices, "attention": attention}


QWEN2_7B = Decoder(28, 3584, 18944, 28, 4, 152064)
# As VideoChat-Flash runs it: 4 frames a clip, 23 of 24 blocks.
UMT_L = VisionEncoder(23, 1024, 4096, patches=14**2, patch_values=16 * 16 * 3, frames=4)
# Table 5 prints multiply-adds ("G") for 8 frames, whatever the number of tokens. Which variants is
# inferred, matrix products alone in both: UMT-L/16 at 224 pixels, all 24 blocks, the 8 frames in
# one pass, no class token: 595.6 beside 596, the UMT paper's own figure (arXiv 2303.16058).
UMT_L_TABLE5 = VisionEncoder(24, 1024, 4096, patches=14**2, patch_values=16 * 16 * 3, frames=8)
# SigLIP-SO400M/14 at 384 pixels, all 27 blocks and the pooling head, 8 images: 2681.4 beside 2679.
SIGLIP_TABLE5 = VisionEncoder(
    27, 1152, 4304, patches=27**2, patch_values=14 * 14 * 3, pooling_head=True
)


@dataclass(frozen=True)
class Cost:
    """What `cost` gives: FLOPs by part, bytes, and the rows of every layer.

    infer_bytes and train_bytes (per GPU) are what the source of the convention defines as memory,
    and None where it defines none.
    """

    parts: dict[str, int]
    rows: list[int]
    weight_bytes: int  # of the language model
    kv_bytes: int
    infer_bytes: int | None = None
    train_bytes: int | None = None

    @property
    def flops(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())

    @property
    def activation_bytes(self) -> int | None:
        """What is left of infer_bytes besides weights and KV cache."""
        if self.infer_bytes is None:
            return None
        return self.infer_bytes - self.weight_bytes - self.kv_bytes


def cost(
    decoder: Decoder,
    *,
    frames: int,
    tokens_per_frame: int,
    text: int = 128,
    drops: DropPlan | Mapping[int, int] | None = None,
    vision: VisionEncoder | None = None,
    convention: Convention = "prefill_causal",
    value_bytes: int = 2,
) -> Cost:
    """What reading a prompt of `frames` x `tokens_per_frame` visual and `text` text tokens costs.

    drops: a plan, or the visual tokens that stay by layer (then nothing is scored for it). vision:
    the encoder to count besides, with HiCo's merge and projector. value_bytes: of one weight and
    one number in the KV cache.

    convention:

    * "prefill_causal": what reading the prompt needs: attention to the visible pairs, the head at
      one row, the scoring of text-guided drops, the merge.
    * "prefill_full": the same with all n^2 pairs, as torch's FLOP counter takes any attention.
    * "paper": VideoChat-Flash, Table 1, the language model alone. *Inferred*, and exact in its 12
      FLOPs cells: 4(Lm + hV)N + 6LhN^2 with N = 196, 144 or 14 tokens a frame (the text of the
      paper says 16) + 128. A prefill has 2 for 4, and for 6 it has 4, or 2 when causal: what the
      table counts is not known (a forward and a backward to the inputs would give it). Its memory,
      *inferred* too: inference 2P + 4 KV caches; training 4P (bf16 weights and gradients) +
      12P / 32 (Adam's states over 32 GPUs) + (12V + 6h)N. Per-layer rows generalise it to drops,
      which the table does not have.
    * "profiler": VideoChat-Flash, Table 7 (which prints T as "G"). *Inferred* from its four
      figures, within 0.05 %: 1000 frames, 60 text tokens, encoder and projector included, no
      attention products (flash-attention is invisible to a profiler), the head at every row that is
      left. A plan there drops from all rows, text included; with the text kept, as the released
      code does, the rows would miss by up to 0.2 %.

    Raises ValueError for an unknown convention, a plan for more layers, or frames that are not
    whole passes of the encoder.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if convention == "paper" and vision is not None:
        raise ValueError("vision must be None: the paper convention is the language model alone")
    plan = drops if isinstance(drops, DropPlan) else None
    for layer in drops if plan is None and drops else ():
        if not 0 <= layer < decoder.layers:
            raise ValueError(f"drops: the model has layers 0 to {decoder.layers - 1}, got {layer}")
    if plan is not None:
        plan.check_layers(decoder.layers)
    visual, prefill = frames * tokens_per_frame, convention.startswith("prefill")
    if plan is not None and convention == "profiler":
        counts = plan.counts(visual + text, frames)
        rows = rows_per_layer(visual + text, 0, decoder.layers, counts)
    else:
        counts = drops if plan is None else plan.counts(visual, frames)
        rows = rows_per_layer(visual, text, decoder.layers, counts)

    causal = convention == "prefill_causal"
    parts = decoder.prefill_flops(rows, causal=causal, head_rows=1 if prefill else rows[-1])
    weights, kv = decoder.parameters * value_bytes, decoder.kv_bytes(rows, value_bytes)
    if convention == "paper":
        doubled = {"matrices": 2 * parts["matrices"], "head": 2 * parts["head"]}
        p, slope = decoder.parameters, 12 * decoder.vocab + 6 * decoder.hidden
        train = 4 * p + 12 * p // TRAINING_GPUS + slope * rows[0]
        parts |= doubled | {"attention": 3 * parts["attention"] // 2}  # 4LhN^2 -> 6LhN^2
        return Cost(parts, rows, weights, kv, weights + 4 * kv, train)
    if not prefill:
        parts["attention"] = 0
    elif plan is not None:
        before = [visual + text, *rows]  # a drop scores what comes out of the layer before
        scored = [before[i] for i, rule in plan.drops.items() if isinstance(rule, TextTopK)]
        parts["scoring"] = sum(map(decoder.scoring_flops, scored))
    if vision is not None:
        parts |= _vision_flops(decoder, vision, frames, tokens_per_frame, products=prefill)
    return Cost(parts, rows, weights, kv)


def _vision_flops(
    decoder: Decoder, vision: VisionEncoder, frames: int, tokens_per_frame: int, *, products: bool
) -> dict[str, int]:
    """Encoder, merge and projector (Linear, GELU, Linear); with or without products of tokens."""
    if frames % vision.frames:
        raise ValueError(f"frames must be whole passes of {vision.frames}, got {frames}")
    passes, kept = frames // vision.frames, vision.frames * tokens_per_frame
    macs, c = vision.macs(), vision.width
    merge = merge_flops(vision.frames * vision.patches, kept, c // vision.merge_heads)
    return {
        "encoder": 2 * passes * (macs["matrices"] + products * macs["attention"]),
        "merge": products * passes * merge,
        "projector": 2 * passes * kept * (c * decoder.hidden + decoder.hidden**2),
    }
