"""What the contracts do not ask of the Triton kernels for selecting: both ways through each of
them, wrong indices, lengths and counts. Run by Triton's interpreter, so slowly and without a GPU.
"""

import os

import pytest
import torch

from hico_kernels.select.reference import (
    gather_tokens_backward_reference,
    select_topk_reference,
    text_guided_scores_reference,
)
from hico_kernels.testing import SPECS, Sample, assert_within_budget, cu_seqlens, promises
from hico_kernels.testing.samples import Draw

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from hico_kernels import triton_tiles
from hico_kernels.select import triton as kernels
from hico_kernels.select import triton_scores, triton_topk
from hico_kernels.triton_tiles import sequence_at, slots


def test_an_index_outside_reads_nothing_and_gives_zeros():
    x = torch.randn(5, 7)
    index = torch.tensor([4, -1, 5, 0, 2**40])
    y = kernels.gather_tokens(x, index)
    assert torch.equal(y[[0, 3]], x[[4, 0]])
    assert not y[[1, 2, 4]].any()


def test_of_several_tensors_too_and_wrong_bounds_stay_counts():
    x, places = torch.randn(5, 7), torch.arange(10, 15)
    index = torch.tensor([-1, 0, 4, 5, 2**40])
    y, kept, ends = kernels.gather_many(x, index, [places], torch.tensor([-3, 2, 2**40, 1]))
    assert torch.equal(y[[1, 2]], x[[0, 4]])
    assert not y[[0, 3, 4]].any()
    assert kept.tolist() == [0, 10, 14, 0, 0]
    assert ends.tolist() == [0, 2, 4, 2]


def test_the_gradient_of_an_index_outside_goes_nowhere():
    grad = torch.randn(5, 7)
    out = kernels.gather_tokens_backward(grad, torch.tensor([4, -1, 5, 0, 4]), 5)
    assert torch.equal(out[4], grad[0] + grad[4])
    assert torch.equal(out[0], grad[3])
    assert not out[1:4].any()


@pytest.mark.parametrize("programs", [1, 3])
def test_a_program_may_have_several_tiles_of_rows_to_normalise(monkeypatch, programs):
    monkeypatch.setattr(triton_tiles, "PROGRAMS", programs)
    spec, d = SPECS["rms_norm_backward"], Draw("cpu", torch.float32)
    sample = Sample("", (*(d.normal(130, 40) for _ in range(3)), d.normal(40), 1e-6))
    promises.right_numbers(spec, sample, lambda sample: spec.run(sample, "triton"))


def test_rows_taken_often_and_far_apart_are_added_in_order():
    index = torch.zeros(2500, dtype=torch.int64)
    index[[3, 1200, 2400]] = 1
    index[[7, 2499]] = 2
    grad = torch.randn(2500, 5, dtype=torch.float64)
    expected = gather_tokens_backward_reference(grad, index, 4)
    assert torch.equal(kernels.gather_tokens_backward(grad, index, 4), expected)


@pytest.mark.parametrize("chunk", [128, 512])
def test_many_scores_are_chosen_as_few_are(monkeypatch, chunk):
    """Chunks, ties across them, empty sequences and all kinds of floats, by the long way."""
    monkeypatch.setattr(triton_topk, "_IN_REGISTERS", 0)
    monkeypatch.setattr(triton_topk, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-40, -1e-40, 1.0, -1.0])
    lengths, keep = (700, 0, 128, 1, 1100), (300, 0, 128, 0, 555)
    total = sum(lengths)
    ends = cu_seqlens(lengths)
    for scores in (
        torch.randn(total, generator=generator),
        torch.randint(0, 4, (total,), generator=generator).float(),
        odd[torch.randint(0, 9, (total,), generator=generator)],
        1 + torch.randperm(total, generator=generator) * 2.0**-23,
    ):
        expected = select_topk_reference(scores, ends, list(keep))
        assert torch.equal(kernels.select_topk(scores, ends, list(keep)), expected)


@pytest.mark.parametrize("in_registers", [0, 8192])
def test_more_wanted_than_there_are_gives_minus_one_in_the_places_left(monkeypatch, in_registers):
    monkeypatch.setattr(triton_topk, "_IN_REGISTERS", in_registers)
    scores = torch.randn(9)
    chosen = kernels.select_topk(scores, cu_seqlens((4, 0, 5)), [6, 2, 1])
    assert chosen[:4].tolist() == [0, 1, 2, 3]
    assert chosen[4:8].tolist() == [-1, -1, -1, -1]
    assert chosen[8] == 4 + scores[4:].argmax()


