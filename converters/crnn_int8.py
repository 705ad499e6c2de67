"""A CRNN with all four convolutions in 8 bits, activations too, and what it takes to keep its answers.

Plain 8 bits leave 25 dB of signal to noise before the GRUs, and it takes 40 for most clips to keep their tags. Here
every activation is a number in 0..1 in steps of 1/255, and the weights around it carry all scales:

- ELU(x) is taken for ``max(x, -1)``, which differs by at most 0.37 where the largest is 500, and the next weights are
  refitted to the difference. Below, ``x + 1`` is kept, so that nothing is negative.
- Each channel has its own range (equalization): ReLU and max-pooling do not mind a factor, and the next weights take it
  up.
- Where 255 steps are too few, a channel is cut into slices: ranges one above the other, each with 255 steps of its
  own, which the next convolution adds up. The lower slices, where most values are, are finer.
- The 1 that is in every channel is taken off again by a channel of ones, which the padding of the next convolution
  makes 0 outside. A bias could not: at the borders fewer weights see it.
- Weights are rounded by :mod:`edgekit.converters.gptq`, all slices together, and biases keep the mean of each output.
  The first GRU's are refitted to what comes out.

The GRUs and the tags stay in float.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from edgekit.converters import crnn, crnn_graph, gptq, rewrite
from edgekit.converters.crnn_graph import Folded

Array = npt.NDArray[Any]

# Slices of the input, of the same size.
INPUT_SLICES = 8
# Of each block's output the slices, as parts of the channel's range.
SLICES: tuple[tuple[float, ...], ...] = ((1 / 4, 3 / 4), (1.0,), (1 / 3, 2 / 3), (1 / 7, 2 / 7, 4 / 7))
# What is added to the largest value that calibration saw, for the louder that it did not see.
INPUT_HEADROOM = 1.3
HEADROOM = (1.6, 1.5, 1.5, 1.6)
# No channel's range is taken for less than this part of the widest one's.
FLOORS = (0.2, 0.3, 0.5, 0.5)
# Of the refit, in parts of the mean variance: how hard it holds on to the given weights.
RIDGE = 0.01
# The same for the first GRU: one of these is chosen.
GRU_RIDGES = (0.01, 0.1, 1.0)
# How much more a row of the given clips, of so many at most, counts than one of the others.
GIVEN_WEIGHTS = (1.0, 10.0, 100.0)
MAX_GIVEN = 6
# What one runtime makes of the features beside another, in parts of their size: 58 dB.
RUNTIME_NOISE, NOISY_TRIALS = 10 ** (-58 / 20), 6
# Made of those given: the last convolution has 2,313 inputs whose covariance must be known.
CLIPS = 24


@dataclass(frozen=True)
class Slices:
    """How the values of a tensor's channels are cut: ``start`` and ``size`` of each slice, (slices, channels)."""

    start: Array
    size: Array

    def __call__(self, x: Array) -> Array:
        """(n, h, w, channels) -> 8-bit slices in 0..1, (n, h, w, slices * channels)."""
        cut = [(x - start) / size for start, size in zip(self.start, self.size, strict=True)]
        return np.asarray(np.round(np.clip(np.concatenate(cut, -1), 0, 1) * 255) / 255, np.float32)

    def widen(self, kernel: Array) -> Array:
        """``kernel``, (3, 3, channels, out), for the slices instead of the values."""
        return np.concatenate([kernel * size[:, None] for size in self.size], 2)


@dataclass(frozen=True)
class Layer:
    """A convolution on slices, and how its outputs are cut.

    Attributes:
        integers: int8, (3, 3, in, out).
        scale, bias: of each output channel. The bias has the 1 that keeps outputs from being negative.
        cut: of its pooled outputs.
    """

    integers: Array
    scale: Array
    bias: Array
    cut: Slices


def convert(folded: Folded, calibration: Array) -> bytes:
    """The int8 flatbuffer of a window: float log-mel levels (1, bands, frames, 1) -> float scores (1, tags).

    Args:
        calibration: log-mel levels, (n, bands, frames, 1), from which all ranges come.
    """
    folded, of_input, layers = plan(folded, calibration)
    converter = crnn_graph.converter(_graph(folded, of_input, layers))
    # The ranges are in the graph, as fake quantization: there is no representative dataset.
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    model = rewrite.load(bytes(converter.convert()))
    rewrite.share_buffers(model)  # a convolution that cuts its output into slices is there once for each
    return rewrite.save(model)


def augment(clips: Array, count: int) -> Array:
    """``clips``, (n, bands, frames, 1), and made from them as many more as ``count`` wants: moved in time and in pitch,
    louder, quieter, brighter and darker. A few clips then fix ranges that others keep to."""
    random = np.random.default_rng(0)
    made = [*clips[np.linspace(0, len(clips) - 1, min(count, len(clips))).round().astype(int)]]
    bands = clips.shape[1]
    while len(made) < count:
        clip = np.roll(clips[len(made) % len(clips)], random.integers(clips.shape[2]), axis=1)
        lowest, highest = clip.min(), clip.max()
        bands_up = np.arange(bands) - random.integers(-6, 7)
        clip = clip[np.clip(bands_up, 0, bands - 1)]
        clip = clip + random.uniform(-6, 6) + random.uniform(-8, 8) * np.linspace(-1, 1, bands)[:, None, None]
        made.append(np.maximum(clip, clip.max() - (highest - lowest)))
    return np.stack(made).astype(np.float32)


