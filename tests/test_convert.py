from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

import edgekit
from edgekit import bundle
from edgekit.errors import ConversionError, EdgekitError, RuntimeMissingError

pytestmark = pytest.mark.host
pytest.importorskip("tensorflow")


@pytest.fixture(scope="module")
def convert(models: Path) -> Any:
    """``edgekit.convert`` of colours.keras with its labels and data, unless told otherwise."""

    def run(output: Path, model: str | Path = models / "colours.keras", **options: Any) -> Any:
        given = {"labels": models / "labels.txt", "validation": models / "data.npz", "mean": 127.5, "std": 127.5}
        return edgekit.convert(model, output, **{**given, **options})

    return run


@pytest.mark.parametrize("recipe", ["float32", "float16", "int8-weights", "dynamic", "int8"])
def test_recipe_is_faithful_in_every_runtime(convert: Any, models: Path, tmp_path: Path, recipe: str) -> None:
    of_bundle = convert(tmp_path / "out.tflite", quantize=recipe, calibration=models / "data.npz")
    assert of_bundle == bundle.read(tmp_path / "out.tflite").file.manifest
    checked = of_bundle.verification
    assert (checked.data, checked.count, checked.top1_agreement, checked.top1) == ("validation", 120, 1.0, 1.0)
    assert of_bundle.runtimes["litert"].status == "ok"
    expected = "ok" if os.environ.get("EDGEKIT_TFLITE_RUNTIME_PYTHON") else "not-installed"
    assert of_bundle.runtimes["tflite-runtime"].status == expected
    assert (of_bundle.calibration is not None) == (recipe == "int8")
    model = bundle.read(tmp_path / "out.tflite").file.model
    assert {model.inputs[0].dtype, model.outputs[0].dtype} == {"int8" if recipe == "int8" else "float32"}
    assert model.inputs[0].shape == (1, 32, 32, 3)


@pytest.fixture(scope="module")
def other_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colour classifier in the other formats, and relatives of it."""
    folder = tmp_path_factory.mktemp("other")
    script = """
import sys, keras
from make_colours import build
model = build()
model.save("colours.h5")
model.export("saved", verbose=False)
given = keras.Input((32, 32, 3), dtype="uint8")
keras.Model(given, model(keras.layers.Rescaling(1 / 127.5, -1)(given))).save("uint8.keras")
whole = keras.Input((32, 32, 3), dtype="int32")
keras.Model(whole, model(keras.layers.Rescaling(1 / 255)(whole))).save("int32.keras")
keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(3)]).save("unbuilt.keras")
build(activation=None).save("logits.keras")
build(channels=1).save("grey.keras")
build(activation="sigmoid").save("tags.keras")
raw = keras.Input((32, 32, 3))
keras.Model(raw, model(keras.layers.Rescaling(1 / 127.5, -1)(raw))).save("rescales.keras")
anyhow = keras.Input((None, None, 3))
x = keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(3, 3)(anyhow))
keras.Model(anyhow, keras.layers.Softmax()(x)).save("anysize.keras")
keras.Model(model.input, [model.output, model.layers[1].output]).save("two.keras")
keras.Model(model.input, model.layers[1].output).save("map.keras")
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TF_CPP_MIN_LOG_LEVEL": "2"}
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True, env=environment)
    (folder / "text.keras").write_text("not a model")
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize("name", ["colours.h5", "saved"])
def test_other_formats_convert_alike(convert: Any, other_models: Path, tmp_path: Path, name: str) -> None:
    checked = convert(tmp_path / "out.tflite", other_models / name, quantize="float32").verification
    assert (checked.top1, checked.top1_agreement) == (1.0, 1.0)


def test_model_that_rescales_for_itself_takes_plain_pixels(convert: Any, other_models: Path, tmp_path: Path) -> None:
    of_bundle = convert(tmp_path / "out.tflite", other_models / "rescales.keras", mean=None, std=None)
    assert (of_bundle.input.mean, of_bundle.input.std, of_bundle.verification.top1) == ((127.5,), (127.5,), 1.0)


def test_logits_become_scores_on_the_device(convert: Any, other_models: Path, tmp_path: Path, colour: Any) -> None:
    of_bundle = convert(tmp_path / "out.tflite", other_models / "logits.keras")
    assert (of_bundle.output.activation, of_bundle.output.in_graph) == ("softmax", False)
    with edgekit.load(tmp_path / "out.tflite") as model:
        assert sum(p.score for p in model.predict(colour("red"))) == pytest.approx(1, abs=1e-5)


