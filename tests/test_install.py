"""The package as installed: what it imports, what it ships, what it has promised to callers."""

import importlib
import os
import re
import statistics
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest
import torch
from torch._C import parse_schema

import hico_kernels
from hico_kernels import dispatch, info, native, ops

ROOT = Path(__file__).parents[1]

# Released schemas. They may only grow at the end, with defaults.
SCHEMAS = """
merge_tokens(Tensor x, SymInt num_tokens, SymInt num_heads, Tensor? metric=None)
    -> (Tensor, Tensor, Tensor)
bipartite_soft_matching(Tensor metric, SymInt r, bool class_token, bool distill_token) -> Tensor
merge_apply(Tensor x, Tensor assignment, SymInt num_tokens, Tensor? sizes) -> (Tensor, Tensor)
merge_similar(Tensor x, Tensor metric, SymInt r, Tensor? sizes, Tensor? other, SymInt front,
    bool class_token, bool distill_token, bool spatial) -> (Tensor, Tensor, Tensor, Tensor, Tensor)
merge_backward(Tensor grad, Tensor assignment, Tensor merged_sizes, Tensor? sizes) -> Tensor
layer_norm_metric(Tensor x, Tensor weight, Tensor bias, float eps, SymInt num_heads)
    -> (Tensor, Tensor)
layer_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)
text_guided_scores(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float scale)
    -> Tensor
text_guided_scores_rotary(Tensor q, Tensor k, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    float scale, Tensor cos, Tensor sin) -> Tensor
select_topk(Tensor scores, Tensor cu_seqlens, SymInt[] keep) -> Tensor
uniform_indices(SymInt num_tokens, SymInt keep, Device device) -> Tensor
gather_tokens(Tensor x, Tensor index) -> Tensor
gather_many(Tensor x, Tensor index, Tensor[] more, Tensor? cu_seqlens) -> Tensor[]
gather_rms_norm(Tensor x, Tensor index, Tensor weight, float eps) -> (Tensor, Tensor)
rms_norm_backward(Tensor grad_rows, Tensor grad_normed, Tensor rows, Tensor weight, float eps)
    -> (Tensor, Tensor)
gather_tokens_backward(Tensor grad, Tensor index, SymInt num_rows) -> Tensor
ragged_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,
    SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, float scale, Tensor? key_bias)
    -> (Tensor, Tensor)
ragged_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse,
    Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,
    bool causal, float scale, Tensor? key_bias) -> (Tensor, Tensor, Tensor)
ragged_decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor kv_lengths, float scale)
    -> Tensor
"""
RELEASED = re.sub(r"\n\s+", " ", SCHEMAS).split("\n")[1:-1]


def fresh_python(source: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(source)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_references_work_without_native_code_or_any_extra():
    fresh_python("""
        import importlib.abc, sys, warnings

        OPTIONAL = {"triton", "transformers", "decord", "av", "PIL", "numpy", "safetensors"}

        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in OPTIONAL or name.startswith("hico_kernels._"):
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Refuse())
        warnings.simplefilter("ignore")  # torch tells that it misses numpy
        import torch
        import hico_kernels as hk

        assert "not built" in hk.why_not("gather_tokens", "cpu")
        x, cu = torch.eye(4), torch.tensor([0, 4])
        merged = hk.merge_tokens(x[None], 2)
        assert merged.sizes.sum() == 4
        matching = hk.bipartite_soft_matching(x[None], 1)
        assert matching.unmerge(matching.merge(x[None])[0]).shape == (1, 4, 4)
        scores = hk.text_guided_scores(x[3:, None], x[:, None], cu.clamp(max=1), cu)
        assert hk.select_topk(scores, cu, [1]).tolist() == [3]
        assert hk.uniform_indices(5, 3).tolist() == [0, 2, 4]
        assert hk.gather_tokens(x, torch.tensor([3])).tolist() == x[3:].tolist()
        q = x[:, None].clone().requires_grad_()
        hk.ragged_attention(q, q, q, cu, cu, 4, 4).sum().backward()
        assert q.grad.isfinite().all()
        cache = x[None, :, None]
        assert hk.ragged_decode_attention(x[:1, None], cache, cache, cu[1:]).shape == (1, 1, 4)
    """)


def test_importing_is_quiet_offline_and_light():
    done = fresh_python("""
        import sys

        def watch(event, args):
            if event.startswith("socket.") and event != "socket.__new__":
                raise RuntimeError(f"{event} at import")

        sys.addaudithook(watch)
        import torch
        before = set(sys.modules)
        import hico_kernels
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = new & {"triton", "transformers", "numpy", "decord", "av", "PIL", "pytest"}
        assert not heavy, heavy
        assert "hico_kernels.testing" not in sys.modules
    """)
    assert (done.stdout, done.stderr) == ("", "")


def test_a_module_that_does_not_load_becomes_a_reason(monkeypatch):
    def refuse(name):
        raise ImportError(f"{name} was built for something else")

    monkeypatch.setattr(importlib, "import_module", refuse)
    monkeypatch.setattr(native, "reasons", {})
    monkeypatch.setattr(native, "loaded", {})
    native.load()
    assert set(native.reasons) == set(native.MODULES)
    reason = hico_kernels.why_not("gather_tokens", "cpu")
    assert "does not load with torch" in reason
    assert "was built for something else" in reason
    with pytest.raises(ValueError, match=r"gather_tokens\(impl='cpu'\) cannot run: .*_C_cpu"):
        hico_kernels.gather_tokens(torch.eye(2), torch.tensor([0]), impl="cpu")


@pytest.mark.parametrize("namespace", ops.NAMESPACES)
@pytest.mark.parametrize("schema", RELEASED, ids=lambda text: text.split("(")[0])
def test_schemas_stay_backward_compatible(schema, namespace):
    old = parse_schema(f"{namespace}::{schema}")
    new = getattr(getattr(torch.ops, namespace), schema.split("(")[0]).default._schema
    assert new.is_backward_compatible_with(old), f"{new} breaks callers of {old}"


def test_every_operation_is_among_the_released_ones():
    assert {schema.split("(")[0] for schema in RELEASED} == set(ops.SCHEMAS)


# --- what is shipped ------------------------------------------------------------------------------


def project() -> dict:
    toml = pytest.importorskip("tomllib", reason="tomllib came with Python 3.11")
    return toml.loads((ROOT / "pyproject.toml").read_text())


def test_every_package_folder_is_listed():
    folders = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for top in ("hico_kernels", "model")
        for file in (ROOT / top).rglob("__init__.py")
    }
    expected = {re.sub(r"^model\b", "hico_model", folder) for folder in folders}
    assert set(project()["tool"]["setuptools"]["packages"]) == expected


