from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgekit
from edgekit import bundle, custom_ops
from edgekit.devices.delegates import chain, isolated, plans
from edgekit.devices.interpreter import Model
from edgekit.errors import BundleError, EdgekitError, InferenceError

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc") or pytest.skip("no C compiler here")
    library = tmp_path_factory.mktemp("delegate") / "stand_in.so"
    source = Path(__file__).with_name("stand_in_delegate.c")
    command = [compiler, "-std=c11", "-O1", "-Wall", "-Werror", "-fPIC", "-shared", f"-I{ROOT / 'edgekit' / 'ops'}"]
    subprocess.run([*command, source, "-o", library, "-lm", "-ldl"], check=True)
    return library


class StandIn:
    """A delegate library that does as it is told: see stand_in_delegate.c."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name

    def behave(self, behaviour: str) -> None:
        self.path.with_name(f"{self.name}.behaviour").write_text(behaviour)

    @property
    def loaded(self) -> int:
        """How often it was loaded."""
        return len(self.path.with_name(f"{self.name}.created").read_text().splitlines())


@pytest.fixture
def stand_in(compiled: Path, tmp_path: Path) -> StandIn:
    return StandIn(Path(shutil.copy(compiled, tmp_path / "stand_in.so")))


@pytest.fixture
def edge_tpu(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A stand-in where the dynamic loader finds it as libedgetpu."""
    (tmp_path / "lib").mkdir()
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib"))
    return StandIn(Path(shutil.copy(compiled, tmp_path / "lib" / plans.EDGE_TPU_LIBRARY)))


@pytest.fixture
def no_vulkan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VK_DRIVER_FILES", "/nowhere.json")


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """The warnings so far, as one text."""
    caplog.set_level(logging.INFO, "edgekit")
    yield lambda: "\n".join(record.message for record in caplog.records if record.levelno >= logging.WARNING)


def worker(model: Model) -> int:
    """The process of a model's delegate."""
    backend = model._chain.active.backend
    assert isinstance(backend, isolated.Isolated)
    return backend._worker.pid


def named(model: Model, image: np.ndarray) -> str:
    return model.predict(image, top_k=1)[0].label


# -- a library that works ----------------------------------------------------------------------------------------------


def test_library_takes_operators_and_gives_what_the_cpu_gives(models: Path, stand_in: StandIn, colour: Any) -> None:
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        assert (model.delegate, model.requested_delegate) == ("stand_in.so", str(stand_in.path))
        assert (model.operators_delegated, model.operators) == (1, 4)
        tensor = model.preprocess(colour("green"))
        with edgekit.load(models / "float32.tflite", delegate="cpu") as cpu:
            np.testing.assert_allclose(model.invoke(tensor), cpu.invoke(tensor), atol=1e-6)
        with pytest.raises(BundleError, match=r"input tensor: expected float32 \(1, 32, 32, 3\), got int8"):
            model.invoke(tensor.astype(np.int8))
        assert named(model, colour("blue")) == "blue" and stand_in.loaded == 1


def test_library_gets_its_options(models: Path, stand_in: StandIn, colour: Any) -> None:
    with edgekit.load(models / "float32.tflite", delegate=f"{stand_in.path},winner=2") as model:
        assert model.predict(colour("red"), threshold=1)[0].class_id == 2


def test_stream_keeps_its_states_in_the_process_of_the_delegate(sound_models: Path, stand_in: StandIn) -> None:
    hops = np.random.default_rng(0).uniform(-0.3, 0.3, (3, 3072)).astype(np.float32)
    with (
        edgekit.load(sound_models / "stream.tflite", delegate="cpu") as cpu,
        edgekit.load(sound_models / "stream.tflite", delegate=str(stand_in.path)) as model,
    ):
        expected = [cpu.invoke(cpu.preprocess(hop)) for hop in hops]
        for _ in range(2):
            np.testing.assert_allclose([model.invoke(model.preprocess(hop)) for hop in hops], expected, atol=1e-6)
            assert model.warm
            model.reset()
            assert not model.warm


def test_what_drivers_print_fills_nothing(models: Path, stand_in: StandIn, colour: Any) -> None:
    stand_in.behave("invoke print")
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        assert [named(model, colour("blue")) for _ in range(50)] == ["blue"] * 50
        assert model.delegate == "stand_in.so"


def test_delegate_takes_no_signal_that_is_for_the_stream(models: Path, stand_in: StandIn, colour: Any) -> None:
    """Nor has it anything open that is not its own."""
    with Path(os.devnull).open() as ours, edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(worker(model), number)
        assert named(model, colour("red")) == "red"
        assert os.getpgid(worker(model)) != os.getpgid(0)
        os.set_inheritable(ours.fileno(), True)
        assert not Path(f"/proc/{worker(model)}/fd/{ours.fileno()}").exists()


