"""Where a quantized graph loses precision: each layer's output held against the float graph's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.converters import rewrite
from edgekit.converters.report import Layer
from edgekit.custom_ops import CustomOpResolver
from edgekit.flatbuffer import Model, Operator, Tensor
from edgekit.quantization import dequantize, quantize

# More frames make no other order of the layers.
MAX_FRAMES = 32


def compare(
    float32: bytes,
    quantized: bytes,
    tensors: Iterable[npt.NDArray[np.float32]],
    resolver: CustomOpResolver | None = None,
) -> tuple[Layer, ...]:
    """Runs both graphs on ``tensors`` and compares what they have in common, by the names of the tensors.

    Args:
        float32, quantized: flatbuffers that one converter made of one model, neither rewritten.
        tensors: float input tensors, each (1, ...).
        resolver: has the kernels of custom operators.

    Returns:
        The layers, worst first.
    """
    graphs = [(Model(content), interpreter(content, resolver)) for content in (float32, quantized)]
    reference = graphs[0][0]
    makers = {reference.tensors[t].name: operator for operator in reference.operators for t in operator.outputs}
    indices = [_activations(graph) for graph, _ in graphs]
    common = [name for name in makers if name in indices[0] and name in indices[1]]
    signal, noise = dict.fromkeys(common, 0.0), dict.fromkeys(common, 0.0)
    for tensor in tensors:
        for graph, running in graphs:
            given = graph.inputs[0]
            real = given.scale and given.dtype != "float32"
            running.set_tensor(
                running.get_input_details()[0]["index"],
                quantize(tensor, given.dtype, given.scale[0], given.zero_point[0]) if real else tensor,
            )
            running.invoke()
        for name in common:
            x, q = (
                _real(running.get_tensor(index[name]), graph.tensors[index[name]])
                for (graph, running), index in zip(graphs, indices, strict=True)
            )
            if x.shape == q.shape:
                signal[name] += float(np.square(x, dtype=np.float64).sum())
                noise[name] += float(np.square(x - q, dtype=np.float64).sum())
    decibels = {name: _db(signal[name], noise[name]) for name in common if signal[name] > 0}

    def inputs(operator: Operator) -> Iterator[float]:
        """Of the nearest layers before it that were compared."""
        for name in (reference.tensors[t].name for t in operator.inputs if t >= 0):
            if name in decibels:
                yield decibels[name]
            elif name in makers:
                yield from inputs(makers[name])

    layers = []
    for name, value in sorted(decibels.items(), key=lambda item: item[1]):
        worst = min(inputs(makers[name]), default=math.inf)
        lost = round(max(worst - value, 0.0), 2) if math.isfinite(worst) else None
        sqnr = round(value, 2) if math.isfinite(value) else None
        layers.append(Layer(name=name, operator=makers[name].name, sqnr_db=sqnr, lost_db=lost))
    return tuple(layers)


def _db(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf


def interpreter(content: bytes, resolver: CustomOpResolver | None = None) -> Any:
    """A graph in LiteRT, ready to run, whose every tensor can be read, with the ``resolver``'s kernels."""
    from ai_edge_litert import interpreter as litert

    # A delegate keeps what lies inside its pieces to itself: XNNPACK, which is left out, and that of custom operators,
    # whose results are made outputs.
    custom = [tensor for operator in Model(content).operators if operator.custom for tensor in operator.outputs]
    if custom:
        model = rewrite.load(content)
        outputs = list(map(int, model.subgraphs[0].outputs))
        model.subgraphs[0].outputs = np.array(list(dict.fromkeys(outputs + custom)), np.int32)
        content = rewrite.save(model)
    found = litert.Interpreter(
        model_content=content,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        experimental_preserve_all_tensors=True,
        experimental_delegates=[resolver.delegate(litert)] if custom and resolver else None,
    )
    found.allocate_tensors()
    return found


def _activations(model: Model) -> dict[str, int]:
    """Name -> index of what operators make. A name that two tensors bear is that of the last (a quantized graph ends in
    a tensor named as the float one that it replaces)."""
    return {model.tensors[t].name: t for operator in model.operators for t in operator.outputs}


def _real(values: npt.NDArray[Any], tensor: Tensor) -> npt.NDArray[np.float32]:
    return dequantize(values, tensor.scale[0], tensor.zero_point[0]) if tensor.scale else values.astype(np.float32)
