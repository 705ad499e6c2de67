"""The front end of a sound model as the operator EdgekitLogMel, in its graph: the bundle takes the sound itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from flatbuffers import flexbuffers

from edgekit.audio import LogMelFrontEnd, Samples
from edgekit.converters import rewrite
from edgekit.errors import ConversionError
from edgekit.manifest import AudioInput
from edgekit.runtimes import Runtime
from edgekit.sandbox import Sandbox, SandboxError

OPERATOR, VERSION = "EdgekitLogMel", 1
# dB between the operator and the front end of calibration: single precision both, added up in another order.
MAX_DIFFERENCE_DB = 1e-3
_MEND = "leave out --edgekit-ops"


def options(input: AudioInput) -> dict[str, Any]:
    """The operator's, of the front end of ``input``."""
    front_end = input.front_end
    values = {
        "sample_rate_hz": input.sample_rate_hz,
        **{name: getattr(front_end, name) for name in ("fft_samples", "frame_hop_samples", "num_mel_bins")},
        **{name: float(getattr(front_end, name)) for name in ("low_hz", "high_hz", "power", "floor")},
        **{name: getattr(front_end, name) for name in ("mel_scale", "mel_norm")},
    }
    return values if front_end.range_db is None else values | {"range_db": float(front_end.range_db)}


def in_graph(input: AudioInput) -> AudioInput:
    """``input`` of the graph that :func:`attach` makes."""
    return msgspec.structs.replace(input, front_end_in_graph=True)


def attach(content: bytes, input: AudioInput) -> bytes:
    """``content``, a flatbuffer that is given the log-mels of ``input``, with the operator before it: it is given the
    sound. Of a stream the operator's state comes before the others, on either side."""
    model = rewrite.load(content)
    graph = rewrite.Graph(model)
    log_mel = int(graph.subgraph.inputs[0])
    levels = log_mel
    if graph.tensor(log_mel).type != schema.TensorType.FLOAT32:
        levels = graph.add_tensor("log_mel_float", input.log_mel_shape)
        code = schema.BuiltinOperator.QUANTIZE
        quantize = graph.operator(code, 1, [levels], log_mel, schema.QuantizeOptionsT)
        graph.subgraph.operators.insert(0, quantize)
    _insert(graph, in_graph(input), levels)
    return rewrite.save(model)


def front_end(input: AudioInput) -> bytes:
    """A flatbuffer of the operator alone: sound -> log-mels; of a stream with its state on either side."""
    model = schema.ModelT()
    model.version, model.description = 3, "front end"
    model.buffers = [schema.BufferT()]
    model.operatorCodes, model.metadata = [], []
    subgraph = schema.SubGraphT()
    subgraph.tensors, subgraph.operators = [], []
    subgraph.inputs, subgraph.outputs = np.array([0], np.int32), np.array([0], np.int32)
    model.subgraphs = [subgraph]
    model.signatureDefs = []
    graph = rewrite.Graph(model)
    _insert(graph, in_graph(input), graph.add_tensor("log_mel", input.log_mel_shape))
    return rewrite.save(model)


def check(model_path: Path, input: AudioInput, runtimes: dict[str, Runtime]) -> float:
    """Holds the operator against the front end of calibration, in each of ``runtimes``, and runs the graph there.

    Args:
        model_path: of what :func:`attach` made; temporary files are written beside it.

    Returns:
        The largest difference, dB.

    Raises:
        ConversionError: the operator computes something else, or it or the graph does not run.
    """
    path, inputs, outputs = (model_path.with_name(name) for name in ("front_end.tflite", "sound.npy", "levels.npy"))
    path.write_bytes(front_end(input))
    sound = _sound(input)
    reference = LogMelFrontEnd(input.front_end, input.sample_rate_hz)
    if input.streaming:
        np.save(inputs, sound.reshape(1, -1, input.hop_samples))
        expected = reference.push(sound)[:, -input.log_mel_shape[2] :]
    else:
        np.save(inputs, sound[None])
        expected = reference(sound)
    largest = 0.0
    for name, runtime in runtimes.items():
        try:
            with Sandbox(runtime, path) as sandbox:
                sandbox.replay(inputs, outputs)
            with Sandbox(runtime, model_path) as sandbox:
                sandbox.invoke(1)
        except SandboxError as error:
            raise ConversionError(f"{OPERATOR} does not run in {name} ({error})", mend=_MEND) from error
        difference = float(np.abs(np.load(outputs).reshape(expected.shape) - expected).max())
        if not difference <= MAX_DIFFERENCE_DB:
            raise ConversionError(
                f"{OPERATOR} in {name}",
                expected=f"the levels of calibration within {MAX_DIFFERENCE_DB:g} dB",
                got=f"{difference:.2g} dB off",
                mend=_MEND,
            )
        largest = max(largest, difference)
    return largest


def _sound(input: AudioInput) -> Samples:
    """Tones that glide, over noise: a window, or of a stream some hops of it."""
    samples = 4 * input.hop_samples if input.streaming else input.window_samples
    seconds = np.arange(samples) / input.sample_rate_hz
    random = np.random.default_rng(0)
    tones = sum(np.sin(2 * np.pi * (hz * seconds + 40 * seconds**2)) for hz in (110.0, 443.0, 1234.0)) / 6
    return np.asarray(tones + 0.1 * random.normal(size=samples), np.float32)


def _insert(graph: Any, input: AudioInput, levels: int) -> None:
    """Puts the operator first in the graph, which gives ``levels`` the log-mels."""
    subgraph, model = graph.subgraph, graph.model
    code = schema.OperatorCodeT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM
    code.customCode, code.version = OPERATOR, VERSION
    model.operatorCodes.append(code)
    operator = schema.OperatorT()
    operator.opcodeIndex = len(model.operatorCodes) - 1
    operator.customOptions = np.frombuffer(bytes(flexbuffers.Dumps(options(input))), np.uint8)
    given, made = [("sound", graph.add_tensor("sound", input.tensor_shape))], []
    if input.streaming:
        shape = (1, 1 + input.front_end.fft_samples // 2)
        given.append(("state_sound", graph.add_tensor("state_sound", shape)))
        made.append(("new_state_sound", graph.add_tensor("new_state_sound", shape)))
    operator.inputs = np.array([index for _, index in given], np.int32)
    operator.outputs = np.array([levels, *(index for _, index in made)], np.int32)
    subgraph.operators.insert(0, operator)
    replaced = int(subgraph.inputs[0])
    subgraph.inputs = np.array([index for _, index in given] + [int(i) for i in subgraph.inputs[1:]], np.int32)
    outputs = [int(i) for i in subgraph.outputs]
    subgraph.outputs = np.array([*outputs[:1], *(index for _, index in made), *outputs[1:]], np.int32)
    for signature in model.signatureDefs or []:
        kept = [entry for entry in signature.inputs if entry.tensorIndex != replaced]
        signature.inputs = [*map(_entry, given), *kept]
        signature.outputs = [*signature.outputs[:1], *map(_entry, made), *signature.outputs[1:]]


def _entry(named: tuple[str, int]) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = named
    return entry
