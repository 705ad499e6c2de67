"""Which operators of a graph the Edge TPU and the GPU would take, told from the ``.tflite`` file alone.

A delegate says yes or no to each operator; TFLite then cuts the graph into pieces, in execution order, as
``graph_info.cc`` of TensorFlow does. Both delegates told of here run one piece only, so a single refused operator in
the middle can leave half of a graph to the CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

import msgspec

from edgekit.flatbuffer import Model, Operator, Tensor


class Left(msgspec.Struct, frozen=True, kw_only=True):
    """``count`` operators named ``operator`` that are left to the CPU for one ``reason``."""

    operator: str
    count: int
    reason: str


class Coverage(msgspec.Struct, frozen=True, kw_only=True):
    """What a delegate takes of a graph: ``delegated`` of its ``operators``, in ``pieces`` runs between which the CPU
    works. ``delegate`` is ``xnnpack``, ``edge-tpu`` or ``gpu``; ``measured`` is False where this was predicted from
    the delegate's rules, not seen."""

    delegate: str
    measured: bool
    operators: int
    delegated: int
    pieces: int
    left: tuple[Left, ...]


def edge_tpu(model: Model) -> Coverage:
    """What ``edgetpu_compiler`` 16.0 would map to the Edge TPU, without its option for several subgraphs. A file that
    it has compiled already is told as it is: ``measured``.

    Raises:
        BundleError: an offset in the options of an operator leads out of the file.
    """
    compiled = any(operator.name == _COMPILED for operator in model.operators)
    return _coverage("edge-tpu", model, edge_tpu_refusals(model), measured=compiled)


def edge_tpu_refusals(model: Model) -> list[str]:
    """For each operator in execution order, why the Edge TPU would not run it; "" where it would.

    The compiler maps the first piece only: https://coral.ai/docs/edgetpu/models-intro, "Compiling". That it cuts as
    TFLite does, so that a branch which needs no refused operator is mapped however late it comes, and that a refused
    QUANTIZE of a float input spoils nothing after it, shows in its logs (google-coral/edgetpu issues 187 and 461,
    f0cal/google-coral issue 20).
    """
    if any(operator.name == _COMPILED for operator in model.operators):
        return ["" if operator.name == _COMPILED else _LEFT_BY_COMPILER for operator in model.operators]
    for operator in model.operators:
        if operator.version > (newest := _EDGE_TPU_VERSIONS.get(operator.name, operator.version)):
            reason = (
                f"the compiler refuses the model: {operator.name} has version {operator.version}, it knows {newest}"
            )
            return [reason] * len(model.operators)
    reasons = [_edge_tpu_reason(node) for node in _nodes(model)]
    first = next(iter(_pieces(model, reasons)), [])
    return _outside(model, reasons, first, "comes after {}, which is not taken")


def gpu(model: Model) -> Coverage:
    """What LiteRT's GPU accelerator would take, which computes 8-bit graphs in float too.

    Raises:
        BundleError: an offset in the options of an operator leads out of the file.
    """
    return _coverage("gpu", model, gpu_refusals(model), measured=False)


def gpu_refusals(model: Model) -> list[str]:
    """For each operator in execution order, why the GPU would not run it; "" where it would.

    The rules are those of TensorFlow's ``gpu_compatibility.cc`` and of LiteRT's ``ml_drift_delegate``, as far as a
    converted model meets them. Both take the largest piece only (``max_delegated_partitions`` is 1).
    """
    nodes = list(_nodes(model))
    if any(node.sizes_itself() for node in nodes):
        return ["the graph computes sizes of tensors when it runs: the GPU takes static sizes only"] * len(nodes)
    if any(node.stateful for node in nodes):
        return ["the graph keeps state in variable tensors, which LiteRT does not load for the GPU"] * len(nodes)
    reasons = [_gpu_reason(node) for node in nodes]
    largest = max(_pieces(model, reasons), key=len, default=[])
    return _outside(model, reasons, largest, "outside the largest piece, the only one that is taken")


def measured(delegate: str, model: Model, pieces: list[list[int]]) -> Coverage:
    """What ``delegate`` took of ``model`` when it was loaded: the positions of the operators in each piece, as
    :class:`edgekit.sandbox.Sandbox` finds them."""
    taken = {position for piece in pieces for position in piece}
    left = Counter(operator.name for position, operator in enumerate(model.operators) if position not in taken)
    return Coverage(
        delegate=delegate,
        measured=True,
        operators=len(model.operators),
        delegated=len(taken),
        pieces=len(pieces),
        left=tuple(Left(operator=name, count=count, reason="not taken") for name, count in left.items()),
    )


