"""Video file -> frames. The only file that knows PyAV and decord.

PyAV reads if it is installed, decord if not. On 8-bit mp4, mkv and webm both give the same bits and
take about as long. decord (0.6.0) is not asked first because it gives other frames than asked for,
without an error, in MPEG-TS, MPEG-PS, WMV, in mp4 with an edit list (any clip cut without
re-encoding), and near key frames of an open GOP; the last it cannot tell us. On 10-bit video the
two libraries round colours differently (1 to 3 of 255 in the mean).
"""

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hico_model.clips import resize
from hico_model.errors import UserError

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class VideoInfo:
    """num_frames can be read; fps is their mean rate; duration = num_frames / fps, in seconds.

    width and height are those of the frames as shown, after a rotation that the file asks for.
    """

    num_frames: int
    fps: float
    duration: float
    width: int
    height: int


def probe(path: PathLike) -> VideoInfo:
    """Size and length of a video. Raises UserError for what is no video or is cut short.

    Reads through the file once without decoding it; further calls on the same file do not.
    """
    return _open(path).info


def iter_frames(
    path: PathLike, indices: Sequence[int], *, size: int | None = None, batch: int = 16
) -> Iterator[np.ndarray]:
    """Frames by their number in order of showing, as batches [B, H, W, 3] uint8 RGB.

    indices: ascending, repeats allowed. size: resize to [B, size, size, 3] as `clips.resize`. At
    most `batch` frames of the video's own size are in memory. Raises UserError if the file is
    damaged.
    """
    video = _open(path)
    wanted = [int(i) for i in indices]
    if wanted != sorted(wanted):
        raise ValueError("indices must be ascending")
    if wanted and not 0 <= wanted[0] <= wanted[-1] < video.info.num_frames:
        raise ValueError(
            f"indices must be in 0..{video.info.num_frames - 1}, got {wanted[0]}..{wanted[-1]}"
        )
    repeats = Counter(wanted)
    waiting: list[np.ndarray] = []
    for frame, n in zip(video.frames(list(repeats)), repeats.values(), strict=True):
        waiting += [frame] * n
        while len(waiting) >= batch:
            yield _stack(waiting[:batch], size)
            del waiting[:batch]
    if waiting:
        yield _stack(waiting, size)


def read_frames(path: PathLike, indices: Sequence[int], *, size: int | None = None) -> np.ndarray:
    """As `iter_frames`, in one array [F, H, W, 3] or [F, size, size, 3]."""
    info = probe(path)
    out = np.empty((len(indices), size or info.height, size or info.width, 3), np.uint8)
    done = 0
    for frames in iter_frames(path, indices, size=size):
        out[done : done + len(frames)] = frames
        done += len(frames)
    return out


def _stack(frames: list[np.ndarray], size: int | None) -> np.ndarray:
    return np.stack(frames) if size is None else resize(np.stack(frames), size)


def _open(path: PathLike) -> "_AvVideo | _DecordVideo":
    if not os.fspath(path):
        raise UserError("the path of the video is empty: give the path of a video file")
    if "://" in os.fspath(path) and not os.path.exists(path):
        raise UserError(f"{path}: URLs are not read: download it first")
    path = os.path.abspath(path)  # not "scheme:name" to FFmpeg
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: check the path of the video")
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file: give the path of one video")
    stat = os.stat(path)
    if stat.st_size == 0:
        raise UserError(f"{path} is empty: copy or download the video again")
    return _open_cached(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4)
def _open_cached(path: str, mtime: int, size: int) -> "_AvVideo | _DecordVideo":
    for reader in (_AvVideo, _DecordVideo):
        try:
            return reader(path)
        except ImportError:
            continue
    raise UserError("no video decoder is installed: pip install av")


def _unreadable(path: str, why: object) -> UserError:
    return UserError(
        f"{path} cannot be read as a video ({why}): is it complete, and does it play elsewhere?"
    )


