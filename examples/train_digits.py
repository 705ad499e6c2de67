"""Trains a MobileNetV3-Small on scikit-learn's handwritten digits and lays out what `edgekit convert` and `run` want.

    python examples/train_digits.py FOLDER [--epochs N] [--size PIXELS] [--start WEIGHTS]

Writes into FOLDER: digits.keras, labels.txt, calibration/ (200 training images), validation/ (360 held-out images, a
folder per class), held-out.avi (the same 360 as a video) and held-out.txt (what each of its frames shows).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cv2
import keras
import numpy as np
import tensorflow as tf
from sklearn.datasets import load_digits

HELD_OUT, BATCH = 360, 48


def load_images(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 digits of 8 x 8 as (n, size_px, size_px, 3) uint8, shuffled, and their classes."""
    digits = load_digits()
    small = (digits.images * (255 / 16)).astype(np.uint8)
    large = np.stack([cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_CUBIC) for image in small])
    order = np.random.default_rng(0).permutation(len(large))
    return np.repeat(large[..., None], 3, axis=3)[order], digits.target[order]


def train(
    images: np.ndarray, classes: np.ndarray, epochs: int, start: Path | None = None, max_s: float = 180.0
) -> keras.Model:
    """A model over pixels scaled to -1..1, from the weights in ``start`` if given; stops early at ``max_s``."""
    keras.utils.set_random_seed(0)
    size_px = images.shape[1]
    model = keras.applications.MobileNetV3Small(
        input_shape=(size_px, size_px, 3), weights=None, classes=10, include_preprocessing=False, dropout_rate=0.1
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the default, 0.999, wants tens of thousands of steps
    if start:
        model.load_weights(start)
    steps = len(images) // BATCH
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, max(epochs * steps - 60, steps), warmup_target=2e-3, warmup_steps=60
    )
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-4)
    optimizer.build(model.trainable_variables)

    # By hand: fit() compiles with XLA, which takes longer than the training on a small CPU.
    @tf.function(jit_compile=False)
    def step(batch: tf.Tensor, truth: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(truth, model(batch, training=True)))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return loss

    random, started_s = np.random.default_rng(0), time.monotonic()
    reach_px = size_px // 12
    for epoch in range(1, epochs + 1):
        order = random.permutation(len(images))
        for start in range(0, steps * BATCH, BATCH):
            chosen = order[start : start + BATCH]
            shifted = np.roll(images[chosen], random.integers(-reach_px, reach_px + 1, 2), (1, 2))
            loss = step(shifted.astype(np.float32) / 127.5 - 1, classes[chosen])
        elapsed_s = time.monotonic() - started_s
        print(f"epoch {epoch}/{epochs}: loss {float(loss):.3f}, {elapsed_s:.0f} s", flush=True)
        if elapsed_s * (epoch + 1) / epoch > max_s:
            print(f"stopping here: another epoch would take longer than {max_s:g} s")
            break
    return model


def write(folder: Path, model: keras.Model, images: np.ndarray, classes: np.ndarray) -> None:
    model.save(folder / "digits.keras")
    Path(folder, "labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
    Path(folder, "held-out.txt").write_text("".join(f"{digit}\n" for digit in classes[-HELD_OUT:]))
    (folder / "calibration").mkdir(exist_ok=True)
    for number, image in enumerate(images[:200]):
        cv2.imwrite(str(folder / "calibration" / f"{number:03}.png"), image)
    video = cv2.VideoWriter(str(folder / "held-out.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, images.shape[2:0:-1])
    for number, (image, digit) in enumerate(zip(images[-HELD_OUT:], classes[-HELD_OUT:], strict=True)):
        (folder / "validation" / str(digit)).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / "validation" / str(digit) / f"{number:03}.png"), image)
        video.write(image)
    video.release()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Trains a MobileNetV3-Small on handwritten digits.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--size", type=int, default=64, help="side of the images, px")
    parser.add_argument("--start", type=Path, help="weights of an earlier training, of whatever size")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    images, classes = load_images(arguments.size)
    model = train(images[:-HELD_OUT], classes[:-HELD_OUT], arguments.epochs, arguments.start)
    write(arguments.folder, model, images, classes)