# -- one that does not load --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("create fail", "the stand-in is not plugged in"),
        ("create crash", r"crashed \(SIGSEGV\)"),
        ("create hang", "gave nothing for 3 s"),
        ("create none", "takes none of the 4 operators"),
        ("prepare fail", "the stand-in does not like it"),
        ("invoke crash 1", r"crashed \(SIGSEGV\)"),
    ],
)
def test_library_that_does_not_load_is_replaced_loudly(
    models: Path,
    stand_in: StandIn,
    colour: Any,
    warnings: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    reason: str,
) -> None:
    stand_in.behave(behaviour)
    if "hang" in behaviour:
        monkeypatch.setattr(isolated, "LOAD_TIMEOUT_S", 3.0)
    complaint = rf"delegate stand_in\.so does not load \(.*{reason}.*\); check that it fits this runtime"
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        assert (model.delegate, named(model, colour("green"))) == ("cpu", "green")
    (line,) = warnings().splitlines()
    assert re.match(complaint, line) and line.endswith("going on with cpu")
    if "hang" not in behaviour:
        with pytest.raises(EdgekitError, match=complaint):
            edgekit.load(models / "float32.tflite", delegate=str(stand_in.path), strict=True)


@pytest.mark.parametrize(
    ("delegate", "complaint"),
    [
        ("/nowhere/libfast.so", "delegate /nowhere/libfast.so: expected a library, got no such file; check the path"),
        ("coral", "no float32_edgetpu.tflite beside the bundle; edgetpu_compiler makes it of the int8 bundle"),
        ("gpu", "delegate gpu: .*(is|is not) installed; apt-get install|only LiteRT has it; pip install"),
    ],
)
@pytest.mark.usefixtures("no_vulkan")
def test_delegate_that_is_absent_is_replaced_loudly_when_it_was_asked_for(
    models: Path, warnings: Callable[[], str], delegate: str, complaint: str
) -> None:
    with edgekit.load(models / "float32.tflite", delegate=delegate) as model:
        assert (model.delegate, model.requested_delegate) == ("cpu", delegate)
        assert re.search(complaint, warnings())
    with pytest.raises(EdgekitError, match=complaint):
        edgekit.load(models / "float32.tflite", delegate=delegate, strict=True)


def test_signal_is_heard_while_a_delegate_loads(models: Path, stand_in: StandIn, frames: Path, until: Any) -> None:
    stand_in.behave("create hang")
    command = [sys.executable, "-m", "edgekit", "run", models / "float32.tflite", "--delegate", stand_in.path]
    run = subprocess.Popen([*command, "--source", frames, "--broker", "none"], stderr=subprocess.PIPE, text=True)
    until(stand_in.path.with_name("stand_in.so.created").exists)
    run.send_signal(signal.SIGTERM)
    _, log = run.communicate(timeout=5)
    assert run.returncode == 0 and "Traceback" not in log


@pytest.mark.usefixtures("no_vulkan")
def test_auto_passes_over_what_is_absent(models: Path, warnings: Callable[[], str], caplog: Any) -> None:
    with edgekit.load(models / "float32.tflite", strict=True) as model:
        assert (model.delegate, model.requested_delegate) == ("cpu", "auto")
    assert not warnings() and "no float32_edgetpu.tflite beside the bundle; passed over" in caplog.text


@pytest.mark.parametrize(
    ("delegate", "complaint"),
    [
        ("tpu", "delegate 'tpu': expected auto, cpu, coral, gpu or the path of a delegate library"),
        ("libx.so.1", "delegate libx.so.1: expected a library, got no such file"),
        ("./float32.tflite,threads", "delegate option 'threads': expected KEY=VALUE; give PATH.so,KEY=VALUE"),
    ],
)
def test_delegate_that_is_none_is_an_error(
    models: Path, monkeypatch: pytest.MonkeyPatch, delegate: str, complaint: str
) -> None:
    monkeypatch.chdir(models)
    with pytest.raises(EdgekitError, match=complaint):
        edgekit.load("float32.tflite", delegate=delegate, strict=True)


