"""What a prompt costs in a Qwen2-shaped decoder: FLOPs of the prefill, bytes of the KV cache.

All counts follow from the rows (tokens) that each layer sees, so a drop shows as fewer rows in the
layers after it. One multiply-add is 2 FLOPs. Norms, rotary positions, activations and softmax are
left out: well under 1 % at the sizes of the published models. Letters: h hidden, I intermediate,
k = KV heads x head size, V vocabulary, n rows. The query width equals h, as in every Qwen2.
"""

from collections.abc import Mapping, Sequence


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


def layer_macs_per_row(hidden: int, intermediate: int, kv_width: int) -> int:
    """Multiply-adds of one row in the matrices of one layer.

    2h^2 (query, output) + 2hk (key, value) + 3hI (gate, up, down). Qwen2-7B: 233,046,016.
    """
    return 2 * hidden**2 + 2 * hidden * kv_width + 3 * hidden * intermediate


def prefill_flops(
    rows: Sequence[int],
    *,
    hidden: int,
    intermediate: int,
    kv_width: int,
    vocab: int,
    head_rows: int = 1,
) -> int:
    """FLOPs of one prefill with `rows[l]` rows in layer l.

    Per layer 2 m n (matrices, m as in `layer_macs_per_row`) + 2 h n^2 (attention: QK^T and PV are
    2 h n^2 each, of which the causal mask leaves half); then 2 h V for each of the `head_rows` rows
    that get logits. Generating needs one; the cost tables of VideoChat-Flash (arXiv 2501.00574)
    count the head at every row, which is head_rows = n.
    """
    macs = layer_macs_per_row(hidden, intermediate, kv_width)
    layers = sum(2 * macs * n + 2 * hidden * n**2 for n in rows)
    return layers + 2 * hidden * vocab * head_rows


def kv_bytes(rows: Sequence[int], *, kv_width: int, bytes_per_value: int = 2) -> int:
    """Bytes of the KV cache: a key and a value of width k for every row of every layer.

    bytes_per_value: 2 for bfloat16, 4 for float32.
    """
    return sum(rows) * 2 * kv_width * bytes_per_value
