"""Custom operators on the host: functions that are marked, converted, and held against their kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.host
keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from flatbuffers import flexbuffers  # noqa: E402

import edgekit  # noqa: E402
from edgekit import bundle, custom_ops, runtimes  # noqa: E402
from edgekit.converters import custom_ops as marks  # noqa: E402
from edgekit.converters import layer_norm, layers, recipes, rewrite  # noqa: E402
from edgekit.custom_ops import CustomOpResolver  # noqa: E402
from edgekit.errors import ConversionError, EdgekitError  # noqa: E402
from edgekit.flatbuffer import Model  # noqa: E402
from edgekit.manifest import CustomOp  # noqa: E402
from edgekit.quantization import dequantize, quantize  # noqa: E402
from edgekit.sandbox import Sandbox  # noqa: E402

if custom_ops.find_library() is None:
    pytest.skip("the library of operators was not built", allow_module_level=True)

LAYERS = """
import keras
import tensorflow as tf
import edgekit

@edgekit.custom_op("Mish", version=2, beta=1.5, mode="plain", approximate=True, terms=3)
def mish(x, beta):
    return x * tf.math.tanh(tf.math.softplus(beta * x))

@keras.saving.register_keras_serializable("test")
class Mish(keras.layers.Layer):
    def call(self, x):
        return mish(x)
"""
OPTIONS = {"beta": 1.5, "mode": "plain", "approximate": 1, "terms": 3, "version": 2}
KERNEL_C = """
#include <math.h>
#include "edgekit_op.h"

static int prepare(EdgekitNode *node) {
  const EdgekitTensor *x = &node->inputs[0];
  if (x->type != EDGEKIT_FLOAT32) return node->fail(node, "expected float32, got type %d", (int)x->type);
  return node->resize(node, 0, x->rank, x->dims);
}

static int invoke(EdgekitNode *node) {
  const float *x = node->inputs[0].data, beta = (float)edgekit_real(node, "beta", 1.0);
  float *y = node->outputs[0].data;
  for (size_t i = 0; i < edgekit_size(&node->inputs[0]); i++) y[i] = x[i] * tanhf(log1pf(expf(beta * x[i])));
  return EDGEKIT_OK;
}

static const EdgekitOp mish = {.name = "Mish", .version = 2, .prepare = prepare, .invoke = invoke};
EDGEKIT_OPS(&mish)
"""
KERNEL_PY = """
import numpy as np
from edgekit import kernel

@kernel("Mish", version=2)
def mish(x, beta, mode, approximate, terms):
    assert (beta, mode, approximate, terms) == (1.5, "plain", 1, 3)
    return x * np.tanh(np.logaddexp(0, beta * x))
"""
MODEL = """
import sys
import keras
from make_colours import build
from edgekit.converters import custom_ops
custom_ops.load(["layers.py"])
Mish = keras.saving.get_registered_object("test>Mish")
keras.utils.set_random_seed(0)
layers = keras.layers
model = keras.Sequential([
    keras.Input((32, 32, 3)), layers.Conv2D(8, 3, strides=2), Mish(), layers.Conv2D(8, 3), Mish(), Mish(),
    layers.GlobalAveragePooling2D(), layers.Dense(3, activation="softmax"),
])
model.save("mish.keras")
model.export("saved", verbose=False)
model = build()
x = layers.LayerNormalization()(model.layers[1](model.input))
x = layers.Dense(3, activation="softmax")(layers.GlobalAveragePooling2D()(x))
keras.Model(model.input, x).save("normalized.keras")
"""


@pytest.fixture(scope="module")
def mish(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mish.keras, a small classifier, also as a SavedModel; layers.py, which marks its activation;
    kernels in mish.so, mish.py and others that are wrong; and normalized.keras, which has a LayerNormalization."""
    folder = tmp_path_factory.mktemp("mish")
    for name, text in {
        "layers.py": LAYERS,
        "mish.c": KERNEL_C,
        "mish.py": KERNEL_PY,
        "wrong.py": KERNEL_PY.replace("beta * x", "x"),
        "older.py": KERNEL_PY.replace("version=2", "version=1"),
        "raises.py": KERNEL_PY.replace("1.5", "2.5"),
        "flat.py": KERNEL_PY.replace("    return ", "    return x.ravel() if np.abs(x).sum() else "),
        "crash.c": KERNEL_C.replace("node->outputs[0].data;", "NULL;"),
    }.items():
        (folder / name).write_text(text)
    for name in ("mish.c", "crash.c"):
        custom_ops.build(folder / name)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", MODEL], cwd=folder, check=True, capture_output=True, env=environment)
    return folder


