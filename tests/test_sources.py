from __future__ import annotations

import http.server
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import pytest

from edgekit.devices.frames import public_name
from edgekit.devices.sources import open_source
from edgekit.errors import SourceError


def test_folder_gives_its_images_in_order(frames: Path) -> None:
    with open_source(str(frames)) as source:
        names = [frame.input.file for frame in source if frame.input]
    assert names == sorted(path.name for path in frames.iterdir())
    assert (source.live, source.captured, source.dropped) == (False, 6, 0)


def test_unreadable_image_in_a_folder_is_a_frame_with_an_error(frames: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(frames, tmp_path / "frames")
    (folder / "1-broken.png").write_bytes(b"\x89PNG and no more")
    (folder / "1-empty.jpg").touch()
    (folder / "1-notes.txt").write_text("not an image by its name")
    with open_source(str(folder)) as source:
        frames_read = list(source)
    assert [frame.input.file for frame in frames_read if frame.image_bgr is None and frame.input] == [
        "1-broken.png", "1-empty.jpg",
    ]  # fmt: skip
    assert all(frame.error for frame in frames_read if frame.image_bgr is None) and len(frames_read) == 8


def test_single_image_is_in_bgr(frames: Path) -> None:
    with open_source(str(frames / "0-red.jpg")) as source:
        (frame,) = source
    assert frame.image_bgr is not None and frame.image_bgr[..., 2].mean() > 200 > 60 > frame.image_bgr[..., 0].mean()


def test_video_gives_every_frame(video: Path) -> None:
    with open_source(str(video)) as source:
        numbers = [frame.input.frame for frame in source if frame.input and frame.image_bgr is not None]
    assert numbers == list(range(90))


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_loop_starts_again_until_it_is_stopped(kind: str, request: pytest.FixtureRequest) -> None:
    path, stop = request.getfixturevalue(kind), threading.Event()
    with open_source(str(path), loop=True, stop=stop) as source:
        for number, _ in enumerate(source, 1):
            if number == 200:
                stop.set()
    assert number == 200


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("camera:x", "expected camera:N"),
        ("camera:77", "cannot be opened"),
        ("camera:99999999999999999999", "expected camera:N"),
        ("", "does not exist"),
        ("nowhere.mp4", "does not exist"),
        ("rtsp://ann:hunter2@127.0.0.1:1/x", "cannot be opened"),
        ("text.mp4", "cannot be opened"),
        ("text.png", "no readable image"),
        ("empty", "holds no images"),
    ],
)
def test_source_that_cannot_be_used_is_an_error(
    spec: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("text.mp4", "text.png"):
        Path(name).write_text("this is neither a video nor an image\n" * 100)
    Path("empty").mkdir()
    with pytest.raises(SourceError, match=complaint) as caught, open_source(spec) as source:
        list(source)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("rtsp://ann:p@ss@cam/1", "rtsp://cam/1"),
        ("http://cam/v?user=ann&pwd=p", "http://cam/v"),
        ("camera:0", "camera:0"),
        ("a folder?/x#1", "a folder?/x#1"),
        ("\udcff.png", "\ufffd.png"),
    ],
)
def test_public_name_leaves_out_secrets(spec: str, name: str) -> None:
    assert public_name(spec) == name


def test_file_name_that_is_not_utf8_is_told_as_near_as_can_be(frames: Path, tmp_path: Path) -> None:
    shutil.copy(frames / "1-green.png", os.fsencode(tmp_path) + b"/\xff.png")
    with open_source(str(tmp_path)) as source:
        (frame,) = source
    assert frame.image_bgr is not None and frame.input and frame.input.file == "\ufffd.png"


@pytest.fixture
def mjpeg_url(colour: Callable[..., Any]) -> Iterator[str]:
    """A camera as many sell them: JPEGs over HTTP, 60 numbered by their brightness, then the end."""

    class Camera(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for number in range(60):
                jpeg = cv2.imencode(".jpg", colour("blue", (64, 48)) // 4 + 2 * number)[1].tobytes()
                self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
                self.wfile.write(jpeg + b"\r\n")
                time.sleep(0.02)

        def log_message(self, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/stream.mjpg"
    server.shutdown()
    server.server_close()


def test_live_source_gives_the_newest_frame_and_counts_the_dropped(mjpeg_url: str) -> None:
    seen = []
    with pytest.raises(SourceError, match="stopped giving frames"), open_source(mjpeg_url) as source:
        for frame in source:
            seen.append(float(frame.image_bgr.mean()))
            time.sleep(0.1)
    assert source.live and source.dropped > 10
    assert source.captured == len(seen) + source.dropped
    assert 3 < len(seen) < 40 and seen == sorted(seen)


def test_live_source_ends_when_it_is_stopped(mjpeg_url: str) -> None:
    stop = threading.Event()
    with open_source(mjpeg_url, stop=stop) as source:
        for number, _ in enumerate(source):
            if number == 3:
                stop.set()
    assert number == 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("source")]
