"""Which operators the Edge TPU would take, told from the ``.tflite`` file alone.

The rules are those of https://coral.ai/docs/edgetpu/models-intro, "Model requirements" and "Supported operations" (the
table for compiler 16.0 and runtime 14). What only compiled models or the compiler's logs show is marked as seen there.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from edgekit.flatbuffer import Model
from edgekit.graph import Node, nodes, outside, pieces

COMPILED = "edgetpu-custom-op"
_LEFT_BY_COMPILER = "left to the CPU when the model was compiled"

# The compiler does not read a model with a newer version: google-coral/edgetpu issues 631 (CONV_2D 6), 845
# (TRANSPOSE_CONV 4) and 879 (QUANTIZE 3), tensorflow/tflite-micro issue 2633 (EXP 2). For FULLY_CONNECTED, the newest
# of TensorFlow 2.5, of its time.
_NEWEST = {"CONV_2D": 5, "TRANSPOSE_CONV": 3, "QUANTIZE": 2, "EXP": 1, "FULLY_CONNECTED": 9}

# The table says that sizes matter, not which. The limits lie between what was seen mapped and what was not. Factor of a
# resize: 2 in many logs; 33 (1 x 1 to 33 x 33) not, in deeplabv3_mnv2_dm05_pascal_quant_edgetpu.tflite. Bytes of its
# output: 128 x 128 x 32 (google-coral/edgetpu issue 31); not 1024 x 1024 x 3 (issue 597). Elements of a mean: 64 x 128;
# not 256 x 128 (issue 461).
_RESIZE_FACTOR, _RESIZE_BYTES, _MEAN_ELEMENTS = 8, 2 << 20, 1 << 14


def refusals(model: Model) -> list[str]:
    """For each operator in execution order, why the Edge TPU would not run it; "" where it would.

    The compiler maps the first piece only: https://coral.ai/docs/edgetpu/models-intro, "Compiling". That it cuts as
    TFLite does, so that a branch which needs no refused operator is mapped however late it comes, and that a refused
    QUANTIZE of a float input spoils nothing after it, shows in its logs (google-coral/edgetpu issues 187 and 461,
    f0cal/google-coral issue 20).
    """
    if any(operator.name == COMPILED for operator in model.operators):
        return ["" if operator.name == COMPILED else _LEFT_BY_COMPILER for operator in model.operators]
    for operator in model.operators:
        if operator.version > (newest := _NEWEST.get(operator.name, operator.version)):
            reason = (
                f"the compiler refuses the model: {operator.name} has version {operator.version}, it knows {newest}"
            )
            return [reason] * len(model.operators)
    reasons = [_reason(node) for node in nodes(model)]
    first = next(iter(pieces(model, reasons)), [])
    return outside(model, reasons, first, "comes after {}, which is not taken")


def _reason(node: Node) -> str:
    operator = node.operator
    if operator.custom:
        return "a custom operator"
    if operator.name not in _RULES:
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
    rule = _RULES[operator.name]
    return rule(node) if rule else ""


def _no_activation(field: int) -> Callable[[Node], str]:
    return lambda node: "has a fused activation" if node.option(field, "<b") else ""


def _parameters(node: Node) -> str:
    return "" if node.fixed(1) and node.fixed(2) else "its weights are computed when the graph runs"


def _convolution(width: int, height: int) -> Callable[[Node], str]:
    def reason(node: Node) -> str:
        if node.option(width, default=1) != node.option(height, default=1):
            return "is dilated differently in x and y"
        return _parameters(node)

    return reason


def _fully_connected(node: Node) -> str:
    if node.option(1, "<b"):
        return "its weights are in a shuffled format"
    shape = node.outputs[0].shape
    return f"its output {shape} is not one-dimensional" if _above_one(shape) > 1 else _parameters(node)


def _reduction(node: Node) -> str:
    axes = node.axes(1)
    if axes is None:
        return "its axes are computed when the graph runs"
    return "reduces the batch dimension" if 0 in axes else ""


def _mean(node: Node) -> str:
    shape, axes = node.inputs[0].shape, node.axes(1)
    if (reason := _reduction(node)) or axes is None:
        return reason
    if len(shape) - 1 in axes and shape[-1] % 4:
        return f"averages over {shape[-1]} channels, not a multiple of 4"
    elements = prod(shape[axis] for axis in axes)
    return f"averages {elements} elements at once, too many" if elements > _MEAN_ELEMENTS else ""


def _concatenation(node: Node) -> str:
    constants = [i for i, tensor in enumerate(node.inputs) if tensor.constant]
    for i in constants:
        if len(node.inputs) != 2 or set(node.constant(i) or ()) - set(node.inputs[i].zero_point):
            return "has a constant input that is not the zeros of a padding"
    return "has a fused activation" if node.option(1, "<b") else ""


def _pad(node: Node) -> str:
    paddings = node.constant(1)
    if paddings is None:
        return "its paddings are computed when the graph runs"
    return "pads the batch dimension" if any(paddings[:2]) else ""


def _prelu(node: Node) -> str:
    alpha = node.inputs[1].shape if len(node.inputs) > 1 else ()
    return f"its slopes {alpha} are not one-dimensional" if prod(alpha[:-1]) > 1 else _parameters(node)


def _resize(node: Node) -> str:
    given, made = node.inputs[0].shape, node.outputs[0].shape
    if len(given) != 4 or len(made) != 4:
        return "does not resize an image"
    factor = max(big / max(small, 1) for small, big in zip(given[1:3], made[1:3], strict=True))
    if factor > _RESIZE_FACTOR:
        return f"enlarges {factor:.0f} times, which is not precise enough"
    return f"its output {made} is too large" if prod(made) > _RESIZE_BYTES else ""


def _softmax(node: Node) -> str:
    shape = node.inputs[0].shape
    if _above_one(shape) > 1:
        return f"its input {shape} is not one-dimensional"
    return f"has {prod(shape)} elements, more than 16000" if prod(shape) > 16000 else ""


def _split(node: Node) -> str:
    axes = node.constant(0)
    if axes is None:
        return "its axis is computed when the graph runs"
    rank = len(node.inputs[1].shape) if len(node.inputs) > 1 else 0
    return "splits the batch dimension" if any(axis in (0, -rank) for axis in axes) else ""


def _pack(node: Node) -> str:
    rank = len(node.outputs[0].shape)
    return "packs along the batch dimension" if node.option(1) in (0, -rank) else ""


def _strided_slice(node: Node) -> str:
    if set(node.constant(3) or (0,)) != {1}:
        return "has strides other than 1"
    return "has an ellipsis or adds an axis" if node.option(2) or node.option(3) else ""


def _above_one(shape: tuple[int, ...]) -> int:
    return sum(side > 1 for side in shape)


# None: taken without a limit of its own.
_RULES: dict[str, Callable[[Node], str] | None] = {
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