def test_a_source_distribution_has_all_that_a_build_and_the_tests_need(tmp_path):
    where = ["egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", *where, "--formats", "tar"],
        cwd=ROOT,
        env=os.environ | {"HICO_CUDA": "0"},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar"))) as archive:
        shipped = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "tests", "bench", "hico_kernels", "model")
    files = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    expected = {str(f.relative_to(ROOT)) for f in files if f.suffix not in (".pyc", ".so")}
    expected |= {"Makefile", "AGENTS.md", "README.md", "LICENSE", ".clang-format", "setup.py"}
    assert not {name for name in expected if "bench/results/" not in name} - shipped
    assert not any(name.endswith((".so", ".pyc")) for name in shipped)


def test_the_version_is_said_once():
    assert project()["project"]["version"] == hico_kernels.__version__


@pytest.mark.parametrize("folder", ["merge", "select", "attention"])
def test_an_operation_folder_documents_itself(folder):
    text = (ROOT / "hico_kernels" / folder / "README.md").read_text()
    parts = ("Definition", "Order", "Ties and NaN", "Numerics", "Gradient", "Cost", "Sources")
    for part in (*parts, "Implementations"):
        assert f"\n## {part}\n" in text, part


@pytest.mark.parametrize("operation", ops.SCHEMAS)
def test_the_documented_implementations_are_those_that_exist(operation):
    exist = [i for i in dispatch.IMPLEMENTATIONS if dispatch.has_implementation(operation, i)]
    row = f"| `{operation}` | {', '.join(exist)} |"
    texts = [file.read_text() for file in (ROOT / "hico_kernels").glob("*/README.md")]
    assert sum(row in text for text in texts) == 1, f"no README.md has the row {row}"


def test_public_names_exist_and_are_documented():
    for name in hico_kernels.__all__:
        assert getattr(hico_kernels, name).__doc__, name
    assert sorted(hico_kernels.__all__) == hico_kernels.__all__


def test_files_stay_short():
    suffixes = {".py", ".cpp", ".cu", ".cuh", ".h"}
    lengths = {
        file.relative_to(ROOT): len(file.read_text().splitlines())
        for top in ("bench", "csrc", "hico_kernels", "model", "tests")
        for file in (ROOT / top).rglob("*")
        if file.suffix in suffixes
    }
    too_long = {str(file): lines for file, lines in lengths.items() if lines > 600}
    assert not too_long, too_long
    assert statistics.median(lengths.values()) <= 200


def test_info_tells_of_every_module_and_operation_what_runs_here():
    report = "\n".join(info.lines())
    for name in (*native.MODULES, *ops.SCHEMAS, "torch", "python", "cpu"):
        assert f"  {name} " in report, name
    for module, reason in native.reasons.items():
        assert re.search(rf"{module} +{re.escape(reason)}", report)
    for operation in ops.SCHEMAS:
        marks = re.search(rf"^  {operation} +(\S.*)$", report, re.MULTILINE)[1].split()
        assert marks[0] == info._auto(operation), operation
        for impl, mark in zip(dispatch.IMPLEMENTATIONS, marks[-5:], strict=True):
            assert (mark == "yes") == (dispatch.why_not(operation, impl) is None), (operation, impl)