def test_sigmoid_means_several_labels_at_once(convert: Any, other_models: Path, tmp_path: Path) -> None:
    of_bundle = convert(tmp_path / "out.tflite", other_models / "tags.keras")
    assert of_bundle.output.multi_label and of_bundle.verification.top1_agreement == 1.0


def test_grey_model_takes_colour_and_grey_images(convert: Any, other_models: Path, tmp_path: Path, colour: Any) -> None:
    convert(tmp_path / "out.tflite", other_models / "grey.keras", validation=None)
    with edgekit.load(tmp_path / "out.tflite") as model:
        assert len(model.predict(colour("red"))) == len(model.predict(colour("red")[..., 0])) == 3


def test_size_left_open_is_asked_for(convert: Any, other_models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--input-size"):
        convert(tmp_path / "out.tflite", other_models / "anysize.keras")
    of_bundle = convert(tmp_path / "out.tflite", other_models / "anysize.keras", input_size=24, validation=None)
    assert of_bundle.input.size_wh == (24, 24)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("two.keras", "expected one input and one output, got 1 and 2"),
        ("map.keras", r"output: expected scores \(batch, classes\)"),
        ("int32.keras", "input: expected type float32 or uint8, got int32"),
        ("unbuilt.keras", "does not know the shape of its input|cannot be loaded"),
        ("text.keras", "cannot be loaded"),
        ("nothing", "saved_model.pb"),
        ("missing.keras", "does not exist"),
    ],
)
def test_model_that_does_not_fit_is_refused(
    convert: Any, other_models: Path, tmp_path: Path, name: str, complaint: str
) -> None:
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "out.tflite", other_models / name)
    assert not list(tmp_path.iterdir())


def test_folders_of_images_calibrate_and_validate(convert: Any, tmp_path: Path, colour: Any) -> None:
    for number, label in enumerate(["red", "green", "blue"] * 12):
        (tmp_path / "frames" / label).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(tmp_path / "frames" / label / f"{number}.png"), colour(label, (64, 48), number)[..., ::-1])
    frames = tmp_path / "frames"
    of_bundle = convert(tmp_path / "out.tflite", quantize="int8", calibration=frames, validation=frames)
    assert (of_bundle.calibration.count, of_bundle.verification.count, of_bundle.verification.top1) == (36, 36, 1.0)


def test_calibration_and_device_see_the_same_tensors(convert: Any, models: Path, tmp_path: Path) -> None:
    """Float tensors made by the device's preprocessing calibrate to the same file as the images they come from."""
    from edgekit.preprocess import ImagePreprocessor

    x = np.load(models / "data.npz")["x"]
    x[0, 0, 0], x[0, -1, -1] = 0, 255
    preprocess = ImagePreprocessor(bundle.read(models / "int8.tflite").input)
    np.savez(tmp_path / "pixels.npz", x=x)
    np.savez(tmp_path / "tensors.npz", x=np.concatenate([preprocess(image) for image in x]))
    for name in ("pixels", "tensors"):
        convert(tmp_path / f"{name}.tflite", quantize="int8", calibration=tmp_path / f"{name}.npz", name="same")
    contents = [bundle.read_file(tmp_path / f"{name}.tflite").content for name in ("pixels", "tensors")]
    assert contents[0] == contents[1]


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": np.full((4, 32, 32, 3), np.nan, np.float32)}, "expected finite numbers"),
        ({"x": np.zeros((4, 16, 16, 3), np.float32)}, r"expected shape \(n, 32, 32, 3\)"),
        ({"x": np.zeros((4, 32, 32, 3), np.int64)}, "expected uint8 images or float32"),
        ({"x": np.zeros((0, 32, 32, 3), np.uint8)}, "expected at least one image, got none"),
        ({"images": np.zeros((4, 32, 32, 3), np.uint8)}, "expected an array named x"),
        ({"x": np.array([{}], object)}, "cannot be read"),
        (None, "a folder of images, or an .npz or .npy file, got nothing there"),
    ],
    ids=["nan", "shape", "type", "none", "name", "pickle", "missing"],
)
def test_calibration_data_is_checked(convert: Any, tmp_path: Path, arrays: Any, complaint: str) -> None:
    if arrays is not None:
        np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "out.tflite", quantize="int8", calibration=tmp_path / "data.npz")
    assert not (tmp_path / "out.tflite").exists()


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("empty", "expected at least one image"),
        ("broken", r"b\.png is not a readable image"),
        ("y", "class numbers 0 to 2"),
    ],
)
def test_validation_data_is_checked(convert: Any, tmp_path: Path, case: str, complaint: str) -> None:
    data = tmp_path / "data"
    for label in ("red", "green", "blue"):
        (data / label).mkdir(parents=True)
    if case == "broken":
        (data / "red" / "b.png").write_bytes(b"\x89PNG")
    if case == "y":
        data = tmp_path / "data.npz"
        np.savez(data, x=np.zeros((2, 32, 32, 3), np.uint8), y=np.array([1, 3]))
    with pytest.raises(ConversionError, match=complaint):
        convert(tmp_path / "out.tflite", validation=data)