def plan(folded: Folded, calibration: Array) -> tuple[Folded, Slices, list[Layer]]:
    """The model with its first GRU refitted to what 8 bits make of the features, how the input is cut, and the four
    layers."""
    exact = [np.asarray(folded.window(clip[None])) for clip in augment(calibration, CLIPS)]
    lowest, highest = min(map(np.min, exact)), max(map(np.max, exact))
    range_ = INPUT_HEADROOM * max(highest - lowest, 1e-3)
    size = np.full((INPUT_SLICES, 1), range_ / INPUT_SLICES)
    of_input = cut = Slices((lowest + highest - range_) / 2 + np.cumsum(size, 0) - size, size)
    # The border is that of the padding, which in slices is not all zeros.
    slices = [of_input(np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))) for x in exact]
    # What the layers would make of the clips without rounding: the weights of each are refitted to it.
    nearly = exact
    layers: list[Layer] = []
    for number, folded_kernel in enumerate(folded.kernels):
        padding = "SAME" if number else "VALID"
        kernel, bias = folded_kernel.astype(np.float64), folded.biases[number]
        if number:
            kernel, bias = _refit(kernel, bias, nearly, exact)
            wide = np.concatenate([cut.widen(kernel), -kernel.sum(2, keepdims=True)], 2)
        else:
            wide = cut.widen(kernel)
        integers, scale = gptq.quantize(wide, gptq.covariance(slices)[0])
        # Pooling does not mind a bias.
        pooled, mean = _convolve(slices, integers.astype(np.float32) * scale, padding, number)
        exactly, wanted = _convolve(exact, folded_kernel, "SAME", number)
        refitted, _ = _convolve(nearly, _float(kernel), "SAME", number)
        # The mean of each output stays what it was; the 1 keeps it from being negative.
        its_bias = wanted + folded.biases[number] - mean + 1
        pooled = [np.maximum(x + _float(its_bias), 0) for x in pooled]
        widest = HEADROOM[number] * np.max([x.max((0, 1, 2)) for x in pooled], 0)
        widest = np.maximum(widest, FLOORS[number] * max(widest.max(), 1e-3))
        sizes = np.array(SLICES[number])[:, None] * widest
        cut = Slices(np.cumsum(sizes, 0) - sizes, sizes)
        layers.append(Layer(integers, scale, its_bias, cut))
        slices = [np.pad(cut(x), ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=1) for x in pooled]
        nearly = [np.maximum(x + _float(bias), -1) for x in refitted]
        exact = [np.asarray(tf.nn.elu(x + folded.biases[number])) for x in exactly]
    # The ones that no convolution follows are left out.
    features = [_features(cut, x[..., :-1]) for x in slices]
    return _refit_gru(folded, features, exact, min(len(calibration), MAX_GIVEN)), of_input, layers


def _features(cut: Slices, slices: Any) -> Any:
    """What the last slices, (n, h, w, slices * channels), stand for: (n, h, w, channels)."""
    parts = np.split(slices, len(cut.size), -1)
    return sum(part * _float(size) for part, size in zip(parts, cut.size, strict=True)) - 1.0


def _refit_gru(folded: Folded, features: list[Array], exact: list[Array], given: int) -> Folded:
    """``folded`` with its first GRU refitted, so that it makes of ``features`` what it made of the ``exact`` ones:
    least squares, held more or less firmly to what it was. It costs nothing at run time.

    Where a gate is about to flip, half a decibel more or less says little: of several the one is taken that changes the
    scores least, those of the ``given`` clips, which come first, as much as those of all.

    Args:
        features, exact: of each clip, (1, h, steps, channels).
    """
    its, wanted = (np.concatenate([sequence[0] for sequence in _sequences(x)]).astype(float) for x in (features, exact))
    (kernel, recurrent_kernel, bias), *others = folded.grus
    rows = len(its) // len(features)  # of each clip
    candidates = [folded]
    for firmness, weight in itertools.product(GRU_RIDGES, GIVEN_WEIGHTS):
        weights = np.where(np.arange(len(its)) < given * rows, weight, 1.0)[:, None]
        weights /= weights.mean()
        mean, of_wanted = (weights * its).mean(0), (weights * wanted).mean(0)
        centred, errors = its - mean, wanted - of_wanted - (its - mean)
        ridge = firmness * np.square(centred).sum(0).mean() * np.eye(centred.shape[1])
        change = np.linalg.solve(centred.T @ (weights * centred) + ridge, centred.T @ (weights * errors))
        refitted = kernel + change @ kernel
        first = _float(refitted), recurrent_kernel, _float(bias + of_wanted @ kernel - mean @ refitted)
        candidates.append(dataclasses.replace(folded, grus=(first, *others)))
    # The runtimes round otherwise in places: a clip that keeps its scores by a hair is to keep them with noise too.
    random = np.random.default_rng(0)
    noisy = [
        [x + random.normal(0, RUNTIME_NOISE * np.sqrt(np.square(x).mean()), x.shape) for x in features[:given]]
        for _ in range(NOISY_TRIALS)
    ]
    expected = _scores(folded, exact)
    costs = []
    for candidate in candidates:
        changed = np.abs(_scores(candidate, features) - expected).max(1)
        of_given = [np.abs(_scores(candidate, trial) - expected[:given]).max(1).mean() for trial in noisy]
        costs.append(changed.mean() + np.mean(of_given))
    return candidates[int(np.argmin(costs))]


