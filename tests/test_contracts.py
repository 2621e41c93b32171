"""What every operation promises, whatever it computes, for every implementation that runs here."""

import functools
import itertools
import os
from pathlib import Path

import pytest
import torch

from hico_kernels import dispatch, native, ops
from hico_kernels.testing import SPECS, promises

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()
LARGE = "large"  # the sample of every operation that more than one thread works on
SECONDS = {LARGE, "784to64-h16", "many_members", "gqa7-d128"}  # of each in Triton's interpreter
# Where the first sample would take the interpreter many seconds in every layout of its tensors.
SMALL = {"ragged_attention": "odd_width", "ragged_attention_backward": "odd_width"}


def short(dtype: torch.dtype) -> str:
    return {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}[
        str(dtype).removeprefix("torch.")
    ]


def interpreted(impl: str, device: str) -> bool:
    return impl == "triton" and device == "cpu"


CASES = [
    pytest.param(spec, sample, impl, id=f"{spec.name}-{sample.id}-{impl}-{device}-{short(dtype)}")
    for spec in SPECS.values()
    for device in DEVICES
    for dtype in spec.dtypes
    for place, sample in enumerate(spec.samples(device, dtype))
    for impl in spec.implementations(sample)
    if not (interpreted(impl, device) and dtype != torch.float32 and sample.id in SECONDS)
    if not (interpreted(impl, device) and dtype == torch.bfloat16 and place > 1)  # as float16
]
ROWS = [
    pytest.param(spec, impl, device, id=f"{spec.name}-{impl}-{device}")
    for spec in SPECS.values()
    for device in DEVICES
    for impl in dispatch.IMPLEMENTATIONS
    if impl in spec.implementations(next(iter(spec.samples(device, torch.float32))))
]
KERNELS = [row for row in ROWS if row.values[1] != "reference"]
INTERPRETED = [row for row in ROWS if interpreted(*row.values[1:])]  # one caller at a time
COMPILED = [row for row in KERNELS if row not in INTERPRETED]
CPU_KERNELS = [row for row in ROWS if row.values[1] == "cpu"]
CPU_PATHS = native.loaded["_host"].cpu_paths() if "_host" in native.loaded else []


def keep(promise, spec, impl, device, *dtypes, only=None, leave_out=()):
    """Check a promise on the samples that `impl` can run; only that of one name when given. In the
    interpreter on the first: there all samples are in one test, that of the numbers.
    """
    checked = 0
    slow = interpreted(impl, device)
    for dtype in spec.dtypes:
        samples = spec.samples(device, dtype) if dtype in dtypes else ()
        for sample in itertools.islice(samples, 1 if slow and only is None else None):
            wanted = sample.id not in leave_out and only in (None, sample.id)
            wanted &= not (slow and sample.id in SECONDS)
            if wanted and impl in spec.implementations(sample):
                promise(spec, sample, lambda sample: spec.run(sample, impl))
                checked += 1
    assert checked, "no sample was checked"


def test_every_registered_operation_has_samples():
    assert set(SPECS) == set(ops.SCHEMAS)
    for spec in SPECS.values():
        ids = [sample.id for sample in spec.samples("cpu", torch.float32)]
        assert len(set(ids)) == len(ids) >= 8, f"{spec.name}: {ids}"


@pytest.mark.parametrize(("spec", "sample", "impl"), CASES)
def test_numbers_are_within_the_error_budget(spec, sample, impl):
    promises.right_numbers(spec, sample, lambda sample: spec.run(sample, impl))