@pytest.fixture(scope="module")
def convert(mish: Path, models: Path) -> Callable[..., Any]:
    """``edgekit.convert`` of mish.keras on the coloured pictures, with these files of operators."""

    def run(output: Path, *ops: str, model: str = "mish.keras", **options: Any) -> Any:
        given = {"calibration": models / "data.npz", "mean": 127.5, "std": 127.5, "ops": [mish / name for name in ops]}
        return edgekit.convert(mish / model, output, **{**given, **options})

    return run


def options(content: bytes) -> list[dict[str, Any]]:
    return [flexbuffers.Loads(bytes(operator.customOptions)) for _, operator in custom(rewrite.load(content))]


def custom(tree: Any) -> list[tuple[int, Any]]:
    return list(rewrite.Graph(tree).operators("CUSTOM"))


def operators(content: bytes) -> list[str]:
    return [operator.name for operator in Model(content).operators]


@pytest.mark.parametrize("recipe", ["float16", "int8-weights", "dynamic", "int8"])
def test_operator_stays_in_every_recipe(convert: Any, mish: Path, tmp_path: Path, recipe: str) -> None:
    of_bundle = convert(tmp_path / "out.tflite", "layers.py", "mish.so", quantize=recipe)
    file = bundle.read_file(tmp_path / "out.tflite")
    assert file.manifest == of_bundle and of_bundle.custom_ops == (CustomOp(name="Mish", version=2),)
    assert operators(file.content).count("Mish") == 3 and options(file.content) == [OPTIONS] * 3
    assert {check.status for check in of_bundle.runtimes.values()} <= {"ok", "not-installed"}
    assert of_bundle.runtimes["litert"].top1_agreement == 1.0
    with Sandbox(runtimes.find()["litert"], tmp_path / "out.tflite", ops=[mish / "mish.so"]) as sandbox:
        assert sandbox.pieces and len(sandbox.pieces) <= 3 + 1


def test_kernel_in_python_does_too(edgekit_cli: Any, mish: Path, models: Path) -> None:
    result = edgekit_cli(
        "convert", mish / "saved", "-o", "out.tflite", "--quantize", "int8", "--calibration", models / "data.npz",
        "--ops", mish / "layers.py", "--ops", mish / "mish.py", "--mean", "0", "--std", "255",
    )  # fmt: skip
    assert result.returncode == 0 and "litert" in result.stdout and ": ok" in result.stdout, result.stderr
    assert "differs" not in result.stdout and "failed" not in result.stdout


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        ((), "custom operator Mish version 2, and no kernel for it is known"),
        (
            ("wrong.py",),
            r"custom operator Mish version 2 \(node \d+\): its kernel gives something else .* at most 0\.001",
        ),
        (("crash.so",), r"a kernel of a custom operator crashed \(SIGSEGV\)"),
    ],
    ids=["none", "wrong", "crash"],
)
def test_kernel_that_does_not_fit_is_refused(convert: Any, tmp_path: Path, kernel: Any, line: str) -> None:
    with pytest.raises(ConversionError, match=line):
        convert(tmp_path / "out.tflite", "layers.py", *kernel)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def float32(mish: Path) -> bytes:
    """mish.keras as a flatbuffer."""
    marks.load([str(mish / "layers.py")])
    model = keras.models.load_model(mish / "mish.keras", compile=False)
    given = keras.Input(batch_shape=(1, 32, 32, 3))
    return marks.convert(keras.Model(given, model(given)), "float32", list, CustomOpResolver())


