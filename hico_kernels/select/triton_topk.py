"""select_topk: radix select on the bits of the scores, then one pass that keeps the order.

Few scores: one program a sequence finds the threshold bit by bit in registers. Many: programs take
chunks; three histograms of 11, 11 and 10 bits (whole numbers: atomics give the same in any order)
each narrow the threshold, chunks are counted, and the counts tell every chunk where it writes. No
launch waits for the host, and what depends on lengths is found on the device.

A keep above the length of its sequence cannot be reported from a device: what is left over is -1.
"""

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from hico_kernels.triton_tiles import bounds, sequence_at, slots

_IN_REGISTERS = 4096  # scores of the program that has a sequence to itself
_CHUNK = 4096
_AT_ONCE = 8  # host ints that one launch brings to the device
_BUCKETS = tl.constexpr(2048)


@triton.jit(do_not_specialize=["count", *(f"n{i}" for i in range(_AT_ONCE))])
def numbers_kernel(out_ptr, count, n0, n1, n2, n3, n4, n5, n6, n7):
    """Host ints to the device as arguments: a copy from host memory would wait, or not be captured.

    Writes the first `count` of them.
    """
    tl.store(out_ptr, n0)
    tl.store(out_ptr + 1, n1, mask=count > 1)
    tl.store(out_ptr + 2, n2, mask=count > 2)
    tl.store(out_ptr + 3, n3, mask=count > 3)
    tl.store(out_ptr + 4, n4, mask=count > 4)
    tl.store(out_ptr + 5, n5, mask=count > 5)
    tl.store(out_ptr + 6, n6, mask=count > 6)
    tl.store(out_ptr + 7, n7, mask=count > 7)


@triton.jit
def load_keys(bits_ptr, i, stride, wanted):
    """int32 keys that rise with the scores of these bits: -0 is 0 and NaN is -infinity."""
    bits = tl.load(bits_ptr + i * stride, mask=wanted, other=0)
    bits = tl.where(bits == -2147483648, 0, bits)
    bits = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -8388608, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def wanted_of(ends_ptr, b, length):
    """First place of sequence b in the result, rows to choose, places to fill."""
    place = tl.load(ends_ptr + b)
    keep = (tl.load(ends_ptr + b + 1) - place).to(tl.int32)
    return place, tl.minimum(keep, length), keep


@triton.jit
def write_chosen(out_ptr, place, before, take, start, key, i, inside, threshold, ties_before, ties):
    """Rows above the threshold and, until there are `ties`, at it: ascending, `before` of the
    `take` places of the sequence are taken.
    """
    equal = inside & (key == threshold)
    rank = ties_before + tl.cumsum(equal.to(tl.int32), 0)
    chosen = (inside & (key > threshold)) | (equal & (rank <= ties))
    at = before + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(out_ptr + place + at, start + i, mask=chosen & (at < take))


@triton.jit
def fill_rest(out_ptr, place, take, keep, BLOCK: tl.constexpr):
    """-1 where a sequence has not enough rows."""
    for first in range(take, keep, BLOCK):
        i = first + tl.arange(0, BLOCK)
        tl.store(out_ptr + place + i, -1, mask=i < keep)


@triton.jit(do_not_specialize=["rows"])
def sequence_kernel(
    bits_ptr, cu_ptr, ends_ptr, out_ptr, rows, stride, cu_stride, BLOCK: tl.constexpr
):
    """A sequence of at most BLOCK scores: its threshold from the highest bit to the lowest."""
    b = tl.program_id(0)
    start, length = bounds(cu_ptr, cu_stride, b, rows)
    place, take, keep = wanted_of(ends_ptr, b, length)
    i = tl.arange(0, BLOCK)
    inside = i < length
    key = load_keys(bits_ptr, start + i, stride, inside)
    threshold = tl.full([], -2147483648, tl.int32)
    for bit in range(32):
        higher = threshold ^ (tl.full([], 1, tl.int32) << (31 - bit))
        enough = tl.sum((inside & (key >= higher)).to(tl.int32)) >= take
        threshold = tl.where(enough, higher, threshold)
    ties = take - tl.sum((inside & (key > threshold)).to(tl.int32))
    write_chosen(out_ptr, place, 0, take, start, key, i, inside, threshold, 0, ties)
    fill_rest(out_ptr, place, take, keep, BLOCK)


