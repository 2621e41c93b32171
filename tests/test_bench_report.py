"""README shows the results in the repository, and says where an alternative wins."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench import report, results

ROOT = Path(__file__).parents[1]
LINES = [
    ("merge-clip-f32-hico-t1", 0.002, 40.0),
    ("merge-clip-f32-hico-t2", 0.001, 35.0),
    ("merge-clip-f32-eager-t1", 0.008, 10.0),
    ("merge-clip-f32-eager-t2", 0.007, 5.0),
    ("merge-clip-f32-compiled-t1", 0.001, 80.0),
    ("merge-clip-f32-compiled-t2", 0.002, 17.5),
    ("score-long_video-bf16-hico-t1", 2.5e-5, 0.0),
    ("score-long_video-bf16-torch-t1", 0.0075, 0.0),
    ("read-64frames-f32-patched-t1", 0.5, 20.0),
    ("read-64frames-f32-packed-t1", 0.1, 90.0),
    ("read-64frames-f32-stock-t1", 1.0, 20.0),
]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of results, twice measured."""
    machine = {"device": "A CPU, 2 CPUs", "type": "cpu", "torch": "2.13.0"}
    machine["limits"] = {"copy_gb_per_s": [12.5, 25.0], "float32_gflop_per_s": [100, 100]}
    for commit, faster in (("aaa", 1), ("bbb", 2)):
        lines = [
            {
                "name": name,
                "stats": {"min": seconds / faster, "median": seconds / faster},
                "extra_info": {"percent_of_floor": percent},
            }
            for name, seconds, percent in LINES
        ]
        monkeypatch.setattr(results, "commit", lambda commit=commit: commit)
        results.write({"machine_info": machine, "benchmarks": lines}, tmp_path)
    return tmp_path


def test_readme_shows_the_results_of_the_repository():
    readme = (ROOT / "README.md").read_text()
    assert report.with_part(readme, report.readme_part()) == readme


def test_readmes_pictures_are_of_the_results_of_the_repository():
    tables = results.load("tables")
    drawn = {"cost": report.device_line(tables[0]) if tables else "no measurements"}
    for kept in results.load("ops"):
        for kind in report.PICTURES:
            drawn[report.picture_of(kept, kind)] = report.device_line(kept)
    named = re.findall(r"docs/([\w-]+)-(light|dark)\.svg", report.readme_part())
    assert len(named) >= 2
    for name, theme in named:
        elements = ElementTree.parse(ROOT / "docs" / f"{name}-{theme}.svg").iter()
        about = next(e.text for e in elements if e.tag.endswith("description"))
        assert about == drawn[name], "make report"


def test_where_an_alternative_wins_the_table_says_so(kept):
    (ops,) = results.load("ops", kept)
    found = report.problems(ops)
    _, _, merge, score, read = report.table(found)
    assert merge == (
        "| merge | clip | f32 | 1 / 0.5 ms | 40 / 35 | **compiled wins: 2.00 x** / 2 x compiled |"
    )
    assert read == "| read | 64frames | f32 | 250 ms | 20 | 2 x stock |"
    assert [problem.whole for problem in found] == [False, False, True]
    assert score == "| score | long_video | bf16 | 12.5 us |  | 300 x torch |"
    assert report.verdict(found) == (
        "Faster than the best alternative in 3 of 4 comparisons; slower than compiled in merge "
        "clip f32 on 1 thread (2.00 x)."
    )
    assert report.verdict(found[1:]) == ("Faster than the best alternative in 2 of 2 comparisons.")


def test_what_hooks_cost_stands_with_its_interval(tmp_path):
    line = {"name": "keep_all-small-f32-patched-t1", "stats": {"min": 0.1, "median": 0.1}}
    line["extra_info"] = {"percent_of_floor": 0.0, "overhead_percent": [0.31, -0.24, 1.0]}
    machine = {"device": "A CPU", "type": "cpu", "torch": "2.13.0", "limits": {}}
    results.write({"machine_info": machine, "benchmarks": [line]}, tmp_path)
    (ops,) = results.load("ops", tmp_path)
    _, _, row = report.table(report.problems(ops))
    assert row.endswith(" | +0.3 % over stock, in pairs (-0.2 to +1.0) |")


