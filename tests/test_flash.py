"""impl="flash": what the functions of other packages are handed, which package is asked, and why
none can be. The packages are stand-ins (flash_stubs.py) that compute by the definition.
"""

import sys
from types import ModuleType

import flash_stubs
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import hico_kernels as hk
from hico_kernels import dispatch, flash_backends, ops
from hico_kernels.attention import flash as kernels
from hico_kernels.testing import SPECS, assert_same_bits, cu_seqlens, promises

HERE = {"fa2": flash_stubs.fa2, "fa3": flash_stubs.fa3, "fa4": flash_stubs.fa4}
HERE["torch"] = flash_stubs.torch_ops
FORWARD = ["fa3", "fa4", "fa2", "torch"]


@pytest.fixture
def install(monkeypatch):
    """Make these backends, or modules in their place, the ones that are installed; tensors of the
    CPU stand for those of a GPU.
    """
    monkeypatch.setitem(dispatch._DEVICE, "flash", "cpu")
    load = flash_backends.load

    def only(*names, **modules):
        flash_stubs.CALLS.clear()
        modules = {name: HERE[name]() for name in names} | modules
        for package in ("flash_attn", "flash_attn_interface", "flash_attn.cute"):
            monkeypatch.setitem(sys.modules, package, None)
        if "fa2" in modules or "fa4" in modules:
            monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
        monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, flash_backends.BACKENDS[name].module, module)
        without = "is not built with flash attention"
        monkeypatch.setattr(
            flash_backends,
            "load",
            lambda name: modules.get("torch", without) if name == "torch" else load(name),
        )
        load.cache_clear()
        flash_backends._known.cache_clear()

    yield only
    load.cache_clear()
    flash_backends._known.cache_clear()


