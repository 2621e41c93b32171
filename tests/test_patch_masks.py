"""Masks of layers that hold fewer columns than the sequence has tokens."""

import torch

from hico_kernels.patch.columns import Columns
from hico_kernels.patch.masks import layer_mask, real_tokens

PLAIN = {"capacity": None, "flash": False, "dtype": torch.float32, "eager": False}


def columns(*rows, valid=None):
    positions = torch.tensor(rows)
    valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else torch.tensor(valid)
    return Columns(positions, valid, bool(valid.all()))


def test_a_mask_is_left_out_only_where_attention_is_right_without_it():
    """Row 13: `is_causal` is aligned to the upper left, wrong for some queries after many keys."""
    new = columns([6, 7, 9])
    keys = columns([0, 2, 3]).append(new)
    at = {"start": 6, "length": 10, **PLAIN}
    assert layer_mask(None, new, new, past=0, **at) is None
    one = columns([9])
    assert layer_mask(None, one, columns([0, 2, 3, 9]), past=3, **at) is None
    mask = layer_mask(None, new, keys, past=3, **at)
    want = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert mask[0, 0].long().tolist() == want


def test_no_row_of_a_mask_is_empty_and_padding_is_seen_by_itself_alone():
    """A softmax over nothing is NaN, and NaN times 0 is NaN in every row that reads it."""
    keys = columns([0, 0, 1], [0, 2, 3], valid=[[False, False, True], [True, True, True]])
    mask = layer_mask(None, keys, keys, past=0, start=0, length=4, **PLAIN)
    assert mask[:, 0].long().tolist() == [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


def test_flash_attention_is_told_of_padding_that_the_model_knows_nothing_of():
    keys = columns([0, 0, 1], [0, 2, 3], valid=[[False, False, True], [True, True, True]])
    flash = {**PLAIN, "flash": True, "start": 0, "length": 4, "past": 0}
    assert layer_mask(None, keys, keys, **flash).tolist() == keys.valid.tolist()
    full = columns([0, 2, 3])
    assert layer_mask(None, full, full, **flash) is None
    padding = torch.tensor([[False, True, True, True]])
    assert layer_mask(padding, full, full, **flash).tolist() == [[False, True, True]]


def test_rows_and_columns_are_taken_from_a_mask_that_begins_later():
    """As the masks of sliding windows do: this one has positions 4 to 7 of 8."""
    given = torch.tensor([[[[True, True, False, False], [False, True, True, True]]]])
    new = columns([7])
    mask = layer_mask(given, new, columns([1, 5, 7]), past=2, start=6, length=8, **PLAIN)
    assert mask[0, 0].tolist() == [[False, True, True]]  # position 1 is out of the window


def test_the_empty_part_of_a_static_cache_is_masked():
    given = torch.tensor([[[[0.0, 0.0, -1e9, -1e9, -1e9]]]])
    at = {**PLAIN, "capacity": 5}
    mask = layer_mask(given, columns([1]), columns([1]), past=0, start=1, length=2, **at)
    assert mask[0, 0].tolist() == [[0.0] + [torch.finfo(torch.float32).min] * 4]


def test_padding_is_read_from_either_kind_of_mask():
    flat = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    assert real_tokens(flat, 0, 2, 4).tolist() == [[False, True], [True, True]]
    square = torch.ones(4, 4, dtype=torch.bool).tril() & flat.bool()[:, None, None]
    assert real_tokens(square, 0, 4, 4).tolist() == flat.bool().tolist()
    assert real_tokens(None, 0, 4, 4) is None
