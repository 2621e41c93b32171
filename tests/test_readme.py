"""The README's code runs as printed."""

import re
from pathlib import Path

import patch_models
import pytest

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_readme_begins_with_diagram_commands_and_picture():
    text = (ROOT / "README.md").read_text()
    wanted = ["video.mp4 ─▶ frames", "make demo\nmake test", "(docs/demo.png)", "## In your code"]
    places = [text.find(part) for part in wanted]
    assert -1 not in places
    assert places == sorted(places)


@pytest.mark.parametrize("block", BLOCKS, ids=["operations", "patch", "model"])
def test_the_readmes_code_runs(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    names = {}
    if "model.generate" in block:  # a model of four layers, so the plan moves up
        names = {"model": patch_models.model("qwen2_vl"), "inputs": patch_models.prompt("qwen2_vl")}
        block = block.replace("4: Uniform", "1: Uniform").replace("18: Text", "2: Text")
    exec(compile(block, "README.md", "exec"), names)
