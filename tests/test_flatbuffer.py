from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from edgekit import runtimes
from edgekit.errors import BundleError
from edgekit.flatbuffer import Model


@pytest.fixture(scope="module")
def content(models: Path) -> bytes:
    return (models / "int8.tflite").read_bytes()


def test_model_is_read(content: bytes) -> None:
    model = Model(content)
    (given,), (made,) = model.inputs, model.outputs
    assert (given.shape, given.dtype, made.shape, made.dtype) == ((1, 32, 32, 3), "int8", (1, 3), "int8")
    assert given.scale == pytest.approx((1 / 127.5,), rel=1e-3) and given.zero_point == (-1,)
    assert {operator.name for operator in model.operators} >= {"CONV_2D", "MEAN", "FULLY_CONNECTED", "SOFTMAX"}
    assert model.last_operator == "SOFTMAX"
    assert model.label_file == "labels.txt" and set(model.associated_files) == {"labels.txt", "edgekit.json"}
    assert model.normalization and model.normalization.mean == (127.5,)


def test_agrees_with_the_interpreter(content: bytes) -> None:
    _, module = runtimes.load()
    interpreter = module.Interpreter(model_content=content)
    details = interpreter.get_tensor_details()
    model = Model(content)
    named = {tensor.name: tensor for tensor in model.tensors}
    for detail in details:
        if tensor := named.get(detail["name"]):
            assert tensor.shape == tuple(detail["shape"])
            assert tensor.dtype == np.dtype(detail["dtype"]).name
    assert len(named) >= 8


def test_constants_and_options_are_read(content: bytes) -> None:
    model = Model(content)
    first = next(operator for operator in model.operators if operator.name == "CONV_2D")
    weights, bias = model.constant(first.inputs[1]), model.constant(first.inputs[2])
    assert weights is not None and bias is not None
    assert (weights.dtype.name, weights.shape) == ("int8", model.tensors[first.inputs[1]].shape)
    assert np.abs(weights.astype(int)).max() == 127  # what the widest weight is quantized to
    assert (bias.dtype.name, bias.shape) == ("int32", weights.shape[:1])
    assert model.constant(first.inputs[0]) is None and not model.tensors[first.inputs[0]].constant
    dilation, past_the_schema = model.option(first, 4, default=1), model.option(first, 99, default=-5)
    assert (dilation, past_the_schema) == (1, -5)
    assert model.option(first, 1) in (1, 2)  # the stride


def test_every_truncation_is_refused(content: bytes) -> None:
    flatbuffer_bytes = content.index(b"PK\x03\x04")
    for length in [*range(0, 400), *range(400, flatbuffer_bytes - 16, 97)]:
        with pytest.raises(BundleError):
            Model(content[:length])


def test_mutations_are_refused_or_read(content: bytes) -> None:
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(3000):
        mutated = bytearray(content)
        for at in random.integers(8, len(content), random.integers(1, 30)):
            mutated[at] = random.integers(0, 256)
        try:
            model = Model(bytes(mutated))
            assert model.last_operator is not None and model.associated_files is not None
            for index in range(len(model.tensors)):
                model.constant(index)
            for operator in model.operators:
                model.option(operator, 1)
        except BundleError as error:
            refused += 1
            assert "whole TFLite model" in str(error)
    assert 0 < refused < 3000


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_what_is_refused_would_have_hurt_the_runtime_or_is_refused_by_it(
    content: bytes, share: float, tmp_path: Path
) -> None:
    """A cut file never reaches the runtime; this shows what that would do: an error, or for tflite-runtime a crash."""
    name, _ = runtimes.load()
    cut = tmp_path / "cut.tflite"
    cut.write_bytes(content[: int(share * content.index(b"PK\x03\x04"))])
    code = f"import {runtimes.RUNTIMES[name][0]} as m, sys; m.Interpreter(model_path=sys.argv[1]).allocate_tensors()"
    assert subprocess.run([sys.executable, "-c", code, cut], capture_output=True).returncode != 0
    with pytest.raises(BundleError):
        Model(cut.read_bytes())


def test_foreign_file_is_refused() -> None:
    for content in (b"", b"TFL3", b"not a model at all", b"\0" * 100):
        with pytest.raises(BundleError, match="is not a TFLite model"):
            Model(content, "x.tflite")


@pytest.mark.parametrize("field", ["deprecatedBuiltinCode", "builtinCode"])
def test_negative_operator_code_is_refused(content: bytes, field: str) -> None:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))
    setattr(model.operatorCodes[0], field, -5)
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    with pytest.raises(BundleError, match="operator code"):
        Model(bytes(builder.Output()))


def test_models_made_by_others_are_read(vision_data: Path) -> None:
    for path in vision_data.glob("*.tflite"):
        model = Model(path.read_bytes(), str(path))
        assert model.operators and model.inputs and model.outputs
        assert not any(operator.name.startswith("BUILTIN_") for operator in model.operators)
