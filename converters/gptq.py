"""Rounding of a convolution's weights to 8 bits so that its output, not each weight, comes out right.

Frantar et al., "GPTQ: Accurate post-training quantization for generative pre-trained transformers" (2023): the weights
are rounded one input after the other, and the error of each is made up for by those not rounded yet, as far as the
inputs resemble each other. Adjacent patches of a spectrogram do: it is worth 10 dB over rounding each weight by itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

Array = npt.NDArray[Any]

# Added to the diagonal of the covariance, in parts of its mean, so that inputs that never vary do not blow up.
DAMPING = 0.01
# More patches of an input make no better covariance.
MAX_PATCHES = 6_000


def covariance(inputs: Iterable[Array], others: Iterable[Array] | None = None, size: int = 3) -> tuple[Array, Array]:
    """Covariance, and mean, of the patches that a ``size`` x ``size`` convolution sees.

    Args:
        inputs: tensors (1, height, width, channels), padded by the convolution (``SAME``).
        others: tensors of the same shapes: the covariance is that of the patches of ``inputs`` with those of these.

    Returns:
        (n, n) and (n,) with n = size * size * channels, in the order of a kernel of shape (size, size, channels, out).
    """
    products: Any = 0.0
    totals: list[Any] = [0.0, 0.0]
    origins: list[Any] = []
    count = 0
    for number, pair in enumerate(zip(inputs, inputs if others is None else others, strict=True)):
        patches = []
        for x in pair[: 1 if others is None else 2]:
            of_x = tf.image.extract_patches(x, [1, size, size, 1], [1, 1, 1, 1], [1, 1, 1, 1], "SAME")
            of_x = tf.reshape(of_x, (-1, of_x.shape[-1]))
            step = -(-of_x.shape[0] // MAX_PATCHES)
            patches.append(of_x[number % step :: step])
        # Counted from a patch of the middle: the squares of what all have in common would drown the rest in float32.
        origins = origins or [tf.reduce_mean(p, 0) for p in patches]
        patches = [p - origin for p, origin in zip(patches, origins, strict=True)]
        products = products + tf.cast(tf.matmul(patches[0], patches[-1], transpose_a=True), tf.float64)
        totals = [
            total + tf.reduce_sum(tf.cast(p, tf.float64), 0)
            for total, p in zip(totals, (patches[0], patches[-1]), strict=True)
        ]
        count += int(patches[0].shape[0])
    mean, of_others = (np.asarray(total) / count for total in totals)
    return np.asarray(products) / count - np.outer(mean, of_others), mean + np.asarray(origins[0], np.float64)


def scales(kernel: Array) -> Array:
    """Of each output channel of ``kernel`` (height, width, in, out), so that its largest weight becomes 127."""
    largest = np.abs(kernel).max((0, 1, 2))
    return np.asarray(np.where(largest > 0, largest, 1.0) / 127.0, np.float32)


def quantize(kernel: Array, of_inputs: Array) -> Array:
    """``kernel`` (height, width, in, out) -> int8 of the same shape; the weights are these times :func:`scales`.

    Args:
        of_inputs: as :func:`covariance` gives it.
    """
    scale = scales(kernel).astype(np.float64)
    weights = kernel.reshape(-1, kernel.shape[3]) / scale
    # Of inputs that do not vary at all, as silence, there is nothing to make up for.
    damped = of_inputs + (DAMPING * np.diag(of_inputs).mean() or 1.0) * np.eye(len(of_inputs))
    # Those that vary most first: their errors are the costliest, and there is most left to make up for them.
    order = np.argsort(-np.diag(damped), kind="stable")
    weights, damped = weights[order], damped[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    rounded = np.empty_like(weights)
    for start in range(0, len(weights), 128):  # in blocks, or the memory of the rest would be swept for each row
        block = slice(start, min(start + 128, len(weights)))
        errors = np.empty_like(weights[block])
        for number in range(block.start, block.stop):
            rounded[number] = np.clip(np.round(weights[number]), -127, 127)
            error = errors[number - start] = (weights[number] - rounded[number]) / upper[number, number]
            rest = slice(number + 1, block.stop)
            weights[rest] -= np.outer(upper[number, rest], error)
        weights[block.stop :] -= upper[block, block.stop :].T @ errors
    result = np.empty(rounded.shape, np.int8)
    result[order] = rounded
    return result.reshape(kernel.shape)
