"""What this installation can do: ``python -m hico_kernels.info``."""

import platform
import sys
from importlib import metadata

import torch

from hico_kernels import measured, native, ops
from hico_kernels.dispatch import IMPLEMENTATIONS, has_implementation, overload, why_not

_PACKAGES = ("triton", "flash-attn", "transformers", "decord", "av", "numpy")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    host = native.loaded.get("_host")
    paths = ", ".join(host.cpu_paths()) if host else native.reasons["_host"]
    rows = [("cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, paths: {paths}")]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = p.total_memory / 2**30
        rows.append((f"cuda:{i}", f"{p.name}, sm_{p.major}{p.minor}, {memory:.0f} GiB"))
    return rows if len(rows) > 1 else [*rows, ("cuda", "none")]


def _auto(operation: str) -> str:
    """What impl="auto" takes on every kind of device here for a float32 tensor, and on a GPU for
    heads of bfloat16.
    """
    taken = []
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        tensors = () if operation == "uniform_indices" else (torch.empty(0, device=device),)
        if device == "cuda" and has_implementation(operation, "flash"):
            tensors = (torch.empty(0, 1, 128, dtype=torch.bfloat16, device=device),)
        chosen = overload(operation, "auto", *tensors, device=device)
        named = {ops.KERNELS: device, ops.REFERENCE: "reference"}
        taken.append(named.get(chosen.namespace, chosen.namespace.removeprefix("hico_")))
    return " / ".join(taken)


def _operations() -> list[str]:
    """A row for every operation, a column for every implementation, reasons as footnotes."""
    width = max(map(len, ops.SCHEMAS)) + 2
    reasons: list[str] = []
    rows = []
    for operation in ops.SCHEMAS:
        row = f"  {operation:<{width}}{_auto(operation):<12}"
        for impl in IMPLEMENTATIONS:
            reason = why_not(operation, impl)
            if reason is None:
                mark = "yes"
            elif not has_implementation(operation, impl):
                mark = "-"
            else:
                if reason not in reasons:
                    reasons.append(reason)
                mark = f"[{reasons.index(reason) + 1}]"
            row += f"{mark:<11}"
        rows.append(row.rstrip())
    head = f"  {'':<{width}}{'auto':<12}" + "".join(f"{impl:<11}" for impl in IMPLEMENTATIONS)
    notes = [f"  [{i}] {reason}" for i, reason in enumerate(reasons, 1)]
    notes = ["  -   not in this version", *notes, f"  auto on a GPU: {measured.source(None)}"]
    return [head.rstrip(), *rows, *notes]


def lines() -> list[str]:
    """The report, a line each."""
    python = sys.version.split()[0]
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        python += " (free-threaded: not supported)"
    cuda = torch.version.cuda or "none (CPU build)"
    out = [f"hico_kernels {_version('hico-kernels')}", "", "versions"]
    versions = [("python", python), ("torch", torch.__version__), ("torch's CUDA", cuda)]
    versions += [(name, _version(name)) for name in _PACKAGES]
    out += [f"  {name:<14}{text}" for name, text in versions]
    out += ["", "devices", *(f"  {name:<14}{text}" for name, text in _devices())]
    out += ["", "modules"]
    out += [f"  {m:<14}{native.reasons.get(m, 'loaded')}" for m in native.MODULES]
    out += ["", "operations", *_operations()]
    return out


if __name__ == "__main__":
    print("\n".join(lines()))
