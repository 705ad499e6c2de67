"""The quantization recipes of a CRNN: what :mod:`edgekit.converters.recipes` does, and better rounding of its weights.

The network saturates: what enters the GRUs reaches 8,000, and an error there flips a gate or does nothing. So the
convolutions are what has to be right, and the GRUs, 6 % of the weights, stay in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from edgekit.converters import crnn_graph, crnn_int8, gptq, recipes, rewrite
from edgekit.converters.crnn_graph import Folded
from edgekit.errors import ConversionError

Array = npt.NDArray[Any]

# Clips that the rounding of the weights looks at.
MAX_CLIPS = 16
_DEQUANTIZE_VERSION = 5  # the first that knows a scale for each channel


def convert(
    model: Any, recipe: str, calibration: Array | None, *, streaming: bool = False, exact: bool = False
) -> bytes:
    """Converts ``model``, which :func:`crnn.build` built.

    The input tensor of the result is ``log_mel``, its first output ``scores``; the graph of a stream has its states
    after them, in the same order as inputs and as outputs. The tensor before the GRUs is named
    :data:`crnn_graph.FEATURES`.

    Args:
        recipe: a name in ``recipes.RECIPES``.
        calibration: log-mel levels, (n, bands, frames, 1); for the recipes in ``targets.CALIBRATED``, and where given
            for ``int8-weights``.
        streaming, exact: as :func:`crnn_graph.stream`.

    Raises:
        ConversionError: there is no such graph in this recipe.
    """
    folded = crnn_graph.fold(model)
    if streaming and recipe in ("int8", "int16x8"):
        raise ConversionError(
            f"--streaming has no {recipe}: its states are float", mend="use --quantize int8-weights, a quarter in size"
        )
    if recipe == "int8":
        assert calibration is not None
        return _named(crnn_int8.convert(folded, calibration))
    if recipe == "int16x8":
        assert calibration is not None
        return _named(_int16x8(folded, calibration))
    stored: dict[bytes, tuple[Array, Array]] = {}
    if recipe == "int8-weights":
        folded, stored = _round(folded, _clips(folded, calibration))
    graph = crnn_graph.stream(folded, exact=exact) if streaming else crnn_graph.window(folded)
    content = recipes.RECIPES["float32" if stored else recipe](crnn_graph.converter(graph), None)
    return _named(_store_8_bit(content, stored) if stored else content)


def _int16x8(folded: Folded, calibration: Array) -> bytes:
    """The convolutions by that recipe, and float GRUs: those in 16 bits change every tag, and the runtimes abort on
    their SUB."""
    folded, _ = _round(folded, _clips(folded, calibration))
    convolutions, grus = map(crnn_graph.converter, crnn_graph.halves(folded))

    def tensors() -> Iterator[Array]:
        yield from (clip[None] for clip in calibration)

    return rewrite.join(recipes.int16x8(convolutions, tensors, tf.float32), recipes.RECIPES["float32"](grus, None))


def _clips(folded: Folded, calibration: Array | None) -> Array:
    """What to round the weights by: a few of ``calibration``, or for want of it made ones, which do nearly as well."""
    if calibration is None:
        return made_clips(folded.num_mel_bins, folded.frames)
    chosen = np.linspace(0, len(calibration) - 1, min(MAX_CLIPS, len(calibration))).round().astype(int)
    return np.asarray(calibration[chosen], np.float32)


def made_clips(bands: int, frames: int) -> Array:
    """Log-mel levels (24, bands, frames, 1) that resemble music: the loud and the quiet come in patches of all sizes,
    the bass is louder than the treble, and nothing is more than 80 dB below the loudest."""
    random = np.random.default_rng(0)
    clips = np.zeros((24, bands, frames, 1), np.float32)
    for bands_wide, frames_long in ((1, 1), (2, 4), (4, 16), (12, 68), (32, 273)):
        coarse = random.normal(size=(len(clips), -(-bands // bands_wide), -(-frames // frames_long), 1))
        clips += 5 * tf.image.resize(coarse.astype(np.float32), (bands, frames)).numpy()
    clips += np.linspace(2, -28, bands, dtype=np.float32)[:, None, None]
    return np.asarray(np.maximum(clips, clips.max((1, 2, 3), keepdims=True) - 80))


def _round(folded: Folded, clips: Array) -> tuple[Folded, dict[bytes, tuple[Array, Array]]]:
    """``folded`` with weights that 8 bits hold, and of each kernel, by its bytes in a flatbuffer, those and their
    scales. The first convolution, 576 weights of 370,000, is left as it is."""
    kernels, biases = [folded.kernels[0]], [folded.biases[0]]
    stored = {}
    layers = [[folded.window(clip[None]) for clip in clips]]
    for number in range(len(folded.kernels)):
        layers.append([crnn_graph.block(folded, number, x, "SAME") for x in layers[-1]])
        if not number:
            continue
        kernel = folded.kernels[number]
        of_inputs, mean = gptq.covariance(layers[number])
        integers, scale = gptq.quantize(kernel, of_inputs)
        rounded = integers.astype(np.float32) * scale
        # The mean of each output stays what it was.
        lost = (kernel.astype(np.float64) - rounded).reshape(len(mean), -1)
        biases.append((folded.biases[number] + mean @ lost).astype(np.float32))
        kernels.append(rounded)
        stored[_as_stored(rounded).tobytes()] = (_as_stored(integers), scale)
    return dataclasses.replace(folded, kernels=tuple(kernels), biases=tuple(biases)), stored


def _as_stored(kernel: Array) -> Array:
    """(height, width, in, out) -> (out, height, width, in), as TFLite has it."""
    return np.ascontiguousarray(kernel.transpose(3, 0, 1, 2))


def _store_8_bit(content: bytes, stored: dict[bytes, tuple[Array, Array]]) -> bytes:
    """Puts the kernels in ``stored`` into the flatbuffer as int8, each behind a DEQUANTIZE, which XNNPACK takes as
    weights and the runtimes otherwise work out once."""
    model = rewrite.load(content)
    graph = rewrite.Graph(model)
    added = []
    for index, tensor in enumerate(list(graph.subgraph.tensors)):
        data = model.buffers[tensor.buffer].data
        if data is None or (found := stored.get(np.asarray(data, np.uint8).tobytes())) is None:
            continue
        integers, scale = found
        source = graph.add_tensor(tensor.name + b"/int8", tensor.shape, 1.0, 0, integers)
        quantization = graph.tensor(source).quantization
        quantization.scale, quantization.quantizedDimension = scale, 0
        quantization.zeroPoint = np.zeros(len(scale), np.int64)
        tensor.buffer = 0
        added.append(
            graph.operator(
                schema.BuiltinOperator.DEQUANTIZE, _DEQUANTIZE_VERSION, [source], index, schema.DequantizeOptionsT
            )
        )
    graph.subgraph.operators[:0] = added
    rewrite.share_buffers(model)
    return rewrite.save(model)


def _named(content: bytes) -> bytes:
    """Gives inputs, outputs and features their names, and puts the states in order behind the rest."""
    model = rewrite.load(content)
    graph = rewrite.Graph(model)
    signature = model.signatureDefs[0]
    inputs = {entry.name.decode(): entry for entry in signature.inputs}
    outputs = {entry.name.decode(): entry for entry in signature.outputs}
    states = sorted(name for name in inputs if name != "log_mel")
    for which, entries, names in (
        ("inputs", inputs, ["log_mel", *states]),
        ("outputs", outputs, ["scores", *(f"new_{name}" for name in states)]),
    ):
        ordered = [entries[name] for name in names]
        for entry in ordered:
            graph.tensor(entry.tensorIndex).name = entry.name
        setattr(graph.subgraph, which, np.array([entry.tensorIndex for entry in ordered], np.int32))
        setattr(signature, which, ordered)
    _, first_of_gru = next(graph.operators("FULLY_CONNECTED"))
    graph.tensor(int(first_of_gru.inputs[0])).name = crnn_graph.FEATURES.encode()
    return rewrite.save(model)
