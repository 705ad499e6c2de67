"""What custom operators cost, and the operators shipped against what does the same without them; in turns, on one
thread, in each runtime here (docs/measure.md tells how to have tflite-runtime beside LiteRT).

    python benchmarks/custom_ops.py [FOLDER] [--seconds S]

- The log-mel levels of 29.12 s of sound, as the music tagger has them: the operator against the numpy front end.
- A node, beside the work of its kernel: 20 operators that copy 8 numbers, between 20 RELUs, against the RELUs alone.
- A network of ConvNeXt's kind (12 blocks, 224 x 224) in int8, its LayerNormalization as TensorFlow converts it and as
  EdgeKit's operator, against float32.

FOLDER keeps the models.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from ai_edge_litert import schema_py_generated as schema

import edgekit
from edgekit import runtimes
from edgekit.audio import LogMelFrontEnd
from edgekit.converters import raw_sound, rewrite
from edgekit.custom_ops import build
from edgekit.manifest import AudioInput, LogMel
from edgekit.sandbox import Sandbox, alternate

FRONT_END = LogMel(
    fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000, power=2, floor=1e-10, range_db=80
)
SOUND = AudioInput(sample_rate_hz=12_000, window_samples=349_440, hop_samples=6144, front_end=FRONT_END)
# Calls in a row of each way before it is another's turn, after one that finds the caches filled by others.
CALLS = 20


NODES = 20
COPY_C = r"""
#include "edgekit_op.h"

static int prepare(EdgekitNode *node) {
  (void)node;
  return EDGEKIT_OK;
}

static int invoke(EdgekitNode *node) {
  memcpy(node->outputs[0].data, node->inputs[0].data, node->inputs[0].bytes);
  return EDGEKIT_OK;
}

static const EdgekitOp copy = {.name = "Copy", .version = 1, .prepare = prepare, .invoke = invoke};
EDGEKIT_OPS(&copy)
"""
COPY_PY = """
import edgekit

@edgekit.kernel("Copy")
def copy(x):
    return x
"""
NETWORK = """
import keras
import numpy as np

layers = keras.layers
keras.utils.set_random_seed(0)
x = image = keras.Input((224, 224, 3))
x = layers.Conv2D(40, 4, strides=4)(x)
for stage, (width, count) in enumerate(((40, 2), (80, 2), (160, 6), (320, 2))):
    if stage:
        x = layers.Conv2D(width, 2, strides=2)(layers.LayerNormalization(epsilon=1e-6)(x))
    for _ in range(count):
        y = layers.DepthwiseConv2D(7, padding="same")(x)
        y = layers.Dense(4 * width, activation="relu")(layers.LayerNormalization(epsilon=1e-6)(y))
        x = layers.Add()([x, layers.Dense(width)(y)])