def draw(rows, keys, heads=4, groups=2, width=64, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    q = normal(sum(rows), heads, width)
    k, v = normal(sum(keys), groups, width), normal(sum(keys), groups, width)
    return q, k, v, cu_seqlens(rows), cu_seqlens(keys), max(rows), max(keys)


def served(spec, dtype=torch.bfloat16):
    """Samples of an operation that run by flash attention."""
    return [s for s in spec.samples("cpu", dtype) if "flash" in spec.implementations(s)]


@pytest.mark.parametrize("backend", FORWARD)
def test_a_call_reaches_the_package_with_its_arguments(install, backend):
    install(backend)
    arguments = draw((3, 1, 5), (4, 1, 9))
    out, lse = hk.ragged_attention(
        *arguments, causal=False, scale=0.3, return_lse=True, impl="flash"
    )
    ((name, given),) = flash_stubs.CALLS
    assert name.startswith(f"{backend}.")
    values = list(given.values())
    for i in range(5):
        assert values[i] is arguments[i]  # nothing is copied that need not be
    assert values[5:7] == [5, 9]
    assert 0.3 in values[7:]
    assert given.get("causal", given.get("is_causal")) is False
    exact = hk.ragged_attention(
        *arguments, causal=False, scale=0.3, return_lse=True, impl="reference"
    )
    for actual, expected in zip((out, lse), exact, strict=True):
        assert_same_bits(actual, expected, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["fa3", "fa2", "torch"])  # 4 takes few widths
def test_promises_of_every_operation_hold_for_what_it_serves(install, backend, dtype):
    install(backend)
    checked = set()
    for operation in flash_backends.OPERATIONS:
        spec = SPECS[operation]
        for sample in served(spec, dtype):
            checked.add((operation, sample.id))
            run = lambda s, spec=spec: spec.run(s, "flash")  # noqa: E731
            promises.right_numbers(spec, sample, run)
            promises.untouched_inputs(spec, sample, run)
            promises.own_outputs(spec, sample, run)
            if sample.id in ("mixed", "usual"):
                promises.any_layout(spec, sample, run)
    names = {sample for operation, sample in checked if operation == "ragged_attention"}
    assert {"more_queries", "with_empty", "no_rows", "no_sequences", "int64", "sliced"} <= names
    assert {"no_width", "odd_width", "key_bias-mixed"}.isdisjoint(names)
    assert (("ragged_attention_backward", "with_empty") in checked) == (backend == "fa2")
    assert (("ragged_decode_attention", "empty_cache") in checked) == (backend == "fa2")


@pytest.mark.parametrize("backend", FORWARD)
def test_rows_without_keys_and_rows_with_nan_keep_their_log_sum_exp(install, backend):
    install(backend)
    q, k, v, *ends = draw((4, 2), (2, 2))
    q[5] = torch.nan
    out, lse = hk.ragged_attention(q, k, v, *ends, return_lse=True, impl="flash")
    assert lse[:, :2].isneginf().all()
    assert lse[:, 2:5].isfinite().all()
    assert lse[:, 5].isnan().all()
    assert not out[:2].any()
    assert out[5].isnan().all()


@pytest.mark.parametrize("backend", ["fa2", "torch"])
def test_one_query_each_beside_an_empty_sequence_is_no_decoding(install, backend):
    install(backend)
    arguments = draw((1, 0, 1), (4, 3, 9))
    actual = hk.ragged_attention(*arguments, impl="flash")
    assert_same_bits(actual, hk.ragged_attention(*arguments, impl="reference"), "out")
    assert 2 in list(flash_stubs.CALLS[-1][1].values())[5:7]
    hk.ragged_attention(*draw((1, 1), (4, 9)), impl="flash")  # as fast as it can be
    assert list(flash_stubs.CALLS[-1][1].values())[5] == 1


def gradients(impl, arguments, grad):
    leaves = [x.clone().requires_grad_() for x in arguments[:3]]
    out = hk.ragged_attention(*leaves, *arguments[3:], impl=impl)
    return torch.autograd.grad(out, leaves, grad)


@pytest.mark.parametrize("backend", ["fa2", "fa3", "fa4", "torch"])
def test_gradients_of_every_package(install, backend):
    """By FlashAttention-2 where it is; elsewhere by what "auto" takes, from the same lse."""
    install(backend)
    arguments = draw((4, 0, 3, 2), (2, 3, 5, 0))
    grad = torch.randn(arguments[0].shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    actual = gradients("flash", arguments, grad)
    own = backend == "fa2"
    expected = gradients("reference" if own else "cpu", arguments, grad)
    for a, b, name in zip(actual, expected, "qkv", strict=True):
        assert_same_bits(a, b, f"gradient of {name}")
    backwards = [(name, a) for name, a in flash_stubs.CALLS if "backward" in name]
    assert len(backwards) == own
    if own:
        assert backwards[0][1]["deterministic"] is True
        assert backwards[0][1]["causal"] is True


def test_gradients_of_torch_need_its_deterministic_algorithms(install):
    install("torch")
    grad = draw((3,), (3,))[0]
    call = (grad, *draw((3,), (3,))[:3])
    reason = hk.why_not("ragged_attention_backward", "flash", *call)
    assert "no fixed order unless torch.use_deterministic_algorithms(True)" in reason
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert hk.why_not("ragged_attention_backward", "flash", *call)
        torch.use_deterministic_algorithms(True)
        assert hk.why_not("ragged_attention_backward", "flash", *call) is None
        arguments = draw((4, 2), (2, 2))
        actual = gradients("flash", arguments, arguments[0])
    finally:
        torch.use_deterministic_algorithms(False)
    assert flash_stubs.CALLS[-1][0] == "torch._flash_attention_backward"
    expected = gradients("reference", arguments, arguments[0])
    for a, b in zip(actual, expected, strict=True):
        assert_same_bits(a, b, "gradient")


def test_decoding_reaches_flash_attention_2(install):
    install("fa2", "fa3")
    q, k, v = torch.randn(3, 4, 64), torch.randn(3, 9, 2, 64), torch.randn(3, 9, 2, 64)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    lengths = torch.tensor([9, 0, 4])
    actual = hk.ragged_decode_attention(q, k, v, lengths, scale=0.2, impl="flash")
    ((name, given),) = flash_stubs.CALLS
    assert name == "fa2.flash_attn_with_kvcache"
    assert given["softmax_scale"] == 0.2
    assert given["cache_seqlens"].tolist() == [9, 0, 4]
    assert given["k_cache"] is k or given["k_cache"].data_ptr() == k.data_ptr()
    expected = hk.ragged_decode_attention(q, k, v, lengths, scale=0.2, impl="reference")
    assert_same_bits(actual, expected, "decoding")


# --- which package, and why none -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("major", "width", "installed", "chosen"),
    [
        (9, 128, FORWARD, "fa3"),
        (9, 128, ["torch", "fa2", "fa4"], "fa4"),
        (9, 72, ["torch", "fa2", "fa4"], "fa2"),
        (9, 72, ["torch", "fa4"], "torch"),
        (10, 64, FORWARD, "fa4"),
        (10, 256, FORWARD, "fa2"),
        (8, 128, FORWARD, "fa2"),
        (8, 128, ["torch", "fa3"], "torch"),
        (12, 64, FORWARD, "fa2"),
    ],
)
def test_the_fastest_package_for_the_gpu_and_the_width_is_asked(
    install, monkeypatch, major, width, installed, chosen
):
    install(*installed)
    monkeypatch.setattr(flash_backends, "_major", lambda index: major)
    with FakeTensorMode():
        q = torch.empty(2, 1, width, device="cuda:0", dtype=torch.bfloat16)
    assert flash_backends.serving("ragged_attention", q, q, q) == (chosen, "")


def why_not(operation, *tensors):
    reason = hk.why_not(operation, "flash", *tensors)
    assert reason
    with pytest.raises(ValueError, match="cannot run") as error:
        dispatch.overload(operation, "flash", *tensors)
    assert reason in str(error.value)
    return reason


def test_what_cannot_be_served_is_refused_with_its_reason(install):
    install("fa2", "fa4")
    q, k, v, *_ = draw((3,), (3,))
    assert "dtype must be one of" in why_not("ragged_attention", q.float(), k.float(), v.float())
    assert "takes no key_bias" in why_not("ragged_attention", q, k, v, torch.ones(3))
    narrow = [x[..., :36] for x in (q, k, v)]
    assert "a multiple of 8 up to 256, got 36" in why_not("ragged_attention", *narrow)
    with pytest.raises(ValueError, match="takes no key_bias"):
        hk.ragged_attention(*draw((3,), (3,)), key_bias=torch.ones(3), impl="flash")
    with pytest.raises(ValueError, match="takes no key_bias"):
        torch.ops.hico_flash.ragged_attention(*draw((3,), (3,)), True, 1.0, torch.ones(3))
    install("fa4")
    wide = [torch.cat([x, x], -1)[..., :72] for x in (q, k, v)]
    assert "width (64, 96, 128), got 72" in why_not("ragged_attention", *wide)


def test_a_package_without_the_operation_says_so(install):
    install("fa3")
    q, k, v, *_ = draw((3,), (3,))
    assert "loads whole tiles of a cache" in why_not("ragged_decode_attention", q, k, v)
    assert "FlashAttention-2" in why_not("ragged_attention_backward", q, q, k, v)
    assert hk.why_not("ragged_attention", "flash", q, k, v) is None


def test_what_is_not_installed_or_does_not_load_is_said(install):
    install()
    reason = why_not("ragged_attention", draw((3,), (3,))[0])
    for part in ("flash_attn_interface", "flash_attn.cute", "flash_attn.flash_attn_interface"):
        assert f"({part}) is not installed" in reason
    assert "torch's FlashAttention-2 (torch.ops.aten) is not built with flash attention" in reason
    old = flash_stubs.fa2()
    old.flash_attn_varlen_func = lambda q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q: None
    install(fa2=old)
    reason = why_not("ragged_attention", draw((3,), (3,))[0])
    assert "flash_attn_varlen_func takes no max_seqlen_k" in reason
    install(fa2=flash_stubs.fa2(flash_attn_with_kvcache=None))
    assert "takes no cache_seqlens" in why_not("ragged_decode_attention", draw((3,), (3,))[0])


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("raise OSError('undefined symbol: _Zfoo')", "OSError: undefined symbol: _Zfoo"),
        ("import nobodys_kernels", "ModuleNotFoundError: No module named 'nobodys_kernels'"),
    ],
)
def test_a_package_that_fails_to_load_is_a_reason_and_no_error(
    install, monkeypatch, tmp_path, source, said
):
    install()
    (tmp_path / "flash_attn_interface.py").write_text(source)
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    monkeypatch.syspath_prepend(tmp_path)
    reason = why_not("ragged_attention", draw((3,), (3,))[0])
    assert f"FlashAttention-3 (flash_attn_interface) does not load: {said}" in reason


