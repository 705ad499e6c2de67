"""Which operators LiteRT's GPU accelerator would take, told from the ``.tflite`` file alone.

Operators and newest versions are those of LiteRT's ml_drift_delegate/tflite/support/support.cc, the limits those of
TensorFlow's gpu_compatibility.cc. Held against the WebGPU accelerator of LiteRT 2.3.0 on 130 small graphs.
"""

from __future__ import annotations

from collections.abc import Callable

from edgekit.flatbuffer import Model
from edgekit.graph import Node, nodes, outside, pieces

_NEWEST = {
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
_CUSTOM = ("Convolution2DTransposeBias", "MaxPoolingWithArgmax2D", "MaxUnpooling2D", "Resampler")
_TYPES = ("float32", "float16", "int8", "uint8", "int32", "bool")


def refusals(model: Model) -> list[str]:
    """For each operator in execution order, why the GPU would not run it; "" where it would.

    The rules are those of TensorFlow's ``gpu_compatibility.cc`` and of LiteRT's ``ml_drift_delegate``, as far as a
    converted model meets them. Both take the largest piece only (``max_delegated_partitions`` is 1).
    """
    found = list(nodes(model))
    if any(node.sizes_itself() for node in found):
        return ["the graph computes sizes of tensors when it runs: the GPU takes static sizes only"] * len(found)
    if any(node.stateful for node in found):
        return ["the graph keeps state in variable tensors, which LiteRT does not load for the GPU"] * len(found)
    reasons = [_reason(node) for node in found]
    largest = max(pieces(model, reasons), key=len, default=[])
    return outside(model, reasons, largest, "outside the largest piece, the only one that is taken")


def _reason(node: Node) -> str:
    operator = node.operator
    if operator.custom:
        return "" if operator.name in _CUSTOM else "a custom operator"
    if operator.name not in _NEWEST:
        return "not among the operators that the GPU has"
    if operator.version > (newest := _NEWEST[operator.name]):
        return f"has version {operator.version}, the GPU knows {newest}"
    if any(tensor.dynamic for tensor in node.flow):  # LiteRT would compile for a size of 1
        return "sizes are left open: the GPU takes static sizes only"
    if other := [tensor.dtype for tensor in node.flow if tensor.dtype not in _TYPES]:
        return f"works on {other[0]}, which the GPU has not"
    if any(len(tensor.shape) > 4 for tensor in node.flow):
        return "a tensor of more than 4 dimensions"
    if not all(tensor.shape for tensor in node.arriving):
        return "takes a computed tensor without dimensions"
    if not node.arriving and operator.name != "DEQUANTIZE":
        return "has constant inputs only"
    rule = _RULES.get(operator.name)
    return rule(node) if rule else ""


def _strided_slice(node: Node) -> str:
    return "has an ellipsis, or adds or removes an axis" if any(map(node.option, (2, 3, 4))) else ""


_RULES: dict[str, Callable[[Node], str]] = {
    "ADD_N": lambda node: "" if len(node.inputs) == 2 else f"has {len(node.inputs)} inputs, not 2",
    "FULLY_CONNECTED": lambda node: "its weights are in a shuffled format" if node.option(1, "<b") else "",
    "GATHER": lambda node: (
        "" if len(node.inputs) < 2 or len(node.inputs[1].shape) == 1 else "its indices have several dimensions"
    ),
    "MIRROR_PAD": lambda node: "pads symmetrically, not by reflection" if node.option(0, "<b") else "",
    "SOFTMAX": lambda node: "" if node.option(0, "<f") == 1 else "has a beta other than 1",
    "STRIDED_SLICE": _strided_slice,
}
