"""The tests of hico_kernels.patch and tome on several releases of transformers: `make compat`.

Each release gets a virtual environment of its own in a cache folder (transformers pins what it
needs), which borrows torch, pytest and the rest from the interpreter that runs this. Results go to
compat.json beside this file, and from there into the table of docs/patching.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "tests" / "compat.json", ROOT / "docs" / "patching.md"
START, END = "<!-- from tests/compat.json, by make compat -->\n", "<!-- end of compat.json -->\n"
COMPILE = ROOT / "tests" / "test_patch_compile.py"
TIMM = ROOT / "tests" / "test_tome_timm.py"  # towers without transformers
RELEASES = ("4.57.6", "5.4.0", "5.13.1", "5.18.0", "newest")
FAMILIES = {  # as in tests/patch_models.py, longest first where one name begins another
    "qwen2_5_vl": "Qwen2.5-VL",
    "qwen2_vl": "Qwen2-VL",
    "qwen3_vl": "Qwen3-VL",
    "llava_onevision": "LLaVA-OneVision",
    "llava_next_video": "LLaVA-NeXT-Video",
    "internvl": "InternVL3",
    "video_llama_3": "VideoLLaMA3",
    "smolvlm": "SmolVLM2",
    "glm4v": "GLM-4V",
    "gemma3": "Gemma 3",
    "gemma4": "Gemma 4",
    "qwen3_5": "Qwen3.5",
}


def environment(release: str, folder: Path) -> Path:
    """The interpreter of a virtual environment with that transformers; made when there is none."""
    python = folder / release / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder / release], check=True)
    wanted = "transformers" if release == "newest" else f"transformers=={release}"
    install = [python, "-m", "pip", "install", "-q", "--upgrade", wanted, "pillow"]
    subprocess.run(install, check=True)
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True)
    # Its own packages come first on the path, what it lacks is taken from here.
    borrowed = Path(own.stdout.strip()) / "zz_borrowed.pth"
    borrowed.write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python: Path, report: Path) -> dict:
    """Run the tests; how many of each family, and of all, passed, failed and were skipped."""
    # Compiling takes as long as all else together, and does not depend on the release.
    groups = ("patch", "prellm", "tome")
    files = {file for group in groups for file in (ROOT / "tests").glob(f"test_{group}*.py")}
    tests = sorted(map(str, files - {COMPILE, TIMM}))
    command = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*command, *tests], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    ask = "import torch, transformers; print(transformers.__version__, torch.__version__)"
    versions = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True)
    release, torch = versions.stdout.split()
    cases = list(ElementTree.parse(report).iter("testcase"))
    counts = {name: count(c for c in cases if family(c.get("name")) == name) for name in FAMILIES}
    return {
        "transformers": release,
        "torch": torch,
        "python": platform.python_version(),
        "all": count(cases),
        "families": {name: found for name, found in counts.items() if found},
    }


def family(test: str) -> str | None:
    """The family that a test is about, by its parameters."""
    return next((name for name in FAMILIES if name in test.partition("[")[2]), None)


def count(cases: Iterable[ElementTree.Element]) -> dict[str, int]:
    """Outcomes of test cases."""
    outcomes = Counter(
        next((part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed")
        for case in cases
    )
    failed = outcomes["failure"] + outcomes["error"]
    found = {"passed": outcomes["passed"], "failed": failed, "skipped": outcomes["skipped"]}
    return {name: number for name, number in found.items() if number}


def table(results: Mapping[str, Mapping]) -> str:
    """Markdown: a row for each family, a column for each release."""
    columns = sorted(results.values(), key=lambda r: [int(n) for n in r["transformers"].split(".")])
    heads = ["tests passed with transformers", *(c["transformers"] for c in columns)]
    lines = [heads, ["---"] * len(heads)]
    for name, title in FAMILIES.items():
        lines.append([title, *(cell(c["families"].get(name)) for c in columns)])
    lines.append(["all tests", *(cell(c["all"]) for c in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def cell(found: Mapping[str, int] | None) -> str:
    """What happened, in a few words."""
    if not found:
        return "not in this version"
    passed, failed = found.get("passed", 0), found.get("failed", 0)
    return f"{passed}, {failed} failed" if failed else str(passed)


def main() -> int:
    """Run all, or the releases that are named, and write the results and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("releases", nargs="*", default=RELEASES, help="default: %(default)s")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    parser.add_argument("--envs", type=Path, default=cache / "hico_kernels" / "compat")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for release in arguments.releases:
        print(f"==> transformers {release}", flush=True)
        python = environment(release, arguments.envs)
        results[release] = run(python, arguments.envs / f"{release}.xml")
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + table(results) + END + rest.split(END)[1])
    return 1 if any(r["all"].get("failed") for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
