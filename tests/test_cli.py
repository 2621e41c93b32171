"""The command line, through its real entry point: what it prints, writes and refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("av")

from hico_kernels import TextTopK, Uniform
from hico_model import VideoChatFlash, arguments, cli, page
from hico_model.arguments import parse_drop
from hico_model.cli import DEMO_VIDEO, main
from hico_model.config import presets
from hico_model.errors import UserError

QUESTION = "What is there?"
SMALL = ["--frames", "4", "--max-new-tokens", "2"]
RUN = "import sys; from hico_model.cli import main; sys.exit(main(sys.argv[1:]))"
BARE = f"""
import importlib.abc, sys
EXTRAS = {{"numpy", "PIL", "transformers", "safetensors", "tokenizers", "tqdm", "av", "decord"}}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in EXTRAS:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
{RUN}
"""


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
def test_a_bad_video_is_one_line_before_any_weights(capfd, files, name, says, monkeypatch):
    monkeypatch.setattr(VideoChatFlash, "__init__", lambda *a, **k: pytest.fail("built a model"))
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
        (["--model", ""], "--model is empty"),
        (["--html", ""], "--html is empty"),
        (["--html", "/"], "--html: / is not a file"),
        (["--html", "/dev/full"], "--html: /dev/full is not a file"),
        (["--html", "x" * 300], "cannot be written: File name too long"),
        (["--html", str(DEMO_VIDEO)], "is the video itself"),
        (["--html", "~/no/such/folder/page.html"], os.path.expanduser("~/no/such/folder")),
        (["--sampling", "all"], "--sampling: invalid choice: 'all'"),
        (["--device", ""], "--device: '' is unknown or not there: choose cpu"),
        (["--device", "meta"], "--device: 'meta' is unknown or not there"),
        (["--device", "cuda:99"], "--device: 'cuda:99' is unknown or not there"),
        (["--device", "abacus"], "--device: 'abacus' is unknown or not there"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
    ids=lambda v: "_".join(v)[:40] if isinstance(v, list) else None,
)
def test_a_bad_option_is_one_line_before_any_weights(capfd, options, says, monkeypatch):
    monkeypatch.setattr(VideoChatFlash, "__init__", lambda *a, **k: pytest.fail("built a model"))
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


@pytest.mark.parametrize(
    ("video", "question", "says"),
    [
        ("", QUESTION, "VIDEO is empty"),
        ("https://example.org/a.mp4", QUESTION, "URLs are not read: download it first"),
        ("~/no-such-video.mp4", QUESTION, os.path.expanduser("~/no-such-video.mp4")),
        ("no-such-\udcff.mp4", QUESTION, "no-such-\ufffd.mp4 does not exist"),
        (str(DEMO_VIDEO), "What\udcff is it?", "the question is not UTF-8 after 'What'"),
    ],
    ids=["empty", "url", "home", "name-no-utf8", "question-no-utf8"],
)
def test_bad_words_are_one_line(capfd, video, question, says):
    assert says in refusal(capfd, ["ask", video, question, *SMALL])


def test_weights_beyond_the_memory_are_refused(capfd, monkeypatch):
    monkeypatch.setattr(arguments, "free_bytes", lambda device: 10 * 10**9)
    options = ["--preset", "7b-448", "--device", "cpu"]
    line = refusal(capfd, ["ask", str(DEMO_VIDEO), QUESTION, *options])
    assert "7b-448 take 31.7 GB, 10.0 GB are free on cpu: choose" in line
    assert "(nano, 2b-448)" in line
    arguments.check_memory(presets["2b-448"], "cpu")


def test_free_memory_is_what_the_machine_has():
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = SimpleNamespace(type="cpu")
    assert 10**7 < arguments.free_bytes(cpu) < machine


def test_nothing_is_left_of_trying_to_write(tmp_path):
    old, new = tmp_path / "old.html", tmp_path / "new.html"
    old.write_text("old")
    arguments.check_output(str(old), "a.mp4")
    arguments.check_output(str(new), "a.mp4")
    assert old.read_text() == "old"
    assert not new.exists()


def started(source: str, *argv: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", source, *argv]
    # Unbuffered, argparse would hide that its help cannot be written.
    options["env"] = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120, **options)


@pytest.mark.parametrize(
    "argv", [["demo"], ["ask", "a.mp4", "?"], ["tables"]], ids=lambda argv: argv[0]
)
def test_without_the_extras_it_says_what_to_install(argv, tmp_path):
    done = started(BARE, *argv, cwd=tmp_path, stdout=subprocess.DEVNULL)
    want = r'hico: \w+ is missing: pip install "\.\[model,video\]" in the repository\n'
    assert re.fullmatch(want, done.stderr), done.stderr
    assert done.returncode == 2


def test_help_works_without_the_extras():
    done = started(BARE, "ask", "--help", stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--sampling" in done.stdout


def test_a_bug_of_our_own_is_no_missing_extra(monkeypatch):
    def broken(args):
        raise ModuleNotFoundError("No module named 'hico_model.x'", name="hico_model.x")

    monkeypatch.setattr(cli, "_tables", broken)
    with pytest.raises(ModuleNotFoundError):
        main(["tables"])


def test_an_interrupt_is_quiet(monkeypatch, capfd):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_tables", interrupted)
    assert main(["tables"]) == 130
    assert capfd.readouterr().err == ""


LINES = pytest.mark.parametrize("argv", [["--help"], ["ask", str(DEMO_VIDEO), QUESTION]])


@LINES
def test_a_reader_that_goes_is_no_error(argv):
    reader, writer = os.pipe()
    os.close(reader)
    done = started(RUN, *argv, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("close", "says"), [(">&-", "does not exist"), ("2>&-", "")])
def test_a_closed_stream_is_no_error(close, says):
    shell = f'exec "$@" {close}'
    argv = ["sh", "-c", shell, "sh", sys.executable, "-c", RUN, "ask", "no.mp4", QUESTION]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@LINES
def test_output_that_cannot_be_written_is_one_line(argv):
    with open("/dev/full", "w") as full:
        done = started(RUN, *argv, stdout=full)
    assert done.returncode == 2
    assert re.fullmatch(r"hico: .*No space left on device\n", done.stderr)


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


def test_names_that_are_no_utf8_are_shown(capsys, tmp_path):
    video, html = tmp_path / "a\udcff.mp4", tmp_path / "b\udcff.html"
    video.symlink_to(DEMO_VIDEO)
    assert main(["ask", str(video), QUESTION, *SMALL, "--html", str(html)]) == 0
    assert "b\ufffd.html" in capsys.readouterr().out
    assert "a\ufffd.mp4" in html.read_text(encoding="utf-8")


def test_options_reach_the_answer(monkeypatch, capsys):
    """The rule of sampling, the device and ~ for the home folder."""
    monkeypatch.setenv("HOME", str(DEMO_VIDEO.parent))
    built = []
    init = VideoChatFlash.__init__
    monkeypatch.setattr(
        VideoChatFlash, "__init__", lambda *a, **k: (built.append(k["device"]), init(*a, **k))[1]
    )
    few = ["--frames", "72", "--max-new-tokens", "1", "--device", "cpu", "--sampling", "dense"]
    assert main(["ask", f"~/{DEMO_VIDEO.name}", QUESTION, *few]) == 0
    assert [d.type for d in built] == ["cpu"]
    assert re.search(r"\nframes +72 ", capsys.readouterr().out)


def test_a_page_that_cannot_be_written_after_all_is_one_line(capfd, tmp_path, monkeypatch):
    html = tmp_path / "page.html"
    monkeypatch.setattr(page, "render", lambda run: html.mkdir() or "")
    line = refusal(capfd, ["ask", str(DEMO_VIDEO), QUESTION, *SMALL, "--html", str(html)])
    assert "page.html cannot be written: Is a directory" in line