def test_more_counts_than_one_launch_has_arguments():
    lengths = [i % 5 for i in range(20)]
    keep = [n // 2 for n in lengths]
    scores, ends = torch.randn(sum(lengths)), cu_seqlens(lengths)
    expected = select_topk_reference(scores, ends, keep)
    assert torch.equal(kernels.select_topk(scores, ends, keep), expected)


@pytest.mark.parametrize("kept_rows", [0, 1, 4])
def test_kept_logits_and_a_second_pass_over_the_keys_agree(monkeypatch, kept_rows):
    """On average 4 text rows, by sequence 0, 1, 2 and 13: some above, some below what is kept."""
    monkeypatch.setattr(triton_scores, "_KEPT_ROWS", kept_rows)
    monkeypatch.setattr(triton_scores, "_CHUNK", 128)
    texts, lengths = (0, 1, 2, 13), (30, 300, 5, 150)
    q, k = torch.randn(16, 6, 20), torch.randn(485, 2, 20)
    arguments = q, k, cu_seqlens(texts), cu_seqlens(lengths)
    actual = kernels.text_guided_scores(*arguments, 0.2)
    exact = text_guided_scores_reference(q.double(), k.double(), *arguments[2:], 0.2)
    plain = text_guided_scores_reference(*arguments, 0.2)
    assert_within_budget(actual, exact, plain, "scores")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_key_without_a_number_spoils_its_own_sequence_only(value):
    q, k = torch.ones(2, 2, 16), torch.randn(300, 1, 16)
    k[40, 0, 3] = value
    ends = cu_seqlens((1, 1)), cu_seqlens((90, 210))
    actual = kernels.text_guided_scores(q, k, *ends, 1.0)
    expected = text_guided_scores_reference(q, k, *ends, 1.0)
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.allclose(actual, expected, equal_nan=True)


@triton.jit
def who_owns(cu_ptr, out_ptr, sequences, rows, SIZE: tl.constexpr):
    slot = tl.program_id(0)
    found = sequence_at(slot, cu_ptr, 1, sequences, rows, SIZE)
    for i in tl.static_range(4):
        tl.store(out_ptr + 4 * slot + i, found[i])


def owners(ends, rows, size):
    """Of every slot: sequence, first row, length, tile."""
    programs = slots(rows, len(ends) - 1, size)
    out = torch.full((programs, 4), -1)
    who_owns[(programs,)](torch.tensor(ends), out, len(ends) - 1, rows, SIZE=size)
    return out.tolist()


@pytest.mark.parametrize("lengths", [(5, 1, 9, 3), (0, 6, 0, 2, 0), (4, 4, 4), (0,), (3, 0) * 70])
def test_every_tile_of_every_sequence_has_one_slot(lengths):
    ends = cu_seqlens(lengths).tolist()
    found = owners(ends, ends[-1], 4)
    tiles = [(b, ends[b], n, t) for b, n in enumerate(lengths) for t in range(-(-n // 4))]
    working = [tuple(slot) for slot in found if 4 * slot[3] < slot[2]]
    assert working == tiles


@pytest.mark.parametrize("ends", [[0, 500, 9], [-7, 3, 900], [9, 0, 9], [5, 2**40, -(2**40)]])
def test_wrong_lengths_stay_within_the_rows(ends):
    for b, start, length, tile in owners(ends, 9, 4):
        assert b in (0, 1)
        assert tile >= 0
        assert 0 <= start <= start + length <= 9


@pytest.mark.parametrize("ends", [[0, 500, 9], [-7, 3, 900], [9, 0, 9], [2, 9, 0]])
def test_wrong_lengths_write_only_what_was_asked_for(monkeypatch, ends):
    around, new_empty = torch.full((30,), 77), torch.Tensor.new_empty

    def inside_of_sentinels(x, *shape, **kwargs):
        return around[10:15] if shape == (5,) else new_empty(x, *shape, **kwargs)

    monkeypatch.setattr(torch.Tensor, "new_empty", inside_of_sentinels)
    monkeypatch.setattr(triton_topk, "_IN_REGISTERS", 0)
    monkeypatch.setattr(triton_topk, "_CHUNK", 2)
    kernels.select_topk(torch.randn(9), torch.tensor(ends), [2, 3])
    assert (around[:10] == 77).all()
    assert (around[15:] == 77).all()
