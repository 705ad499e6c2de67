"""Predicts for as long as it is told, in a process that holds nothing else: what ``runtime.py`` compares with.

    python benchmarks/turns.py bare MODULE MODEL THREADS       # invoke alone; no tensor is filled or read
    python benchmarks/turns.py plain MODULE MODEL THREADS VIDEO    # decode, resize, invoke, as one writes it by hand
    python benchmarks/turns.py mediapipe MODEL VIDEO           # its ImageClassifier in video mode
    python benchmarks/turns.py mediapipe-memory MODEL VIDEO    # the same on frames that were decoded before

Answers each line with a number of seconds by one with how often it predicted in so long, and how long that was. Runs in
any Python that has what is compared.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np  # that of TFLite needs it

# Frames that are kept in memory.
KEPT = 30


def interpreter(module: str, model: str, threads: str) -> Any:
    made = importlib.import_module(module).Interpreter(model, num_threads=int(threads))
    made.allocate_tensors()
    return made


def decoded(video: str) -> Iterator[Any]:
    """The frames of the video in BGR, over and over."""
    import cv2

    while True:
        capture = cv2.VideoCapture(video)
        while (frame := capture.read())[0]:
            yield frame[1]


def bare(module: str, model: str, threads: str) -> Callable[[], object]:
    invoke: Callable[[], object] = interpreter(module, model, threads).invoke
    return invoke


def plain(module: str, model: str, threads: str, video: str) -> Callable[[], object]:
    import cv2

    tflite, frames = interpreter(module, model, threads), decoded(video)
    given, result = tflite.get_input_details()[0], tflite.get_output_details()[0]
    size_wh = tuple(map(int, given["shape"][2:0:-1]))

    def predict() -> object:
        image_rgb = cv2.cvtColor(cv2.resize(next(frames), size_wh), cv2.COLOR_BGR2RGB)
        tflite.set_tensor(given["index"], image_rgb[np.newaxis].astype(given["dtype"]))
        tflite.invoke()
        return tflite.get_tensor(result["index"]).argmax()

    return predict


def mediapipe(model: str, video: str, *, kept: int = 0) -> Callable[[], object]:
    import cv2
    import mediapipe as mp
    from mediapipe.tasks.python import BaseOptions, vision

    options = vision.ImageClassifierOptions(
        base_options=BaseOptions(model_asset_path=model), running_mode=vision.RunningMode.VIDEO, max_results=3
    )
    classifier = vision.ImageClassifier.create_from_options(options)
    frames, numbers = decoded(video), itertools.count()
    if kept:
        frames = itertools.cycle([next(frames) for _ in range(kept)])

    def predict() -> object:
        image_rgb = cv2.cvtColor(next(frames), cv2.COLOR_BGR2RGB)
        image = mp.Image(image_format=mp.ImageFormat.SRGB, data=image_rgb)
        return classifier.classify_for_video(image, 33 * next(numbers)).classifications

    return predict


def main() -> None:
    what, *arguments = sys.argv[1:]
    if what.startswith("mediapipe"):
        predict = mediapipe(*arguments, kept=KEPT if what == "mediapipe-memory" else 0)
    else:
        predict = bare(*arguments) if what == "bare" else plain(*arguments)
    predict()
    print("ready", flush=True)
    for line in sys.stdin:
        count, began_s = 0, time.perf_counter()
        while (now_s := time.perf_counter()) - began_s < float(line):
            predict()
            count += 1
        print(count, now_s - began_s, flush=True)


if __name__ == "__main__":
    main()