class TestMarkedFunctions:
    """What the worker does, without the rest of a conversion."""

    @pytest.mark.parametrize(
        ("kernel", "line"),
        [
            ("mish.so", ""),
            ("mish.py", ""),
            ("older.py", "Mish version 2, and its kernel is of version 1"),
            ("raises.py", r"kernel fails in the model \(AssertionError"),
            ("flat.py", r"kernel fails in the model .*expected an array of shape"),
            ("wrong.py", "gives something else than its function"),
        ],
    )
    def test_check_of_a_kernel(self, float32: bytes, mish: Path, kernel: str, line: str) -> None:
        resolver, with_kernels = marks.load([str(mish / kernel)])
        assert with_kernels == (str(mish / kernel),)
        items = np.random.default_rng(0).uniform(-1, 1, (2, 1, 32, 32, 3)).astype(np.float32)
        if not line:
            return marks.check(float32, items, resolver)
        with pytest.raises(ConversionError, match=line):
            marks.check(float32, items, resolver)

    def test_check_finds_one_wrong_value_and_what_is_not_finite(self, float32: bytes, mish: Path) -> None:
        good, _ = marks.load([str(mish / "mish.py")])
        items = np.random.default_rng(0).uniform(-1, 1, (1, 1, 32, 32, 3)).astype(np.float32)

        def spoiled(value: float) -> CustomOpResolver:
            def kernel(x: np.ndarray, **_: Any) -> np.ndarray:
                with np.errstate(all="ignore"):  # of what the operator before it made
                    y = x * np.tanh(np.logaddexp(0, 1.5 * x))
                y.flat[-1] += value
                return y

            good.add("Mish", kernel, version=2)
            return good

        marks.check(float32, items, spoiled(1e-6))
        for value in (1.0, np.nan, np.inf):
            with pytest.raises(ConversionError, match="gives something else than its function"):
                marks.check(float32, items, spoiled(value))

    def test_other_options_than_those_that_were_marked(self, float32: bytes) -> None:
        tree = rewrite.load(float32)
        for _, operator in custom(tree):
            operator.customOptions = np.frombuffer(bytes(flexbuffers.Dumps({"beta": 3.0})), np.uint8)
        with pytest.raises(ConversionError, match=r"other options than the function .*got {'beta': 3\.0}"):
            marks._nodes(rewrite.save(tree))

    @pytest.mark.usefixtures("float32")
    def test_operators_that_nobody_marked_are_named(self) -> None:
        given = keras.Input(batch_shape=(1, 32, 32, 3))
        model = keras.Model(given, keras.ops.fft2((given[..., 0], given[..., 1]))[0])
        with pytest.raises(ConversionError, match=r"operators that no TFLite runtime has: .*FFT2D"):
            marks.convert(model, "float32", list, CustomOpResolver())

    def test_operator_of_several_tensors(self) -> None:
        @edgekit.custom_op("Halves", tolerance=0)
        def halves(x: Any, y: Any) -> Any:
            return x + y, x - y

        class Halves(keras.layers.Layer):  # type: ignore[misc]
            def call(self, x: Any) -> Any:
                total, difference = halves(x, 3.0)
                return total * difference

        given = keras.Input(batch_shape=(1, 4))
        content = marks.convert(keras.Model(given, Halves()(given)), "float32", list, CustomOpResolver())
        resolver = CustomOpResolver()
        resolver.add("Halves", lambda x, y: (x + y, x - y))
        items = [np.arange(4, dtype=np.float32)[None]]
        marks.check(content, items, resolver)
        resolver.add("Halves", lambda x, y: (x - y, x + y))
        with pytest.raises(ConversionError, match=r"Halves version 1 \(node 0\): .*expected at most 0 of the largest"):
            marks.check(content, items, resolver)

    def test_marked_function_trains(self) -> None:
        square = edgekit.custom_op("Square")(lambda x: x * x)
        x = tf.Variable([1.0, 3.0])
        with tf.GradientTape() as tape:
            total = tf.reduce_sum(square(x))
        assert tape.gradient(total, x).numpy().tolist() == [2, 6]

    def test_weight_that_is_no_argument_is_refused(self) -> None:
        factor = tf.Variable(2.0)
        scaled = edgekit.custom_op("Scaled")(lambda x: x * factor)
        with pytest.raises(EdgekitError, match="Scaled: its function uses a tensor or a variable that is no argument"):
            scaled(np.ones(3, np.float32))

    @pytest.mark.parametrize(
        ("name", "given", "line"),
        [
            ("1st", {}, "expected a name of letters"),
            ("Fühl", {}, "expected a name of letters"),
            ("", {}, "expected a name of letters"),
            ("Good", {"version": 0}, "version of custom operator Good: expected a whole number from 1"),
            ("Good", {"version": True}, "expected a whole number from 1"),
            ("Good", {"tolerance": float("nan")}, "tolerance of custom operator Good"),
            ("Good", {"sizes": [1, 2]}, r"option sizes of custom operator Good: .* got \[1, 2\]"),
            ("Good", {"size": 1 << 63}, "option size"),
            ("Good", {"size": 1e39}, "option size"),
            ("Good", {"size": float("inf")}, "option size"),
            ("Good", {"text": "a\0b"}, "option text"),
            ("Good", {"tfl_fusable_op": True}, "option 'tfl_fusable_op'"),
        ],
    )
    def test_marks_that_no_model_can_hold_are_refused(self, name: str, given: dict[str, Any], line: str) -> None:
        with pytest.raises(EdgekitError, match=line):
            edgekit.custom_op(name, **given)