class _AvVideo:
    """Index of a video, from its packets, without decoding them."""

    def __init__(self, path: str):
        import av

        self.path = path
        try:
            with self._stream() as (container, stream):
                self._index(container, stream)
            with self._stream() as (container, stream):
                first = next(_decode(container, stream), None)
        except av.FFmpegError as e:
            raise _unreadable(path, e.strerror) from e
        if first is None:
            raise UserError(f"{path} has no frames that can be decoded: copy or download it again")
        self.coded = (first.width, first.height)
        height, width, _ = self._pixels(first).shape
        self.info = VideoInfo(self.count, self.fps, self.count / self.fps, width, height)

    @contextmanager
    def _stream(self):
        import av

        with av.open(self.path, metadata_errors="ignore") as container:
            picture = container.format.name == "image2" or container.format.name.endswith("_pipe")
            stream = container.streams.best("video")
            if picture:
                raise UserError(f"{self.path} is a still picture: give a video")
            if stream is None or stream.disposition & stream.disposition.attached_pic:
                raise UserError(
                    f"{self.path} has no video in it (audio only?), or its index is cut off"
                )
            if stream.codec_context is None:
                raise UserError(
                    f"{self.path} has no codec that is known: it is cut off, or convert it to H.264"
                )
            stream.thread_type = "AUTO"
            yield container, stream

    def _index(self, container, stream) -> None:
        """Times of all frames in order of showing, and which of them decoding can start from."""
        packets = [
            (p.pts, p.is_keyframe, p.duration, p.is_discard)
            for p in container.demux(stream)
            if p.size
        ]
        if "mov" in container.format.name and len(packets) < stream.frames:
            raise UserError(
                f"{self.path} is cut short, {len(packets)} of {stream.frames} frames are there: "
                "copy or download it again"
            )
        start = next((i for i, p in enumerate(packets) if p[1]), len(packets))
        # Nothing before the first key frame can be decoded; an edit list hides the discarded.
        shown = [p for p in packets[start:] if not p[3] and not _earlier(p[0], packets[start][0])]
        if not shown:
            raise UserError(f"{self.path} has no frames: copy or download it again")
        self.count = len(shown)
        self.fps = float(stream.average_rate or 0) or 1.0
        # Only these two containers give every frame its exact time. In others we count frames.
        self.pts, self.keys = None, [0]
        times = [p[0] for p in shown]
        if not {"mov", "matroska"} & set(container.format.name.split(",")) or None in times:
            return
        shown.sort()
        times.sort()
        if len(set(times)) < len(times):
            return
        self.pts = times
        self.keys = [i for i, p in enumerate(shown) if p[1]]
        seconds = float((times[-1] - times[0] + (shown[-1][2] or 0)) * stream.time_base)
        self.fps = _mean_rate(self.fps, self.count, seconds)

    def frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Frames [H, W, 3] at `wanted`, ascending and without repeats."""
        import av

        done = 0
        try:
            if self.pts is not None:
                for frame in self._by_time(wanted):
                    yield frame
                    done += 1
            if done < len(wanted):
                for frame in self._by_count(wanted[done:]):
                    yield frame
                    done += 1
        except av.FFmpegError as e:
            raise _unreadable(self.path, f"near frame {wanted[done]}: {e.strerror}") from e
        if done < len(wanted):
            raise _unreadable(self.path, f"it ends before frame {wanted[done]} of {self.count}")

    def _by_time(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Seeks over what is not needed. Stops at a frame that is not where the index has it."""
        with self._stream() as (container, stream):
            frames, last = _decode(container, stream), -1
            for i in wanted:
                before = bisect_right(self.keys, i)
                key = self.keys[before - 1] if before else 0
                if key > last + 1:
                    container.seek(self.pts[key], stream=stream)
                    frames = _decode(container, stream)
                at = self.pts[i]
                frame = next((f for f in frames if f.pts is not None and f.pts >= at), None)
                if frame is None or frame.pts != at:
                    return
                yield self._pixels(frame)
                last = i

    def _by_count(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Decodes from the beginning."""
        left = iter(wanted)
        target = next(left)
        with self._stream() as (container, stream):
            for i, frame in enumerate(_decode(container, stream)):
                if i == target:
                    yield self._pixels(frame)
                    target = next(left, None)
                    if target is None:
                        return

    def _pixels(self, frame) -> np.ndarray:
        width, height = self.coded  # the size may change midway
        rgb = frame.to_ndarray(format="rgb24", width=width, height=height)
        return np.rot90(rgb, round(frame.rotation / 90))


class _DecordVideo:
    """For where PyAV is missing. Refuses the wrong readings that its own index gives away."""

    def __init__(self, path: str):
        import decord

        self.path = path
        if not path.lower().endswith((".mp4", ".m4v", ".mov", ".mkv", ".webm")):
            raise UserError(f"{path} needs PyAV to be read exactly: pip install av")
        try:
            reader = self._reader()
            first = self._batch(reader, [0])[0]
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as e:
            raise _unreadable(path, _last_line(e)) from e
        count = len(reader)
        times = reader.get_frame_timestamp(np.arange(count))
        if times[0, 0] < 0:
            raise UserError(
                f"{path} has an edit list and needs PyAV to be read exactly: pip install av"
            )
        fps = _mean_rate(reader.get_avg_fps(), count, float(times[-1, 1] - times[0, 0]))
        self.info = VideoInfo(count, fps, count / fps, first.shape[1], first.shape[0])

    def frames(self, wanted: list[int]) -> Iterator[np.ndarray]:
        """Frames [H, W, 3] at `wanted`, ascending and without repeats."""
        import decord

        try:
            reader = self._reader()
            for i in wanted:
                yield self._batch(reader, [i])[0]
        except (decord.DECORDError, decord.DECORDLimitReachedError, RuntimeError) as e:
            raise _unreadable(self.path, _last_line(e)) from e

    def _reader(self):
        import decord

        with _silent_stderr():
            decord.logging.set_level(decord.logging.QUIET)
            # No frame may stand in for one that cannot be decoded: by default any number does.
            return decord.VideoReader(self.path, num_threads=1, fault_tol=1e-9)

    @staticmethod
    def _batch(reader, indices: list[int]) -> np.ndarray:
        batch = reader.get_batch(indices)  # of the type of decord.bridge, which may have been set
        return batch.asnumpy() if hasattr(batch, "asnumpy") else np.asarray(batch)


def _decode(container, stream) -> Iterator:
    started = False
    for packet in container.demux(stream):
        started = started or packet.is_keyframe  # a recording may begin anywhere
        if started:
            yield from packet.decode()


def _mean_rate(fps: float, count: int, seconds: float) -> float:
    """fps of the header, unless the frames' times contradict it: a variable rate."""
    true = count / seconds if seconds > 0 else fps
    return true if abs(true / fps - 1) > 0.01 else fps


def _earlier(pts: int | None, than: int | None) -> bool:
    return pts is not None and than is not None and pts < than


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


@contextmanager
def _silent_stderr():
    """decord's C++ writes why it cannot open a file, at every log level."""
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)
