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
# Scales that are tried, in parts of that which makes the largest weight 127.
SCALES = (1.0, 0.85, 0.7, 0.55)
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


def quantize(kernel: Array, of_inputs: Array) -> tuple[Array, Array]:
    """``kernel`` (height, width, in, out) as integers and the scale of each output channel.

    The scale is the best of a few: with a smaller one all weights are rounded less, but the largest are cut off.

    Args:
        of_inputs: as :func:`covariance` gives it.

    Returns:
        int8 of the kernel's shape, and float32 (out,): the weights are their product.
    """
    given = kernel.reshape(-1, kernel.shape[3]).astype(np.float64)
    largest = np.abs(given).max(0)
    scale = np.where(largest > 0, largest, 1.0) / 127 * np.array(SCALES)[:, None]  # (trials, out)
    scale = scale.astype(np.float32).astype(np.float64)
    weights = np.concatenate([given / of_trial for of_trial in scale], 1)
    # Of inputs that do not vary at all, as silence, there is nothing to make up for.
    damped = of_inputs + (DAMPING * np.diag(of_inputs).mean() or 1.0) * np.eye(len(of_inputs))
    # Those that vary most first: their errors are the costliest, and there is most left to make up for them.
    order = np.argsort(-np.diag(damped), kind="stable")
    rounded = np.empty_like(weights)
    rounded[order] = _round(weights[order], np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T)
    trials = rounded.reshape(len(given), *scale.shape)
    errors = [given - trials[:, trial] * scale[trial] for trial in range(len(scale))]
    best = np.argmin([np.sum(error * (damped @ error), 0) for error in errors], 0)
    channels = np.arange(kernel.shape[3])
    return trials[:, best, channels].astype(np.int8).reshape(kernel.shape), scale[best, channels].astype(np.float32)


def _round(weights: Array, upper: Array) -> Array:
    """``weights`` (in, channels) in integers; ``upper`` is the Cholesky factor of the inputs' inverse covariance."""
    weights, rounded = weights.copy(), np.empty_like(weights)
    for start in range(0, len(weights), 128):  # in blocks, or the memory of the rest would be swept for each row
        block = slice(start, min(start + 128, len(weights)))
        errors = np.empty_like(weights[block])
        for number in range(block.start, block.stop):
            rounded[number] = np.clip(np.round(weights[number]), -127, 127)
            error = errors[number - start] = (weights[number] - rounded[number]) / upper[number, number]
            rest = slice(number + 1, block.stop)
            weights[rest] -= np.outer(upper[number, rest], error)
        weights[block.stop :] -= upper[block, block.stop :].T @ errors
    return rounded
