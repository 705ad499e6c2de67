"""Time of each kind of operator in int8 against float32: where a quantized graph gains, and where it does not.

    python benchmarks/operators.py FOLDER [--instructions]

FOLDER is that of benchmarks/recipes.py. Each operator is cut out of its graph and runs alone, on one thread of LiteRT
with XNNPACK; what the cheapest of them takes, which is the cost of a call, is taken off.

With --instructions they are counted by valgrind, whose processor has AVX2 and no VNNI: the kernels are those of a CPU
without 8-bit dot products, whatever this one has.
"""

from __future__ import annotations

import argparse
import copy
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from edgekit.converters import rewrite
from edgekit.flatbuffer import Model

ROUNDS, TURN_S = 9, 0.003


def alone(model: Any, position: int) -> bytes:
    """A flatbuffer of the one operator at ``position``."""
    operator, graph = copy.copy(model.subgraphs[0].operators[position]), schema.SubGraphT()
    cut = schema.ModelT()
    cut.version, cut.operatorCodes, cut.buffers, cut.subgraphs = 3, model.operatorCodes, [schema.BufferT()], [graph]
    graph.tensors, graph.operators, graph.inputs = [], [operator], []

    def move(index: int, is_input: bool) -> int:
        if index < 0:
            return -1
        tensor = copy.copy(model.subgraphs[0].tensors[index])
        buffer = model.buffers[tensor.buffer]
        graph.tensors.append(tensor)
        if buffer.data is None or not len(buffer.data):
            tensor.buffer = 0
            if is_input:
                graph.inputs.append(len(graph.tensors) - 1)
        else:
            cut.buffers.append(buffer)
            tensor.buffer = len(cut.buffers) - 1
        return len(graph.tensors) - 1

    operator.inputs = np.array([move(int(index), True) for index in operator.inputs], np.int32)
    operator.outputs = np.array([move(int(index), False) for index in operator.outputs], np.int32)
    graph.outputs, graph.inputs = operator.outputs, np.array(graph.inputs, np.int32)
    return rewrite.save(cut)


def load(content: bytes) -> Any:
    interpreter = Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    for given in interpreter.get_input_details():
        noise = np.random.default_rng(0).uniform(-1, 1, given["shape"])
        interpreter.set_tensor(
            given["index"], (noise * (1 if given["dtype"] == np.float32 else 100)).astype(given["dtype"])
        )
    return interpreter


def microseconds(interpreters: list[Any]) -> list[float]:
    """The best of several turns of each, all taking turns."""
    best = [float("inf")] * len(interpreters)
    for _ in range(ROUNDS):
        for number, interpreter in enumerate(interpreters):
            count, started_s = 0, time.perf_counter()
            while (elapsed_s := time.perf_counter() - started_s) < TURN_S:
                interpreter.invoke()
                count += 1
            best[number] = min(best[number], 1e6 * elapsed_s / count)
    return best


def parts(folder: Path, recipe: str) -> dict[str, list[bytes]]:
    """Kind of operator -> a flatbuffer of each."""
    content = (folder / f"{recipe}.tflite").read_bytes()
    model, found = rewrite.load(content), defaultdict(list)
    for position, operator in enumerate(Model(content).operators):
        found[operator.name].append(alone(model, position))
    return found


def by_time(folder: Path, recipe: str) -> dict[str, float]:
    """Kind of operator -> microseconds of all of them, less what a call costs."""
    of_kind = parts(folder, recipe)
    times = microseconds([load(content) for contents in of_kind.values() for content in contents])
    call, remaining = min(times), iter(times)
    return {kind: sum(next(remaining) - call for _ in contents) for kind, contents in of_kind.items()}


def by_instructions(folder: Path, recipe: str) -> dict[str, float]:
    """Kind of operator -> thousands of instructions of all of them, counted by valgrind."""
    found = {}
    for kind in parts(folder, recipe):
        counts = []
        for invocations in (2, 102):
            command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__]
            options = [str(folder), "--invoke", recipe, kind, str(invocations)]
            same = {**os.environ, "PYTHONHASHSEED": "0"}
            said = subprocess.run([*command, *options], capture_output=True, text=True, check=True, env=same).stderr
            counts.append(int(re.findall(r"Collected : (\d+)", said)[0]))
        found[kind] = (counts[1] - counts[0]) / 100 / 1e3
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures each kind of operator in int8 against float32.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--instructions", action="store_true", help="count instructions under valgrind")
    parser.add_argument("--invoke", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.invoke:
        recipe, kind, invocations = arguments.invoke
        for interpreter in [load(content) for content in parts(arguments.folder, recipe)[kind]]:
            for _ in range(int(invocations)):
                interpreter.invoke()
        return
    measure, unit = (by_instructions, "thousand instructions") if arguments.instructions else (by_time, "us")
    floats, integers = (measure(arguments.folder, recipe) for recipe in ("float32", "int8"))
    print(f"| operator | float32, {unit} | int8, {unit} | int8 against float32 |\n|---|---|---|---|")
    rows = [(kind, floats.get(kind, 0.0), integers.get(kind, 0.0)) for kind in {**floats, **integers}]
    rows.append(("all", sum(floats.values()), sum(integers.values())))
    for kind, of_float, of_integer in sorted(rows, key=lambda row: -max(row[1:])):
        ratio = f"{of_integer / of_float:.2f} x" if of_float >= 1 <= of_integer else ""
        print(f"| {kind} | {of_float:.0f} | {of_integer:.0f} | {ratio} |")


if __name__ == "__main__":
    main()