def _coverage(delegate: str, model: Model, refusals: list[str], *, measured: bool) -> Coverage:
    left = Counter((op.name, reason) for op, reason in zip(model.operators, refusals, strict=True) if reason)
    taken = refusals.count("")
    return Coverage(
        delegate=delegate,
        measured=measured,
        operators=len(refusals),
        delegated=taken,
        pieces=1 if taken else 0,
        left=tuple(Left(operator=name, count=count, reason=reason) for (name, reason), count in left.items()),
    )


def _pieces(model: Model, reasons: list[str]) -> Iterable[list[int]]:
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


def _outside(model: Model, reasons: list[str], piece: list[int], outside: str) -> list[str]:
    """``reasons`` completed by ``outside`` for the operators that are not refused but are not in ``piece`` either; "{}"
    in it stands for the refused operator that they come after."""
    inside, result = set(piece), list(reasons)
    culprits: dict[int, str] = {}  # by tensor
    for index, operator in enumerate(model.operators):
        if index not in inside:
            before = next((culprits[tensor] for tensor in operator.inputs if tensor in culprits), "")
            culprits.update(dict.fromkeys(operator.outputs, operator.name if reasons[index] else before))
            result[index] = reasons[index] or outside.format(before or "itself")
    return result


@dataclass(frozen=True)
class _Node:
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


def _nodes(model: Model) -> Iterable[_Node]:
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
        yield _Node(
            model=model,
            operator=operator,
            inputs=[tensors[i] for i in inputs],
            outputs=[tensors[i] for i in outputs],
            arriving=[tensors[i] for i in flow],
            # What the file neither holds nor computes is state, which an LSTM carries from call to call.
            stateful=len(carried) > len(flow),
        )


# --- Edge TPU: https://coral.ai/docs/edgetpu/models-intro, "Model requirements" and "Supported operations" (the table
# for compiler 16.0 and runtime 14). What only compiled models or the compiler's logs show is marked as seen there.

_COMPILED = "edgetpu-custom-op"
_LEFT_BY_COMPILER = "left to the CPU when the model was compiled"

# The compiler does not read a model with a newer version: google-coral/edgetpu issues 631 (CONV_2D 6), 845
# (TRANSPOSE_CONV 4) and 879 (QUANTIZE 3), tensorflow/tflite-micro issue 2633 (EXP 2). For FULLY_CONNECTED, the newest
# of TensorFlow 2.5, of its time.
_EDGE_TPU_VERSIONS = {"CONV_2D": 5, "TRANSPOSE_CONV": 3, "QUANTIZE": 2, "EXP": 1, "FULLY_CONNECTED": 9}

# The table says that sizes matter, not which. The limits lie between what was seen mapped and what was not. Factor of a
# resize: 2 in many logs; 33 (1 x 1 to 33 x 33) not, in deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite. Bytes of its
# output: 128 x 128 x 32 (google-coral/edgetpu issue 31); not 1024 x 1024 x 3 (issue 597). Elements of a mean: 64 x 128;
# not 256 x 128 (issue 461).
_RESIZE_FACTOR, _RESIZE_BYTES, _MEAN_ELEMENTS = 8, 2 << 20, 1 << 14


def _edge_tpu_reason(node: _Node) -> str:
    operator = node.operator
    if operator.custom:
        return "a custom operator"
    if operator.name not in _EDGE_TPU:
        return "not among the operators that the Edge TPU has"
    if not node.inputs or not node.outputs:
        return "has no input or no output"
    if node.sizes_itself() or any(tensor.dynamic for tensor in node.flow):
        return "sizes are left open: the Edge TPU takes static sizes only"
    for tensor in node.flow:
        if tensor.dtype not in ("int8", "uint8") or not tensor.scale:
            return f"works on {tensor.dtype}: the Edge TPU takes quantized int8 and uint8 only"
        if prod(tensor.shape[:-3]) > 1:
            return f"a tensor of shape {tensor.shape}: only the 3 innermost dimensions may be above 1"
    if floats := [t.dtype for t in node.inputs if t.constant and t.dtype in ("float32", "float16")]:
        return f"has {floats[0]} parameters: the Edge TPU takes quantized int8 and uint8 only"
    rule = _EDGE_TPU[operator.name]
    return rule(node) if rule else ""


def _no_activation(field: int) -> Callable[[_Node], str]:
    return lambda node: "has a fused activation" if node.option(field, "<b") else ""


def _parameters(node: _Node) -> str:
    return "" if node.fixed(1) and node.fixed(2) else "its weights are computed when the graph runs"


def _convolution(width: int, height: int) -> Callable[[_Node], str]:
    def reason(node: _Node) -> str:
        if node.option(width, default=1) != node.option(height, default=1):
            return "is dilated differently in x and y"
        return _parameters(node)

    return reason


