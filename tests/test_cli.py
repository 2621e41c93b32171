"""The command line, through its real entry point: what it prints, writes and refuses."""

import re
from pathlib import Path

import pytest

pytest.importorskip("av")

from hico_kernels import TextTopK, Uniform
from hico_model.cli import DEMO_VIDEO, main, parse_drop
from hico_model.config import presets
from hico_model.errors import UserError

QUESTION = "What is there?"
SMALL = ["--frames", "4", "--max-new-tokens", "2"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Things that are no video, by what is wrong with them."""
    import av

    folder = tmp_path_factory.mktemp("files")
    video = DEMO_VIDEO.read_bytes()
    (folder / "text.mp4").write_text("this is no video\n" * 100)
    (folder / "empty.mp4").touch()
    (folder / "cut.mp4").write_bytes(video[: len(video) // 2])
    with av.open(str(folder / "frameless.avi"), "w") as container:
        stream = container.add_stream("mpeg4", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()
    names = ["text.mp4", "empty.mp4", "cut.mp4", "frameless.avi", "missing.mp4"]
    return {name: str(folder / name) for name in names} | {"folder": str(folder)}


def refusal(capfd, argv: list[str]) -> str:
    """The one line on stderr of a run that must be refused."""
    assert main(argv) == 2
    err = capfd.readouterr().err
    assert err.startswith("hico: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("missing.mp4", "does not exist"),
        ("folder", "not a file"),
        ("empty.mp4", "empty"),
        ("text.mp4", "cannot be read as a video"),
        ("cut.mp4", "cut"),
        ("frameless.avi", "no frames"),
    ],
)
def test_a_bad_video_is_one_line(capfd, files, name, says):
    line = refusal(capfd, ["ask", files[name], QUESTION, *SMALL])
    assert says in line
    assert files[name] in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--frames", "0"], "--frames must be at least 4"),
        (["--frames", "-8"], "--frames must be at least 4"),
        (["--frames", "many"], "--frames: invalid int value: 'many'"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1"),
        (["--preset", "13b"], f"choose one of {', '.join(presets)}"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--html", "/no/such/folder/page.html"], "/no/such/folder"),
        (
            ["--drop", "28:uniform:0.5"],
            "--drop: layer 28 is out of range, the model has layers 0 to 27",
        ),
        (["--drop", "-1:uniform:0.5"], "layer must be >= 0, got -1"),
        (["--drop", "4:uniform:0"], "above 0 and up to 1, got 0"),
        (["--drop", "4:uniform:1.5"], "above 0 and up to 1, got 1.5"),
        (["--drop", "4:uniform:nan"], "above 0 and up to 1, got nan"),
        (["--drop", "4:uniform:0.5,8:text:0.75"], "cannot rise"),
        (["--drop", "4:uniform:0.5,4:text:0.25"], "layer 4 is there twice"),
        (["--drop", "4:best:0.5"], "'4:best:0.5' is not LAYER:RULE:KEEP"),
        (["--drop", "4:uniform"], "'4:uniform' is not LAYER:RULE:KEEP"),
        (["--drop", "4:uniform:0.5:1"], "is not LAYER:RULE:KEEP"),
        (["--drop", "four:uniform:0.5"], "is not LAYER:RULE:KEEP"),
        (["--drop", "4:uniform:0.75,"], "'' is not LAYER:RULE:KEEP"),
        (["--drop", ""], "'' is not LAYER:RULE:KEEP"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else None,
)
def test_a_bad_option_is_one_line(capfd, options, says):
    # "=" so that a value may begin with "-"
    options = ["=".join(options)] if len(options) == 2 else options
    assert says in refusal(capfd, ["ask", str(DEMO_VIDEO), QUESTION, *options])


@pytest.mark.parametrize("argv", [[], ["ask"], ["ask", "a.mp4"], ["sing"]], ids=" ".join)
def test_a_bad_command_is_one_line(capfd, argv):
    assert "--help" in refusal(capfd, argv)


@pytest.mark.parametrize("argv", [["--help"], ["ask", "--help"], ["demo", "--help"]], ids=" ".join)
def test_help(capsys, argv):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 0
    assert "hico" in capsys.readouterr().out


def test_drop_reads_as_written():
    plan = parse_drop("18:text:0.25,4:uniform:0.75")
    assert dict(plan.drops) == {4: Uniform(0.75), 18: TextTopK(0.25)}
    assert plan == presets["nano"].plan
    assert not parse_drop("none").drops
    with pytest.raises(UserError):
        parse_drop("None")


def columns(out: str) -> list[str]:
    return next(line for line in out.splitlines() if line.startswith("stage")).split()


def test_demo_end_to_end(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert columns(out) == ["stage", "shape", "tokens", "kept", "time", "share"]
    stages = [line.split("  ")[0] for line in out.splitlines()]
    for name in ("frames", "clips", "encoder", "merge", "projector", "drop @4 uniform", "decode"):
        assert name in stages
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert re.search(r"\b12,544\b.*100\.0%", rows["encoder"])
    assert re.search(r"\b1,024\b.*8\.2%", rows["merge"])
    assert re.search(r"\b768\b.*6\.1%", rows["drop @4 uniform"])
    assert re.search(r"\b256\b.*2\.0%", rows["drop @18 text"])
    for case in ("16 tokens a frame, no drops", "LongVA", "LongVILA"):
        assert case in out
    assert "random" in out
    assert "mean nothing" in out
    assert "\033" not in out
    assert Path("hico_demo.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "hico_demo.html" in out


def test_ask_with_few_frames_and_no_drops(capsys, tmp_path):
    page = tmp_path / "page.html"
    argv = ["ask", str(DEMO_VIDEO), QUESTION, *SMALL, "--drop", "none", "--html", str(page)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "drop @" not in out
    assert "with drops" not in out
    assert QUESTION in out
    rows = {line.split("  ")[0]: line for line in out.splitlines()}
    assert re.search(r" 64 +8\.2%", rows["merge"])
    assert page.is_file()