class Block(keras.layers.Layer):  # type: ignore[misc]
    """A layer of a user's with others inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normalize = keras.layers.LayerNormalization(epsilon=1e-6)
        self.convolve = keras.layers.Conv2D(channels, 1)

    def call(self, x: Any) -> Any:
        return x + self.convolve(self.normalize(x))


@pytest.fixture(scope="module")
def model() -> Any:
    """Layers of normalization of each kind, where a model may have them."""
    keras.utils.set_random_seed(0)
    wide = keras.initializers.RandomUniform(0.5, 2.0)
    given = keras.Input(batch_shape=(1, 16, 16, 3))
    x = keras.layers.Conv2D(12, 3)(given)
    nested = keras.Sequential([keras.layers.LayerNormalization(gamma_initializer=wide), keras.layers.Conv2D(12, 3)])
    x = Block(12)(nested(x))
    x = keras.layers.LayerNormalization(scale=False, center=False)(x)
    x = keras.layers.LayerNormalization(axis=1)(keras.layers.GlobalAveragePooling2D()(x))
    x = keras.layers.LayerNormalization(axis=[0, 1])(x)
    return keras.Model(given, keras.layers.Dense(4)(x))


@pytest.fixture(scope="module")
def data() -> list[np.ndarray]:
    return list(np.random.default_rng(0).uniform(-1, 1, (12, 1, 16, 16, 3)).astype(np.float32))


@pytest.fixture(scope="module")
def converted(model: Any, data: list[np.ndarray]) -> dict[str, bytes]:
    """``model`` with EdgeKit's operator, by recipe, and in int8 without it."""
    resolver, contents = CustomOpResolver(), {}
    for recipe in ("float32", "float16", "int8"):
        with layer_norm.as_operator(model):
            content = marks.convert(model, recipe, lambda: data, resolver)
        contents[recipe] = rewrite.rewrite(content, recipe)
    contents["int8 without"] = rewrite.rewrite(recipes.convert(model, "int8", lambda: data))
    return contents


def sqnr_db(content: bytes, model: Any, data: list[np.ndarray]) -> float:
    running = layers.interpreter(content, CustomOpResolver())
    (given,), made = running.get_input_details(), running.get_output_details()[0]
    signal = noise = 0.0
    for x in data:
        scale, zero_point = given["quantization"]
        running.set_tensor(given["index"], quantize(x, given["dtype"].__name__, scale, zero_point) if scale else x)
        running.invoke()
        y, right = running.get_tensor(made["index"]), np.asarray(model(x))
        scale, zero_point = made["quantization"]
        signal += float(np.square(right).sum())
        noise += float(np.square(right - (dequantize(y, scale, zero_point) if scale else y)).sum())
    return float(10 * np.log10(signal / noise))