def _fully_connected(node: _Node) -> str:
    if node.option(1, "<b"):
        return "its weights are in a shuffled format"
    shape = node.outputs[0].shape
    return f"its output {shape} is not one-dimensional" if _above_one(shape) > 1 else _parameters(node)


def _reduction(node: _Node) -> str:
    axes = node.axes(1)
    if axes is None:
        return "its axes are computed when the graph runs"
    return "reduces the batch dimension" if 0 in axes else ""


def _mean(node: _Node) -> str:
    shape, axes = node.inputs[0].shape, node.axes(1)
    if (reason := _reduction(node)) or axes is None:
        return reason
    if len(shape) - 1 in axes and shape[-1] % 4:
        return f"averages over {shape[-1]} channels, not a multiple of 4"
    elements = prod(shape[axis] for axis in axes)
    return f"averages {elements} elements at once, too many" if elements > _MEAN_ELEMENTS else ""


def _concatenation(node: _Node) -> str:
    constants = [i for i, tensor in enumerate(node.inputs) if tensor.constant]
    for i in constants:
        if len(node.inputs) != 2 or set(node.constant(i) or ()) - set(node.inputs[i].zero_point):
            return "has a constant input that is not the zeros of a padding"
    return "has a fused activation" if node.option(1, "<b") else ""


def _pad(node: _Node) -> str:
    paddings = node.constant(1)
    if paddings is None:
        return "its paddings are computed when the graph runs"
    return "pads the batch dimension" if any(paddings[:2]) else ""


def _prelu(node: _Node) -> str:
    alpha = node.inputs[1].shape if len(node.inputs) > 1 else ()
    return f"its slopes {alpha} are not one-dimensional" if prod(alpha[:-1]) > 1 else _parameters(node)


def _resize(node: _Node) -> str:
    given, made = node.inputs[0].shape, node.outputs[0].shape
    if len(given) != 4 or len(made) != 4:
        return "does not resize an image"
    factor = max(big / max(small, 1) for small, big in zip(given[1:3], made[1:3], strict=True))
    if factor > _RESIZE_FACTOR:
        return f"enlarges {factor:.0f} times, which is not precise enough"
    return f"its output {made} is too large" if prod(made) > _RESIZE_BYTES else ""


def _softmax(node: _Node) -> str:
    shape = node.inputs[0].shape
    if _above_one(shape) > 1:
        return f"its input {shape} is not one-dimensional"
    return f"has {prod(shape)} elements, more than 16000" if prod(shape) > 16000 else ""


def _split(node: _Node) -> str:
    axes = node.constant(0)
    if axes is None:
        return "its axis is computed when the graph runs"
    rank = len(node.inputs[1].shape) if len(node.inputs) > 1 else 0
    return "splits the batch dimension" if any(axis in (0, -rank) for axis in axes) else ""


def _pack(node: _Node) -> str:
    rank = len(node.outputs[0].shape)
    return "packs along the batch dimension" if node.option(1) in (0, -rank) else ""


def _strided_slice(node: _Node) -> str:
    if set(node.constant(3) or (0,)) != {1}:
        return "has strides other than 1"
    return "has an ellipsis or adds an axis" if node.option(2) or node.option(3) else ""


def _above_one(shape: tuple[int, ...]) -> int:
    return sum(side > 1 for side in shape)


# None: taken without a limit of its own.
_EDGE_TPU: dict[str, Callable[[_Node], str] | None] = {
    **dict.fromkeys(
        "ADD EXPAND_DIMS L2_NORMALIZATION LOGISTIC LSTM MAXIMUM MINIMUM MUL QUANTIZE RELU RELU6 RELU_N1_TO_1 RESHAPE "
        "RSQRT SLICE SPACE_TO_DEPTH SQUARED_DIFFERENCE SQUEEZE SUB TANH TRANSPOSE UNIDIRECTIONAL_SEQUENCE_LSTM".split()
    ),
    "AVERAGE_POOL_2D": _no_activation(5),
    "CONCATENATION": _concatenation,
    "CONV_2D": _convolution(4, 5),
    "DEPTHWISE_CONV_2D": _convolution(5, 6),
    "FULLY_CONNECTED": _fully_connected,
    "MAX_POOL_2D": _no_activation(5),
    "MEAN": _mean,
    "PACK": _pack,
    "PAD": _pad,
    "PRELU": _prelu,
    "REDUCE_MAX": _reduction,
    "REDUCE_MIN": _reduction,
    "RESIZE_BILINEAR": _resize,
    "RESIZE_NEAREST_NEIGHBOR": _resize,
    "SOFTMAX": _softmax,
    "SPLIT": _split,
    "STRIDED_SLICE": _strided_slice,
    "SUM": _reduction,
    "TRANSPOSE_CONV": lambda node: "" if node.fixed(1) else "its weights are computed when the graph runs",
}