@pytest.mark.parametrize("path", CPU_PATHS)
@pytest.mark.parametrize(("spec", "impl", "device"), CPU_KERNELS)
def test_every_machine_code_of_the_cpu_is_right(spec, impl, device, path):
    use_cpu_path = torch.ops.hico.use_cpu_path.default
    try:
        assert use_cpu_path(path) == path
        keep(promises.right_numbers, spec, impl, device, *spec.dtypes)
        keep(promises.same_bits_with_any_threads, spec, impl, device, *spec.dtypes, only=LARGE)
    finally:
        use_cpu_path("best")


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_every_tensor_may_be_strided(spec, impl, device):
    dtypes = torch.float32, torch.bfloat16
    one = next(iter(spec.samples(device, torch.float32))).id
    if interpreted(impl, device):
        dtypes, one = dtypes[:1], SMALL.get(spec.name, one)
    keep(promises.any_layout, spec, impl, device, *dtypes, only=one)


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_autocast_does_not_change_the_precision(spec, impl, device):
    def in_autocast(spec, sample, run):
        expected = run(sample)
        with torch.autocast(device, torch.bfloat16):
            actual = run(sample)
        for a, b in zip(actual, expected, strict=True):
            promises.assert_same_bits(a, b, f"{spec.name} {sample.id} in autocast")

    keep(in_autocast, spec, impl, device, torch.float32)


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_inputs_are_left_alone(spec, impl, device):
    keep(promises.untouched_inputs, spec, impl, device, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_outputs_are_contiguous_and_share_no_memory(spec, impl, device):
    keep(promises.own_outputs, spec, impl, device, torch.float32, torch.float64)


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_the_same_bits_come_every_time(spec, impl, device):
    times = 2 if interpreted(impl, device) else 20
    again = functools.partial(promises.same_bits_again, repeats=times)
    keep(again, spec, impl, device, torch.float32)


@pytest.mark.parametrize(("spec", "impl", "device"), COMPILED)  # plain torch leaves it to its BLAS
def test_the_same_bits_come_whatever_the_number_of_threads(spec, impl, device):
    keep(promises.same_bits_with_any_threads, spec, impl, device, *spec.dtypes, only=LARGE)


@pytest.mark.parametrize(("spec", "impl", "device"), [r for r in ROWS if r not in INTERPRETED])
def test_eight_callers_at_once_get_what_one_gets(spec, impl, device):
    keep(promises.same_bits_called_together, spec, impl, device, torch.float32, only=LARGE)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize(("spec", "impl", "device"), CPU_KERNELS)
def test_ten_thousand_calls_leak_nothing(spec, impl, device):
    sample = next(iter(spec.samples(device, torch.float32)))
    arguments = spec.arguments(sample)
    run = spec.registered(ops.KERNELS).default
    for calls in (2_000, 10_000):  # the first round fills what is kept on purpose
        before = resident_bytes()
        for _ in range(calls):
            run(*arguments)
        grown = resident_bytes() - before
    assert grown < 2_000_000, f"{grown} bytes in {calls} calls"


@pytest.mark.parametrize(("spec", "impl", "device"), ROWS)
def test_the_operator_is_registered_as_torch_expects(spec, impl, device):
    first = next(iter(spec.samples(device, torch.float32))).id
    operator = spec.registered(dispatch.namespace(impl)).default

    def registered(spec, sample, run):
        checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
        if sample.id == first or sample.id.startswith(
            "no_"
        ):  # the slow one: usual and empty inputs
            checks.append("test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, spec.arguments(sample), test_utils=checks)

    keep(registered, spec, impl, device, torch.float32, leave_out=[LARGE])
    for dtype in spec.dtypes[1:]:  # the shape rule also tells the dtypes of the outputs
        sample = next(iter(spec.samples(device, dtype)))
        if impl in spec.implementations(sample):
            torch.library.opcheck(operator, spec.arguments(sample), test_utils="test_faketensor")


@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("device", DEVICES)
def test_an_implementation_that_was_asked_for_runs_or_says_why_not(spec, impl, device):
    for dtype in spec.dtypes:
        sample = next(iter(spec.samples(device, dtype)))
        if impl in spec.implementations(sample):
            spec.run(sample, impl)
            continue
        tensors = [x for x in spec.arguments(sample) if isinstance(x, torch.Tensor)]
        reason = dispatch.why_not(spec.name, impl, *tensors)
        with pytest.raises(ValueError, match="cannot run") as error:
            spec.run(sample, impl)
        for part in (spec.name, repr(impl), reason):
            assert part in str(error.value)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_auto_is_the_best_implementation_that_can_run(spec):
    for dtype in spec.dtypes:
        sample = next(iter(spec.samples("cpu", dtype)))
        best = "cpu" if "cpu" in spec.implementations(sample) else "reference"
        for actual, expected in zip(spec.run(sample, "auto"), spec.run(sample, best), strict=True):
            promises.assert_same_bits(actual, expected, f"{spec.name} auto is not {best}")


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_cost_is_at_least_the_outputs_and_never_negative(spec):
    for sample in spec.samples("cpu", torch.float32):
        cost = spec.cost(sample)
        written = sum(y.numel() * y.element_size() for y in spec.run(sample, "auto"))
        assert cost.bytes >= written, sample.id
        assert cost.flops >= 0, sample.id


# --- what only a CUDA device can show -------------------------------------------------------------

NO_CUDA = pytest.param(None, None, None, id="cuda", marks=pytest.mark.skip("needs a CUDA device"))
FLASH = [
    pytest.param(spec, "flash", "cuda", id=f"{spec.name}-flash-cuda")
    for spec in SPECS.values()
    if "cuda" in DEVICES
    and "flash" in spec.implementations(next(iter(spec.samples("cuda", torch.bfloat16))))
]
ON_CUDA = [row for row in KERNELS if row.values[2] == "cuda"] + FLASH or [NO_CUDA]


def usual(spec, impl, device):
    dtype = torch.bfloat16 if impl == "flash" else torch.float32
    return next(iter(spec.samples(device, dtype)))


def floating(sample):
    return [x for x in sample.args if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize(("spec", "impl", "device"), ON_CUDA)
def test_a_captured_graph_replays_on_new_values(spec, impl, device):
    sample = usual(spec, impl, device)
    spec.run(sample, impl)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = spec.run(sample, impl)
    for x in floating(sample):
        x.copy_(x.flip(0))
    graph.replay()
    for actual, expected in zip(replayed, spec.run(sample, impl), strict=True):
        promises.assert_same_bits(actual, expected, f"{spec.name} replayed")


@pytest.mark.parametrize(("spec", "impl", "device"), ON_CUDA)
def test_the_current_stream_is_used(spec, impl, device):
    sample = usual(spec, impl, device)
    expected, values = spec.run(sample, impl), [x.clone() for x in floating(sample)]
    for x in floating(sample):
        x.zero_()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)  # what runs on another stream meets the zeros
        for x, value in zip(floating(sample), values, strict=True):
            x.copy_(value)
        actual = spec.run(sample, impl)
    side.synchronize()
    for one, other in zip(actual, expected, strict=True):
        promises.assert_same_bits(one, other, f"{spec.name} on a side stream")