def test_memory_and_parts_of_the_time_stand_in_a_table_of_their_own(tmp_path):
    lines = []
    for impl, more in (("stock", {}), ("patched", {"milliseconds": {"scoring": 1.5}})):
        line = {"name": f"read-64frames-f32-{impl}-t1", "stats": {"min": 0.1, "median": 0.1}}
        memory = {"peak_bytes": 2_500_000, "kv_bytes": 1_000_000}
        lines.append(line | {"extra_info": {"percent_of_floor": 0.0, **memory, **more}})
    machine = {"device": "A CPU", "type": "cpu", "torch": "2.13.0", "limits": {}}
    results.write({"machine_info": machine, "benchmarks": lines}, tmp_path)
    (ops,) = results.load("ops", tmp_path)
    _, _, *rows = report.apart(ops)
    assert rows == [
        "| 64frames | stock | 100 ms | 2.5 | 1 |  |  |  |",
        "| 64frames | patched | 100 ms | 2.5 | 1 | 1.5 ms |  |  |",
    ]
    assert "memory of reading a prompt" in report.readme_part(tmp_path)
    assert report.apart({"results": []}) == []


def test_the_way_to_the_first_token_is_shown_by_stage():
    entries = [
        {"name": "first_token-64frames-bf16-longva", "frames": 64, "encode_s": 0.0,
         "prefill_s": 0.61234, "first_token_s": 0.7, "decode_tokens_per_s": 41.23},
        {"name": "first_token-10000frames-bf16-longva", "frames": 10000, "oom_at_gb": 80.0},
        {"name": "dropping-1000frames-bf16-text4x0.5", "frames": 1000, "first_token_s": 1.234e-5},
        {"name": "encoder-8frames-bf16-umt_l", "latency_s": 0.01},
    ]  # fmt: skip
    _, _, *rows = report.stages({"results": entries})
    assert rows == [
        "| longva | 64 | 0.612 | 0.7 | 41.2 |",
        "| longva | 10000 | oom | oom | oom |",
        "| table 7: text4x0.5 | 1000 |  | 1.23e-05 |  |",
    ]


def test_readmes_part_names_device_commit_and_every_picture(kept):
    part = report.readme_part(kept)
    assert "A CPU, 2 CPUs, torch 2.13.0, commit bbb" in part
    assert "measured limits: copy 12.5 / 25.0 GB/s, float32 100 GFLOP/s; medians." in part
    assert "not measured so far" in part
    for name in ("cost", *(f"{kind}-a-cpu-2-cpus" for kind in ("ops", "models", "progress"))):
        assert f'srcset="docs/{name}-dark.svg"' in part
        assert f'src="docs/{name}-light.svg"' in part


def test_pictures_and_page_are_drawn_and_drawn_again_the_same(kept, tmp_path):
    pytest.importorskip("matplotlib")
    from bench import page, pictures

    folder = tmp_path / "docs"
    folder.mkdir()
    files = pictures.draw(folder, kept)
    before = {file.name: file.read_bytes() for file in files}
    names = ("cost", *(f"{kind}-a-cpu-2-cpus" for kind in ("ops", "models", "progress")))
    assert set(before) == {f"{name}-{theme}.svg" for name in names for theme in ("light", "dark")}
    assert {file.name: file.read_bytes() for file in pictures.draw(folder, kept)} == before
    shown = before["ops-a-cpu-2-cpus-light.svg"].decode()
    for text in ("0.5 compiled", "2 compiled", "300 torch", "no floor", "long_video bf16"):
        assert f">{text}<" in shown
    text = page.write(tmp_path / "report.html", folder, kept).read_text()
    assert text.count("data:image/svg+xml;base64,") == 8
    assert "docs/" not in text
    assert "<b>compiled wins: 2.00 x</b>" in text
    assert "2368810.0" in text


def test_the_pages_markdown():
    pytest.importorskip("transformers")
    from bench.page import html

    assert html("a < b, `c` and **d**") == "<p>a &lt; b, <code>c</code> and <b>d</b></p>"
    assert html("- x\n- y") == "<ul><li>x</li><li>y</li></ul>"
    assert html("| a | b |\n|---|---|\n| x | 1.5 |") == (
        '<table><tr><th>a</th><th>b</th></tr><tr><td>x</td><td class="number">1.5</td></tr></table>'
    )
