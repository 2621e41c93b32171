import struct
import subprocess
import sys
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest

from hico_model import video
from hico_model.clips import resize
from hico_model.errors import UserError

av = pytest.importorskip("av")

WIDTH, HEIGHT = 96, 64


def picture(i, height=HEIGHT):
    """A frame that tells its number: a bright bar moves down and across, one step per frame."""
    frame = np.full((height, WIDTH, 3), 40, np.uint8)
    frame[:, i % WIDTH] = 250
    frame[i // WIDTH * 8 : i // WIDTH * 8 + 8, :, 0] = 200
    return frame


def write(path, count=60, codec="libx264", options=None, container=None, times=None, height=HEIGHT):
    """A video of `count` frames; times: their presentation times in ms."""
    with av.open(str(path), "w", options=container or {}) as out:
        stream = out.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, height, "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, height), "rgb24").reformat(
                format="yuv420p"
            )
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def turn(path, degrees):
    """Set the display matrix in the track header of an mp4; degrees: counter-clockwise."""
    a, b, c, d = {90: (0, -1, 1, 0), 180: (-1, 0, 0, -1), -90: (0, 1, -1, 0)}[degrees]
    data = bytearray(path.read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    struct.pack_into(">5i", data, matrix, a * one, b * one, 0, c * one, d * one)
    path.write_bytes(data)
    return path


def decoded(path):
    """All frames, decoded one after the other."""
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@pytest.fixture
def only_decord(monkeypatch):
    pytest.importorskip("decord")
    monkeypatch.setitem(sys.modules, "av", None)
    video._open_cached.cache_clear()
    yield
    video._open_cached.cache_clear()


GOP = {"g": "12", "bf": "3"}
FILES = {
    "short-gops.mp4": {"options": GOP},
    "one-gop.mp4": {"options": {"g": "999", "bf": "2"}},
    "open-gops.mp4": {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}},
    "fragmented.mp4": {"options": GOP, "container": {"movflags": "frag_keyframe+empty_moov"}},
    "matroska.mkv": {"options": GOP},
    "transport.ts": {"options": GOP},
    "program.mpg": {"codec": "mpeg2video", "options": GOP},
    "old.avi": {"codec": "mpeg4"},
    "windows.wmv": {"codec": "wmv2"},
    "vp9.webm": {"codec": "libvpx-vp9", "options": {"g": "12", "deadline": "realtime"}},
}


@pytest.mark.parametrize("name", FILES)
def test_any_choice_of_frames_is_the_one_that_decoding_in_order_gives(tmp_path, name):
    path = write(tmp_path / name, **FILES[name])
    every = decoded(path)
    info = video.probe(path)
    assert info == video.VideoInfo(60, 30, 2, WIDTH, HEIGHT)
    for wanted in ([0], [59], [30, 31, 59], [1, 13, 14, 40], range(60), [5, 5, 5, 47, 47]):
        got = video.read_frames(path, wanted)
        assert all(np.array_equal(g, every[i]) for g, i in zip(got, wanted, strict=True)), wanted


@pytest.mark.parametrize("name", [n for n in FILES if n.endswith((".mp4", ".mkv", ".webm"))])
def test_a_far_frame_is_sought_and_not_decoded_up_to(tmp_path, name, monkeypatch):
    path = write(tmp_path / name, **FILES[name])
    video.probe(path)
    made = []

    def decode(container, stream, original=video._decode):
        for frame in original(container, stream):
            made.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_decode", decode)
    monkeypatch.setattr(video._AvVideo, "_by_count", None)  # where times are exact it is not needed
    for wanted in ([0], [58], [0, 29, 58], [11, 12, 13, 35, 36, 37]):
        made.clear()
        video.read_frames(path, wanted)
        assert len(made) <= (13 * len(wanted) if name != "one-gop.mp4" else wanted[-1] + 1)


@pytest.mark.parametrize("name", ["short-gops.mp4", "one-gop.mp4", "matroska.mkv", "vp9.webm"])
def test_decord_gives_the_same_bits(tmp_path, name, monkeypatch, request):
    path = write(tmp_path / name, **FILES[name])
    info, frames = video.probe(path), video.read_frames(path, range(60))
    request.getfixturevalue("only_decord")
    assert isinstance(video._open(path), video._DecordVideo)
    assert video.probe(path) == info
    for wanted in ([0], [59], [1, 13, 14, 40], [5, 5, 47]):
        assert np.array_equal(video.read_frames(path, wanted), frames[wanted])


def cut_out(source, path, start):
    """The stream from its second key frame on, not re-encoded; time 0 is that of frame `start`."""
    with av.open(str(source)) as inp, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(inp.streams.video[0])
        shift = round(start / 30 / inp.streams.video[0].time_base)
        keys = 0
        for packet in inp.demux(video=0):
            keys += packet.is_keyframe
            if keys > 1 and packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = stream
                out.mux(packet)
    return path


