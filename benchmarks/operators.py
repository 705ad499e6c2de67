"""Time of each kind of operator in int8 against float32: where a quantized graph gains, and where it does not.

    python benchmarks/operators.py FOLDER

FOLDER is that of benchmarks/recipes.py. Each operator is cut out of its graph and runs alone, on one thread of LiteRT
with XNNPACK; what the cheapest of them takes, which is the cost of a call, is taken off.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections import defaultdict
from itertools import chain
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures each kind of operator in int8 against float32.")
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    sums: dict[str, dict[str, list[float]]] = {}
    first: dict[str, float] = {}
    for recipe in ("float32", "int8"):
        content = (folder / f"{recipe}.tflite").read_bytes()
        model, names = rewrite.load(content), [operator.name for operator in Model(content).operators]
        times = microseconds([load(alone(model, position)) for position in range(len(names))])
        call = min(times)
        first[recipe] = times[0] - call
        sums[recipe] = defaultdict(list)
        for name, taken in zip(names, times, strict=True):
            sums[recipe][name].append(taken - call)
    print("| operator | float32: count, us | int8: count, us | int8 against float32 |\n|---|---|---|---|")
    kinds = sorted({*sums["float32"], *sums["int8"]}, key=lambda kind: -sum(sums["float32"][kind]))
    rows = [(kind, sums["float32"][kind], sums["int8"][kind]) for kind in kinds]
    rows.append(("all", *(list(chain(*sums[recipe].values())) for recipe in ("float32", "int8"))))
    rows.append(("the first CONV_2D", [first["float32"]], [first["int8"]]))
    for kind, floats, integers in rows:
        ratio = f"{sum(integers) / sum(floats):.2f} x" if sum(floats) > 0 else ""
        print(f"| {kind} | {len(floats)}, {sum(floats):.0f} | {len(integers)}, {sum(integers):.0f} | {ratio} |")


if __name__ == "__main__":
    main()
