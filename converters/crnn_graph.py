"""The TensorFlow Lite graph of a CRNN: of a whole window, or of the new frames of a stream.

It computes what the Keras model of :mod:`edgekit.converters.crnn` does, but for rounding: batch normalization is folded
into the convolutions, pooling goes before ELU (the larger of two is the larger after a monotone function), and the GRU
is unrolled, as TensorFlow's converter crashes on quantized loops (tensorflow issues 62281, 87468).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf

from edgekit.converters import crnn
from edgekit.errors import ConversionError

Array = npt.NDArray[np.float32]

# Frames of a call of the streaming graph: the pooling in time of all blocks but the last makes one column of them.
STEP = 24
# Of the last pooling, which takes so many columns.
LAST_POOL = crnn.POOLS[-1]
# Frames that a column needs on either side of its own.
CONTEXT = 33
# The tensor before the GRU, shape (1, steps, features).
FEATURES = "features"


@dataclass(frozen=True)
class Folded:
    """The weights of a CRNN as the graphs use them.

    Attributes:
        frames, num_mel_bins: of the window.
        axis: of the first batch normalization, 1 frequency or 2 time.
        scale, offset: what it does: ``x * scale + offset``, one for each band, or each frame of the padded window.
        kernels, biases: of the convolutions, (3, 3, in, out) and (out,), with their batch normalization.
        grus: of each GRU the kernel, the recurrent kernel and the bias, gates in the order z, r, h; those of z and r
            have the slope and the offset of the hard sigmoid in them.
        output: kernel and bias of the tags.
    """

    frames: int
    num_mel_bins: int
    axis: int
    scale: Array
    offset: Array
    kernels: tuple[Array, ...]
    biases: tuple[Array, ...]
    grus: tuple[tuple[Array, Array, Array], ...]
    output: tuple[Array, Array]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of the log-mel levels of a window."""
        return 1, self.num_mel_bins, self.frames, 1

    @property
    def columns(self) -> int:
        """Of a window before the last pooling."""
        return (self.frames + sum(crnn.padding(self.frames))) // STEP

    def normalize(self, x: Any) -> Any:
        """``x``, (n, bands, frames, 1), behind the first batch normalization, with what the padding becomes there on
        either side where the normalization is over time."""
        if self.axis == 1:
            shape = (1, -1, 1, 1)
            return x * self.scale.reshape(shape) + self.offset.reshape(shape)
        shape = (1, 1, -1, 1)
        before, after = crnn.padding(self.frames)
        inside = slice(before, len(self.scale) - after)
        x = tf.pad(x * self.scale[inside].reshape(shape), [[0, 0], [0, 0], [before, after], [0, 0]])
        return x + self.offset.reshape(shape)

    def window(self, x: Any) -> Any:
        """``x``, a window (n, bands, frames, 1), padded and behind the first batch normalization."""
        if self.axis == 1:
            x = tf.pad(x, [[0, 0], [0, 0], list(crnn.padding(self.frames)), [0, 0]])
        return self.normalize(x)


