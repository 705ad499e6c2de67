"""Writes a small Keras classifier that names a picture's colour: red, green or blue. Its weights are set by hand."""

from __future__ import annotations

import sys

import keras
import numpy as np


def build(channels: int = 3, activation: str | None = "softmax") -> keras.Model:
    classes = 3
    given = keras.Input((32, 32, channels))
    x = keras.layers.Conv2D(classes, 3, strides=2, padding="same", activation="relu6", name="conv")(given)
    x = keras.layers.GlobalAveragePooling2D()(x)
    model = keras.Model(given, keras.layers.Dense(classes, activation=activation, name="scores")(x))
    kernel = np.zeros((3, 3, channels, classes), np.float32)
    for colour in range(classes):
        kernel[1, 1, colour % channels, colour] = 2
    model.get_layer("conv").set_weights([kernel, np.ones(classes, np.float32)])
    model.get_layer("scores").set_weights([3 * np.eye(classes, dtype=np.float32), np.zeros(classes, np.float32)])
    return model


if __name__ == "__main__":
    build().save(sys.argv[1])