def test_options_that_do_not_fit_are_refused(convert: Any, models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="int8 needs calibration data"):
        convert(tmp_path / "out.tflite", quantize="int8")
    with pytest.raises(ConversionError, match=r"ends in \.tflite"):
        convert(tmp_path / "out.bin")
    for options in (
        {"mean": float("nan")},
        {"alpha": float("inf")},
        {"std": 0},
        {"std": float("inf")},
        {"quantize": "int4"},
        {"input_size": 0},
    ):
        with pytest.raises(ConversionError, match=r"expected .* got|expected auto or"):
            convert(tmp_path / "out.tflite", **options)
    with pytest.raises(ConversionError, match="32 or more for a MobileNetV3"):
        convert(tmp_path / "out.tflite", "mobilenet-v3-small", input_size=8)
    with pytest.raises(EdgekitError, match="cannot write"):
        convert(tmp_path / "no" / "out.tflite")
    (tmp_path / "labels.txt").write_text("one\ntwo\n")
    with pytest.raises(ConversionError, match="expected 2 classes, as --classes or the lines of --labels say, got 3"):
        convert(tmp_path / "out.tflite", labels=tmp_path / "labels.txt")
    with pytest.raises(EdgekitError, match="expected 3 lines"):
        convert(tmp_path / "out.tflite", labels=tmp_path / "labels.txt", classes=3)
    with pytest.raises(ConversionError, match="expected mobilenet-v3-small or mobilenet-v3-large to load them into"):
        convert(tmp_path / "out.tflite", weights="some.h5")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.txt"]


def test_without_data_it_says_that_nothing_is_proven(models: Path, edgekit_cli: Any) -> None:
    result = edgekit_cli("convert", models / "colours.keras", "-o", "out.tflite", "--quantize", "float32")
    assert result.returncode == 0 and "noise only" in result.stdout
    assert "does not say how its pixels are normalized" in result.stderr


@pytest.mark.parametrize("safe_path", ["", "1"])
def test_module_in_the_users_folder_is_not_imported(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, safe_path: str
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", safe_path)
    for name in ("random.py", "h5py.py", "data.py"):
        (tmp_path / name).write_text("raise SystemExit('imported the wrong one')")
    code = f"import edgekit; edgekit.convert({str(models / 'colours.keras')!r}, 'out.tflite')"
    script = tmp_path / "elsewhere" / "script.py"
    script.parent.mkdir()
    script.write_text(code)
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "out.tflite").exists()


def test_full_disk_for_temporary_files_is_an_error(tmp_path: Path) -> None:
    """The room is taken before it is written to: a mapped file would end the process with SIGBUS."""
    code = (
        "import os, errno, pathlib, numpy as np\n"
        "def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')\n"
        "os.posix_fallocate = full\n"
        "from edgekit.converters.data import allocate\n"
        "allocate(pathlib.Path('x/y.npy'), np.float32, (1000, 1000))"
    )
    (tmp_path / "x").mkdir()
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "no room for 4 MB" in result.stderr and "TMPDIR" in result.stderr


def test_termination_leaves_no_temporary_file(models: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "edgekit", "convert", str(models / "colours.keras"), "-o", "out.tflite"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    assert process.stderr
    while "loading the model" not in process.stderr.readline():
        pass
    process.terminate()
    assert process.wait(20) == 143
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]


def test_output_behind_a_link_is_written_there(convert: Any, tmp_path: Path) -> None:
    (tmp_path / "link.tflite").symlink_to(tmp_path / "real.tflite")
    convert(tmp_path / "link.tflite", quantize="float32")
    assert (tmp_path / "link.tflite").is_symlink() and (tmp_path / "real.tflite").stat().st_size > 1000


