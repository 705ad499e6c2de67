"""Runs a model on recorded input tensors in one TFLite runtime: ``replay.py MODULE MODEL.tflite IN.npy OUT.npy``.

A process of its own, started by path: a runtime that crashes on the model is then a finding, and the Python that runs
it needs that runtime and NumPy only, not EdgeKit. Progress goes to standard output, a count a line.
"""

import sys

# This folder's modules must not be taken for others of the same name.
sys.path.pop(0)

import importlib

import numpy as np


def main(module: str, model: str, inputs: str, outputs: str) -> None:
    interpreter = importlib.import_module(module).Interpreter(model_path=model, num_threads=1)
    interpreter.allocate_tensors()
    (given,), (made,) = interpreter.get_input_details(), interpreter.get_output_details()
    tensors = np.load(inputs, mmap_mode="r")
    results = np.empty((len(tensors), *made["shape"][1:]), made["dtype"])
    for number, tensor in enumerate(tensors):
        interpreter.set_tensor(given["index"], tensor[None])
        interpreter.invoke()
        results[number] = interpreter.get_tensor(made["index"])[0]
        print(number + 1, flush=True)  # noqa: T201
    np.save(outputs, results)


main(*sys.argv[1:])