@pytest.fixture
def cut_clip(tmp_path):
    """An edit list hides what lies between the key frame, 12, and the cut, 16."""
    return cut_out(write(tmp_path / "whole.mp4", options=GOP), tmp_path / "cut.mp4", 16)


def test_frames_that_an_edit_list_hides_are_not_counted(cut_clip):
    every = decoded(cut_clip)
    assert video.probe(cut_clip).num_frames == len(every) < 48
    got = video.read_frames(cut_clip, range(len(every)))
    assert np.array_equal(got, every)
    assert np.array_equal(video.read_frames(cut_clip, [len(every) - 1])[0], every[-1])


def test_decord_alone_refuses_what_it_would_read_wrongly(cut_clip, tmp_path, only_decord):
    with pytest.raises(UserError, match=r"edit list.*pip install av"):
        video.probe(cut_clip)


def test_decord_alone_refuses_containers_it_cannot_seek_in(tmp_path, request):
    path = write(tmp_path / "a.ts")
    request.getfixturevalue("only_decord")
    with pytest.raises(UserError, match="pip install av"):
        video.probe(path)


def test_without_any_decoder_the_install_command_is_given(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(UserError, match=r"no video decoder is installed: pip install av$"):
        video.probe(path)


@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_frames_are_turned_as_the_file_asks(tmp_path, degrees, request):
    path = turn(write(tmp_path / "a.mp4", count=5), degrees)
    want = np.rot90(decoded(path)[3], degrees // 90)
    got = video.read_frames(path, [3])[0]
    info = video.probe(path)
    assert (info.height, info.width) == want.shape[:2]
    assert np.array_equal(got, want)
    request.getfixturevalue("only_decord")
    assert np.array_equal(video.read_frames(path, [3])[0], want)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv"])
def test_a_variable_frame_rate_gives_the_true_duration(tmp_path, name, request):
    times = np.cumsum(np.random.default_rng(0).choice([10, 33, 100, 300], 60)).tolist()
    path = write(tmp_path / name, times=[t - times[0] for t in times])
    info = video.probe(path)
    assert info.num_frames == 60
    assert info.duration == pytest.approx((times[-1] - times[0]) / 1000, abs=0.15)
    assert info.fps == pytest.approx(60 / info.duration)
    assert np.array_equal(video.read_frames(path, [7, 41])[1], decoded(path)[41])
    request.getfixturevalue("only_decord")
    assert video.probe(path).duration == pytest.approx(info.duration, abs=0.15)


def test_frames_come_resized_in_batches_with_repeats(tmp_path):
    path, wanted = write(tmp_path / "a.mp4"), [0, 9, 9, 9, 20, 20, 59]
    batches = list(video.iter_frames(path, wanted, size=32, batch=3))
    assert [len(b) for b in batches] == [3, 3, 1]
    want = resize(video.read_frames(path, wanted), 32)
    assert np.array_equal(np.concatenate(batches), want)
    assert np.array_equal(video.read_frames(path, wanted, size=32), want)


def test_only_a_batch_of_frames_is_held(tmp_path, monkeypatch):
    path = write(tmp_path / "a.mp4")
    made = []
    original = video._AvVideo._pixels
    monkeypatch.setattr(
        video._AvVideo, "_pixels", lambda self, frame: made.append(1) or original(self, frame)
    )
    video.probe(path)
    made.clear()
    next(video.iter_frames(path, range(60), batch=4))
    assert len(made) == 4


def test_no_indices_give_no_frames(tmp_path):
    path = write(tmp_path / "a.mp4", count=5)
    assert video.read_frames(path, []).shape == (0, HEIGHT, WIDTH, 3)
    assert list(video.iter_frames(path, [])) == []


@pytest.mark.parametrize("indices", [[3, 2], [-1, 2], [0, 5]])
def test_indices_outside_or_out_of_order_are_refused(tmp_path, indices):
    path = write(tmp_path / "a.mp4", count=5)
    with pytest.raises(ValueError, match="indices must be"):
        video.read_frames(path, indices)


def test_a_file_that_was_replaced_is_read_anew(tmp_path):
    path = write(tmp_path / "a.mp4", count=5)
    assert video.probe(path).num_frames == 5
    write(path, count=9)
    assert video.probe(path).num_frames == 9


def write_audio(path):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())


def write_still(path):
    from PIL import Image

    Image.fromarray(picture(0)).save(path)


def cut(source, path, fraction):
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])


def spoil(path):
    data = bytearray(write(path, count=300, options=GOP).read_bytes())
    start = data.index(b"mdat") + 4000
    data[start : start + 3000] = bytes(3000)
    path.write_bytes(data)


