from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit import custom_ops, runtimes
from edgekit.custom_ops import CustomOpResolver, build
from edgekit.devices.health import rss_bytes
from edgekit.errors import BundleError, EdgekitError
from edgekit.flatbuffer import Model
from edgekit.sandbox import Sandbox, SandboxError

OPTIONS = {"factor": 1.5, "count": -7, "flag": True, "mode": "abc", "big": 1 << 40}

needs_library = pytest.mark.skipif(
    custom_ops.find_library() is None, reason="EdgeKit's library of operators is not built"
)
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler here")

SHARPEN = r"""
#include "edgekit_op.h"

static int prepare(EdgekitNode *node) {
  const EdgekitTensor *x = &node->inputs[0];
  if (node->input_count != 1 || x->type != EDGEKIT_FLOAT32) return node->fail(node, "expected one float32 tensor");
  if (!edgekit_option(node, "gain")) return node->fail(node, "expected an option gain");
  return node->resize(node, 0, x->rank, x->dims);
}

static int invoke(EdgekitNode *node) {
  const float *x = node->inputs[0].data, gain = (float)edgekit_real(node, "gain", 0);
  float *y = node->outputs[0].data;
  for (size_t i = 0; i < edgekit_size(&node->inputs[0]); i++) y[i] = gain * x[i];
  return EDGEKIT_OK;
}

static const EdgekitOp sharpen = {.name = "Sharpen", .version = 1, .prepare = prepare, .invoke = invoke};
EDGEKIT_OPS(&sharpen)
"""


@pytest.fixture(scope="session")
def runtime() -> ModuleType:
    return runtimes.load()[1]


