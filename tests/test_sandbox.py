from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit import runtimes, sandbox
from edgekit.flatbuffer import Model
from edgekit.sandbox import Sandbox, SandboxError

# Without it XNNPACK finds no processor, and nobody how much memory a process has.
proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


@pytest.fixture
def runtime() -> runtimes.Runtime:
    return next(iter(runtimes.find().values()))


@pytest.fixture
def library(tmp_path: Path) -> Any:
    """Compiles C code into a delegate library, as TFLite loads them."""
    compiler = shutil.which("gcc") or pytest.skip("no C compiler here")

    def build(code: str) -> Path:
        (tmp_path / "delegate.c").write_text(code)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", "delegate.so", "delegate.c"], cwd=tmp_path, check=True)
        return tmp_path / "delegate.so"

    return build


def test_replay_gives_what_the_interpreter_gives(runtime: Any, models: Path, tmp_path: Path) -> None:
    tensors = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "in.npy", tensors)
    done: list[int] = []
    with Sandbox(runtime, models / "float32.tflite") as trial:
        trial.replay(tmp_path / "in.npy", tmp_path / "out.npy", done.append)
    interpreter = runtimes.load()[1].Interpreter(model_path=str(models / "float32.tflite"))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], tensors[3:4])
    interpreter.invoke()
    expected = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])[0]
    assert done == [1, 2, 3, 4, 5]
    assert np.load(tmp_path / "out.npy")[3] == pytest.approx(expected, abs=1e-6)


@proc
def test_pieces_are_the_operators_that_xnnpack_took(runtime: Any, models: Path) -> None:
    with Sandbox(runtime, models / "float32.tflite") as trial:
        assert trial.pieces is not None
        taken = [operator for piece in trial.pieces for operator in piece]
    assert taken and len(set(taken)) == len(taken)


@proc
def test_peak_is_beyond_the_bare_runtime(runtime: Any, models: Path) -> None:
    with Sandbox(runtime, models / "float32.tflite") as trial:
        trial.invoke(1)
        assert 0 < trial.peak_bytes < 100e6


def test_alternate_measures_each_and_goes_on_without_one_that_failed(runtime: Any, models: Path) -> None:
    with (
        Sandbox(runtime, models / "float32.tflite") as one,
        Sandbox(runtime, models / "int8.tflite") as other,
        Sandbox(runtime, models / "int8.tflite") as dead,
    ):
        dead._child.kill()
        times = sandbox.alternate([one, dead, other], 0.2)
    assert isinstance(times[1], SandboxError) and "killed" in str(times[1])
    assert all(len(times[number]) >= 3 and times[number].min() > 0 for number in (0, 2))


@pytest.mark.parametrize(
    ("model", "delegate", "complaint"),
    [
        ("missing.tflite", "cpu", "missing.tflite|Could not open"),
        ("labels.txt", "cpu", "not a valid|should be 'TFL3'"),
        ("float32.tflite", "/missing.so", "missing.so: cannot open shared object file"),
    ],
)
def test_sandbox_says_why_it_does_not_load(
    runtime: Any, models: Path, model: str, delegate: str, complaint: str
) -> None:
    with pytest.raises(SandboxError, match=complaint):
        Sandbox(runtime, models / model, delegate)


def test_sandbox_survives_a_crash(runtime: Any, models: Path, library: Any) -> None:
    crashing = library("#include <stdlib.h>\nvoid* tflite_plugin_create_delegate() { abort(); }")
    with pytest.raises(SandboxError, match=r"crashed \(SIGABRT\)"):
        Sandbox(runtime, models / "float32.tflite", str(crashing))


def test_sandbox_ends_what_hangs(runtime: Any, models: Path, library: Any) -> None:
    hanging = library("#include <unistd.h>\nvoid* tflite_plugin_create_delegate() { sleep(60); return 0; }")
    with pytest.raises(SandboxError, match="gave nothing for 2 s"):
        Sandbox(runtime, models / "float32.tflite", str(hanging), timeout_s=2.0)


def test_find_refuses_a_python_without_the_runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(runtimes.PYTHON_VARIABLE, str(tmp_path / "python"))
    with pytest.raises(runtimes.RuntimeMissingError, match="does not run"):
        runtimes.find()


def test_replay_without_a_delegate_gives_what_lies_inside(runtime: Any, models: Path, tmp_path: Path) -> None:
    tensors = np.random.default_rng(0).uniform(-1, 1, (5, 32, 32, 3)).astype(np.float32)
    np.save(tmp_path / "in.npy", tensors)
    graph = Model((models / "float32.tflite").read_bytes())
    first = graph.operators[0].outputs[0]
    with Sandbox(runtime, models / "float32.tflite", "none") as trial:
        assert trial.pieces == []
        trial.replay(tmp_path / "in.npy", tmp_path / "out.npy", count=2, tensor=first)
    inside = np.load(tmp_path / "out.npy")
    assert inside.shape == (2, np.prod(graph.tensors[first].shape)) and inside.any()


def test_replay_of_a_stream_feeds_its_states_back(runtime: Any, sound_models: Path, tmp_path: Path) -> None:
    """Two hops are what it remembers: those before the last two do not matter, and none is left from the row before."""
    hops = np.random.default_rng(0).uniform(-60, 0, (2, 3, 16, 12, 1)).astype(np.float32)
    hops[1, 1:] = hops[0, 1:]
    np.save(tmp_path / "in.npy", np.concatenate([hops, hops[:1]]))
    np.save(tmp_path / "one.npy", hops[:, 2:])
    with Sandbox(runtime, sound_models / "stream.tflite") as trial:
        trial.replay(tmp_path / "in.npy", tmp_path / "out.npy")
        trial.replay(tmp_path / "one.npy", tmp_path / "first.npy")
    out, first = np.load(tmp_path / "out.npy"), np.load(tmp_path / "first.npy")
    np.testing.assert_array_equal(out[0], out[1])
    np.testing.assert_array_equal(out[0], out[2])
    assert not np.allclose(out[0], first[0])


def test_python_with_a_safe_path_runs_it(monkeypatch: pytest.MonkeyPatch, runtime: Any, models: Path) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with Sandbox(runtime, models / "float32.tflite") as trial:
        assert len(trial.invoke(2)) == 2