def fold(model: Any) -> Folded:
    """The weights of ``model``, which :func:`crnn.build` built."""

    def affine(name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        layer = model.get_layer(name)
        gamma, beta, mean, variance = (np.asarray(w, np.float64) for w in layer.get_weights())
        scale = gamma / np.sqrt(variance + layer.epsilon)
        return scale, beta - mean * scale

    def gru(kernel: Array, recurrent_kernel: Array, bias: Array) -> tuple[Array, Array, Array]:
        gates = slice(2 * len(recurrent_kernel))
        kernel, recurrent_kernel, bias = kernel.copy(), recurrent_kernel.copy(), bias.copy()
        for weights in (kernel, recurrent_kernel, bias):
            weights[..., gates] *= crnn.HARD_SIGMOID_SLOPE
        bias[gates] += 0.5
        return kernel, recurrent_kernel, bias

    scale, offset = affine("bn_0_freq")
    kernels, biases = [], []
    for number in range(1, 1 + len(crnn.POOLS)):
        kernel, bias = (np.asarray(w, np.float64) for w in model.get_layer(f"conv{number}").get_weights())
        its_scale, its_offset = affine(f"bn{number}")
        kernels.append((kernel * its_scale).astype(np.float32))
        biases.append((bias * its_scale + its_offset).astype(np.float32))
    axis = model.get_layer("bn_0_freq").axis
    _, num_mel_bins, frames, _ = model.inputs[0].shape
    return Folded(
        frames=frames,
        num_mel_bins=num_mel_bins,
        axis=int(axis[0] if isinstance(axis, (list, tuple)) else axis),
        scale=scale.astype(np.float32),
        offset=offset.astype(np.float32),
        kernels=tuple(kernels),
        biases=tuple(biases),
        grus=tuple(gru(*model.get_layer(name).get_weights()) for name in ("gru1", "gru2")),
        output=tuple(model.get_layer("output").get_weights()),
    )


def window(folded: Folded) -> Any:
    """The graph of a whole window: log-mel levels (1, bands, frames, 1) -> scores (1, tags)."""

    def graph(log_mel: Any) -> dict[str, Any]:
        return {"scores": scores(folded, _features(folded, log_mel))}

    return traced(graph, log_mel=folded.shape)


def halves(folded: Folded) -> tuple[Any, Any]:
    """The same graph in two: log-mel levels -> features (steps, features), and these -> scores."""

    def convolutions(log_mel: Any) -> dict[str, Any]:
        features = _features(folded, log_mel)
        return {FEATURES: tf.reshape(features, features.shape[1:])}

    def grus(features: Any) -> dict[str, Any]:
        return {"scores": scores(folded, features[None])}

    first = traced(convolutions, log_mel=folded.shape)
    return first, traced(grus, features=first.get_concrete_function().structured_outputs[FEATURES].shape)


def traced(graph: Callable[..., Any], **shapes: Any) -> Any:
    """``graph`` as a TensorFlow function of float32 tensors of these names and shapes."""
    specs = [tf.TensorSpec(shape, tf.float32, name=name) for name, shape in shapes.items()]
    return tf.function(graph, input_signature=specs, autograph=False)


def _features(folded: Folded, log_mel: Any) -> Any:
    x = tf.pad(folded.window(log_mel), [[0, 0], [1, 1], [1, 1], [0, 0]])
    for number in range(len(crnn.POOLS)):
        x = block(folded, number, x, "SAME" if number else "VALID")
    return sequence(x)


def converter(graph: Any) -> Any:
    """TensorFlow's converter of a graph that :func:`traced` made."""
    holder = tf.Module()  # keeps the constants alive
    holder.graph = graph
    return tf.lite.TFLiteConverter.from_concrete_functions([graph.get_concrete_function()], holder)


def stream(folded: Folded, *, exact: bool = False) -> Any:
    """The graph of ``STEP`` new frames: their log-mel levels and the states -> scores and the new states.

    Each block keeps the last two columns of what entered it, and convolves in time without padding. The columns before
    the last pooling are kept for as long as the window is, pooled in groups that end with the newest column, and the
    GRUs run over all groups each time. So the window has sound before and after it where the Keras model has padding.

    ``exact`` gives what the Keras model gives for the last ``frames`` frames: the first and the last group of a window
    are computed by themselves, with the padding. The first is computed when its frames have come, and kept until the
    window ends.

    Raises:
        ConversionError: the first batch normalization is over time, or the window is too short to be ``exact``.
    """
    if folded.axis != 1:
        raise ConversionError(
            "--streaming needs a model whose first batch normalization is over frequency",
            expected="--bn-axis frequency, and weights trained so",
            got="one over time, which is different for each position in the window",
            mend="train the model of edgekit.converters.crnn.build(bn_axis='frequency'), or leave out --streaming",
        )
    if exact and folded.columns <= 2 * LAST_POOL:
        raise ConversionError(
            f"--exact with a window of {folded.frames} frames",
            expected=f"more than {2 * LAST_POOL * STEP}",
            mend="leave out --exact, or take a longer window",
        )
    plan = _Plan(folded)

    def graph(log_mel: Any, *states: Any) -> dict[str, Any]:
        given = dict(zip(plan.states(exact), states, strict=True))
        made: dict[str, Any] = {}
        x = folded.normalize(log_mel)
        recent = x
        if exact:
            recent = tf.concat([given["recent"], x], 2)
            made["recent"] = recent[:, :, STEP:]
            x = recent[:, :, plan.history - plan.delay : plan.history - plan.delay + STEP]
        for number in range(len(crnn.POOLS)):
            x = tf.concat([given[f"block{number + 1}"], x], 2)
            made[f"block{number + 1}"] = x[:, :, -2:]
            x = block(folded, number, x, "stream")
        columns = tf.concat([given["columns"], sequence(x)], 1)
        made["columns"] = columns[:, 1:]
        if not exact:
            steps = _pool(columns)
        else:
            firsts = tf.concat([given["first_steps"], _edge(folded, recent, first=True)], 1)
            made["first_steps"] = firsts[:, 1:]
            last = _edge(folded, recent, first=False)
            steps = tf.concat([firsts[:, :1], _pool(columns[:, : folded.columns - 2 * LAST_POOL]), last], 1)
        return {"scores": scores(folded, steps), **{f"new_{name}": made[name] for name in given}}

    return traced(graph, log_mel=(1, folded.num_mel_bins, STEP, 1), **plan.states(exact))


def streaming_window_samples(frames: int, frame_hop_samples: int, *, exact: bool) -> int:
    """How much sound a prediction of the streaming graph needs: a whole number of calls."""
    before, after = crnn.padding(frames)
    columns = (frames + before + after) // STEP
    # The first columns hear the zeros that the states begin with.
    calls = -(-frames // STEP) if exact else columns + -(-2 * CONTEXT // STEP)
    return calls * STEP * frame_hop_samples


def reference(model: Any, log_mel: Array) -> Array:
    """What the streaming graph that is not ``exact`` must give after it was fed ``log_mel``, shape (1, bands, frames,
    1), frame by frame, as float TensorFlow computes it at one go: (1, tags). ``frames`` is the window that
    :func:`streaming_window_samples` tells, or longer."""
    folded = fold(model)
    x = folded.normalize(tf.constant(log_mel[:, :, -(folded.columns * STEP + 2 * CONTEXT) :]))
    for number in range(len(crnn.POOLS)):
        x = block(folded, number, x, "stream")
    return np.asarray(scores(folded, _pool(sequence(x))))


class _Plan:
    """How the windows of :func:`stream` lie on the grid of its columns, with ``exact``.

    Column n, made in call n (0 the first), is about frames ``24 n - 33 - delay`` to ``24 n - 10 - delay``. ``delay`` is
    such that the columns of a window which ends with a call lie on that grid.

    Attributes:
        delay: frames that the convolutions are behind.
        history: frames before those of the call that the first and the last group need.
        calls_to_end: from when the first group of a window can be computed to when the window ends.
        kept_columns: that later windows need.
    """

    def __init__(self, folded: Folded) -> None:
        before, after = crnn.padding(folded.frames)
        self.folded = folded
        self.delay = (before - CONTEXT + folded.frames) % STEP
        # Frames of sound that the first and the last group of a window are made of.
        needed = LAST_POOL * STEP + CONTEXT - min(before, after)
        reach = needed + (folded.frames - needed) % STEP
        self.history = reach - STEP
        self.calls_to_end = (folded.frames - reach) // STEP
        # Calls since the last column that is neither in the first nor in the last group.
        lag = (folded.frames + before - CONTEXT - self.delay) // STEP - folded.columns + LAST_POOL
        self.kept_columns = folded.columns - 2 * LAST_POOL + lag - 1

    def states(self, exact: bool) -> dict[str, tuple[int, ...]]:
        bands, channels, states = self.folded.num_mel_bins, 1, {}
        for number, (pool, its_channels) in enumerate(zip(crnn.POOLS, crnn.CHANNELS, strict=True), 1):
            states[f"block{number}"] = (1, bands, 2, channels)
            bands, channels = bands // pool, its_channels
        features = bands * channels
        if not exact:
            return {**states, "columns": (1, self.folded.columns - 1, features)}
        return {
            **states,
            "columns": (1, self.kept_columns, features),
            "recent": (1, self.folded.num_mel_bins, self.history, 1),
            "first_steps": (1, self.calls_to_end, features),
        }


def block(folded: Folded, number: int, x: Any, padding: str) -> Any:
    """Convolution, pooling and ELU. ``padding``: ``SAME``, ``VALID``, or ``stream``: ``SAME`` in frequency and
    ``VALID`` in time, the last block not pooled in time."""
    pool = crnn.POOLS[number]
    pool_in_time = pool
    if padding == "stream":
        x, padding = tf.pad(x, [[0, 0], [1, 1], [0, 0], [0, 0]]), "VALID"
        pool_in_time = 1 if number == len(crnn.POOLS) - 1 else pool
    x = tf.nn.conv2d(x, folded.kernels[number], 1, padding) + folded.biases[number]
    return tf.nn.elu(tf.nn.max_pool2d(x, (pool, pool_in_time), (pool, pool_in_time), "VALID"))


def _edge(folded: Folded, recent: Any, *, first: bool) -> Any:
    """The first or the last group of a window, (1, 1, features), of the frames that end with ``recent`` or begin with
    it. At the end of the window each block sees the padding of the Keras model."""
    before, after = crnn.padding(folded.frames)
    needed = LAST_POOL * STEP + CONTEXT
    silence = folded.offset.reshape(1, -1, 1, 1)
    if first:
        pad = np.tile(silence, (1, 1, before, 1))
        x = tf.concat([pad, recent[:, :, : needed - before]], 2)
    else:
        pad = np.tile(silence, (1, 1, after, 1))
        x = tf.concat([recent[:, :, recent.shape[2] - needed + after :], pad], 2)
    for number in range(len(crnn.POOLS)):
        x = tf.pad(x, [[0, 0], [0, 0], [1, 0] if first else [0, 1], [0, 0]])
        x = block(folded, number, x, "stream")
    return _pool(sequence(x))


def sequence(x: Any) -> Any:
    """(1, bands, columns, channels) -> (1, columns, bands * channels)."""
    if x.shape[1] > 1:
        x = tf.transpose(x, (0, 2, 1, 3))
        return tf.reshape(x, (1, x.shape[1], x.shape[2] * x.shape[3]))
    return tf.reshape(x, (1, x.shape[2], x.shape[3]))


def _pool(columns: Any) -> Any:
    """The last pooling in time, of (1, columns, features)."""
    groups = columns.shape[1] // LAST_POOL
    return tf.reduce_max(tf.reshape(columns, (1, groups, LAST_POOL, columns.shape[2])), 2)


def scores(folded: Folded, steps: Any) -> Any:
    """(1, steps, features) -> (1, tags), through both GRUs."""
    steps = tf.reshape(steps, steps.shape[1:], name=FEATURES)
    for kernel, recurrent_kernel, bias in folded.grus:
        steps = tf.concat(_gru(steps, kernel, recurrent_kernel, bias), 0)
    kernel, bias = folded.output
    return tf.sigmoid(tf.matmul(steps[-1:], kernel) + bias)


def _gru(steps: Any, kernel: Array, recurrent_kernel: Array, bias: Array) -> list[Any]:
    """The state (1, units) after each of ``steps``, (steps, features)."""
    units = recurrent_kernel.shape[0]
    entering = tf.matmul(steps, kernel) + bias
    state, states = tf.zeros((1, units)), []
    for number in range(steps.shape[0]):
        x = entering[number : number + 1]
        gates = tf.clip_by_value(x[:, : 2 * units] + tf.matmul(state, recurrent_kernel[:, : 2 * units]), 0.0, 1.0)
        update, reset = gates[:, :units], gates[:, units:]
        candidate = tf.tanh(x[:, 2 * units :] + tf.matmul(reset * state, recurrent_kernel[:, 2 * units :]))
        state = candidate + update * (state - candidate)
        states.append(state)
    return states