# -- one that fails later ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "cause", "reason"),
    [
        ("invoke fail 1000", "failed", r"failed \(.*the stand-in has had enough"),
        ("invoke crash 3", "crashed", r"crashed \(SIGSEGV\)"),
        ("invoke hang 3", "hung", "gave nothing for 2 s"),
    ],
)
def test_library_that_fails_later_costs_a_frame(
    models: Path,
    stand_in: StandIn,
    colour: Any,
    warnings: Callable[[], str],
    behaviour: str,
    cause: str,
    reason: str,
) -> None:
    stand_in.behave(behaviour)
    good = int(behaviour.split()[-1]) - 2  # one more was tried when it was loaded
    of_bundle = bundle.read(models / "float32.tflite")
    with Model(of_bundle, delegate=str(stand_in.path), hang_s=2.0 if "hang" in behaviour else 60.0) as model:
        tensor = model.preprocess(colour("green"))
        for _ in range(good):
            model.invoke(tensor)
        assert model.delegate == "stand_in.so" and not warnings()
        with pytest.raises(InferenceError, match=rf"delegate stand_in\.so {reason}") as raised:
            model.invoke(tensor)
        assert (raised.value.cause, model.delegate) == (cause, "cpu")
        assert named(model, colour("green")) == "green"
    (line,) = warnings().splitlines()
    assert line.endswith("cpu goes on; check that it fits this runtime and this machine")


def test_strict_goes_on_with_no_other_delegate(models: Path, stand_in: StandIn, colour: Any) -> None:
    stand_in.behave("invoke fail 3")
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path), strict=True) as model:
        assert named(model, colour("green")) == "green"
        with pytest.raises(BundleError, match=r"delegate stand_in\.so failed .*; check that it fits") as raised:
            model.predict(colour("green"))
        assert not isinstance(raised.value, InferenceError)


def test_run_goes_on_without_the_frame(
    models: Path, stand_in: StandIn, frames: Path, edgekit_cli: Any, edgekit_fails: Any
) -> None:
    stand_in.behave("invoke crash 4")
    command = ("run", models / "float32.tflite", "--source", frames, "--broker", "none", "--delegate", stand_in.path)
    result = edgekit_cli(*command, "--json")
    told = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(one["seq"], one["delegate"], one["predictions"][0]["label"]) for one in told] == [
        (1, "stand_in.so", "red"),
        (2, "stand_in.so", "green"),
        (3, "cpu", "red"),
        (4, "cpu", "green"),
        (5, "cpu", "blue"),
    ], result.stderr
    assert result.returncode == 0 and "6 captured, 5 inferred, 0 dropped, 1 failed" in result.stderr
    assert "delegate stand_in.so crashed (SIGSEGV)" in edgekit_fails(*command, "--strict")


def test_stream_begins_anew_with_the_next_delegate(sound_models: Path, stand_in: StandIn) -> None:
    stand_in.behave("invoke crash 4")
    sound = np.zeros(3072, np.float32)
    with edgekit.load(sound_models / "stream.tflite", delegate=str(stand_in.path)) as model:
        assert [len(model.predict(sound)) for _ in range(2)] == [0, 3]
        with pytest.raises(InferenceError):
            model.predict(sound)
        assert model.delegate == "cpu" and not model.warm
        assert [len(model.predict(sound)) for _ in range(2)] == [0, 3]


