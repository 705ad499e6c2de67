from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.audio import LogMelFrontEnd
from edgekit.converters import clips, data
from edgekit.converters.clips import Clips
from edgekit.errors import ConversionError
from edgekit.manifest import AudioInput, LogMel

RATE_HZ, FRAMES = 8000, 16
FRONT_END = LogMel(
    fft_samples=128, frame_hop_samples=64, num_mel_bins=8, low_hz=0.0, high_hz=4000.0, power=2.0, range_db=80.0
)
WINDOW = AudioInput(sample_rate_hz=RATE_HZ, window_samples=64 * (FRAMES - 1), hop_samples=64 * 8, front_end=FRONT_END)
STREAM = msgspec.structs.replace(
    WINDOW,
    window_samples=64 * FRAMES,
    hop_samples=64 * 4,
    streaming=True,
    front_end=msgspec.structs.replace(FRONT_END, range_db=None),
)


def tone(seconds: float, hertz: float = 440.0, seed: int = 0) -> np.ndarray:
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (0.3 * np.sin(2 * np.pi * hertz * t) + np.random.default_rng(seed).normal(0, 0.01, len(t))).astype("float32")


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes sound into a file of the folder ``sound``."""
    soundfile = pytest.importorskip("soundfile")

    def run(name: str, sound: np.ndarray, rate_hz: int = RATE_HZ) -> Path:
        path = tmp_path / "sound" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, sound, rate_hz, subtype="FLOAT" if name.endswith(".wav") else None)
        return path

    return run


def load(path: Path, folder: Path, input: AudioInput = WINDOW, **options: Any) -> data.Dataset:
    folder.mkdir(exist_ok=True)
    return data.load(str(path), "calibration", Clips(input), folder, **{"limit": 100, **options})


def test_windows_of_a_long_sound_are_few_and_evenly_spaced() -> None:
    sound = np.repeat(np.arange(100, dtype=np.float32), 10)  # window n is full of n
    pieces = np.array_split(np.append(sound, np.zeros(7, np.float32)), 23)
    found = [int(window[0]) for window in clips.windows(iter(pieces), 10, 8)]
    assert len(found) == 8 and np.all(np.diff(found) >= 8) and found[0] < 16 and found[-1] > 80


def test_windows_of_an_endless_sound_hold_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three hours at 12 kHz, of which 16 windows of a second at most are in memory."""
    import tracemalloc

    second = np.ones(12_000, np.float32)
    tracemalloc.start()
    found = clips.windows((second for _ in range(3 * 3600)), 12_000, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list(found)) == 8 and peak < 20 * second.nbytes


@pytest.mark.parametrize(("samples", "expected"), [(3, 1), (10, 1), (19, 1), (20, 2), (35, 3)])
def test_windows_of_a_short_sound(samples: int, expected: int) -> None:
    found = list(clips.windows([np.ones(samples, np.float32)], 10, 8))
    assert len(found) == expected
    assert found[0].sum() == min(samples, 10)  # silence after a sound that is shorter


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 44_100])
def test_load_of_audio_files_gives_what_the_device_makes_of_them(write: Any, tmp_path: Path, rate_hz: int) -> None:
    sound = tone(1.0)
    t = np.arange(int(rate_hz * 1.0)) / rate_hz
    path = write("a.wav", sound if rate_hz == RATE_HZ else 0.3 * np.sin(2 * np.pi * 440 * t), rate_hz)
    dataset = load(path.parent, tmp_path / "job")
    assert dataset.x.shape == (8, 8, FRAMES, 1) and dataset.x.dtype == np.float32
    if rate_hz == RATE_HZ:
        first = LogMelFrontEnd(FRONT_END, RATE_HZ)(sound[: WINDOW.window_samples])
        np.testing.assert_allclose(dataset.x[0, ..., 0], first, atol=1e-4)
    loudest = dataset.x[4, ..., 0].mean(1).argmax()
    assert loudest == LogMelFrontEnd(FRONT_END, RATE_HZ)(tone(0.2)).mean(1).argmax()


