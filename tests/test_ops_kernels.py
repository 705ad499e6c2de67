"""The operators shipped, called as the delegate calls them but without an interpreter.

EDGEKIT_TEST_KERNELS names their library where the machine has no compiler. It is built on another one, where this file
runs as a script: ``CC=aarch64-linux-gnu-gcc python tests/test_ops_kernels.py build/kernels.so``.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekit.audio import LogMelFrontEnd
from edgekit.errors import EdgekitError
from edgekit.manifest import LogMel

OPS = Path(__file__).parents[1] / "edgekit" / "ops"
# ctypes has no callback that takes as many arguments as `fail` is given.
HARNESS = r"""
#include <stdarg.h>
#include <stdio.h>
#include "edgekit_op.h"
extern const EdgekitOp edgekit_log_mel, edgekit_layer_norm;
EDGEKIT_OPS(&edgekit_log_mel, &edgekit_layer_norm)
EDGEKIT_EXPORT char said[512];
EDGEKIT_EXPORT int fail(EdgekitNode *node, const char *format, ...) {
  va_list arguments;
  (void)node;
  va_start(arguments, format);
  vsnprintf(said, sizeof said, format, arguments);
  va_end(arguments);
  return EDGEKIT_ERROR;
}
"""
FLAGS = (
    "-std=c11 -O3 -ffp-contract=fast -fno-math-errno -fvisibility=hidden -Wall -Wextra -Werror -fPIC -shared".split()
)
TYPES = {"float32": 1, "int32": 2, "int16": 7, "int8": 9, "float64": 11}
RATE_HZ = 12_000
PUBLISHED = LogMel(
    fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000, power=2, floor=1e-10, range_db=80
)
STREAM = msgspec.structs.replace(PUBLISHED, range_db=None)
SPEECH = LogMel(
    fft_samples=400, frame_hop_samples=160, num_mel_bins=40, low_hz=50, high_hz=5500, mel_scale="htk", mel_norm="none"
)
# Frames that overlap by more than half, frames that lie apart, and sizes whose factors are odd, large or none.
DENSE = LogMel(fft_samples=1024, frame_hop_samples=100, num_mel_bins=32, low_hz=20, high_hz=6000)
SPARSE = LogMel(fft_samples=256, frame_hop_samples=700, num_mel_bins=16, low_hz=20, high_hz=6000)
SIZES = [2, 3, 4, 6, 8, 15, 25, 64, 343, 441, 480, 509, 551, 1018, 1021, 1102, 2048, 4096]


class Tensor(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int32), ("rank", ctypes.c_int32), ("dims", ctypes.POINTER(ctypes.c_int32)),
        ("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t), ("scale", ctypes.c_float),
        ("zero_point", ctypes.c_int32), ("constant", ctypes.c_int32),
    )  # fmt: skip


class Option(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_char_p), ("kind", ctypes.c_int32), ("integer", ctypes.c_int64), ("real", ctypes.c_double),
        ("text", ctypes.c_char_p),
    )  # fmt: skip


class Node(ctypes.Structure):
    pass


RESIZE = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(Node), ctypes.c_int, ctypes.c_int, ctypes.POINTER(ctypes.c_int32)
)
CALL = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Node))
Node._fields_ = (
    ("inputs", ctypes.POINTER(Tensor)), ("outputs", ctypes.POINTER(Tensor)), ("input_count", ctypes.c_int32),
    ("output_count", ctypes.c_int32), ("options", ctypes.POINTER(Option)), ("option_count", ctypes.c_int32),
    ("blob", ctypes.c_void_p), ("blob_bytes", ctypes.c_size_t), ("state", ctypes.c_void_p), ("user", ctypes.c_void_p),
    ("index", ctypes.c_int32), ("version", ctypes.c_int32), ("resize", RESIZE), ("fail", ctypes.c_void_p),
)  # fmt: skip


class Op(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p), ("version", ctypes.c_int32), ("init", CALL), ("prepare", CALL), ("invoke", CALL),
        ("free", CALL), ("user", ctypes.c_void_p),
    )  # fmt: skip


class Library(ctypes.Structure):
    _fields_ = (("abi", ctypes.c_int32), ("op_count", ctypes.c_int32), ("ops", ctypes.POINTER(ctypes.POINTER(Op))))


class Refused(Exception):
    pass


class Kernel:
    """A node of the operator ``name``."""

    def __init__(self, library: ctypes.CDLL, name: str, **options: Any) -> None:
        library.edgekit_library.restype = ctypes.POINTER(Library)
        ops = library.edgekit_library().contents
        named = {ops.ops[i].contents.name.decode(): ops.ops[i].contents for i in range(ops.op_count)}
        self._op, self._library = named[name], library
        self._options = (Option * len(options))(*(self._option(key, value) for key, value in options.items()))
        self._resize = RESIZE(self._take_shape)
        self.node = Node(
            options=self._options, option_count=len(options), resize=self._resize, version=1,
            fail=ctypes.cast(library.fail, ctypes.c_void_p),
        )  # fmt: skip
        self._shapes: dict[int, tuple[int, ...]] = {}
        try:
            self._check(self._op.init)
        except Refused:
            self.free()
            raise

    @staticmethod
    def _option(key: str, value: Any) -> Option:
        if isinstance(value, str):
            return Option(key.encode(), 3, text=value.encode())
        return Option(key.encode(), 2, real=value) if isinstance(value, float) else Option(key.encode(), 1, value)

    def _check(self, step: Callable[[Any], int]) -> None:
        if step(ctypes.byref(self.node)):
            raise Refused(ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(self._library, "said"))).decode())

    def _take_shape(self, _node: object, output: int, rank: int, dims: Any) -> int:
        self._shapes[output] = tuple(dims[:rank])
        return 0

    @staticmethod
    def _tensor(array: np.ndarray, scale: float = 0, zero_point: int = 0) -> Tensor:
        dims = (ctypes.c_int32 * max(array.ndim, 1))(*array.shape)
        return Tensor(TYPES[array.dtype.name], array.ndim, dims, array.ctypes.data, array.nbytes, scale, zero_point)

    def __call__(
        self, *inputs: np.ndarray, outputs: tuple[str, ...] = ("float32",), scales: tuple[tuple[float, int], ...] = ()
    ) -> tuple[np.ndarray, ...]:
        """``scales``: scale and zero point of the inputs, then of the outputs."""
        quantized = (*scales, *[(0.0, 0)] * (len(inputs) + len(outputs) - len(scales)))
        given = [self._tensor(array, *scale) for array, scale in zip(inputs, quantized, strict=False)]
        made = [np.empty(0, dtype) for dtype in outputs]
        tensors = [self._tensor(array, *scale) for array, scale in zip(made, quantized[len(inputs) :], strict=True)]
        self.node.inputs, self.node.input_count = (Tensor * len(inputs))(*given), len(inputs)
        self.node.outputs, self.node.output_count = (Tensor * len(outputs))(*tensors), len(outputs)
        self._check(self._op.prepare)
        made = [np.empty(self._shapes[i], dtype) for i, dtype in enumerate(outputs)]
        tensors = [self._tensor(array, *scale) for array, scale in zip(made, quantized[len(inputs) :], strict=True)]
        self.node.outputs = (Tensor * len(outputs))(*tensors)
        self._check(self._op.invoke)
        return tuple(made)

    def free(self) -> None:
        self._op.free(ctypes.byref(self.node))
        assert not self.node.state


Make = Callable[..., Kernel]


def compile_kernels(output: Path, *flags: str) -> None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        pytest.skip("no C compiler")
    harness = output.with_suffix(".c")
    harness.write_text(HARNESS)
    sources = [str(path) for path in (harness, OPS / "log_mel.c", OPS / "layer_norm.c")]
    subprocess.run([*compiler.split(), *FLAGS, *flags, f"-I{OPS}", *sources, "-o", str(output), "-lm"], check=True)


def load_kernels(folder: Path, *flags: str) -> ctypes.CDLL:
    if built := os.environ.get("EDGEKIT_TEST_KERNELS"):
        if flags:
            pytest.skip("the library was built elsewhere")
        return ctypes.CDLL(built)
    compile_kernels(folder / "kernels.so", *flags)
    return ctypes.CDLL(str(folder / "kernels.so"))


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return load_kernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module", params=[4, 8])
def narrow_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """What processors with fewer instructions run."""
    return load_kernels(tmp_path_factory.mktemp("narrow"), f"-DEDGEKIT_LOG_MEL_LANES={request.param}")


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Kernel] = []

    def make(library: ctypes.CDLL, name: str, **options: Any) -> Kernel:
        made.append(Kernel(library, name, **options))
        return made[-1]

    yield make
    for kernel in made:
        kernel.free()


def options_of(front_end: LogMel, **changes: Any) -> dict[str, Any]:
    options = {"sample_rate_hz": RATE_HZ, **msgspec.structs.asdict(front_end), **changes}
    return {key: value for key, value in options.items() if value is not None}


def music(samples: int) -> np.ndarray:
    """Chords that come and go, a sweep, and some noise."""
    random, time_s = np.random.default_rng(0), np.arange(samples) / RATE_HZ
    notes = sum(np.sin(2 * np.pi * hz * time_s) * (np.sin(time_s * rate) > 0) for hz, rate in ((220, 3), (1375, 7)))
    sweep = np.sin(2 * np.pi * 150 * time_s**2)
    return (0.2 * np.asarray(notes) + 0.1 * sweep + random.normal(0, 1e-3, samples)).astype(np.float32)


def noise(samples: int) -> np.ndarray:
    return np.random.default_rng(1).normal(0, 0.2, samples).astype(np.float32)


def faint(samples: int) -> np.ndarray:
    return noise(samples) * np.float32(1e-4)


def quantized(samples: int) -> np.ndarray:
    return (music(samples) * 32_768).astype(np.int16)


def check_log_mel(kernel: Kernel, front_end: LogMel, sound: np.ndarray) -> None:
    (levels,) = kernel(sound)
    assert levels.shape[0] == levels.shape[3] == 1
    check_levels(levels[0, ..., 0], LogMelFrontEnd(front_end, RATE_HZ)(sound), front_end)


def check_levels(levels: np.ndarray, expected: np.ndarray, front_end: LogMel) -> None:
    """Within 1e-3 dB, but for what lies 80 dB and more below the strongest of its frame, about which float32 knows too
    little; numpy works in float64 inside."""
    assert levels.shape == expected.shape
    amplitudes, expected_amplitudes = (
        10 ** (db.astype(np.float64) / 20 / front_end.power) for db in (levels, expected)
    )
    error = np.abs(amplitudes - expected_amplitudes)
    bound = 1e-3 / 8.686 / front_end.power * expected_amplitudes + 1e-7 * expected_amplitudes.max(0)
    assert (error <= bound).all()


@pytest.mark.parametrize("front_end", [PUBLISHED, SPEECH, DENSE, SPARSE])
@pytest.mark.parametrize("make_sound", [music, noise, faint, quantized])
def test_log_mel_is_that_of_the_front_end(
    library: ctypes.CDLL, make: Make, front_end: LogMel, make_sound: Callable[[int], np.ndarray]
) -> None:
    kernel = make(library, "EdgekitLogMel", **options_of(front_end))
    for samples in (20_000, 4097, 1000, 257, 256, 100, 7, 3, 2, 1):  # one kernel: it forgets what came before
        check_log_mel(kernel, front_end, make_sound(samples))


def test_log_mel_of_the_published_front_end_is_within_a_thousandth_of_a_db(library: ctypes.CDLL, make: Make) -> None:
    kernel = make(library, "EdgekitLogMel", **options_of(PUBLISHED))
    for sound in (music(349_440), noise(349_440), quantized(349_440), np.full(5000, 0.9, np.float32), noise(7)):
        expected = LogMelFrontEnd(PUBLISHED, RATE_HZ)(sound)
        np.testing.assert_allclose(kernel(sound)[0][0, ..., 0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("fft_samples", SIZES)
def test_log_mel_of_other_fft_sizes(library: ctypes.CDLL, make: Make, fft_samples: int) -> None:
    front_end = msgspec.structs.replace(SPEECH, fft_samples=fft_samples, num_mel_bins=12)
    check_log_mel(make(library, "EdgekitLogMel", **options_of(front_end)), front_end, noise(9000))


@pytest.mark.parametrize("front_end", [PUBLISHED, SPEECH, SPARSE])
def test_log_mel_on_processors_with_fewer_instructions(
    narrow_library: ctypes.CDLL, make: Make, front_end: LogMel
) -> None:
    kernel = make(narrow_library, "EdgekitLogMel", **options_of(front_end))
    for sound in (music(30_000), quantized(5000), noise(3)):
        check_log_mel(kernel, front_end, sound)


@pytest.mark.parametrize(
    "changes",
    [
        {"power": 1.0}, {"power": 0.5, "floor": 1e-6}, {"floor": 1e-3}, {"range_db": 12.5}, {"range_db": 0.0},
        {"mel_scale": "htk"}, {"mel_norm": "none"}, {"num_mel_bins": 1}, {"num_mel_bins": 700}, {"high_hz": 300.0},
        {"low_hz": 5990.0}, {"frame_hop_samples": 1, "fft_samples": 32}, {"frame_hop_samples": 65_536},
    ],
)  # fmt: skip
def test_log_mel_with_other_options(library: ctypes.CDLL, make: Make, changes: dict[str, Any]) -> None:
    front_end = msgspec.structs.replace(PUBLISHED, **changes)
    check_log_mel(make(library, "EdgekitLogMel", **options_of(front_end)), front_end, music(7000))


def test_log_mel_options_left_out_are_those_of_the_manifest(library: ctypes.CDLL, make: Make) -> None:
    front_end = LogMel(fft_samples=512, frame_hop_samples=256, num_mel_bins=40, low_hz=0, high_hz=6000)
    options = options_of(front_end)
    for key in ("power", "floor", "mel_scale", "mel_norm"):
        del options[key]
    check_log_mel(make(library, "EdgekitLogMel", **options), front_end, music(9000))


def test_log_mel_takes_sound_of_either_shape_and_int16_of_any_scale(library: ctypes.CDLL, make: Make) -> None:
    kernel, sound = make(library, "EdgekitLogMel", **options_of(PUBLISHED)), quantized(9000)
    (expected,) = kernel(sound)
    np.testing.assert_array_equal(kernel(sound[None])[0], expected)
    np.testing.assert_array_equal(kernel(sound, scales=((1 / 32_768, 0),))[0], expected)
    (louder,) = kernel(sound, scales=((2 / 32_768, 0),))
    check = LogMelFrontEnd(PUBLISHED, RATE_HZ)(sound / np.float32(16_384))
    np.testing.assert_allclose(louder[0, ..., 0], check, atol=1e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_log_mel_takes_constants_that_are_not_aligned(library: ctypes.CDLL, make: Make, dtype: type) -> None:
    kernel = make(library, "EdgekitLogMel", **options_of(PUBLISHED))
    sound = music(9000) if dtype is np.float32 else quantized(9000)
    shifted = np.frombuffer(b"\0" + sound.tobytes(), np.uint8)[1:].view(dtype)
    np.testing.assert_array_equal(kernel(shifted)[0], kernel(sound)[0])


@pytest.mark.parametrize(
    ("fft_samples", "frame_hop_samples", "hop_samples"),
    [(512, 256, 512), (512, 256, 6144), (400, 256, 256), (509, 256, 256), (509, 256, 512), (300, 256, 6144), (2, 1, 7)],
)
def test_log_mel_of_a_stream_is_that_of_the_front_end(
    library: ctypes.CDLL, make: Make, fft_samples: int, frame_hop_samples: int, hop_samples: int
) -> None:
    front_end = msgspec.structs.replace(STREAM, fft_samples=fft_samples, frame_hop_samples=frame_hop_samples)
    kernel, reference = make(library, "EdgekitLogMel", **options_of(front_end)), LogMelFrontEnd(front_end, RATE_HZ)
    for sound in (music(4 * hop_samples), quantized(4 * hop_samples)):
        state = np.zeros((1, 1 + fft_samples // 2), np.float32)
        reference.reset()
        for piece in np.split(sound, 4):
            levels, state = kernel(piece, state, outputs=("float32", "float32"))
            assert levels.shape == (1, 96, hop_samples // frame_hop_samples, 1)
            check_levels(levels[0, ..., 0], reference.push(piece), front_end)
            assert state.shape == (1, 1 + fft_samples // 2) and state[0, 0] == 1


def test_log_mel_of_a_stream_is_the_beginning_of_the_whole(library: ctypes.CDLL, make: Make) -> None:
    sound = music(10 * 6144)
    kernel, state = make(library, "EdgekitLogMel", **options_of(STREAM)), np.zeros((1, 257), np.float32)
    pieces = []
    for piece in np.split(sound, 10):
        levels, state = kernel(piece[None], state, outputs=("float32", "float32"))
        pieces.append(levels)
    np.testing.assert_array_equal(np.concatenate(pieces, 2), kernel(sound)[0][:, :, :-1])


def test_log_mel_of_silence_is_the_floor(library: ctypes.CDLL, make: Make) -> None:
    for sound in (np.zeros(5000, np.float32), np.zeros(5000, np.int16)):
        (levels,) = make(library, "EdgekitLogMel", **options_of(PUBLISHED))(sound)
        np.testing.assert_allclose(levels, -100, atol=1e-4)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("at", [0, 1, 2500, 4999])
@pytest.mark.parametrize("front_end", [STREAM, msgspec.structs.replace(STREAM, num_mel_bins=500, high_hz=300)])
def test_log_mel_of_sound_that_is_not_finite_is_an_error(
    library: ctypes.CDLL, make: Make, value: float, at: int, front_end: LogMel
) -> None:
    kernel, sound = make(library, "EdgekitLogMel", **options_of(front_end)), music(5120)
    (expected,) = kernel(sound)
    damaged = sound.copy()
    damaged[at] = value
    with pytest.raises(EdgekitError, match="finite samples"):
        LogMelFrontEnd(front_end, RATE_HZ)(damaged)
    with pytest.raises(Refused, match=r"^sound: expected finite samples in -1..1, got NaN, infinity or larger ones; "):
        kernel(damaged)
    with pytest.raises(Refused, match="expected finite samples"):
        kernel(damaged, np.zeros((1, 257), np.float32), outputs=("float32", "float32"))
    np.testing.assert_array_equal(kernel(sound)[0], expected)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"sample_rate_hz": 999}, "sample_rate_hz: expected a whole number of 1000 to 384000, got 999; "),
        ({"sample_rate_hz": 12_000.0}, "sample_rate_hz: expected a whole number of 1000 to 384000, got 12000; "),
        ({"fft_samples": 1}, "fft_samples: expected a whole number of 2 to 65536, got 1; "),
        ({"fft_samples": 2**31}, "got 2147483648; "),
        ({"fft_samples": None}, "fft_samples: .* got none; "),
        ({"fft_samples": "512"}, 'fft_samples: .* got "512"; '),
        ({"frame_hop_samples": 0}, "frame_hop_samples: .* got 0; "),
        ({"frame_hop_samples": -(2**63)}, "frame_hop_samples: .* got -9223372036854775808; "),
        ({"num_mel_bins": 1025}, "num_mel_bins: expected a whole number of 1 to 1024, got 1025; "),
        ({"low_hz": -1}, "low_hz: expected 0 Hz or more, got -1; "),
        ({"low_hz": float("nan")}, "low_hz: expected 0 Hz or more, got -?nan; "),
        ({"low_hz": 6000}, "mel filters: expected low_hz < high_hz <= 6000, .* got 6000 and 6000; "),
        ({"high_hz": 6001}, "mel filters: .* got 0 and 6001; "),
        ({"high_hz": float("inf")}, "high_hz: expected a frequency above low_hz, got inf; "),
        ({"high_hz": None}, "high_hz: .* got none; "),
        ({"low_hz": 1000.0, "high_hz": float(np.nextafter(1000, 2000))}, "mel filters: expected .* far enough apart"),
        ({"high_hz": 1e-37}, "mel filters: expected .* far enough apart"),
        ({"power": 0}, "power: expected a number above 0, got 0; "),
        ({"power": "two"}, 'power: expected a number above 0, got "two"; '),
        ({"power": 1e38}, "floor and power: expected "),
        ({"floor": 0.0}, "floor: expected a number above 0, got 0; "),
        ({"floor": -1e-10}, "floor: expected a number above 0, got -1e-10; "),
        ({"floor": 1e-10, "power": 0.1}, "floor and power: expected "),
        ({"range_db": -1.0}, "range_db: expected 0 dB or more, got -1; "),
        ({"range_db": float("nan")}, "range_db: expected 0 dB or more, got -?nan; "),
        ({"mel_scale": "mel"}, 'mel_scale: expected slaney or htk, got "mel"; '),
        ({"mel_scale": 1}, "mel_scale: expected slaney or htk, got 1; "),
        ({"mel_norm": "x" * 500}, 'mel_norm: expected slaney or none, got "x{60}"; '),
    ],
)
def test_log_mel_options_that_do_not_fit_are_an_error(
    library: ctypes.CDLL, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(Refused, match=rf"^.*{complaint}.*convert the model again$"):
        Kernel(library, "EdgekitLogMel", **options_of(PUBLISHED, **changes))


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("front_end", "inputs", "outputs", "complaint"),
    [
        (PUBLISHED, [zeros(0)], ["float32"], r"input 0, the sound: expected .* got float32 of shape \(0,\)"),
        (PUBLISHED, [zeros(2, 9)], ["float32"], r"input 0, the sound: expected .* got float32 of shape \(2, 9\)"),
        (PUBLISHED, [zeros()], ["float32"], r"input 0, the sound: expected .* got float32 of shape \(\)"),
        (PUBLISHED, [zeros(*[1] * 32)], ["float32"], r"input 0, the sound: .* got float32 of shape \(1, 1, "),
        (PUBLISHED, [zeros(9, dtype="int32")], ["float32"], r"float32 or int16 .* got int32 of shape \(9,\)"),
        (PUBLISHED, [zeros(9)], ["int8"], "output 0: expected float32, got int8"),
        (PUBLISHED, [], ["float32"], "expected 1 input and 1 output, or of a stream 2 and 2, got 0 and 1"),
        (PUBLISHED, [zeros(9)], ["float32", "float32"], "got 1 and 2"),
        (STREAM, [zeros(9)] * 3, ["float32"] * 3, "got 3 and 3"),
        (STREAM, [zeros(500), zeros(1, 257)], ["float32"] * 2, "multiple of frame_hop_samples, 256, got 500 samples"),
        (STREAM, [zeros(256), zeros(1, 257)], ["float32"] * 2, "fft_samples of a stream: expected .* 256, got 512"),
        (DENSE, [zeros(1000), zeros(1, 513)], ["float32"] * 2, "at most twice frame_hop_samples, 100, .* got 1024"),
        (PUBLISHED, [zeros(512), zeros(1, 257)], ["float32"] * 2, "range_db of a stream: expected none, .* got 80"),
        (STREAM, [zeros(512), zeros(1, 256)], ["float32"] * 2, r"the state: expected .*\(1, 257\), got .*\(1, 256\)"),
        (STREAM, [zeros(512), zeros(257)], ["float32"] * 2, r"the state: expected .* got float32 of shape \(257,\)"),
        (STREAM, [zeros(512), zeros(1, 257, dtype="int8")], ["float32"] * 2, "the state: expected float32 .* got int8"),
        (STREAM, [zeros(512), zeros(1, 257)], ["float32", "int16"], "output 1: expected float32, got int16"),
    ],
)
def test_log_mel_tensors_that_do_not_fit_are_an_error(
    library: ctypes.CDLL, make: Make, front_end: LogMel, inputs: list[np.ndarray], outputs: list[str], complaint: str
) -> None:
    kernel = make(library, "EdgekitLogMel", **options_of(front_end))
    with pytest.raises(Refused, match=complaint):
        kernel(*inputs, outputs=tuple(outputs))


def test_log_mel_of_int16_with_a_zero_point_is_an_error(library: ctypes.CDLL, make: Make) -> None:
    with pytest.raises(Refused, match="zero point 0"):
        make(library, "EdgekitLogMel", **options_of(PUBLISHED))(quantized(999), scales=((1 / 32_768, 5),))


# The last axis: fewer than the sums that go on side by side, a multiple of them, some more, and more than one piece.
CHANNELS = [1, 2, 15, 16, 96, 100, 777, 70_000]


def normalized(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, epsilon: float) -> np.ndarray:
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * gamma + beta


def weights(channels: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(2)
    return random.uniform(0.5, 2, channels).astype(np.float32), random.normal(0, 1, channels).astype(np.float32)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("offset", [0, 1000])
def test_layer_norm_of_float(library: ctypes.CDLL, make: Make, channels: int, offset: float) -> None:
    x = (np.random.default_rng(0).normal(0, 3, (2, 3, channels)) + offset).astype(np.float32)
    gamma, beta = weights(channels)
    (y,) = make(library, "EdgekitLayerNorm", epsilon=1e-3)(x, gamma, beta)
    assert y.shape == x.shape
    np.testing.assert_allclose(y, normalized(x, gamma, beta, 1e-3), rtol=1e-5, atol=1e-5 if not offset else 1e-3)


@pytest.mark.parametrize("channels", CHANNELS)
def test_layer_norm_of_int8_is_within_a_step(library: ctypes.CDLL, make: Make, channels: int) -> None:
    q = np.random.default_rng(0).integers(-128, 127, (1, 2, 2, channels), np.int8, endpoint=True)
    q[0, 0, 0] //= 40  # hardly any variance
    gamma, beta = weights(channels)
    scales = ((0.07, -9), (0.0, 0), (0.0, 0), (0.02, 11))
    (y,) = make(library, "EdgekitLayerNorm", epsilon=1e-5)(q, gamma, beta, outputs=("int8",), scales=scales)
    x = (q.astype(np.float64) + 9) * np.float32(0.07)
    expected = np.clip(normalized(x, gamma, beta, 1e-5) / np.float32(0.02) + 11, -128, 127)
    assert y.shape == q.shape and np.abs(y - expected).max() < 0.501
    assert channels < 15 or (y.min() == -128 and y.max() == 127)  # and saturates


def test_layer_norm_takes_what_is_not_aligned(library: ctypes.CDLL, make: Make) -> None:
    kernel, x = make(library, "EdgekitLayerNorm", epsilon=1e-3), noise(30 * 40).reshape(30, 40)
    tensors = (x, *weights(40))
    shifted = [
        np.frombuffer(b"\0" + one.tobytes(), np.uint8)[1:].view(np.float32).reshape(one.shape) for one in tensors
    ]
    np.testing.assert_array_equal(kernel(*shifted)[0], kernel(*tensors)[0])


def test_layer_norm_of_nan_is_nan_in_float_and_the_least_in_int8(library: ctypes.CDLL, make: Make) -> None:
    kernel, x, gamma = make(library, "EdgekitLayerNorm", epsilon=1e-3), noise(80).reshape(2, 40), weights(40)[0]
    x[1, 7] = np.nan
    (y,) = kernel(x, gamma, gamma)
    assert np.isfinite(y[0]).all() and np.isnan(y[1]).all()
    scales = ((0.1, 0), (0.0, 0), (0.0, 0), (0.1, 0))
    gamma[3] = np.nan
    (y,) = kernel(np.ones((2, 40), np.int8), gamma, gamma, outputs=("int8",), scales=scales)
    assert (y[:, 3] == -128).all()


def test_layer_norm_of_nothing_is_nothing(library: ctypes.CDLL, make: Make) -> None:
    (y,) = make(library, "EdgekitLayerNorm", epsilon=1e-3)(zeros(0, 40), zeros(40), zeros(40))
    assert y.shape == (0, 40)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({}, "none"), ({"epsilon": "small"}, "text"), ({"epsilon": 0}, "0"), ({"epsilon": -1.0}, "-1"),
        ({"epsilon": float("nan")}, "-?nan"), ({"epsilon": 1e-60}, "1e-60"),
    ],
)  # fmt: skip
def test_layer_norm_options_that_do_not_fit_are_an_error(
    library: ctypes.CDLL, options: dict[str, Any], got: str
) -> None:
    with pytest.raises(Refused, match=f"^epsilon: expected a number above 0, got {got}; convert the model again$"):
        Kernel(library, "EdgekitLayerNorm", **options)


@pytest.mark.parametrize(
    ("inputs", "outputs", "scales", "complaint"),
    [
        ([zeros(2, 4), zeros(4)], ["float32"], (), "expected 3 inputs and 1 output, got 2 and 1"),
        ([zeros(2, 4, dtype="int16"), zeros(4), zeros(4)], ["int16"], (), r"input 0: .* got int16 of shape \(2, 4\)"),
        ([zeros(), zeros(1), zeros(1)], ["float32"], (), r"input 0: expected .* got float32 of shape \(\)"),
        ([zeros(2, 0), zeros(0), zeros(0)], ["float32"], (), r"input 0: expected .* got float32 of shape \(2, 0\)"),
        ([zeros(2, 4, dtype="int8"), zeros(4), zeros(4)], ["int8"], (), "input 0: expected .*, no scale"),
        ([zeros(2, 4, dtype="int8"), zeros(4), zeros(4)], ["int8"], ((0.1, 0),), "output 0: expected .*, no scale"),
        ([zeros(2, 4), zeros(4), zeros(4)], ["int8"], (), "output 0: expected the type of input 0, float32"),
        ([zeros(2, 4), zeros(5), zeros(4)], ["float32"], (), r"input 1, gamma: expected .*\(4,\), got .*\(5,\)"),
        ([zeros(2, 4), zeros(4), zeros(1, 4)], ["float32"], (), r"input 2, beta: expected .* got .*\(1, 4\)"),
        ([zeros(2, 4), zeros(4), zeros(4, dtype="int8")], ["float32"], (), "input 2, beta: expected float32 .* int8"),
    ],
)
def test_layer_norm_tensors_that_do_not_fit_are_an_error(
    library: ctypes.CDLL,
    make: Make,
    inputs: list[np.ndarray],
    outputs: list[str],
    scales: tuple[tuple[float, int], ...],
    complaint: str,
) -> None:
    kernel = make(library, "EdgekitLayerNorm", epsilon=1e-3)
    with pytest.raises(Refused, match=complaint):
        kernel(*inputs, outputs=tuple(outputs), scales=scales)


if __name__ == "__main__":
    compile_kernels(Path(sys.argv[1]))
