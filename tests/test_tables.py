"""`hico tables`: every printed cell, its recomputation, and the four formats."""

import csv
import io
import json

import pytest

pytest.importorskip("transformers")

from hico_model.cli import main
from hico_model.paper_tables import TABLE1, TABLE5, TABLE7
from hico_model.table_formats import render
from hico_model.tables import SOURCE, as_printed, tables


@pytest.fixture(scope="module")
def own():
    """All tables, each in its own convention."""
    return {table.number: table for table in tables()}


def cells(table):
    """Those with a formula."""
    found = [(labels, cell) for labels, cells in table.rows for cell in cells]
    return [(labels, cell) for labels, cell in found if cell.recomputed is not None]


def test_every_printed_cell_of_table_1_is_there_and_one_does_not_agree(own):
    printed = {labels: [c.paper for c in row] for labels, row in own[1].rows}
    assert len(own[1].rows) == len(TABLE1) + 4
    for line in TABLE1:
        want = [line.teraflops, line.train_gigabytes, line.infer_gigabytes]
        assert printed[line.frames, line.model, line.tokens_per_frame] == [*want, None]
    known = [(labels, cell) for labels, cell in cells(own[1]) if cell.paper]
    assert len(known) == 36
    ((labels, outlier),) = [(labels, cell) for labels, cell in known if not cell.agrees]
    assert (labels, outlier.quantity) == ((1000, "LongVILA", 196), "infer")
    assert outlier.recomputed == pytest.approx(60.2, abs=0.05)


def test_real_16_tokens_stand_beside_the_printed_14(own):
    flash = [labels for labels, _ in own[1].rows if labels[1] == "VideoChat-Flash"]
    assert flash == [(n, "VideoChat-Flash", k) for n in (64, 256, 1000, 10000) for k in (14, 16)]
    for labels, row in own[1].rows:
        if labels[2] == 16:
            assert [(c.paper, c.agrees) for c in row] == [(None, None)] * 4
    values = {labels: row[0].recomputed for labels, row in own[1].rows}
    assert values[10000, "VideoChat-Flash", 16] == pytest.approx(19967.3, abs=0.05)


def test_tables_5_and_7_are_within_a_thousandth(own):
    assert [c.paper for _, c in cells(own[5])][:2] == [line.gigaflops for line in TABLE5]
    assert [c.paper for _, c in cells(own[7])] == [line.teraflops for line in TABLE7]
    for _, cell in [*cells(own[5])[:2], *cells(own[7])]:
        assert cell.agrees
        assert cell.recomputed == pytest.approx(float(cell.paper), rel=1e-3)


@pytest.mark.parametrize("convention", ["prefill_causal", "prefill_full"])
def test_counted_cells_equal_the_recomputed_of_a_prefill(convention):
    for table in tables((1, 7), convention):
        for labels, cell in cells(table):
            assert cell.counted == cell.recomputed, (table.number, labels)
            assert cell.agrees is None


def test_counted_cells_of_encoders_equal_the_recomputed(own):
    counted = [cell for _, cell in cells(own[5]) if cell.counted is not None]
    assert len(counted) == 4
    assert all(cell.counted == cell.recomputed for cell in counted)


def test_a_wrong_formula_is_marked(own, monkeypatch):
    import hico_model.tables as module

    right = module.cost
    monkeypatch.setattr(module, "cost", lambda *a, text=128, **k: right(*a, text=text + 50, **k))
    for number in (1, 7):
        (table,) = tables([number])
        printed = [cell for _, cell in cells(table) if cell.paper]
        assert not any(cell.agrees for cell in printed if cell.quantity == "FLOPs")
        wrong = sum(not cell.agrees for cell in printed)
        figures = "".join(line for line in render([table], "text").splitlines() if "*:" not in line)
        assert figures.count("*") == wrong


def test_figures_are_printed_as_in_the_paper():
    assert as_printed(2368810.25) == "2368810.0"
    assert as_printed(519.74) == "519.7"


def test_text_and_markdown_show_the_same(own):
    text, markdown = (render(list(own.values()), form) for form in ("text", "md"))
    for page in (text, markdown):
        line = next(x for x in page.splitlines() if "28707.7" in x)
        assert line.replace("|", "").split()[:5] == [
            "1000",
            "LongVILA",
            "196",
            "28707.7",
            "28707.7",
        ]
        assert "79.7" in line
        assert "60.2*" in line
        assert page.count(SOURCE) == 3
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(rows) == 3 * 2 + 16 + 5 + 7
    assert all(line.endswith("|") for line in rows)