def _scores(folded: Folded, features: list[Array]) -> Array:
    return np.concatenate([crnn_graph.scores(folded, sequence) for sequence in _sequences(features)])


def _sequences(features: list[Array]) -> list[Array]:
    return [np.asarray(crnn_graph.sequence(_float(x))) for x in features]


def _convolve(inputs: list[Array], kernel: Array, padding: str, number: int) -> tuple[list[Array], Array]:
    """The pooled outputs of a convolution without bias, and the mean of each output before pooling."""
    pool, pooled, means = crnn.POOLS[number], [], []
    for x in inputs:
        y = tf.nn.conv2d(x, kernel, 1, padding)
        means.append(np.asarray(tf.reduce_mean(y, (0, 1, 2)), np.float64))
        pooled.append(np.asarray(tf.nn.max_pool2d(y, pool, pool, "VALID")))
    return pooled, np.mean(means, 0)


def _refit(kernel: Array, bias: Array, nearly: list[Array], exact: list[Array]) -> tuple[Array, Array]:
    """``kernel`` and ``bias`` changed a little, so that they make of the inputs ``nearly`` what they made of ``exact``:
    least squares, held to what they were by ``RIDGE``."""
    own, mean = gptq.covariance(nearly)
    crossed, _ = gptq.covariance(nearly, exact)
    _, wanted = gptq.covariance(exact)
    ridge = RIDGE * np.diag(own).mean() * np.eye(len(own))
    weights = kernel.reshape(len(own), -1)
    refitted = np.linalg.solve(own + ridge, (crossed + ridge) @ weights)
    return refitted.reshape(kernel.shape), bias + wanted @ weights - mean @ refitted


def _graph(folded: Folded, of_input: Slices, layers: list[Layer]) -> Any:
    """The TensorFlow graph, its ranges as fake quantization."""

    def graph(log_mel: Any) -> dict[str, Any]:
        x = tf.pad(folded.window(log_mel), [[0, 0], [1, 1], [1, 1], [0, 0]])
        x = _in_8_bits((x - _float(of_input.start[:, 0])) / _float(of_input.size[:, 0]))
        for number, layer in enumerate(layers):
            pool, last = crnn.POOLS[number], number == len(layers) - 1
            parts = []
            for integers, scale, bias in _convolutions(layer, last, share=number > 1):
                y = tf.nn.conv2d(x, _weights(integers, scale), 1, "SAME" if number else "VALID") + bias
                parts.append(_in_8_bits(tf.nn.max_pool2d(_in_8_bits(tf.nn.relu(y)), pool, pool, "VALID")))
            if not last and number > 1:
                parts.append(_in_8_bits(tf.ones((*parts[0].shape[:3], 1))))
            x = tf.concat(parts, -1) if not last and len(parts) > 1 else parts[0]
        cut = layers[-1].cut
        features = sum(part * _float(size) for part, size in zip(parts, cut.size, strict=True)) - 1.0
        return {"scores": crnn_graph.scores(folded, crnn_graph.sequence(features))}

    return crnn_graph.traced(graph, log_mel=folded.shape)


def _convolutions(layer: Layer, last: bool, share: bool) -> list[tuple[Array, Array, Array]]:
    """Weights, their scale and biases of one convolution for all slices and the ones, or, where they ``share`` their
    weights, of one for each slice."""
    each = [
        (layer.integers, _float(layer.scale / size), _float((layer.bias - start) / size))
        for start, size in zip(layer.cut.start, layer.cut.size, strict=True)
    ]
    if share or last:
        return each
    ones = np.zeros((*layer.integers.shape[:3], 1), np.int8), _float([1.0]), _float([1.0])
    integers, scale, bias = zip(*each, ones, strict=True)
    return [(np.concatenate(integers, 3), np.concatenate(scale), np.concatenate(bias))]


def _weights(integers: Array, scale: Array) -> Any:
    return tf.quantization.fake_quant_with_min_max_vars_per_channel(
        tf.constant(integers.astype(np.float32) * scale), -127 * scale, 127 * scale, narrow_range=True
    )


def _in_8_bits(x: Any) -> Any:
    return tf.quantization.fake_quant_with_min_max_args(x, 0.0, 1.0)


def _float(values: Any) -> Array:
    return np.asarray(values, np.float32)
