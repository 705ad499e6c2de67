from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.audio import LogMelFrontEnd, Resampler, as_samples, read_audio
from edgekit.errors import EdgekitError, SourceError
from edgekit.manifest import LogMel

soundfile = pytest.importorskip("soundfile")
RATE_HZ = 12_000
PUBLISHED = LogMel(
    fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000, power=2, floor=1e-10, range_db=80
)
OTHER = LogMel(
    fft_samples=400, frame_hop_samples=160, num_mel_bins=40, low_hz=50, high_hz=5500, mel_scale="htk", mel_norm="none"
)
# Frames that overlap by more than half, and frames that lie apart.
DENSE = LogMel(fft_samples=1024, frame_hop_samples=100, num_mel_bins=32, low_hz=20, high_hz=6000)
SPARSE = LogMel(fft_samples=256, frame_hop_samples=700, num_mel_bins=16, low_hz=20, high_hz=6000)


def sound(samples: int, seed: int = 0) -> np.ndarray:
    """Chords that come and go, with some noise."""
    random = np.random.default_rng(seed)
    time_s = np.arange(samples) / RATE_HZ
    tones = sum(np.sin(2 * np.pi * hz * time_s) * (np.sin(time_s * rate) > 0) for hz, rate in ((220, 3), (1375, 7)))
    return (0.2 * np.asarray(tones) + random.normal(0, 1e-3, samples)).astype(np.float32)


@pytest.mark.parametrize("front_end", [PUBLISHED, OTHER, DENSE, SPARSE])
@pytest.mark.parametrize("samples", [349_440, 20_000, 256, 3, 1])
def test_log_mel_is_that_of_librosa(front_end: LogMel, samples: int) -> None:
    librosa = pytest.importorskip("librosa")
    given = sound(samples)
    mel = librosa.feature.melspectrogram(
        # librosa does not mirror more than once
        y=np.pad(given, front_end.fft_samples // 2, "reflect").astype(np.float64), sr=RATE_HZ, center=False,
        n_fft=front_end.fft_samples, hop_length=front_end.frame_hop_samples, n_mels=front_end.num_mel_bins,
        fmin=front_end.low_hz, fmax=front_end.high_hz, htk=front_end.mel_scale == "htk",
        norm=None if front_end.mel_norm == "none" else "slaney",
    )  # fmt: skip
    expected = librosa.power_to_db(mel**front_end.power, ref=1.0, amin=front_end.floor, top_db=front_end.range_db)
    levels = LogMelFrontEnd(front_end, RATE_HZ)(given)
    assert levels.dtype == np.float32 and levels.shape == expected.shape
    np.testing.assert_allclose(levels, expected, atol=0.01)
    assert np.abs(levels - expected).mean() < 1e-4


@pytest.mark.parametrize("front_end", [PUBLISHED, OTHER, DENSE, SPARSE])
@pytest.mark.parametrize("samples", [40_000, 1025, 512, 257, 256, 100, 1])
def test_stream_gives_the_frames_of_the_whole(front_end: LogMel, samples: int) -> None:
    given, random = sound(samples), np.random.default_rng(1)
    stream = LogMelFrontEnd(front_end, RATE_HZ)
    for _ in range(2):  # the second time after a flush
        pieces, at = [], 0
        while at < samples:
            size = int(random.integers(1, 3000))
            pieces.append(stream.push(given[at : at + size]))
            at += size
        streamed = np.concatenate([*pieces, stream.flush()], axis=1)
        whole = LogMelFrontEnd(_without_range(front_end), RATE_HZ)(given)
        assert streamed.shape == whole.shape
        np.testing.assert_allclose(streamed, whole, atol=1e-4)


def _without_range(front_end: LogMel) -> LogMel:
    return msgspec.structs.replace(front_end, range_db=None)


def test_stream_gives_as_many_frames_as_hops() -> None:
    stream = LogMelFrontEnd(PUBLISHED, RATE_HZ)
    given = sound(10 * 6144)
    assert [stream.push(hop).shape for hop in given.reshape(10, 6144)] == [(96, 24)] * 10
    stream.reset()
    assert stream.push(given[:6144]).shape == (96, 24) and stream.flush().shape == (96, 1)
    assert stream.flush().shape == (96, 0)


def test_silence_is_the_floor() -> None:
    np.testing.assert_allclose(LogMelFrontEnd(PUBLISHED, RATE_HZ)(np.zeros(5000)), -100, atol=1e-4)


def test_int16_is_the_same_sound() -> None:
    given = (sound(5000) * 32_768).astype(np.int16)
    front_end = LogMelFrontEnd(PUBLISHED, RATE_HZ)
    np.testing.assert_array_equal(front_end(given), front_end(given / np.float32(32_768)))


@pytest.mark.parametrize(
    ("samples", "complaint"),
    [
        (np.empty(0, np.float32), "at least one sample"),
        (np.array([0, np.nan, 0], np.float32), "finite samples"),
        (np.array([0, np.inf, 0], np.float32), "finite samples"),
        (np.full(9, 1e30), "finite samples"),
        (np.zeros((5, 2)), "mono"),
        (np.zeros(5, np.int32), "int16"),
    ],
)
def test_samples_that_do_not_fit_are_an_error(samples: np.ndarray, complaint: str) -> None:
    with pytest.raises(EdgekitError, match=complaint):
        LogMelFrontEnd(PUBLISHED, RATE_HZ)(samples)


@pytest.mark.parametrize(("field", "value"), [("high_hz", 6001), ("low_hz", 6000), ("floor", 0), ("power", -1)])
def test_parameters_that_do_not_fit_are_an_error(field: str, value: float) -> None:
    with pytest.raises(EdgekitError, match=r"expected .* got"):
        LogMelFrontEnd(msgspec.structs.replace(PUBLISHED, **{field: value}), RATE_HZ)


@pytest.fixture
def tone(tmp_path: Path) -> Any:
    """Writes 3 s of a tone of 440 Hz on the left, and silence on the right."""

    def write(suffix: str, rate_hz: int, **options: Any) -> Path:
        left = 0.5 * np.sin(2 * np.pi * 440 * np.arange(3 * rate_hz) / rate_hz)
        path = tmp_path / f"tone{suffix}"
        soundfile.write(path, np.stack([left, 0 * left], 1), rate_hz, **options)
        return path

    return write


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
@pytest.mark.parametrize("rate_hz", [48_000, 44_100, 12_000, 8_000])
def test_file_is_read_mono_at_the_rate_asked_for(tone: Any, suffix: str, rate_hz: int) -> None:
    read = np.concatenate(list(read_audio(tone(suffix, rate_hz), RATE_HZ)))
    assert read.dtype == np.float32 and abs(len(read) - 3 * RATE_HZ) < 5
    spectrum = np.abs(np.fft.rfft(read[:RATE_HZ]))
    assert spectrum.argmax() == 440
    assert np.abs(read[2000:-2000]).max() == pytest.approx(0.25, abs=0.03)  # the mean of both channels


def test_file_of_the_same_rate_is_read_sample_by_sample(tmp_path: Path) -> None:
    given = np.random.default_rng(0).integers(-32_768, 32_767, 300_000, np.int16, endpoint=True)
    soundfile.write(tmp_path / "noise.wav", given, RATE_HZ)
    read = np.concatenate(list(read_audio(tmp_path / "noise.wav", RATE_HZ)))
    np.testing.assert_array_equal(read, as_samples(given))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
def test_file_cut_short_gives_what_is_there_and_a_warning(tmp_path: Path, suffix: str, caplog: Any) -> None:
    path = tmp_path / f"noise{suffix}"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.1, 0.1, (44_100 * 3, 2)), 44_100)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    read = np.concatenate(list(read_audio(path, RATE_HZ)))
    assert 0.3 * RATE_HZ < len(read) < 2.9 * RATE_HZ
    assert "it may be cut short" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("text.mp3", b"this is no sound\n" * 100, "text.mp3 is not a sound file"),
        ("text.wav", b"this is no sound\n" * 100, "text.wav is not a sound file"),
        ("samples.raw", bytes(1000), "samples.raw is not a sound file"),
        ("empty.wav", b"", "empty.wav is empty"),
        ("missing.wav", None, "No such file"),
    ],
)
def test_file_that_is_no_sound_is_an_error(tmp_path: Path, name: str, content: Any, complaint: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=complaint):
        list(read_audio(tmp_path / name, RATE_HZ))


