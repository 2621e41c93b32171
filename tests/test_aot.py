"""Every Triton kernel compiled for three GPU generations, as a launch on real shapes would have it:
it fits, keeps its registers, and uses the matrix units where it multiplies matrices.

Also by Triton 3.6, the oldest that a supported torch brings, in bfloat16 alone to save time; with
it first on the path (PYTHONPATH=.venv/triton-3.6) these tests are of it, in float32 too.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hico_kernels import dispatch, native, ops

pytestmark = pytest.mark.skipif(not native.HAS_TRITON, reason="triton is not installed")

# Kernels with products too small for wgmma and tcgen05, which need 64 rows, and why.
_GRADIENT = "32 rows a tile: more do not fit into registers for heads wider than 128"
BELOW_WGMMA = {
    "hico_kernels.attention.triton_backward.dq_kernel": _GRADIENT,
    "hico_kernels.attention.triton_backward.dkv_kernel": _GRADIENT,
}


OLDEST = Path(sys.prefix, "triton-3.6")  # `make test` installs it


@pytest.fixture(scope="module", params=["newest", "3.6"])
def compiled(request, tmp_path_factory):
    env = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    narrow = []
    if request.param == "3.6":
        if not OLDEST.exists():
            pytest.skip(f"no Triton 3.6 in {OLDEST}: make test installs it")
        narrow = ["--bfloat16"]
        path = filter(None, (str(OLDEST), os.environ.get("PYTHONPATH")))
        env["PYTHONPATH"] = os.pathsep.join(path)
    done = subprocess.run(
        [sys.executable, "-m", "hico_kernels.testing.aot", *narrow],
        env=os.environ | env,
        text=True,
        capture_output=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["triton"].startswith("3.6.") or request.param == "newest"
    return found


def label(row):
    return f"{row['kernel']} for {row['operation']} in {row['dtype']} on sm_{row['capability']}"


def test_every_kernel_is_compiled_for_every_architecture(compiled):
    assert compiled["not_launched"] == []
    operations = {op for op in ops.SCHEMAS if dispatch.has_implementation(op, "triton")}
    for capability in (80, 90, 100):
        rows = [row for row in compiled["rows"] if row["capability"] == capability]
        assert {row["operation"] for row in rows} == operations


def test_shared_memory_suffices(compiled):
    for row in compiled["rows"]:
        assert row["shared"] <= row["shared_limit"], label(row)


def test_nothing_spills(compiled):
    for row in compiled["rows"]:
        assert row["reg"] > 0, label(row)
        assert (row["stack"], row["local"]) == (0, 0), label(row)


def test_products_run_on_the_matrix_units(compiled):
    for row in compiled["rows"]:
        products = row["matrix_products"]
        if row["kernel"] in BELOW_WGMMA:
            products += row["small_matrix_products"]
        assert products > 0 or row["dots"] == 0, label(row)


def test_attention_loads_no_head_value_by_value(compiled):
    """Also those 72 wide, which are no multiple of 16 numbers (triton_tiles.step_of)."""
    rows = [row for row in compiled["rows"] if row["operation"].startswith("ragged_")]
    assert rows
    for row in rows:
        if row["dtype"] == "bfloat16":
            assert row["loads_of_2_bytes"] == 0, label(row)
