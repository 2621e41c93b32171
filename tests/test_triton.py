"""How the Triton kernels are reached: when Triton is imported, why they cannot run, what "auto" and
the gradients take. What they compute is tested with the contracts of all implementations.
"""

import os
import subprocess
import sys
import textwrap
import warnings
from types import SimpleNamespace

import pytest
import torch

import hico_kernels as hk
from hico_kernels import dispatch, native, ops

X = torch.ones(1, 2, 3)
INTO = torch.zeros(1, 2, dtype=torch.int32)


def fresh_python(source: str, interpret: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(source)],
        env=os.environ | {"TRITON_INTERPRET": interpret},
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not native.HAS_TRITON, reason="triton is not installed")
def test_triton_is_imported_by_the_first_call_only():
    fresh_python(
        """
        import sys
        import torch, hico_kernels as hk

        x, into = torch.ones(1, 2, 3), torch.zeros(1, 2, dtype=torch.int32)
        run = hk.dispatch.overload("merge_backward", "triton", x)
        assert "triton" not in sys.modules
        run(x, into, into + 1, None)
        assert "triton" in sys.modules
        """,
        interpret="1",
    )


def test_a_gpu_is_needed_unless_triton_interprets():
    fresh_python(
        """
        import torch, hico_kernels as hk

        if hk.native.HAS_TRITON:
            cpu = hk.why_not("merge_backward", "triton", torch.ones(1, 2, 3))
            assert cpu == "tensors must be on cuda, got cpu", cpu
            anywhere = hk.why_not("merge_backward", "triton")
            assert (anywhere is None) == torch.cuda.is_available(), anywhere
        """,
        interpret="0",
    )


def test_an_installation_without_triton_says_so():
    fresh_python(
        """
        import importlib.abc, sys

        class Refuse(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path=None, target=None):
                if name == "triton":
                    raise ModuleNotFoundError(name)

        sys.meta_path.insert(0, Refuse())
        import hico_kernels as hk
        assert hk.why_not("merge_backward", "triton") == "triton is not installed"
        """,
        interpret="1",
    )


def test_the_interpreter_is_never_chosen_by_auto():
    run = dispatch.overload("merge_backward", "auto", X)
    assert run.namespace != ops.TRITON


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
def test_a_gradient_takes_the_implementation_of_its_forward_pass(impl):
    if reason := hk.why_not("merge_backward", impl, X):
        pytest.skip(reason)
    run = dispatch.backward_overload("merge_backward", impl, X)
    assert run.namespace == dispatch.namespace(impl)


def test_a_gradient_without_that_implementation_takes_the_best():
    run = dispatch.backward_overload("merge_backward", "cpu", X.double())
    assert run.namespace == ops.REFERENCE


def on_cuda(dtype=torch.float32):
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype)


def test_plain_torch_on_a_gpu_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(dispatch, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"merge_backward runs as plain torch .*triton: dtype"):
        run = dispatch.overload("merge_backward", "auto", on_cuda(torch.float64))
    assert run.namespace == ops.REFERENCE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.overload("merge_backward", "auto", on_cuda(torch.float64))


@pytest.mark.skipif(not native.HAS_TRITON, reason="triton is not installed")
def test_auto_takes_triton_on_a_gpu_where_there_is_no_cuda_kernel():
    assert dispatch.overload("merge_backward", "auto", on_cuda()).namespace == ops.TRITON