@pytest.fixture(scope="session")
def sharpen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the operator ``Sharpen``."""
    if custom_ops.find_library() is None or not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler here, or none when EdgeKit was installed")
    source = tmp_path_factory.mktemp("sharpen") / "sharpen.c"
    source.write_text(SHARPEN)
    library, versions = build(source)
    assert versions == {"Sharpen": 1} and library == source.with_suffix(".so")
    return library


def interpret(runtime: ModuleType, path: Path, resolver: CustomOpResolver) -> Any:
    interpreter = runtime.Interpreter(str(path), experimental_delegates=[resolver.delegate(runtime)])
    interpreter.allocate_tensors()
    return interpreter


def run(interpreter: Any, *inputs: np.ndarray) -> list[np.ndarray]:
    for detail, x in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(detail["index"], x)
    interpreter.invoke()
    return [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]


def squaring(**more: Any) -> CustomOpResolver:
    resolver = CustomOpResolver()
    resolver.add("Square", lambda x, **_: x * x, **more)
    return resolver


def _kernels(folder: Path, version: int = 1) -> Path:
    """A file that squares."""
    path = folder / "kernels.py"
    path.write_text(
        f"import edgekit\n\n@edgekit.kernel('Square', version={version})\ndef square(x, **_):\n    return x * x\n"
    )
    return path


X = np.linspace(0.5, 1.5, 128, dtype=np.float32).reshape(1, 4, 4, 8)


@needs_library
def test_resolver_brings_a_python_kernel_into_the_runtime(op_models: Path, runtime: ModuleType) -> None:
    seen: list[dict[str, Any]] = []
    resolver = CustomOpResolver()
    resolver.add("Square", lambda x, **options: (seen.append(options), x * x)[1])
    (y,) = run(interpret(runtime, op_models / "chain.tflite", resolver), X)
    np.testing.assert_allclose(y, X**8, rtol=1e-6)
    assert seen == [OPTIONS] * 3


@needs_library
def test_custom_nodes_leave_the_rest_to_xnnpack_in_no_more_pieces(
    op_models: Path, runtime: ModuleType, tmp_path: Path
) -> None:
    """Three nodes, of which two follow each other, leave three pieces of the one that XNNPACK has of built-in operators
    (none at all where it is not in the runtime)."""
    kernels = _kernels(tmp_path)
    pieces = []
    for name in ("chain", "chain_built_in"):
        with Sandbox(next(iter(runtimes.find().values())), op_models / f"{name}.tflite", ops=[kernels]) as sandbox:
            assert sandbox.pieces is not None
            pieces.append(len(sandbox.pieces))
    assert pieces in ([3, 1], [0, 0])
    nodes = interpret(runtime, op_models / "chain.tflite", squaring())._get_ops_details()
    assert [node["op_name"] for node in nodes].count("DELEGATE") == pieces[0] + 2


@needs_library
def test_tensors_within_a_piece_and_several_outputs(op_models: Path, runtime: ModuleType) -> None:
    resolver = squaring()
    resolver.add("Split", lambda x: (x[:, :4], x[:, 4:]))
    x = np.arange(8, dtype=np.float32)[None]
    squared, high = run(interpret(runtime, op_models / "two_outputs.tflite", resolver), x)
    assert squared.tolist() == [[0, 1, 4, 9]] and high.tolist() == [[4, 5, 6, 7]]


@needs_library
def test_input_is_resized_where_the_kernel_gives_shapes(op_models: Path, runtime: ModuleType) -> None:
    interpreter = interpret(runtime, op_models / "chain.tflite", squaring(shape=lambda shape, **_: shape))
    for shape in ((1, 2, 3, 8), (2, 6, 6, 8), (1, 4, 4, 8)):
        interpreter.resize_tensor_input(interpreter.get_input_details()[0]["index"], shape)
        interpreter.allocate_tensors()
        x = np.random.default_rng(0).uniform(0.5, 1.5, shape).astype(np.float32)
        np.testing.assert_allclose(run(interpreter, x)[0], x**8, rtol=1e-5)


@needs_library
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (
            lambda x, **_: x[:1, :1],
            r"Square: expected an array of shape \(1, 4, 4, 8\) of its kernel, got \(1, 1, 4, 8\)",
        ),
        (lambda x, **_: (x, x), "Square: expected 1 arrays of its kernel, got 2"),
        (lambda x, **_: x.fill(0), "read-only"),
        (lambda x, **_: x.astype(complex), "[Cc]annot cast"),
    ],
)
def test_kernel_that_does_not_fit_is_told(op_models: Path, runtime: ModuleType, kernel: Any, message: str) -> None:
    resolver = CustomOpResolver()
    resolver.add("Square", kernel)
    interpreter = interpret(runtime, op_models / "chain.tflite", resolver)
    with pytest.raises(RuntimeError, match=r"custom operator Square \(node \d\): "):
        run(interpreter, X)
    with pytest.raises(Exception, match=message):
        raise resolver.take_error() or AssertionError("nothing was raised")


class OutOfTune(Exception):
    pass


@needs_library
def test_kernel_that_raises_ends_in_that_exception(op_models: Path, colour: Callable[..., np.ndarray]) -> None:
    calls = []

    def kernel(x: np.ndarray, gain: float) -> np.ndarray:
        calls.append(gain)
        if len(calls) == 2:
            raise OutOfTune("at the second call")
        return gain * x

    resolver = CustomOpResolver()
    resolver.add("Sharpen", kernel)
    with edgekit.load(op_models / "colour_op.tflite", ops=resolver) as model:
        assert model.predict(colour("green"))[0].label == "green"
        with pytest.raises(OutOfTune, match="at the second call"):
            model.predict(colour("green"))
        assert model.predict(colour("blue"))[0].label == "blue"
    assert calls == [5.0] * 3
    resolver.add("Sharpen", kernel, shape=lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        edgekit.load(op_models / "colour_op.tflite", ops=resolver)


@needs_library
def test_two_interpreters_in_two_threads(op_models: Path, runtime: ModuleType) -> None:
    """Each with kernels of its own, one of which raises."""
    wrong: list[Any] = []

    def work(power: int) -> None:
        resolver = CustomOpResolver()
        resolver.add("Square", lambda x, **_: x**power if power != 3 else 1 / 0)
        interpreter = interpret(runtime, op_models / "chain.tflite", resolver)
        for _ in range(300):
            try:
                (y,) = run(interpreter, X)
                if not np.allclose(y, X ** (power**3), rtol=1e-5):
                    wrong.append(y)
            except RuntimeError:
                if power != 3 or not isinstance(resolver.take_error(), ZeroDivisionError):
                    wrong.append("another error")

    threads = [threading.Thread(target=work, args=(power,)) for power in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@needs_library
def test_interpreters_leave_no_memory_behind(op_models: Path, runtime: ModuleType, sharpen: Path) -> None:
    def some(count: int) -> None:
        for _ in range(count):
            resolver = squaring()
            resolver.load(sharpen)
            run(interpret(runtime, op_models / "chain.tflite", resolver), X)

    some(100)
    before = rss_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    some(1000)
    gc.collect()
    after = rss_bytes()
    # A thousand of the smallest things forgotten, a resolver or a piece, would be more.
    assert after and after - before < 500_000


@needs_library
def test_delegate_keeps_what_it_calls(op_models: Path, runtime: ModuleType) -> None:
    interpreter = interpret(runtime, op_models / "chain.tflite", squaring())
    gc.collect()
    np.testing.assert_allclose(run(interpreter, X)[0], X**8, rtol=1e-6)


@needs_library
def test_operator_nobody_resolves_is_named_with_what_to_do(op_models: Path, edgekit_fails: Any, frames: Path) -> None:
    line = edgekit_fails("run", op_models / "colour_op.tflite", "--source", frames, "--broker", "none")
    assert (
        "needs the custom operator Sharpen version 1, and no kernel for it is known; give its library with --ops"
        in line
    )
    with pytest.raises(BundleError, match="Sharpen version 1"):
        edgekit.load(op_models / "colour_op.tflite")


@needs_library
def test_operator_of_a_newer_version_is_told(op_models: Path, runtime: ModuleType, tmp_path: Path) -> None:
    model = Model((op_models / "newer.tflite").read_bytes())
    line = squaring(version=3).outdated(model)
    assert "custom operator Square version 7, and its kernel is of version 3; get a newer one" in line
    assert not squaring(version=7).outdated(model)
    resolver = squaring(version=7)
    np.testing.assert_allclose(run(interpret(runtime, op_models / "newer.tflite", resolver), X)[0], X**8, rtol=1e-6)
    with pytest.raises(SandboxError, match="its kernel is of version 3; get a newer one"):
        Sandbox(next(iter(runtimes.find().values())), op_models / "newer.tflite", ops=[_kernels(tmp_path, version=3)])


def test_library_that_was_not_built_is_told(op_models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(custom_ops, "FOLDER", tmp_path)
    with pytest.raises(
        BundleError, match=r"Sharpen version 1; EdgeKit's libedgekit_ops\.so was not built .* C compiler"
    ):
        edgekit.load(op_models / "colour_op.tflite")
    resolver = CustomOpResolver()
    resolver.add("Sharpen", lambda x, gain: gain * x)
    with pytest.raises(EdgekitError, match="was not built"):
        edgekit.load(op_models / "colour_op.tflite", ops=resolver)


def test_run_takes_a_library(op_models: Path, sharpen: Path, frames: Path, edgekit_cli: Any) -> None:
    result = edgekit_cli(
        "run", op_models / "colour_op.tflite", "--source", frames, "--broker", "none", "--json", "--ops", sharpen
    )
    labels = [json.loads(line)["predictions"][0]["label"] for line in result.stdout.splitlines()]
    assert labels == ["red", "green", "blue"] * 2, result.stderr
    found = json.loads(edgekit_cli("inspect", op_models / "colour_op.tflite", "--ops", sharpen, "--json").stdout)
    assert {"name": "Sharpen", "version": 1, "custom": True, "count": 1, "kernel": 1} in found["operators"]
    assert {"operator": "Sharpen", "count": 1, "reason": "a custom operator"} in found["delegates"][0]["left"]
    measured = edgekit_cli("bench", op_models / "colour_op.tflite", "--ops", sharpen, "--seconds", "0.2", "--json")
    assert any(row["latency_ms"] for row in json.loads(measured.stdout)["inference"]), measured.stderr


@needs_library
@pytest.mark.host
def test_tensorflow_loads_the_same_library(op_models: Path) -> None:
    lite = pytest.importorskip("tensorflow").lite
    np.testing.assert_allclose(run(interpret(lite, op_models / "chain.tflite", squaring()), X)[0], X**8, rtol=1e-6)


@needs_library
def test_library_is_an_external_delegate_for_programs_in_c(sharpen: Path) -> None:
    """As benchmark_model and TfLiteExternalDelegateCreate call it: options may have the same name."""
    library = ctypes.CDLL(str(custom_ops.find_library()))
    library.tflite_plugin_create_delegate.restype = ctypes.c_void_p
    report = ctypes.CFUNCTYPE(None, ctypes.c_char_p)

    def create(*options: tuple[str, str]) -> tuple[Any, bytes]:
        keys, values = ((ctypes.c_char_p * len(options))(*map(str.encode, some)) for some in zip(*options, strict=True))
        told: list[bytes] = []
        count = ctypes.c_size_t(len(options))
        return library.tflite_plugin_create_delegate(keys, values, count, report(told.append)), b"".join(told)

    delegate, told = create(("ops", str(sharpen)), ("ops", str(sharpen)))
    assert delegate and not told
    library.tflite_plugin_destroy_delegate(ctypes.c_void_p(delegate))
    for option, problem in (
        (("ops", "/nowhere/mish.so"), rb"/nowhere/mish\.so: cannot open"),
        (("ops", "libm.so.6"), rb"has no edgekit_library: name its operators in EDGEKIT_OPS"),
        (("kernel", "none"), rb"kernel: expected an address, got none"),
        (("threads", "2"), rb"option threads: expected ops or kernel"),
    ):
        delegate, told = create(option)
        assert not delegate and re.search(problem, told), (option, told)


@needs_library
def test_run_takes_kernels_in_a_python_file(
    op_models: Path, frames: Path, edgekit_cli: Any, edgekit_fails: Any, tmp_path: Path
) -> None:
    file = tmp_path / "kernels.py"
    file.write_text("import edgekit\n\n@edgekit.kernel('Sharpen')\ndef sharpen(x, gain):\n    return gain * x\n")
    command = ("run", op_models / "colour_op.tflite", "--source", frames, "--broker", "none", "--json", "--ops", file)
    assert len(edgekit_cli(*command).stdout.splitlines()) == 6
    file.write_text(file.read_text().replace("return gain * x", "raise ValueError('out of tune')"))
    assert "the kernel of the custom operator Sharpen raised ValueError: out of tune" in edgekit_fails(*command)
    file.write_text("import nothing_of_that_name\n")
    assert "kernels.py do not load (ModuleNotFoundError" in edgekit_fails(*command)


@needs_library
@needs_compiler
def test_kernel_in_c_tells_what_does_not_fit(op_models: Path, tmp_path: Path) -> None:
    source = tmp_path / "sharpen.c"
    source.write_text(SHARPEN.replace('"gain"', '"another"'))
    library, _ = build(source)
    with pytest.raises(BundleError, match=r"custom operator Sharpen \(node 1\): expected an option gain"):
        edgekit.load(op_models / "colour_op.tflite", ops=[library])


@needs_compiler
def test_build_writes_a_library(edgekit_cli: Any, tmp_path: Path) -> None:
    (tmp_path / "sharpen.c").write_text(SHARPEN)
    result = edgekit_cli("ops", "build", "sharpen.c")
    assert result.stdout == "sharpen.so: Sharpen version 1\n", result.stderr
    result = edgekit_cli("ops", "build", "sharpen.c", "-o", "other.so", "--json")
    assert json.loads(result.stdout) == {"library": "other.so", "operators": {"Sharpen": 1}}


@needs_compiler
@pytest.mark.parametrize(
    ("source", "line"),
    [
        (SHARPEN.replace("return EDGEKIT_OK;", "return EDGEKIT_OK"), "sharpen.c does not compile (sharpen.c:"),
        (SHARPEN.replace("EDGEKIT_OPS(&sharpen)", ""), "sharpen.c exports no operators; name them in EDGEKIT_OPS"),
        (None, "source sharpen.c: expected a C file, got no such file"),
    ],
)
def test_build_of_what_is_no_operator_fails(edgekit_fails: Any, tmp_path: Path, source: str | None, line: str) -> None:
    if source:
        (tmp_path / "sharpen.c").write_text(source)
    assert line in edgekit_fails("ops", "build", "sharpen.c")
    assert not list(tmp_path.glob("*.so*")) and not list(tmp_path.glob(".*"))


def test_build_without_a_compiler_fails(edgekit_fails: Any, tmp_path: Path) -> None:
    (tmp_path / "sharpen.c").write_text(SHARPEN)
    line = edgekit_fails("ops", "build", "sharpen.c", env={**os.environ, "PATH": str(tmp_path), "CC": ""})
    assert "no C compiler is here; apt-get install gcc" in line


@needs_compiler
def test_library_of_another_interface_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "sharpen.c"
    source.write_text(
        SHARPEN.replace('"edgekit_op.h"', '"edgekit_op.h"\n#undef EDGEKIT_OP_ABI\n#define EDGEKIT_OP_ABI 99')
    )
    with pytest.raises(EdgekitError, match=r"expected edgekit_op\.h number 1, got 99; build them again"):
        build(source)


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("gone.so", None, "no such file"),
        ("text.so", "no library", "do not load"),
        ("sharpen.c", SHARPEN, "are a source; edgekit ops build"),
    ],
)
def test_load_of_what_is_no_library_fails(tmp_path: Path, name: str, content: str | None, line: str) -> None:
    if content:
        (tmp_path / name).write_text(content)
    with pytest.raises(EdgekitError, match=line):
        CustomOpResolver(tmp_path / name)
