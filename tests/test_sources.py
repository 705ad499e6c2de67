from __future__ import annotations

import os
import random
import shutil
import threading
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgekit.devices.sources import images as sources
from edgekit.devices.sources.frames import public_name
from edgekit.devices.sources.images import open_source
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


def test_image_that_cannot_be_prepared_ahead_is_given_all_the_same(frames: Path) -> None:
    """So that whoever prepares it then meets the error, and tells of it."""

    def prepare(*_: object) -> np.ndarray:
        raise MemoryError

    with open_source(str(frames)) as source:
        source.prepare = prepare
        given = list(source)
    assert len(given) == 6 and not any(frame.prepared for frame in given)


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
        ("camera:csi:x", "expected camera:N"),
        ("/dev/video77", "there is no /dev/video77"),
        ("mic:0", "does not exist: expected camera:N"),
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
        ("rtsp://admin:pa/ss@cam.lan/stream", "rtsp://cam.lan/stream"),
        ("rtsp://admin:pa#ss/d@[fe80::1]:554/x", "rtsp://[fe80::1]:554/x"),
        ("rtsp:/admin:pass@cam:554/x", "rtsp:/cam:554/x"),
        ("rtsp:admin:pass@cam/x", "rtsp:cam/x"),
        ("camera:rtsp://admin:pass@cam/x", "camera:rtsp://cam/x"),
        ("rtsp://cam/user=admin_password=pass_stream=0.sdp", "rtsp://cam"),
        ("http://cam/video.cgi;user=admin;pwd=pass", "http://cam/video.cgi"),
        ("http://cam/v?pwd=pa@ss", "http://…"),
        ("folder/at@home.mp4", "folder/at@home.mp4"),
    ],
)
def test_public_name_leaves_out_secrets(spec: str, name: str) -> None:
    assert public_name(spec) == name


def test_public_name_shows_nothing_of_any_secret() -> None:
    generator = random.Random(1)
    letters = "abcXYZ019/#?@:;&%!$._-+=[]"
    for _ in range(1000):
        secret = "".join(generator.choices(letters, k=4)) + "hunter2" + "".join(generator.choices("abc#/:;%!$", k=3))
        spec = generator.choice(
            [
                "rtsp://ann:{}@cam.lan/live", "rtsp:/ann:{}@cam.lan:554/1", "rtsp:ann:{}@cam.lan", "http://{}@cam.lan/a.mjpg",
                "camera:rtsps://ann:{}@cam.lan/x", "http://cam.lan/v?user=ann&pwd={}", "http://cam.lan/v;pwd={};x=1",
                "rtsp://cam.lan/user=ann_password={}_channel=1", "HTTP://cam.lan:81/#token={}",
            ]
        ).format(secret)  # fmt: skip
        assert "hunter2" not in public_name(spec) and secret not in public_name(spec), spec


@pytest.mark.parametrize("name", ["12:30.avi", "file:other.avi", "concat:a|other.avi"])
def test_video_name_is_never_taken_for_a_protocol(
    video: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(video, name)
    with open_source(f"./{name}") as source:
        assert len(list(source)) == len(list(open_source(str(video))))


def test_file_name_that_is_not_utf8_is_told_as_near_as_can_be(frames: Path, tmp_path: Path) -> None:
    shutil.copy(frames / "1-green.png", os.fsencode(tmp_path) + b"/\xff.png")
    with open_source(str(tmp_path)) as source:
        (frame,) = source
    assert frame.image_bgr is not None and frame.input and frame.input.file == "\ufffd.png"


def test_no_more_than_a_few_images_are_read_ahead(tmp_path: Path) -> None:
    for number in range(8):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.zeros((8, 8, 3), np.uint8))
    with open_source(str(tmp_path)) as source:
        frames_read = iter(source)
        next(frames_read)
        for number in range(1 + sources.READ_AHEAD, 8):
            cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8, 3), 255, np.uint8))
        assert [frame.image_bgr.max() for frame in frames_read][sources.READ_AHEAD :] == [255] * (
            7 - sources.READ_AHEAD
        )


@pytest.mark.parametrize("kind", ["video", "frames"])
def test_what_was_read_ahead_and_not_used_is_not_captured(kind: str, request: pytest.FixtureRequest) -> None:
    with open_source(str(request.getfixturevalue(kind))) as source:
        for number, _ in enumerate(source, 1):
            if number == 3:
                break
    assert (source.captured, source.dropped) == (3, 0)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("source")]


def test_video_that_is_cut_gives_what_is_there_and_says_so(
    video: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = video.read_bytes()
    (tmp_path / "cut.avi").write_bytes(whole[: len(whole) // 2])
    with open_source(str(tmp_path / "cut.avi")) as source:
        count = len(list(source))
    assert 20 < count < 70 and f"ended after {count} of 90 frames" in caplog.text


@pytest.mark.parametrize("pixels", ["grey", "alpha", "16 bit", "1 x 1"])
def test_image_of_other_pixels_is_taken_as_8_bit_bgr(tmp_path: Path, pixels: str) -> None:
    image = {
        "grey": np.full((6, 9), 200, np.uint8),
        "alpha": np.full((6, 9, 4), 200, np.uint8),
        "16 bit": np.full((6, 9, 3), 200 << 8, np.uint16),
        "1 x 1": np.full((1, 1, 3), 200, np.uint8),
    }[pixels]
    cv2.imwrite(str(tmp_path / "image.png"), image)
    with open_source(str(tmp_path / "image.png")) as source:
        (frame,) = source
    assert frame.image_bgr is not None and frame.image_bgr.dtype == np.uint8
    assert frame.image_bgr.shape == (*image.shape[:2], 3) and (frame.image_bgr == 200).all()