def test_csv_and_json_have_every_cell_unrounded(own):
    found = list(own.values())
    rows = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert len(rows) == 16 * 4 + 5 * 2 + 7 * 2
    assert float(rows[0]["recomputed"]) == found[0].rows[0][1][0].recomputed
    data = json.loads(render(found, "json"))
    assert [t["table"] for t in data] == [1, 5, 7]
    assert [t["convention"] for t in data] == ["paper", None, "profiler"]
    assert data[2]["rows"][6]["cells"][0]["paper"] == "245.8"
    assert data[2]["rows"][6]["layer"] == "4, 18"


@pytest.fixture
def results(tmp_path):
    """A folder with the results of a CPU and of a GPU that ran three of the measurements."""
    entries = [
        {"name": "first_token-64frames-bf16-longva", "first_token_s": 0.61, "peak_gb": 21.37},
        {"name": "first_token-1000frames-bf16-longvila", "oom_at_gb": 80.0},
        {"name": "dropping-1000frames-bf16-uniform4x0.75_text18x0.25", "first_token_s": 1.234},
        {"name": "encoder-8frames-bf16-umt_l", "latency_s": 0.01234},
    ]
    for kind, found in (("cpu", [e | {"first_token_s": 99.0} for e in entries]), ("cuda", entries)):
        folder = tmp_path / f"some-{kind}"
        folder.mkdir()
        head = {"device": f"Some {kind}", "type": kind, "commit": "abc", "date": "2026-01-01"}
        (folder / "tables.json").write_text(json.dumps({**head, "results": found}))
    return tmp_path


def test_what_a_gpu_measured_stands_beside_and_the_rest_is_not_measured(results):
    one, five, seven = tables(results=results)
    measured = {
        (t.number, *labels, c.quantity): c.measured
        for t in (one, five, seven)
        for labels, row in t.rows
        for c in row
    }
    given = {k: v for k, v in measured.items() if v not in (None, "not measured")}
    assert given == {
        (1, 64, "LongVA", 144, "infer"): 21.37,
        (1, 64, "LongVA", 144, "first token"): 0.61,
        (1, 1000, "LongVILA", 196, "infer"): "oom",
        (1, 1000, "LongVILA", 196, "first token"): "oom",
        (5, "UMT-L@224", "24 blocks, 8 frames in one pass", "latency"): pytest.approx(12.34),
        (7, "uniform/0.75, attention/0.25", "4, 18", "first token"): 1.234,
    }
    assert measured[1, 64, "VideoChat-Flash", 14, "first token"] is None
    assert measured[1, 64, "VideoChat-Flash", 16, "first token"] == "not measured"
    text = render([one, five, seven], "text")
    assert text.count("Some cuda, commit abc, 2026-01-01") == 3
    assert "99" not in text.split("measured:")[1]
    line = next(x for x in text.splitlines() if "LongVA" in x)
    assert line.split()[-2:] == ["21.4", "0.61"]


def test_without_results_nothing_is_measured(tmp_path):
    for table in tables(results=tmp_path / "none"):
        for _, row in table.rows:
            assert {c.measured for c in row} <= {None, "not measured"}
        assert any("nothing so far" in note for note in table.notes)


def test_the_measurements_are_called_as_the_tables_call_them():
    pytest.importorskip("pytest_benchmark")
    from bench import measured
    from hico_model.tables import MEASURED, plan_name, plan_of

    assert set(MEASURED.values()) <= set(measured.systems("cuda"))
    names = {plan_name(plan_of(line)) for line in TABLE7}
    assert len(names) == len(TABLE7)
    for (_, tokens), name in MEASURED.items():
        assert measured.systems("cuda")[name].tokens_per_frame == tokens


def test_the_command(capsys):
    assert main(["tables", "--table", "5"]) == 0
    out = capsys.readouterr().out
    assert "Table 5" in out
    assert "595.6" in out
    assert "Table 1" not in out
    assert main(["tables", "--table", "7", "--convention", "paper", "--format", "csv"]) == 0
    assert capsys.readouterr().out.startswith("table,convention,row,quantity,unit,paper,recomputed")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--table", "2"], "choose from 1, 5, 7"),
        (["--table", "one"], "invalid int value: 'one'"),
        (["--convention", "exact"], "prefill_causal"),
        (["--table", "5", "--convention", "paper"], "for tables 1 and 7"),
        (["--format", "html"], "json"),
        (["7"], "unrecognized arguments: 7"),
    ],
    ids="_".join,
)
def test_a_bad_option_is_one_line(capsys, options, says):
    assert main(["tables", *options]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("hico: ")
    assert captured.err.count("\n") == 1
    assert says in captured.err
    assert not captured.out
