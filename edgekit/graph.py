"""The operators of a graph as a delegate sees them, and the pieces that TFLite cuts the graph into for it.

A delegate says yes or no to each operator; TFLite then cuts the graph, in execution order, as ``graph_info.cc`` of
TensorFlow does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edgekit.flatbuffer import Model, Operator, Tensor


def pieces(model: Model, reasons: list[str]) -> Iterable[list[int]]:
    """The pieces that a delegate would be given, which refuses the operators with a reason.

    As PartitionGraphIntoIndependentNodeSubsets of TensorFlow's graph_info.cc: a piece gathers every operator of its
    kind whose inputs are there, then the other kind has its turn.
    """
    waiting = dict(enumerate(model.operators))
    missing = {tensor for operator in model.operators for tensor in operator.outputs if tensor >= 0}
    while waiting:
        kind, piece = None, []
        for index, operator in list(waiting.items()):
            if missing.isdisjoint(operator.inputs) and kind in (None, bool(reasons[index])):
                kind = bool(reasons[index])
                piece.append(index)
                missing.difference_update(operator.outputs)
                del waiting[index]
        if not piece:  # a cycle: no runtime loads that
            return
        if not kind:
            yield piece


def outside(model: Model, reasons: list[str], piece: list[int], beyond: str) -> list[str]:
    """``reasons`` completed by ``beyond`` for the operators that are not refused but are not in ``piece`` either; "{}"
    in it stands for the refused operator that they come after."""
    inside, result = set(piece), list(reasons)
    culprits: dict[int, str] = {}  # by tensor
    for index, operator in enumerate(model.operators):
        if index not in inside:
            before = next((culprits[tensor] for tensor in operator.inputs if tensor in culprits), "")
            culprits.update(dict.fromkeys(operator.outputs, operator.name if reasons[index] else before))
            result[index] = reasons[index] or beyond.format(before or "itself")
    return result


@dataclass(frozen=True)
class Node:
    """An operator with its tensors. ``arriving`` are the inputs that come when the graph runs, not from the file."""

    model: Model
    operator: Operator
    inputs: list[Tensor]
    outputs: list[Tensor]
    arriving: list[Tensor]
    stateful: bool

    @property
    def flow(self) -> list[Tensor]:
        return self.arriving + self.outputs

    def option(self, field: int, format: str = "<i", default: int = 0) -> int:
        return self.model.option(self.operator, field, format, default)

    def constant(self, position: int) -> list[int] | None:
        """The flat values of an input of whole numbers; None where it is absent or computed when the graph runs."""
        index = self.operator.inputs[position] if position < len(self.operator.inputs) else -1
        values = self.model.constant(index) if index >= 0 else None
        return None if values is None or values.dtype.kind not in "iu" else [int(value) for value in values.flat]

    def fixed(self, position: int) -> bool:
        """Whether an input is absent or constant."""
        index = self.operator.inputs[position] if position < len(self.operator.inputs) else -1
        return index < 0 or self.model.tensors[index].constant

    def axes(self, position: int) -> list[int] | None:
        """As :meth:`constant`, the dimensions of the first input that an input names, counted from the first."""
        axes, rank = self.constant(position), len(self.inputs[0].shape)
        return None if axes is None else [axis % rank for axis in axes if -rank <= axis < rank]

    def sizes_itself(self) -> bool:
        return not all(map(self.fixed, _SIZES.get(self.operator.name, ())))


# Inputs, by position, that decide the size of the output.
_SIZES = {
    **dict.fromkeys(
        "RESHAPE RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR PAD PADV2 MIRROR_PAD TILE BROADCAST_TO".split(), (1,)
    ),
    **dict.fromkeys("MEAN SUM REDUCE_MAX REDUCE_MIN REDUCE_PROD EXPAND_DIMS".split(), (1,)),
    **dict.fromkeys("FILL TRANSPOSE_CONV".split(), (0,)),
    **dict.fromkeys("SLICE RANGE".split(), (1, 2)),
    "STRIDED_SLICE": (1, 2, 3),
}


def nodes(model: Model) -> Iterable[Node]:
    tensors = model.tensors
    given = {id(tensor) for tensor in model.inputs}
    made = {index for operator in model.operators for index in operator.outputs}
    held = {index for index, tensor in enumerate(tensors) if tensor.constant}
    for operator in model.operators:
        inputs, outputs = ([i for i in indices if i >= 0] for indices in (operator.inputs, operator.outputs))
        carried = [i for i in inputs if i not in held]
        flow = [i for i in carried if i in made or id(tensors[i]) in given]
        if operator.name == "DEQUANTIZE" and not flow:  # it unpacks weights
            held.update(outputs)
        yield Node(
            model=model,
            operator=operator,
            inputs=[tensors[i] for i in inputs],
            outputs=[tensors[i] for i in outputs],
            arriving=[tensors[i] for i in flow],
            # What the file neither holds nor computes is state, which an LSTM carries from call to call.
            stateful=len(carried) > len(flow),
        )