x = layers.LayerNormalization(epsilon=1e-6)(layers.GlobalAveragePooling2D()(x))
keras.Model(image, layers.Dense(10, activation="softmax")(x)).save("network.keras")
random = np.random.default_rng(0)
coarse = random.normal(size=(32, 14, 14, 3)).astype(np.float32)
np.save("x.npy", keras.ops.convert_to_numpy(keras.ops.image.resize(coarse, (224, 224))))
"""


def music() -> np.ndarray:
    """Tones that come and go, and glide, over noise."""
    random, time_s = np.random.default_rng(0), np.arange(SOUND.window_samples) / SOUND.sample_rate_hz
    notes = sum(np.sin(2 * np.pi * hz * time_s) * (np.sin(time_s * rate) > 0) for hz, rate in ((220, 3), (1375, 7)))
    glide = np.sin(2 * np.pi * 90 * time_s**2)
    return (0.2 * np.asarray(notes) + 0.1 * glide + random.normal(0, 1e-3, len(time_s))).astype(np.float32)


def timed(work: Callable[[], Any]) -> Callable[[int], np.ndarray]:
    """As :meth:`Sandbox.invoke`."""

    def call(count: int) -> np.ndarray:
        times = np.empty(count)
        for number in range(count):
            started_s = time.perf_counter()
            work()
            times[number] = 1e3 * (time.perf_counter() - started_s)
        return times

    return call


def take_turns(ways: dict[str, Callable[[int], np.ndarray]], seconds: float) -> dict[str, float]:
    """Median time of a call of each, ms."""
    times: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for name, call in ways.items():
            times[name].append(call(1 + CALLS)[1:])
    return {name: float(np.median(taken)) for name, taken in times.items()}


def print_log_mel(folder: Path, seconds: float) -> None:
    sound, front_end = music(), LogMelFrontEnd(FRONT_END, SOUND.sample_rate_hz)
    expected = front_end(sound)
    path, given, made = folder / "log_mel.tflite", folder / "sound.npy", folder / "levels.npy"
    path.write_bytes(raw_sound.front_end(SOUND))
    np.save(given, sound[None])
    differences_db = {}
    ways: dict[str, Callable[[int], np.ndarray]] = {"numpy": timed(lambda: front_end(sound))}
    with ExitStack() as stack:
        for name, runtime in runtimes.find().items():
            sandbox = stack.enter_context(Sandbox(runtime, path))
            sandbox.replay(given, made)  # the sound stays in the input tensor
            differences_db[name] = float(np.abs(np.load(made).reshape(expected.shape) - expected).max())
            ways[name] = sandbox.invoke
        times_ms = take_turns(ways, seconds)
    print("| log-mel of 29.12 s | time | largest difference |\n|---|---|---|")
    for name, difference_db in differences_db.items():
        print(f"| EdgekitLogMel, {name} | 1/{times_ms['numpy'] / times_ms[name]:.1f} | {difference_db:.1g} dB |")
    print(f"| the numpy front end | 1, {times_ms['numpy']:.2f} ms | |")


def print_nodes(folder: Path, seconds: float) -> None:
    (folder / "copying.c").write_text(COPY_C)
    (folder / "copying.py").write_text(COPY_PY)
    library, _ = build(folder / "copying.c")
    for name, custom in (("relus", False), ("copies", True)):
        (folder / f"{name}.tflite").write_bytes(nodes(custom))
    print("\n| a node beside its kernel, us | in C | in Python |\n|---|---|---|")
    for runtime in runtimes.find().values():
        trials: list[tuple[str, list[Path]]] = [
            ("relus", []),
            ("copies", [library]),
            ("copies", [folder / "copying.py"]),
        ]
        with ExitStack() as stack:
            sandboxes = [
                stack.enter_context(Sandbox(runtime, folder / f"{name}.tflite", ops=ops)) for name, ops in trials
            ]
            alone, in_c, in_python = (1e3 * np.median(times) / NODES for times in alternate(sandboxes, seconds))
        print(f"| {runtime.name} | {in_c - alone:.2f} | {in_python - alone:.2f} |")


def nodes(custom: bool) -> bytes:
    """RELU after RELU of 8 numbers, with or without an operator that copies them before each."""
    model, subgraph = schema.ModelT(), schema.SubGraphT()
    model.version, model.buffers, model.subgraphs = 3, [schema.BufferT()], [subgraph]
    relu, copy = schema.OperatorCodeT(), schema.OperatorCodeT()
    relu.builtinCode = relu.deprecatedBuiltinCode = schema.BuiltinOperator.RELU
    copy.builtinCode = copy.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    copy.customCode = "Copy"
    model.operatorCodes, subgraph.operators, subgraph.tensors = [relu, copy], [], []
    codes = [1, 0] * NODES if custom else [0] * NODES
    for number in range(len(codes) + 1):
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.hasRank = f"x{number}", np.array([1, 8], np.int32), True
        subgraph.tensors.append(tensor)
    for number, code in enumerate(codes):
        operator = schema.OperatorT()
        operator.opcodeIndex = code
        operator.inputs, operator.outputs = np.array([number], np.int32), np.array([number + 1], np.int32)
        subgraph.operators.append(operator)
    subgraph.inputs, subgraph.outputs = np.array([0], np.int32), np.array([len(codes)], np.int32)
    return rewrite.save(model)


def print_layer_norm(folder: Path, seconds: float) -> None:
    (folder / "network.py").write_text(NETWORK)
    subprocess.run([sys.executable, "network.py"], cwd=folder, check=True, capture_output=True)
    paths, changes = {}, {}
    for name, recipe, own in (("float32", "float32", False), ("int8", "int8", False), ("int8, operator", "int8", True)):
        paths[name] = folder / f"network {name}.tflite"
        manifest = edgekit.convert(
            folder / "network.keras",
            paths[name],
            quantize=recipe,
            calibration=folder / "x.npy",
            edgekit_ops=own,
            mean=0,
            std=1,
        )
        assert manifest.verification
        changes[name] = manifest.verification.mean_abs_difference
    print(
        "\n| ConvNeXt's kind | runtime | latency | XNNPACK's pieces | mean change of a score |\n|---|---|---|---|---|"
    )
    for runtime in runtimes.find().values():
        with ExitStack() as stack:
            sandboxes = [stack.enter_context(Sandbox(runtime, path)) for path in paths.values()]
            medians = [float(np.median(times)) for times in alternate(sandboxes, seconds)]
            for (name, change), sandbox, median in zip(changes.items(), sandboxes, medians, strict=True):
                ratio, pieces = median / medians[0], len(sandbox.pieces or [])
                print(f"| {name} | {runtime.name} | {ratio:.2f} x | {pieces} | {change:.4f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures custom operators against what does the same.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/benchmarks"))
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure each")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for measurement in (print_log_mel, print_nodes, print_layer_norm):
        measurement(options.folder, options.seconds)


if __name__ == "__main__":
    main()