def test_tensors_of_the_cpu_are_refused(install, monkeypatch):
    install("fa2")
    monkeypatch.setitem(dispatch._DEVICE, "flash", "cuda")
    assert why_not("ragged_attention", draw((3,), (3,))[0]) == "tensors must be on cuda, got cpu"


def test_only_attention_has_a_flash_implementation():
    for operation in ops.SCHEMAS:
        assert dispatch.has_implementation(operation, "flash") == hasattr(kernels, operation)
    assert set(flash_backends.OPERATIONS) == {
        operation for operation in ops.SCHEMAS if dispatch.has_implementation(operation, "flash")
    }


# --- under torch.compile -------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["fa3", "fa2"])
def test_one_graph_with_one_operator(install, backend):
    install(backend)
    torch._dynamo.reset()
    arguments = draw((4, 3), (4, 5))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def attend(*arguments):
        return hk.ragged_attention(*arguments, impl="flash")

    fast = torch.compile(attend, fullgraph=True, backend=keep)
    assert_same_bits(fast(*arguments), attend(*arguments), "compiled")
    (graph,) = graphs
    assert "hico_flash.ragged_attention" in graph.print_readable(print_output=False)
    leaves = [x.clone().requires_grad_() for x in arguments[:3]]
    eager = gradients("flash", arguments, arguments[0])
    fast = torch.compile(attend, fullgraph=True, backend="aot_eager")
    compiled = torch.autograd.grad(fast(*leaves, *arguments[3:]), leaves, arguments[0])
    for a, b in zip(compiled, eager, strict=True):
        assert_same_bits(a, b, "gradient")


def test_the_operators_are_registered_as_torch_expects(install):
    install("fa2")
    for operation in flash_backends.OPERATIONS:
        spec = SPECS[operation]
        operator = spec.registered(ops.FLASH).default
        for sample in served(spec)[:3]:
            torch.library.opcheck(operator, spec.arguments(sample))