FAST = {"container": {"movflags": "faststart"}}
BAD = {
    "missing.mp4": (lambda p: None, "does not exist"),
    "folder.mp4": (lambda p: p.mkdir(), "is not a file"),
    "empty.mp4": (lambda p: p.write_bytes(b""), "is empty"),
    "text.mp4": (lambda p: p.write_text("hello\n" * 100), "cannot be read as a video"),
    "noise.mp4": (
        lambda p: p.write_bytes(np.random.default_rng(0).bytes(100_000)),
        "cannot be read as a video",
    ),
    "audio.m4a": (write_audio, "no video in it"),
    "still.png": (write_still, "still picture"),
    "still.jpg": (write_still, "still picture"),
    "no-moov.mp4": (
        lambda p: cut(write(p.with_name("whole.mp4")), p, 0.8),
        "cannot be read|no video in it",
    ),
    "cut-fast.mp4": (
        lambda p: cut(write(p.with_name("whole.mp4"), 300, options=GOP, **FAST), p, 0.7),
        r"cut short, \d+ of 300 frames",
    ),
    "cut-header.mp4": (
        lambda p: cut(write(p.with_name("whole.mp4"), **FAST), p, 0.1),
        "cannot be read|no video in it|cut off",
    ),
    "damaged.mp4": (spoil, "near frame|it ends before"),
}


@pytest.mark.parametrize("decoder", ["av", "decord"])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_in_one_line_on_a_quiet_terminal(
    tmp_path, name, decoder, request, capfd
):
    make, words = BAD[name]
    make(tmp_path / name)
    if decoder == "decord":
        request.getfixturevalue("only_decord")
        words = f"{words}|cannot be read|pip install av"
    with pytest.raises(UserError, match=words) as e:
        video.read_frames(tmp_path / name, range(video.probe(tmp_path / name).num_frames))
    assert "\n" not in str(e.value)
    assert name in str(e.value)
    assert capfd.readouterr().err == ""


def test_a_file_that_decodes_to_fewer_frames_than_it_lists_is_refused(tmp_path, monkeypatch):
    path = write(tmp_path / "a.ts")
    video.probe(path)
    original = video._decode
    monkeypatch.setattr(video, "_decode", lambda *args: islice(original(*args), 50))
    assert len(video.read_frames(path, [3, 49])) == 2
    with pytest.raises(UserError, match="ends before frame 50 of 60"):
        video.read_frames(path, [3, 50])


def test_frames_before_the_first_key_frame_of_an_open_gop_are_not_counted(tmp_path):
    whole = write(tmp_path / "whole.mp4", **FILES["open-gops.mp4"])
    path = cut_out(whole, tmp_path / "cut.mkv", 0)
    every = decoded(path)
    assert video.probe(path).num_frames == len(every) < 50
    assert np.array_equal(video.read_frames(path, range(len(every))), every)


def test_decord_puts_no_frame_in_the_place_of_another(tmp_path, request):
    whole = write(tmp_path / "whole.mp4", **FILES["open-gops.mp4"])
    path = str(cut_out(whole, tmp_path / "cut.mkv", 0))
    count = len(decoded(path))
    request.getfixturevalue("only_decord")
    opened = object.__new__(video._DecordVideo)  # its __init__ refuses this file for its edit list
    opened.path = path
    assert len(opened._reader()) > count  # lists frames whose references are cut off
    with pytest.raises(UserError, match=r"cut\.mkv"):
        list(opened.frames(range(len(opened._reader()))))


@pytest.mark.parametrize("codec", ["libx264", "mpeg2video", "mpeg4"])
def test_a_recording_that_begins_midway_is_read_from_its_first_key_frame(tmp_path, codec):
    whole = write(tmp_path / "whole.ts", codec=codec, options=GOP)
    path = tmp_path / "tail.ts"
    data = whole.read_bytes()
    path.write_bytes(data[:376] + data[len(data) // 188 // 3 * 188 :])  # with the stream's tables
    info = video.probe(path)
    assert 20 < info.num_frames < 50
    got = video.read_frames(path, [0, info.num_frames - 1])
    assert np.array_equal(got, np.array(decoded(whole))[[60 - info.num_frames, 59]])


def test_frames_keep_the_first_size_when_it_changes_midway(tmp_path):
    a = write(tmp_path / "a.ts", count=20)
    b = write(tmp_path / "b.ts", count=20, height=96)
    path = tmp_path / "both.ts"
    path.write_bytes(a.read_bytes() + b.read_bytes())
    assert video.probe(path).num_frames == 40
    assert video.read_frames(path, [5, 35]).shape == (2, HEIGHT, WIDTH, 3)


def test_a_cut_matroska_file_gives_the_frames_that_are_there(tmp_path):
    whole = write(tmp_path / "whole.mkv", 300, options=GOP)
    cut(whole, tmp_path / "cut.mkv", 0.6)
    info = video.probe(tmp_path / "cut.mkv")
    assert 100 < info.num_frames < 250
    got = video.read_frames(tmp_path / "cut.mkv", [0, info.num_frames - 2])
    assert np.array_equal(got[1], decoded(whole)[info.num_frames - 2])


def test_importing_the_reader_needs_no_decoder():
    code = "import sys; sys.modules['av'] = sys.modules['decord'] = None; import hico_model.video"
    subprocess.run([sys.executable, "-c", code], check=True)