def test_library_that_works_again_takes_over(
    models: Path,
    stand_in: StandIn,
    colour: Any,
    until: Any,
    warnings: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stand_in.behave("create fail")
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:

        def tended(times: int) -> bool:
            model.tend()
            model.preprocess(colour("red"))
            return stand_in.loaded >= times

        for _ in range(20):
            tended(0)
        assert stand_in.loaded == 1  # not before it is time
        monkeypatch.setattr(chain, "RETRY_S", 0.0)
        model._chain._retry_at_s = 0.0
        until(lambda: tended(3))
        assert model.delegate == "cpu" and len(warnings().splitlines()) == 1
        stand_in.behave("invoke fail 3")
        until(lambda: tended(4) and model.delegate == "stand_in.so")
        assert named(model, colour("blue")) == "blue" and "stand_in.so takes over from cpu" in warnings()
        with pytest.raises(InferenceError):
            model.predict(colour("blue"))
        assert (model.delegate, named(model, colour("blue"))) == ("cpu", "blue")


def test_operator_in_a_file_that_crashes_is_loaded_anew(op_models: Path, colour: Any, tmp_path: Path) -> None:
    """There is no other delegate that could run it."""
    if custom_ops.find_library() is None:
        pytest.skip("EdgeKit's library of operators is not built")
    (tmp_path / "ops.py").write_text(
        "import os, edgekit\ncalls = []\n\n@edgekit.kernel('Sharpen')\ndef sharpen(x, gain):\n"
        "    calls.append(x)\n    if x.min() > 0 or len(calls) == 2: os.kill(os.getpid(), 11)\n    return gain * x\n"
    )
    with edgekit.load(op_models / "colour_op.tflite", delegate="cpu", ops=[tmp_path / "ops.py"]) as model:
        for _ in range(2):
            assert named(model, colour("green")) == "green"
            with pytest.raises(InferenceError, match=r"delegate cpu crashed \(SIGSEGV\)"):
                model.predict(colour("green"))
        fatal = np.full_like(model.preprocess(colour("red")), 1)
        with pytest.raises(InferenceError):
            model.invoke(fatal)
        with pytest.raises(BundleError, match="3 times in a row") as raised:
            model.invoke(fatal)
        assert not isinstance(raised.value, InferenceError)


# -- the end of its process --------------------------------------------------------------------------------------------


def lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_process_ends_with_the_model(models: Path, stand_in: StandIn, colour: Any) -> None:
    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        process, tensor = worker(model), model.preprocess(colour("red"))
        assert lives(process)
    assert not lives(process)
    with pytest.raises(BundleError, match="was closed"):
        model.invoke(tensor)


def test_model_is_closed_while_its_delegate_hangs(models: Path, stand_in: StandIn, colour: Any, until: Any) -> None:
    stand_in.behave("invoke hang 2")
    raised: list[BaseException] = []

    def predict() -> None:
        try:
            model.predict(colour("red"))
        except EdgekitError as error:
            raised.append(error)

    with edgekit.load(models / "float32.tflite", delegate=str(stand_in.path)) as model:
        process = worker(model)
        thread = threading.Thread(target=predict, daemon=True)
        thread.start()
        until(lambda: model._chain.active.backend._busy.locked())
    thread.join(20)
    assert "was closed" in str(raised[0]) and not lives(process)


@pytest.mark.parametrize("behaviour", ["", "create hang", "prepare hang", "invoke hang 2"])
def test_process_ends_with_one_that_is_killed(
    models: Path, stand_in: StandIn, until: Any, tmp_path: Path, behaviour: str
) -> None:
    """Whatever it does: one that hangs would keep an Edge TPU from who comes next."""
    stand_in.behave(behaviour)
    script = tmp_path / "run.py"
    script.write_text(
        "import subprocess, sys, edgekit, numpy as np\n"
        "class Told(subprocess.Popen):\n"
        "    def __init__(self, *arguments, **options):\n"
        "        super().__init__(*arguments, **options)\n"
        "        print(self.pid, flush=True)\n"
        "subprocess.Popen = Told\n"
        "model = edgekit.load(sys.argv[1], delegate=sys.argv[2])\n"
        "print('loaded', flush=True)\n"
        "while True: model.invoke(model.preprocess(np.zeros((8, 8, 3), np.uint8)))\n"
    )
    with subprocess.Popen(
        [sys.executable, script, models / "float32.tflite", stand_in.path], stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdout
        process = int(running.stdout.readline())
        until(stand_in.path.with_name("stand_in.so.created").exists)
        if not behaviour.startswith(("create", "prepare")):
            assert running.stdout.readline() == "loaded\n"
        time.sleep(0.2)
        assert lives(process)
        running.kill()
    until(lambda: not lives(process))


# -- Coral -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def coral_bundle(models: Path, tmp_path: Path) -> Path:
    """An int8 bundle; the one "compiled" of it has float tensors."""
    shutil.copy(models / "float32.tflite", tmp_path / "colours_edgetpu.tflite")
    return Path(shutil.copy(models / "int8.tflite", tmp_path / "colours.tflite"))


def test_auto_takes_coral_and_then_the_next(coral_bundle: Path, edge_tpu: StandIn, colour: Any, warnings: Any) -> None:
    edge_tpu.behave("invoke crash 3")
    with Model(bundle.read(coral_bundle), order=("coral", "cpu")) as model:
        assert (model.delegate, model.operators_delegated, model.operators) == ("coral", 1, 4)
        assert named(model, colour("green")) == "green" and model.preprocess(colour("red")).dtype == np.float32
        with pytest.raises(InferenceError, match="delegate coral crashed"):
            model.predict(colour("green"))
        assert model.delegate == "cpu" and model.preprocess(colour("red")).dtype == np.int8
        assert named(model, colour("green")) == "green"
    assert "check that the Edge TPU is plugged in" in warnings()


def test_coral_that_is_not_plugged_in_is_told(coral_bundle: Path, edge_tpu: StandIn) -> None:
    edge_tpu.behave("create fail")
    with pytest.raises(
        EdgekitError, match=r"delegate coral does not load \(.*not plugged in.*\); check that the Edge TPU"
    ):
        edgekit.load(coral_bundle, delegate="coral", strict=True)


def test_coral_without_its_library_is_told(coral_bundle: Path) -> None:
    if plans.is_installed(plans.EDGE_TPU_LIBRARY):
        pytest.skip("it is here")
    with pytest.raises(EdgekitError, match=r"libedgetpu\.so\.1 is not installed; install libedgetpu1-std"):
        edgekit.load(coral_bundle, delegate="coral", strict=True)


def test_bundle_compiled_for_coral_runs_nowhere_else(vision_data: Path, edge_tpu: StandIn) -> None:
    path = vision_data / "mobilenet_v1_0.25_128_quant_edgetpu.tflite"
    with edgekit.load(path) as model:
        assert (model.delegate, model.operators_delegated, model.operators) == ("coral", 1, 1)
        assert len(model.predict(np.zeros((128, 128, 3), np.uint8))) == 3
    edge_tpu.path.unlink()
    with pytest.raises(EdgekitError, match=r"libedgetpu\.so\.1 is not installed"):
        edgekit.load(path)


def test_compiled_model_that_does_not_fit_is_refused(coral_bundle: Path, edge_tpu: StandIn, vision_data: Path) -> None:
    shutil.copy(vision_data / "mobilenet_v1_0.25_128_quant_edgetpu.tflite", plans.compiled_path(coral_bundle))
    with pytest.raises(EdgekitError, match=r"input tensor: expected \(1, 32, 32, 3\), got \(1, 128, 128, 3\)"):
        edgekit.load(coral_bundle, delegate="coral", strict=True)


# -- the GPU, on software Vulkan ---------------------------------------------------------------------------------------


@pytest.fixture
def vulkan(monkeypatch: pytest.MonkeyPatch) -> str:
    from edgekit import runtimes

    driver = os.environ.get("EDGEKIT_TEST_VULKAN") or pytest.skip("no EDGEKIT_TEST_VULKAN here; scripts/test sets it")
    if "litert" not in runtimes.installed():
        pytest.skip("only LiteRT has it")
    monkeypatch.setenv("VK_DRIVER_FILES", driver)
    return driver


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_gpu_gives_what_the_cpu_gives(models: Path, vulkan: str, colour: Any, name: str) -> None:
    with (
        Model(bundle.read(models / f"{name}.tflite"), order=("coral", "gpu", "cpu"), strict=True) as model,
        edgekit.load(models / f"{name}.tflite", delegate="cpu") as cpu,
    ):
        assert (model.delegate, model.operators_delegated, model.operators) == ("gpu", 4, 4)
        for label in ("red", "green", "blue"):
            tensor = model.preprocess(colour(label))
            # An 8-bit graph is computed in float: the last step may be another.
            atol = 1e-5 if name == "float32" else 0.01
            np.testing.assert_allclose(model.scores(model.invoke(tensor)), cpu.scores(cpu.invoke(tensor)), atol=atol)
            assert named(model, colour(label)) == label


def test_gpu_runs_mobilenet(vision_data: Path, vulkan: str) -> None:
    image = cv2.cvtColor(cv2.imread(str(vision_data / "parrot.jpg")), cv2.COLOR_BGR2RGB)
    with edgekit.load(
        vision_data / "mobilenet_v2_1.0_224_quant.tflite", labels=vision_data / "imagenet_labels.txt", delegate="gpu"
    ) as model:
        assert (model.delegate, named(model, image)) == ("gpu", "macaw")


def test_gpu_refuses_what_it_would_take_in_part(sound_models: Path, vulkan: str, warnings: Any, caplog: Any) -> None:
    with Model(bundle.read(sound_models / "window.tflite"), order=("gpu",)) as model:
        assert model.delegate == "cpu" and not warnings()
        assert "delegate gpu takes whole models, and of this one" in caplog.text
    with edgekit.load(sound_models / "window.tflite", delegate="gpu") as model:
        assert model.delegate == "cpu" and "delegate gpu does not load" in warnings()


def test_gpu_with_a_driver_that_is_none_is_told(models: Path, vulkan: str, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "icd.json").write_text('{"ICD": {"library_path": "/nowhere.so", "api_version": "1.0.5"}}')
    monkeypatch.setenv("VK_DRIVER_FILES", str(tmp_path / "icd.json"))
    with pytest.raises(
        EdgekitError, match=r"delegate gpu does not load \(no GPU with a Vulkan driver\); check the driver"
    ):
        edgekit.load(models / "float32.tflite", delegate="gpu", strict=True)
