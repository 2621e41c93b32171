"""What "auto" takes on a GPU follows the table of measured order, and the table the results."""

import json
from types import SimpleNamespace

import pytest
import torch

from bench import order, results
from hico_kernels import dispatch, flash_backends, info, measured, native, ops

ATTENTION = "ragged_attention"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU where Triton, CUDA and flash attention can do everything, and a table of its own."""
    monkeypatch.setattr(measured, "FILE", tmp_path / "measured.json")
    monkeypatch.setattr(measured, "capability", lambda index: "9.0")
    monkeypatch.setattr(native, "HAS_TRITON", True)
    monkeypatch.setattr(dispatch, "_not_loaded", lambda operation, impl: None)
    monkeypatch.setattr(flash_backends, "serving", lambda *call: ("fa3", ""))
    monkeypatch.setitem(dispatch._DTYPES, (ATTENTION, "cuda"), dispatch._GPU)

    def with_table(table):
        measured.FILE.write_text(json.dumps(table))
        measured.table.cache_clear()

    yield with_table
    measured.table.cache_clear()


def auto(operation, dtype=torch.bfloat16):
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=dtype)
    return dispatch._best(operation, "cuda", (x, x, x))


def on_hopper(**orders):
    kept = {"device": "NVIDIA H200", "date": "2026-12-01", "commit": "abc", "order": orders}
    return {"9.0": kept}


def test_without_measurement_attention_is_flash_and_all_else_cuda_then_triton(gpu):
    gpu({})
    assert auto(ATTENTION) == "flash"
    assert auto(ATTENTION, torch.float32) == "triton"
    assert auto("gather_tokens") == "cuda"
    assert auto("merge_tokens") == "triton"
    assert "not measured on such a GPU: attention flash, then triton" in measured.source(0)
    gpu(on_hopper() | {"9.0": None} | {"10.0": on_hopper(gather_tokens=["triton"])["9.0"]})
    measured.table().pop("9.0")
    assert auto("gather_tokens") == "cuda"  # measured elsewhere


@pytest.mark.parametrize("first", ["triton", "cuda", "flash"])
def test_auto_takes_what_was_measured_to_be_fastest(gpu, first):
    rest = [impl for impl in ("flash", "cuda", "triton") if impl != first]
    gpu(on_hopper(**{ATTENTION: [first, *rest]}))
    assert auto(ATTENTION) == first
    assert measured.order(ATTENTION, 0) == (first, *rest)
    assert measured.source(0) == "measured on NVIDIA H200, 2026-12-01, commit abc"


def test_what_cannot_run_is_passed_over_and_what_was_not_measured_comes_last(gpu):
    gpu(on_hopper(**{ATTENTION: ["flash"], "gather_tokens": ["triton"]}))
    assert auto(ATTENTION, torch.float32) == "triton"
    assert measured.order("gather_tokens", 0) == ("triton", "cuda")
    assert auto("gather_tokens") == "triton"
    assert auto("merge_tokens") == "triton"


def test_the_order_is_a_constant_of_torch_compile(gpu):
    gpu(on_hopper(gather_tokens=["triton", "cuda"]))

    def taken(x):
        return x + (1 if measured.order("gather_tokens", 0)[0] == "triton" else 2)

    assert torch.compile(taken, fullgraph=True, backend="eager")(torch.zeros(())) == 1


def test_info_says_where_the_order_comes_from():
    assert f"  auto on a GPU: {measured.source(None)}" in info.lines()


# --- the table ------------------------------------------------------------------------------------

LINES = [
    ("ragged_attention-a-f32-triton", 1.0),
    ("ragged_attention-a-bf16-triton", 2.0),
    ("ragged_attention-a-bf16-flash", 3.0),
    ("ragged_attention-a-bf16-hico", 1.0),
    ("ragged_attention-a-bf16-sdpa_each", 0.1),
    ("ragged_attention-b-bf16-triton", 9.0),
    ("ragged_attention-b-bf16-flash", 4.0),
    ("gather_tokens-a-bf16-triton", 1.0),
    ("gather_tokens-a-bf16-cuda", 2.0),
    ("select_topk-a-f32-triton", 1.0),
]


def kept(tmp_path, capability="9.0", device="NVIDIA H200", lines=LINES):
    machine = {"device": device, "type": "cuda", "torch": "2.13.0", "limits": {}}
    machine |= {"capability": capability} if capability else {}
    runs = [
        {
            "name": name,
            "stats": {"min": seconds, "median": seconds},
            "extra_info": {"percent_of_floor": 10.0},
        }
        for name, seconds in lines
    ]
    results.write({"machine_info": machine, "benchmarks": runs}, tmp_path)


def test_the_order_is_that_of_the_problems_all_implementations_ran(tmp_path):
    kept(tmp_path)
    kept(tmp_path, capability=None, device="A CPU")
    (line,) = order.table(tmp_path).items()
    assert line[0] == "9.0"
    assert line[1]["device"] == "NVIDIA H200"
    assert line[1]["order"] == {
        "ragged_attention": ["flash", "triton"],
        "gather_tokens": ["triton", "cuda"],
    }
    slower = [(name, s * 2 if "b-bf16-flash" in name else s) for name, s in LINES]
    kept(tmp_path, lines=slower)
    assert order.table(tmp_path)["9.0"]["order"]["ragged_attention"] == ["triton", "flash"]


def test_implementations_by_name_are_no_rivals(tmp_path):
    kept(tmp_path)
    (ops_kept,) = results.load("ops", tmp_path)
    (ours,) = (x for x in ops_kept["results"] if x["name"].endswith("-hico"))
    assert ours["times_as_fast"] == {"sdpa_each": 0.1}


def test_the_shipped_table_follows_from_the_results_of_the_repository():
    assert measured.FILE.read_text() == order.text(), "run `make report`"


def test_every_operation_of_the_table_exists():
    for found in measured.table().values():
        for operation, impls in found["order"].items():
            assert operation in ops.SCHEMAS
            assert all(dispatch.has_implementation(operation, impl) for impl in impls)