def test_crash_of_the_converter_is_an_error_and_not_the_end(
    convert: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[Any] = []
    popen = subprocess.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        children.append(popen(*arguments, **options))
        return children[-1]

    def crash(stage: str, *_: int) -> None:
        if stage.startswith("quantizing"):
            children[0].send_signal(signal.SIGSEGV)

    monkeypatch.setattr("edgekit.converters.convert.subprocess.Popen", remember)
    with pytest.raises(ConversionError, match=r"converter crashed \(SIGSEGV\) while quantizing to int8"):
        convert(tmp_path / "out.tflite", quantize="int8", calibration=models / "data.npz", progress=crash)
    assert not list(tmp_path.iterdir())


def test_interrupt_ends_the_child_and_writes_nothing(models: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgekit", "convert", str(models / "colours.keras"), "-o", "out.tflite"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "loading the model" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130 and not list(tmp_path.iterdir())


def test_runtime_that_is_wrong_is_told(
    convert: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for a runtime that loads a model and gives something else."""
    wrong = tmp_path / "site" / "tflite_runtime"
    wrong.mkdir(parents=True)
    (wrong / "__init__.py").touch()
    (wrong / "interpreter.py").write_text(
        "import numpy as np\n"
        "from ai_edge_litert.interpreter import Interpreter as Right\n"
        "class Interpreter(Right):\n"
        "    def get_tensor(self, index): return np.roll(super().get_tensor(index), 1)\n"
    )
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo 2.14.0 || PYTHONPATH="{wrong.parent}" exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_TFLITE_RUNTIME_PYTHON", str(python))
    checks = convert(tmp_path / "out.tflite", quantize="float32").runtimes
    assert (checks["litert"].status, checks["tflite-runtime"].status) == ("ok", "differs")
    assert checks["tflite-runtime"].top1_agreement == 0


def test_runtime_that_crashes_is_told(convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 2.14.0 || kill -SEGV $$\n')
    python.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_TFLITE_RUNTIME_PYTHON", str(python))
    checks = convert(tmp_path / "out.tflite", quantize="float32").runtimes
    assert (checks["litert"].status, checks["tflite-runtime"].status) == ("ok", "failed")
    assert "crashed (SIGSEGV)" in checks["tflite-runtime"].detail


def test_runtime_that_hangs_is_told(convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && echo 2.14.0 || exec sleep 100\n')
    python.chmod(0o755)
    monkeypatch.setenv("EDGEKIT_TFLITE_RUNTIME_PYTHON", str(python))
    monkeypatch.setattr("edgekit.sandbox.STALL_TIMEOUT_S", 5.0)
    checks = convert(tmp_path / "out.tflite", quantize="float32").runtimes
    assert (checks["litert"].status, checks["tflite-runtime"].detail) == ("ok", "gave nothing for 5 s")


def test_python_without_the_runtime_is_an_error(convert: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_TFLITE_RUNTIME_PYTHON", "/nowhere/python")
    with pytest.raises(RuntimeMissingError, match="EDGEKIT_TFLITE_RUNTIME_PYTHON=/nowhere/python does not run"):
        convert(tmp_path / "out.tflite")


@pytest.fixture(scope="module")
def weight_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a MobileNetV3-Small of three classes in each format, and of others."""
    folder = tmp_path_factory.mktemp("weights")
    script = """
import keras
keras.utils.set_random_seed(1)
make = keras.applications.MobileNetV3Small
model = make(input_shape=(32, 32, 3), weights=None, classes=3, include_preprocessing=False)
model.save_weights("good.weights.h5")
model.save("good.keras")
model.save("good.h5")
make(input_shape=(32, 32, 3), weights=None, classes=5).save_weights("five.weights.h5")
make(input_shape=(32, 32, 3), weights=None, classes=5).save("five.h5")
keras.applications.MobileNetV3Large(input_shape=(32, 32, 3), weights=None, classes=3).save_weights("large.weights.h5")
"""
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True, capture_output=True)
    (folder / "text.h5").write_text("no weights here")
    return folder


class TestMobileNetWeights:
    """A named model with weights from a file."""

    def test_each_format_gives_the_same_model(self, convert: Any, weight_files: Path, tmp_path: Path) -> None:
        from edgekit.converters import models

        first, *others = (
            models.open_model(
                "mobilenet-v3-small", weights=str(weight_files / name), classes=3, input_size=32, mean=None, std=None
            ).model.get_weights()
            for name in ("good.weights.h5", "good.keras", "good.h5")
        )
        assert all(np.array_equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        of_bundle = convert(
            tmp_path / "out.tflite", "mobilenet-v3-small", weights=str(weight_files / "good.h5"), input_size=32,
            quantize="float32", mean=None, std=None,
        )  # fmt: skip
        assert of_bundle.verification.top1_agreement == 1.0 and of_bundle.input.mean == (127.5,)

    @pytest.mark.parametrize(
        ("name", "complaint"),
        [
            ("five.weights.h5", r"layer logits: expected \(1, 1, 1024, 3\) \(3,\), got \(1, 1, 1024, 5\) \(5,\)"),
            ("five.h5", r"layer logits: expected \(1, 1, 1024, 3\) \(3,\), got \(1, 1, 1024, 5\) \(5,\)"),
            ("large.weights.h5", r"do not fit: layer \w+: expected \(.*got \("),
            ("text.h5", "cannot be loaded"),
            ("missing.h5", "do not exist"),
        ],
    )
    def test_weights_that_do_not_fit_name_the_layer(
        self, convert: Any, weight_files: Path, tmp_path: Path, name: str, complaint: str
    ) -> None:
        with pytest.raises(ConversionError, match=complaint):
            convert(tmp_path / "out.tflite", "mobilenet-v3-small", weights=str(weight_files / name), input_size=32)

    def test_imagenet_weights_without_a_network_say_where_to_put_them(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # no network, even where there is one
        with pytest.raises(
            ConversionError, match=r"put Keras's file weights_mobilenet_v3_small_224_1\.0_float\.h5 into .*models"
        ):
            edgekit.convert("mobilenet-v3-small", tmp_path / "out.tflite", weights="imagenet")

    def test_imagenet_weights_with_other_classes_are_refused(self, convert: Any, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match="expected 1000 classes, got 3"):
            convert(tmp_path / "out.tflite", "mobilenet-v3-small", weights="imagenet")


def test_cli_prints_the_manifest_as_json(models: Path, edgekit_cli: Any) -> None:
    result = edgekit_cli(
        "convert", models / "colours.keras", "-o", "out.tflite", "--mean", "127.5", "--std", "127.5", "--json",
        "--validation", models / "data.npz", "--name", "door", "--version", "2.1",
    )  # fmt: skip
    of_bundle = json.loads(result.stdout)
    assert (of_bundle["name"], of_bundle["version"], of_bundle["quantization"]) == ("door", "2.1", "int8-weights")


def test_two_conversions_at_once_do_not_disturb_each_other(convert: Any, tmp_path: Path) -> None:
    threads = [
        threading.Thread(
            target=convert, args=(tmp_path / f"{n}.tflite",), kwargs={"quantize": "float32", "name": "same"}
        )
        for n in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bundle.read(tmp_path / "0.tflite").file.content == bundle.read(tmp_path / "1.tflite").file.content


def test_bundle_is_read_by_mediapipe(models: Path, tmp_path: Path, colour: Any) -> None:
    """Another TFLite tool takes labels, normalization and size from the standard metadata."""
    python = os.environ.get("EDGEKIT_MEDIAPIPE_PYTHON")
    if not python:
        pytest.skip("EDGEKIT_MEDIAPIPE_PYTHON names no Python with MediaPipe")
    script = """
import sys, numpy as np, mediapipe as mp
from mediapipe.tasks.python import BaseOptions, vision
options = vision.ImageClassifierOptions(base_options=BaseOptions(model_asset_path=sys.argv[1]), max_results=1)
with vision.ImageClassifier.create_from_options(options) as classifier:
    for image in np.load(sys.argv[2]):
        (head,) = classifier.classify(mp.Image(image_format=mp.ImageFormat.SRGB, data=image)).classifications
        print(head.categories[0].category_name, head.categories[0].score)
"""
    images = [colour(label, (32, 32)) for label in ("red", "green", "blue")]
    np.save(tmp_path / "images.npy", images)
    shutil.copy(models / "float32.tflite", tmp_path)
    result = subprocess.run(
        [python, "-c", script, "float32.tflite", "images.npy"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [label for label, _ in rows] == ["red", "green", "blue"]
    with edgekit.load(models / "float32.tflite") as model:
        ours = [model.predict(image, top_k=1)[0].score for image in images]
    assert [float(score) for _, score in rows] == pytest.approx(ours, abs=1e-5)