def test_file_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(100), RATE_HZ)
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    (tmp_path / "a.wav").rename(path)
    assert [len(piece) for piece in read_audio(path, RATE_HZ)] == [100]


def test_file_without_samples_is_an_error(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "none.wav", np.empty(0), RATE_HZ)
    with pytest.raises(SourceError, match="holds no sound"):
        list(read_audio(tmp_path / "none.wav", RATE_HZ))


def test_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "soxr", None)
    with pytest.raises(EdgekitError, match=r"needs the package soxr .*; pip install soxr"):
        Resampler(48_000, RATE_HZ)


def test_three_hours_of_sound_take_no_more_memory_than_a_minute(tmp_path: Path) -> None:
    with soundfile.SoundFile(tmp_path / "long.flac", "w", 16_000, 1) as file:
        minute = sound(60 * 16_000)
        for _ in range(180):
            file.write(minute)
    script = (
        "import resource, sys\nfrom edgekit.audio import read_audio\n"
        "total = 0\n"
        "for number, piece in enumerate(read_audio(sys.argv[1], 12_000)):\n"
        "    total += len(piece)\n"
        "    if number == 7: early = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - early)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "long.flac"], capture_output=True, text=True, check=True
    )
    samples, growth_kib = map(int, result.stdout.split())
    assert abs(samples - 3 * 3600 * RATE_HZ) < 10
    assert growth_kib < 4096


def test_log_mel_resembles_that_of_the_author(crnn_data: Path) -> None:
    """His decoder began 150 samples later, and his resampler was another."""
    clip = np.concatenate(list(read_audio(crnn_data / "bensound-cute.mp3", RATE_HZ)))
    start = (len(clip) - 349_440) // 2 + 150
    levels = LogMelFrontEnd(PUBLISHED, RATE_HZ)(clip[start : start + 349_440])
    author = np.load(crnn_data / "bensound-cute.npy")[0, 0]
    assert levels.shape == author.shape and levels.max() == pytest.approx(author.max(), abs=0.1)
    difference = np.abs(levels - author)[author > author.min() + 1]
    assert np.median(difference) < 0.2 and difference.mean() < 0.3