# --- GPU: operators and newest versions are those of LiteRT's ml_drift_delegate/tflite/support/support.cc, the limits
# those of gpu_compatibility.cc. Held against the WebGPU accelerator of LiteRT 2.3.0 on 130 small graphs.

_GPU_VERSIONS = {
    name: newest
    for newest, names in {
        1: "CAST HARD_SWISH PRELU RESHAPE TOPK_V2",
        2: "ATAN2 AVERAGE_POOL_2D CEIL COS DIV ELU EQUAL EXP FLOOR FLOOR_MOD GREATER GREATER_EQUAL LEAKY_RELU LESS "
        "LESS_EQUAL LOG LOGICAL_AND LOGICAL_NOT LOGICAL_OR LOGISTIC MAX_POOL_2D NEG NOT_EQUAL POW RELU RELU6 "
        "RELU_N1_TO_1 ROUND RSQRT SIGN SIN SQRT SQUARE SQUARED_DIFFERENCE STRIDED_SLICE TANH",
        3: "DEQUANTIZE FLOOR_DIV GELU RESIZE_BILINEAR RESIZE_NEAREST_NEIGHBOR SUB",
        4: "MAXIMUM MINIMUM QUANTIZE SOFTMAX",
        5: "ABS MIRROR_PAD PAD PADV2",
        6: "ADD CONCATENATION CONV_2D DEPTHWISE_CONV_2D",
        8: "MUL",
        9: "TRANSPOSE",
        14: "FULLY_CONNECTED",
        # any version
        1000: "ADD_N ARG_MAX BATCH_MATMUL CUMSUM DEPTH_TO_SPACE DYNAMIC_UPDATE_SLICE EMBEDDING_LOOKUP GATHER MEAN "
        "ONE_HOT PACK REDUCE_ALL REDUCE_ANY REDUCE_MAX REDUCE_MIN REDUCE_PROD REVERSE_V2 SELECT SELECT_V2 SLICE "
        "SPACE_TO_DEPTH SPLIT SPLIT_V SUM TILE TRANSPOSE_CONV UNPACK",
    }.items()
    for name in names.split()
}
_GPU_CUSTOM = ("Convolution2DTransposeBias", "MaxPoolingWithArgmax2D", "MaxUnpooling2D", "Resampler")
_GPU_TYPES = ("float32", "float16", "int8", "uint8", "int32", "bool")


def _gpu_reason(node: _Node) -> str:
    operator = node.operator
    if operator.custom:
        return "" if operator.name in _GPU_CUSTOM else "a custom operator"
    if operator.name not in _GPU_VERSIONS:
        return "not among the operators that the GPU has"
    if operator.version > (newest := _GPU_VERSIONS[operator.name]):
        return f"has version {operator.version}, the GPU knows {newest}"
    if any(tensor.dynamic for tensor in node.flow):  # LiteRT would compile for a size of 1
        return "sizes are left open: the GPU takes static sizes only"
    if other := [tensor.dtype for tensor in node.flow if tensor.dtype not in _GPU_TYPES]:
        return f"works on {other[0]}, which the GPU has not"
    if any(len(tensor.shape) > 4 for tensor in node.flow):
        return "a tensor of more than 4 dimensions"
    if not all(tensor.shape for tensor in node.arriving):
        return "takes a computed tensor without dimensions"
    if not node.arriving and operator.name != "DEQUANTIZE":
        return "has constant inputs only"
    rule = _GPU.get(operator.name)
    return rule(node) if rule else ""


def _gpu_strided_slice(node: _Node) -> str:
    return "has an ellipsis, or adds or removes an axis" if any(map(node.option, (2, 3, 4))) else ""


def _gpu_gather(node: _Node) -> str:
    return "" if len(node.inputs) > 1 and len(node.inputs[1].shape) == 1 else "its indices are not one-dimensional"


_GPU: dict[str, Callable[[_Node], str]] = {
    "ADD_N": lambda node: "" if len(node.inputs) == 2 else f"has {len(node.inputs)} inputs, not 2",
    "FULLY_CONNECTED": lambda node: "its weights are in a shuffled format" if node.option(1, "<b") else "",
    "GATHER": lambda node: (
        "" if len(node.inputs) < 2 or len(node.inputs[1].shape) == 1 else "its indices have several dimensions"
    ),
    "MIRROR_PAD": lambda node: "pads symmetrically, not by reflection" if node.option(0, "<b") else "",
    "SOFTMAX": lambda node: "" if node.option(0, "<f") == 1 else "has a beta other than 1",
    "STRIDED_SLICE": _gpu_strided_slice,
}