def test_load_of_audio_files_for_a_stream_gives_its_frames(write: Any, tmp_path: Path) -> None:
    sound = tone(0.2)
    dataset = load(write("a.wav", sound).parent, tmp_path / "job", STREAM)
    frames = LogMelFrontEnd(STREAM.front_end, RATE_HZ).push(sound[: STREAM.window_samples])
    np.testing.assert_allclose(dataset.x[0, ..., 0], frames, atol=1e-4)
    (tensor,) = Clips(STREAM).tensors(dataset.x[:1])
    assert tensor.shape == (1, 4, 8, 4, 1)
    np.testing.assert_array_equal(np.concatenate(list(tensor[0, ..., 0]), axis=1), dataset.x[0, ..., 0])


def test_load_takes_more_of_each_file_the_fewer_there_are(write: Any, tmp_path: Path) -> None:
    for number in range(3):
        path = write(f"{number}.flac", tone(3.0, seed=number))
    assert len(load(path.parent, tmp_path / "job").x) == 24
    assert len(load(path.parent, tmp_path / "job", limit=6).x) == 6
    assert len(load(path.parent, tmp_path / "job", limit=2).x) == 2


def test_load_of_labelled_folders_gives_each_window_its_tag(write: Any, tmp_path: Path) -> None:
    for tag, seconds in (("low", 0.3), ("high", 0.05)):
        path = write(f"{tag}/a.wav", tone(seconds))
    dataset = load(path.parents[1], tmp_path / "job", classes=3, labels=("low", "other", "high"), multi_label=True)
    np.testing.assert_array_equal(dataset.class_ids, [[0, 0, 1], [1, 0, 0], [1, 0, 0]])


LOG_MEL = np.random.default_rng(0).uniform(-60, 20, (8, FRAMES))


@pytest.mark.parametrize(
    "x",
    [
        LOG_MEL,
        LOG_MEL.astype(np.float32),
        LOG_MEL[None],
        LOG_MEL[None, ..., None],
        LOG_MEL[None, None],  # as the author of the music tagger has them
    ],
    ids=["one", "float32", "several", "channels last", "channels first"],
)
@pytest.mark.parametrize("name", ["x.npy", "x.npz", "folder"])
def test_load_of_arrays_of_each_shape(tmp_path: Path, x: np.ndarray, name: str) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        np.save(path / "x.npy", x)
    else:
        np.save(path, x) if name.endswith("npy") else np.savez(path, x=x)
    dataset = load(path, tmp_path / "job")
    np.testing.assert_allclose(dataset.x, LOG_MEL[None, ..., None], rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "complaint"),
    [
        (LOG_MEL[:, :10], r"expected log-mels of shape \(8, 16\) or \(n, 8, 16\), got \(8, 10\)"),
        (LOG_MEL[None, :4], r"got \(1, 4, 16\)"),
        (LOG_MEL[None, None, None], r"got \(1, 1, 1, 8, 16\)"),
        (LOG_MEL[0], r"got \(16,\)"),
        (LOG_MEL.astype(int), "expected float32 log-mel levels in dB, got int64"),
        (np.where(LOG_MEL > 19, np.nan, LOG_MEL), "expected finite numbers, got NaN or infinity"),
        (np.where(LOG_MEL > 19, -np.inf, LOG_MEL), "expected finite numbers"),
        (np.zeros((0, 8, FRAMES)), "expected log-mels|at least one clip"),
        (np.array([{}], object), "cannot be read"),
    ],
    ids=["frames", "mels", "dimensions", "row", "type", "nan", "infinity", "none", "pickle"],
)
def test_load_of_arrays_that_do_not_fit_is_refused(tmp_path: Path, x: np.ndarray, complaint: str) -> None:
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(ConversionError, match=complaint):
        load(tmp_path / "x.npy", tmp_path / "job")


