from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edgekit.manifest import AudioInput, LogMel

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no gcc here"),
]

ROUNDS = 100_000
SOURCES = Path(__file__).parents[1] / "edgekit" / "ops"


def front_end(**fields: object) -> AudioInput:
    given = {
        "fft_samples": 512,
        "frame_hop_samples": 256,
        "num_mel_bins": 16,
        "low_hz": 0.0,
        "high_hz": 6000.0,
        "power": 2.0,
    }
    return AudioInput(
        sample_rate_hz=12_000,
        window_samples=6144,
        hop_samples=3072,
        front_end=LogMel(**given | fields),
        streaming=False,
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library with its sanitizers on, and what plays the interpreter's part."""
    program = tmp_path_factory.mktemp("fuzz") / "fuzz"
    command = [
        "gcc",
        "-std=c11",
        "-g",
        "-O1",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        f"-I{SOURCES}",
    ]
    sources = [Path(__file__).with_name("fuzz_ops.c"), *sorted(SOURCES.glob("*.c"))]
    subprocess.run([*command, *sources, "-o", program, "-lm", "-ldl"], check=True)
    return program


@pytest.fixture(scope="module")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Options as ``edgekit convert`` writes them."""
    flexbuffers = pytest.importorskip("flatbuffers.flexbuffers")
    from edgekit.converters import raw_sound

    path = tmp_path_factory.mktemp("fuzz") / "seeds"
    with path.open("wb") as file:
        for input in (
            front_end(),
            front_end(range_db=80.0),
            front_end(fft_samples=12, frame_hop_samples=6, num_mel_bins=4, mel_scale="htk", mel_norm="none"),
        ):
            options = bytes(flexbuffers.Dumps(raw_sound.options(input)))
            of = input.front_end
            line = f"EdgekitLogMel {of.fft_samples} {of.frame_hop_samples} {len(options)}\n"
            file.write(line.encode() + options)
        for _ in range(2):
            options = bytes(flexbuffers.Dumps({"epsilon": 1e-3}))
            file.write(f"EdgekitLayerNorm 0 0 {len(options)}\n".encode() + options)
    return path


def test_sanitizers_find_nothing_in_mutated_options_shapes_and_graphs(fuzz: Path, seeds: Path) -> None:
    """In two processes at a time. What was right must have got through as well, or nothing was tried."""
    halves = [
        subprocess.Popen(
            [fuzz, seeds, str(ROUNDS // 2), str(number)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for number in (1, 2)
    ]
    for half in halves:
        output, _ = half.communicate(timeout=280)
        assert half.returncode == 0, output[:4000]
        rounds, prepared, invoked, refused = map(int, re.findall(r"\d+", output))
        assert rounds == ROUNDS // 2 and min(prepared, invoked, refused) > rounds / 10, output