class TestLayerNormalization:
    """``--edgekit-ops``."""

    def test_layers_over_the_last_axis_become_the_operator(self, converted: dict[str, bytes], model: Any) -> None:
        for recipe in ("float32", "float16", "int8"):
            assert operators(converted[recipe]).count("EdgekitLayerNorm") == 4, recipe
        epsilons = sorted(round(given["epsilon"], 9) for given in options(converted["float32"]))
        assert epsilons == [1e-6, 1e-3, 1e-3, 1e-3]
        kinds = {type(layer) for layer in model._flatten_layers()}
        assert keras.layers.LayerNormalization in kinds and layer_norm._AsOperator not in kinds

    def test_kernel_computes_what_the_layer_does(self, converted: dict[str, bytes], data: list[np.ndarray]) -> None:
        marks.check(converted["float32"], data[:2], CustomOpResolver())

    def test_graph_computes_the_same(self, converted: dict[str, bytes], model: Any, data: list[np.ndarray]) -> None:
        assert sqnr_db(converted["float32"], model, data) > 100
        assert sqnr_db(converted["float16"], model, data) > 50

    def test_int8_loses_less_with_it(self, converted: dict[str, bytes], model: Any, data: list[np.ndarray]) -> None:
        without, with_it = (sqnr_db(converted[name], model, data) for name in ("int8 without", "int8"))
        assert with_it > without + 0.5

    def test_int8_operator_takes_and_gives_int8(self, converted: dict[str, bytes]) -> None:
        model = Model(converted["int8"])
        for operator in model.operators:
            if operator.custom:
                types = [model.tensors[t].dtype for t in (*operator.inputs, *operator.outputs)]
                assert types == ["int8", "float32", "float32", "int8"]

    def test_float16_operator_has_its_constants_in_float32(self, converted: dict[str, bytes]) -> None:
        model = Model(converted["float16"])
        for operator in model.operators:
            if operator.custom:
                assert [model.tensors[t].constant for t in operator.inputs] == [False, True, True]

    @pytest.mark.parametrize("recipe", ["float32", "float16", "int8"])
    def test_xnnpack_has_no_more_pieces_than_it_must(self, tmp_path: Path, data: list[np.ndarray], recipe: str) -> None:
        given = keras.Input(batch_shape=(1, 16, 16, 3))
        x = keras.layers.LayerNormalization()(keras.layers.Conv2D(8, 3)(given))
        x = keras.layers.Dense(4)(keras.layers.GlobalAveragePooling2D()(keras.layers.Conv2D(8, 3)(x)))
        model = keras.Model(given, x)
        with layer_norm.as_operator(model):
            content = rewrite.rewrite(marks.convert(model, recipe, lambda: data, CustomOpResolver()), recipe)
        (tmp_path / "model.tflite").write_bytes(content)
        with Sandbox(runtimes.find()["litert"], tmp_path / "model.tflite") as sandbox:
            assert sandbox.pieces and len(sandbox.pieces) == 2
            assert sum(map(len, sandbox.pieces)) == len(operators(content)) - 1

    def test_bundle_names_the_same_classes(self, mish: Path, models: Path, tmp_path: Path) -> None:
        of_bundle = edgekit.convert(
            mish / "normalized.keras", tmp_path / "out.tflite", quantize="int8", edgekit_ops=True,
            calibration=models / "data.npz", validation=models / "data.npz", mean=127.5, std=127.5,
        )  # fmt: skip
        assert of_bundle.custom_ops == (CustomOp(name="EdgekitLayerNorm", version=1),)
        assert of_bundle.runtimes["litert"].top1_agreement == 1.0


def test_options_that_change_nothing_are_warned_about(
    convert: Any, models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    colours, output = str(models / "colours.keras"), tmp_path / "out.tflite"
    assert convert(output, "mish.so", model=colours, quantize="float32", edgekit_ops=True).custom_ops == ()
    assert "--edgekit-ops changed nothing" in caplog.text and "mish.so is for nothing" in caplog.text


def test_ops_are_for_models_of_images(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="--ops is for models of images"):
        edgekit.convert("crnn", tmp_path / "out.tflite", ops=["mish.so"])