def test_load_of_arrays_with_several_tags_each(tmp_path: Path) -> None:
    x, y = np.stack([LOG_MEL, LOG_MEL + 1, LOG_MEL + 2]), np.array([[1, 0], [1, 1], [0, 0]])
    np.savez(tmp_path / "x.npz", x=x, y=y)
    dataset = load(tmp_path / "x.npz", tmp_path / "job", classes=2, multi_label=True, limit=2)
    np.testing.assert_array_equal(dataset.class_ids, y[[0, 2]])
    np.testing.assert_allclose(dataset.x[1, ..., 0], LOG_MEL + 2, rtol=1e-6)
    np.savez(tmp_path / "x.npz", x=x, y=y[:, :1])
    with pytest.raises(ConversionError, match=r"0 or 1 for each class of each clip, shape \(3, 2\), got int64"):
        load(tmp_path / "x.npz", tmp_path / "job", classes=2, multi_label=True)


def test_load_of_arrays_for_a_stream_repeats_what_is_too_short(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", LOG_MEL[:, :10])
    (item,) = load(tmp_path / "x.npy", tmp_path / "job", STREAM).x[..., 0]
    np.testing.assert_allclose(item[:, 6:], LOG_MEL[:, :10], rtol=1e-6)
    np.testing.assert_allclose(item[:, :6], LOG_MEL[:, 4:10], rtol=1e-6)
    np.save(tmp_path / "x.npy", np.concatenate([LOG_MEL, LOG_MEL + 1], 1))
    (item,) = load(tmp_path / "x.npy", tmp_path / "job", STREAM).x[..., 0]
    np.testing.assert_allclose(item, LOG_MEL + 1, rtol=1e-6)


def test_load_of_a_text_file_named_mp3_is_refused_by_name(write: Any, tmp_path: Path) -> None:
    folder = write("a.wav", tone(0.3)).parent
    (folder / "b.mp3").write_text("not a sound")
    with pytest.raises(ConversionError, match=r"calibration .*sound: b\.mp3 is not a sound file; give a wav"):
        load(folder, tmp_path / "job")


@pytest.mark.parametrize("what", ["no files", "an empty file", "nothing there"])
def test_load_without_sound_is_refused(tmp_path: Path, what: str) -> None:
    pytest.importorskip("soundfile")
    path = tmp_path / "sound"
    if what != "nothing there":
        path.mkdir()
    if what == "an empty file":
        (path / "a.wav").touch()
    expected = {"no files": "at least one clip, got none", "an empty file": "is empty", "nothing there": what}
    with pytest.raises(ConversionError, match=expected[what]):
        load(path, tmp_path / "job")


def test_load_of_nan_samples_is_refused_by_name(write: Any, tmp_path: Path) -> None:
    path = write("a.wav", np.full(RATE_HZ, np.nan, np.float32))
    with pytest.raises(ConversionError, match=r"a\.wav: sound"):
        load(path.parent, tmp_path / "job")


@pytest.mark.parametrize(
    ("sounds", "words"),
    [
        ([np.zeros(RATE_HZ)], "are silence, or do not change"),
        ([tone(0.12), np.zeros(RATE_HZ // 8)], "1 of 2 calibration clips are silence"),
        ([tone(0.12), tone(0.12)], "all calibration clips are the same"),
        ([tone(0.12), tone(0.12, seed=1)], ""),
        ([tone(0.12)], ""),
        ([np.ones(1)], ""),
    ],
    ids=["silence", "silence among others", "equal", "two", "one", "a click"],
)
def test_suspicion_of_sound(write: Any, tmp_path: Path, sounds: list[np.ndarray], words: str) -> None:
    for number, sound in enumerate(sounds):
        path = write(f"{number}.wav", sound)
    line = Clips(WINDOW).suspicion(load(path.parent, tmp_path / "job").x[: len(sounds)])
    assert (words in line) if words else not line


@pytest.mark.parametrize(("count", "copies"), [(1, 24), (2, 24), (5, 25), (24, 0), (100, 0)])
def test_copies_make_up_for_few_clips(count: int, copies: int) -> None:
    longer = Clips(msgspec.structs.replace(WINDOW, window_samples=64 * 95))
    x = np.random.default_rng(0).uniform(-60, 20, (count, *longer.shape)).astype(np.float32)
    found = list(longer.copies(x))
    assert len(found) == copies
    digests = {item.tobytes() for item in [*x, *found]}
    assert len(digests) == count + copies  # no two alike