@triton.jit
def bucket(histogram_ptr, need):
    """The bucket with the need-th largest key, and how many are needed from it."""
    digit = tl.arange(0, _BUCKETS)
    counts = tl.load(histogram_ptr + digit)
    reach = tl.sum(counts) - tl.cumsum(counts, 0) + counts  # keys of this bucket and of higher ones
    found = tl.sum((reach >= need).to(tl.int32)) - 1
    return found, need - tl.sum(tl.where(digit > found, counts, 0))


@triton.jit
def chunk_of(bits_ptr, cu_ptr, stride, cu_stride, sequences, rows, CHUNK: tl.constexpr):
    """b, its first row, its length, rows within it, which are there, keys as unsigned bits."""
    slot = tl.program_id(0)
    b, start, length, chunk = sequence_at(slot, cu_ptr, cu_stride, sequences, rows, CHUNK)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = i < length
    key = load_keys(bits_ptr, start + i, stride, inside)
    return b, start, length, chunk, i, inside, key


@triton.jit(do_not_specialize=["sequences", "rows"])
def histogram_kernel(
    bits_ptr, cu_ptr, ends_ptr, histograms_ptr, sequences, rows, stride, cu_stride,
    DIGIT: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds a chunk to the histogram of a digit, of the keys that have the higher digits."""
    b, _, length, chunk, _, inside, key = chunk_of(
        bits_ptr, cu_ptr, stride, cu_stride, sequences, rows, CHUNK
    )
    _, need, _ = wanted_of(ends_ptr, b, length)
    if chunk * CHUNK < length:
        histogram_ptr = histograms_ptr + b.to(tl.int64) * 3 * _BUCKETS
        high = (key >> 21) + 1024
        if DIGIT == 0:
            digit = high
        else:
            top, need = bucket(histogram_ptr, need)
            inside = inside & (high == top)
            digit = (key >> 10) & 2047
            if DIGIT == 2:
                middle, need = bucket(histogram_ptr + _BUCKETS, need)
                inside = inside & (digit == middle)
                digit = key & 1023
        counts = tl.histogram(digit, _BUCKETS, mask=inside)
        at = histogram_ptr + DIGIT * _BUCKETS + tl.arange(0, _BUCKETS)
        tl.atomic_add(at, counts, mask=counts > 0, sem="relaxed")


@triton.jit(do_not_specialize=["sequences", "rows"])
def count_kernel(
    bits_ptr, cu_ptr, ends_ptr, histograms_ptr, threshold_ptr, counts_ptr, sequences, rows,
    stride, cu_stride, CHUNK: tl.constexpr,
):  # fmt: skip
    """Keys of a chunk above and at the threshold; of a sequence the threshold and its ties."""
    b, _, length, chunk, _, inside, key = chunk_of(
        bits_ptr, cu_ptr, stride, cu_stride, sequences, rows, CHUNK
    )
    histogram_ptr = histograms_ptr + b.to(tl.int64) * 3 * _BUCKETS
    _, need, _ = wanted_of(ends_ptr, b, length)
    top, need = bucket(histogram_ptr, need)
    middle, need = bucket(histogram_ptr + _BUCKETS, need)
    low, need = bucket(histogram_ptr + 2 * _BUCKETS, need)
    threshold = ((top - 1024) << 21) | (middle << 10) | low
    counts_ptr += tl.program_id(0).to(tl.int64) * 2
    tl.store(counts_ptr, tl.sum((inside & (key > threshold)).to(tl.int32)))
    tl.store(counts_ptr + 1, tl.sum((inside & (key == threshold)).to(tl.int32)))
    tl.store(threshold_ptr + 2 * b, threshold, mask=chunk == 0)
    tl.store(threshold_ptr + 2 * b + 1, need, mask=chunk == 0)


@triton.jit(do_not_specialize=["sequences", "rows"])
def compact_kernel(
    bits_ptr, cu_ptr, ends_ptr, threshold_ptr, counts_ptr, out_ptr, sequences, rows,
    stride, cu_stride, CHUNK: tl.constexpr,
):  # fmt: skip
    """Writes the chosen rows of a chunk behind those of the chunks before it."""
    b, start, length, chunk, i, inside, key = chunk_of(
        bits_ptr, cu_ptr, stride, cu_stride, sequences, rows, CHUNK
    )
    place, take, keep = wanted_of(ends_ptr, b, length)
    threshold = tl.load(threshold_ptr + 2 * b)
    ties = tl.load(threshold_ptr + 2 * b + 1)
    above = tl.zeros([], tl.int32)
    equal = tl.zeros([], tl.int32)
    counts_ptr += (tl.program_id(0) - chunk).to(tl.int64) * 2
    for first in range(0, chunk, 1024):
        before = first + tl.arange(0, 1024)
        above += tl.sum(tl.load(counts_ptr + 2 * before, mask=before < chunk, other=0))
        equal += tl.sum(tl.load(counts_ptr + 2 * before + 1, mask=before < chunk, other=0))
    before = above + tl.minimum(equal, ties)
    write_chosen(out_ptr, place, before, take, start, key, i, inside, threshold, equal, ties)
    if chunk == 0:
        fill_rest(out_ptr, place, take, keep, CHUNK)


def select_topk(scores: Tensor, cu_seqlens: Tensor, keep: list[int]) -> Tensor:
    """Scores [S] float32, cu_seqlens [B+1], keep: B host ints -> [sum(keep)] int64, ascending."""
    rows, sequences, total = scores.shape[0], len(keep), sum(keep)
    out = scores.new_empty(total, dtype=torch.int64)
    if not total:
        return out
    ends = [0, *accumulate(keep)]
    on_device = scores.new_empty(len(ends), dtype=torch.int64)
    for first in range(0, len(ends), _AT_ONCE):
        some = ends[first : first + _AT_ONCE]
        numbers = some + [0] * (_AT_ONCE - len(some))
        numbers_kernel[(1,)](on_device[first:], len(some), *numbers, enable_fp_fusion=True)
    bits = scores.view(torch.int32)
    strides = bits.stride(0), cu_seqlens.stride(0)
    options = {"enable_fp_fusion": True}
    if rows <= _IN_REGISTERS:
        block = triton.next_power_of_2(max(rows, 128))
        sequence_kernel[(sequences,)](
            bits, cu_seqlens, on_device, out, rows, *strides,
            BLOCK=block, num_warps=max(block // 512, 1), **options,
        )  # fmt: skip
        return out
    programs = slots(rows, sequences, _CHUNK)
    histograms = scores.new_zeros(sequences, 3, _BUCKETS.value, dtype=torch.int32)
    thresholds = scores.new_empty(sequences, 2, dtype=torch.int32)
    counts = scores.new_empty(programs, 2, dtype=torch.int32)
    rest = sequences, rows, *strides
    options["num_warps"] = 8
    for digit in range(3):
        histogram_kernel[(programs,)](
            bits, cu_seqlens, on_device, histograms, *rest, DIGIT=digit, CHUNK=_CHUNK, **options
        )
    count_kernel[(programs,)](
        bits, cu_seqlens, on_device, histograms, thresholds, counts, *rest, CHUNK=_CHUNK, **options
    )
    compact_kernel[(programs,)](
        bits, cu_seqlens, on_device, thresholds, counts, out, *rest, CHUNK=_CHUNK, **options
    )
    return out
