"""A bounds-checked reader for TFLite flatbuffers and their TFLite Metadata.

tflite-runtime 2.14 trusts the offsets in a file: one that was cut short ends the process with a segmentation fault.
So every file is walked here first, and no offset is followed out of the file. Field numbers are those of TensorFlow's
``schema.fbs`` (version 3) and of TFLite Support's ``metadata_schema.fbs``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgekit.errors import BundleError

T = TypeVar("T")

TENSOR_TYPES = (
    "float32 float16 int32 uint8 int64 string bool int16 complex64 int8 float64 complex128 uint64 resource variant "
    "uint32 uint16 int4 bfloat16 int2 uint4 float8_e4m3fn float8_e5m2"
).split()

# Those of them that numpy has, as it has them.
_NUMPY_TYPES = frozenset("float32 float16 int32 uint8 int64 bool int16 int8 float64 uint64 uint32 uint16".split())

# In the order of BuiltinOperator in schema.fbs.
BUILTIN_OPERATORS = (
    "ADD AVERAGE_POOL_2D CONCATENATION CONV_2D DEPTHWISE_CONV_2D DEPTH_TO_SPACE DEQUANTIZE EMBEDDING_LOOKUP FLOOR "
    "FULLY_CONNECTED HASHTABLE_LOOKUP L2_NORMALIZATION L2_POOL_2D LOCAL_RESPONSE_NORMALIZATION LOGISTIC LSH_PROJECTION "
    "LSTM MAX_POOL_2D MUL RELU RELU_N1_TO_1 RELU6 RESHAPE RESIZE_BILINEAR RNN SOFTMAX SPACE_TO_DEPTH SVDF TANH "
    "CONCAT_EMBEDDINGS SKIP_GRAM CALL CUSTOM EMBEDDING_LOOKUP_SPARSE PAD UNIDIRECTIONAL_SEQUENCE_RNN GATHER "
    "BATCH_TO_SPACE_ND SPACE_TO_BATCH_ND TRANSPOSE MEAN SUB DIV SQUEEZE UNIDIRECTIONAL_SEQUENCE_LSTM STRIDED_SLICE "
    "BIDIRECTIONAL_SEQUENCE_RNN EXP TOPK_V2 SPLIT LOG_SOFTMAX DELEGATE BIDIRECTIONAL_SEQUENCE_LSTM CAST PRELU MAXIMUM "
    "ARG_MAX MINIMUM LESS NEG PADV2 GREATER GREATER_EQUAL LESS_EQUAL SELECT SLICE SIN TRANSPOSE_CONV SPARSE_TO_DENSE "
    "TILE EXPAND_DIMS EQUAL NOT_EQUAL LOG SUM SQRT RSQRT SHAPE POW ARG_MIN FAKE_QUANT REDUCE_PROD REDUCE_MAX PACK "
    "LOGICAL_OR ONE_HOT LOGICAL_AND LOGICAL_NOT UNPACK REDUCE_MIN FLOOR_DIV REDUCE_ANY SQUARE ZEROS_LIKE FILL "
    "FLOOR_MOD RANGE RESIZE_NEAREST_NEIGHBOR LEAKY_RELU SQUARED_DIFFERENCE MIRROR_PAD ABS SPLIT_V UNIQUE CEIL "
    "REVERSE_V2 ADD_N GATHER_ND COS WHERE RANK ELU REVERSE_SEQUENCE MATRIX_DIAG QUANTIZE MATRIX_SET_DIAG ROUND "
    "HARD_SWISH IF WHILE NON_MAX_SUPPRESSION_V4 NON_MAX_SUPPRESSION_V5 SCATTER_ND SELECT_V2 DENSIFY SEGMENT_SUM "
    "BATCH_MATMUL PLACEHOLDER_FOR_GREATER_OP_CODES CUMSUM CALL_ONCE BROADCAST_TO RFFT2D CONV_3D IMAG REAL COMPLEX_ABS "
    "HASHTABLE HASHTABLE_FIND HASHTABLE_IMPORT HASHTABLE_SIZE REDUCE_ALL CONV_3D_TRANSPOSE VAR_HANDLE READ_VARIABLE "
    "ASSIGN_VARIABLE BROADCAST_ARGS RANDOM_STANDARD_NORMAL BUCKETIZE RANDOM_UNIFORM MULTINOMIAL GELU "
    "DYNAMIC_UPDATE_SLICE RELU_0_TO_1 UNSORTED_SEGMENT_PROD UNSORTED_SEGMENT_MAX UNSORTED_SEGMENT_SUM ATAN2 "
    "UNSORTED_SEGMENT_MIN SIGN BITCAST BITWISE_XOR RIGHT_SHIFT"
).split()


class Table:
    """A flatbuffer table at ``position`` in ``buffer``; a field is addressed by its number in the schema."""

    def __init__(self, buffer: bytes, position: int) -> None:
        self.buffer, self.position = buffer, position
        self.vtable = position - self._unpack("<i", position)
        self.vtable_bytes: int = self._unpack("<H", self.vtable)

    @classmethod
    def root(cls, buffer: bytes, identifier: bytes) -> Table:
        if buffer[4:8] != identifier:
            raise ValueError(f"identifier {bytes(buffer[4:8])!r}, not {identifier!r}")
        return cls(buffer, struct.unpack_from("<I", buffer, 0)[0])

    def _unpack(self, format: str, position: int) -> int:
        if position < 0:  # struct would count it from the end
            raise ValueError("offset before the start of the file")
        value: int = struct.unpack_from(format, self.buffer, position)[0]
        return value

    def _offset(self, field: int) -> int | None:
        entry = 4 + 2 * field
        if entry >= self.vtable_bytes:
            return None
        offset = self._unpack("<H", self.vtable + entry)
        return self.position + offset if offset else None

    def _target(self, field: int) -> int | None:
        at = self._offset(field)
        return None if at is None else at + self._unpack("<I", at)

    def number(self, field: int, format: str = "<i", default: int = 0) -> int:
        at = self._offset(field)
        return default if at is None else self._unpack(format, at)

    def table(self, field: int) -> Table | None:
        at = self._target(field)
        return None if at is None else Table(self.buffer, at)

    def tables(self, field: int) -> list[Table]:
        at = self._target(field)
        if at is None:
            return []
        count = self._unpack("<I", at)
        if at + 4 + 4 * count > len(self.buffer):
            raise ValueError("vector past the end of the file")
        return [Table(self.buffer, p + self._unpack("<I", p)) for p in range(at + 4, at + 4 + 4 * count, 4)]

    def vector(self, field: int, dtype: npt.DTypeLike) -> npt.NDArray[np.generic]:
        """A view, not a copy."""
        at = self._target(field)
        if at is None:
            return np.empty(0, dtype)
        return np.frombuffer(self.buffer, dtype, self._unpack("<I", at), at + 4)

    def string(self, field: int) -> str:
        return self.vector(field, np.uint8).tobytes().decode("utf-8", "replace")


@dataclass(frozen=True)
class Tensor:
    """A tensor of the graph. ``scale`` and ``zero_point`` are empty where it is not quantized; ``dynamic`` says that
    another size than the batch is left open; ``constant`` that the file holds its data."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    dynamic: bool = False
    constant: bool = False


@dataclass(frozen=True)
class Operator:
    """An operator of the graph: its name (the custom name for a custom operator) and version, the indices of its
    tensors (-1: an optional one that is absent), and its builtin options, which :meth:`Model.option` reads."""

    name: str
    version: int
    custom: bool
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Table | None = None


@dataclass(frozen=True)
class Normalization:
    """Normalization of the input as TFLite Metadata states it: ``(x - mean) / std`` per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def check_identifier(head: bytes, where: str) -> None:
    """Checks the first 8 bytes of a file.

    Raises:
        BundleError: it is no TFLite model.
    """
    if head[4:8] != b"TFL3":
        raise BundleError(
            f"{where} is not a TFLite model",
            expected="'TFL3' at byte 4",
            got=repr(bytes(head[4:8])) if head else "an empty file",
            mend="give a .tflite file",
        )


class Model:
    """The first subgraph of a ``.tflite`` flatbuffer, wholly read and checked at construction.

    Raises:
        BundleError: ``content`` is no TFLite flatbuffer, or an offset in it leads out of it.
    """

    def __init__(self, content: bytes, where: str = "model") -> None:
        self.where = where
        check_identifier(content[:8], where)
        self._read(self._walk, content)

    def _read(self, walk: Callable[[bytes], T], content: bytes) -> T:
        try:
            return walk(content)
        except (struct.error, ValueError, IndexError, OverflowError, MemoryError) as error:
            reason = "an offset leads out of the file" if isinstance(error, struct.error) else error
            raise BundleError(
                f"{self.where} is not a whole TFLite model ({reason})",
                mend="it was cut short or altered: copy or convert it again",
            ) from error

    def _walk(self, content: bytes) -> None:
        root = Table.root(content, b"TFL3")
        buffers = [self._buffer(table, content) for table in root.tables(4)]
        codes = [self._operator_code(table) for table in root.tables(1)]
        subgraphs = root.tables(2)
        if not subgraphs:
            raise ValueError("no subgraph")
        for subgraph in subgraphs:
            tables = subgraph.tables(0)
            tensors = [self._tensor(table, buffers) for table in tables]
            operators = [self._operator(table, codes, len(tensors)) for table in subgraph.tables(3)]
            inputs, outputs = (self._indices(subgraph, field, len(tensors)) for field in (1, 2))
            if subgraph is subgraphs[0]:
                self.tensors, self.operators = tensors, operators
                self.inputs, self.outputs = [tensors[i] for i in inputs], [tensors[i] for i in outputs]
                self._output_indices = outputs
                self._data = [buffers[table.number(2, "<I")] if buffers else np.empty(0, np.uint8) for table in tables]
        self.metadata: dict[str, bytes] = {}
        for entry in root.tables(6):
            data = buffers[entry.number(1, "<I")]
            if (name := entry.string(0)) == "TFLITE_METADATA":  # others may be large, and nothing here reads them
                self.metadata[name] = data.tobytes()

    @staticmethod
    def _buffer(table: Table, content: bytes) -> npt.NDArray[np.generic]:
        """A view, not a copy."""
        # A model over 2 GB keeps its buffers behind the flatbuffer, by offset and size.
        offset, size = table.number(1, "<Q"), table.number(2, "<Q")
        if offset + size > len(content):
            raise ValueError("buffer past the end of the file")
        return np.frombuffer(content, np.uint8, size, offset) if size else table.vector(0, np.uint8)

    @staticmethod
    def _operator_code(table: Table) -> tuple[str, int, bool]:
        # Codes above 127 do not fit the older int8 field; the newer field is missing in older files.
        older, newer = table.number(0, "<b"), table.number(3)
        if min(older, newer) < 0:
            raise ValueError("negative operator code")
        code = max(older, newer)
        version = table.number(2, default=1)
        if code == BUILTIN_OPERATORS.index("CUSTOM"):
            return table.string(1), version, True
        known = code < len(BUILTIN_OPERATORS)
        return BUILTIN_OPERATORS[code] if known else f"BUILTIN_{code}", version, False

    @staticmethod
    def _indices(table: Table, field: int, count: int) -> tuple[int, ...]:
        indices = tuple(int(i) for i in table.vector(field, np.int32))
        if any(i < -1 or i >= count for i in indices):  # -1: an optional tensor that is absent
            raise ValueError("tensor index out of range")
        return indices

    def _operator(self, table: Table, codes: list[tuple[str, int, bool]], tensor_count: int) -> Operator:
        name, version, custom = codes[table.number(0, "<I")]
        inputs, outputs = (self._indices(table, field, tensor_count) for field in (1, 2))
        for options in (5, 9):
            table.vector(options, np.uint8)
        return Operator(name, version, custom, inputs, outputs, table.table(4))

    @staticmethod
    def _tensor(table: Table, buffers: list[npt.NDArray[np.generic]]) -> Tensor:
        buffer = table.number(2, "<I")
        if buffer >= max(len(buffers), 1):  # buffer 0 means none, even where there are no buffers
            raise ValueError("buffer index out of range")
        quantization = table.table(4)
        scale = quantization.vector(2, np.float32) if quantization else ()
        zero_point = quantization.vector(3, np.int64) if quantization else ()
        type_index = table.number(1, "<b")
        return Tensor(
            name=table.string(3),
            shape=tuple(int(n) for n in table.vector(0, np.int32)),
            dtype=TENSOR_TYPES[type_index] if 0 <= type_index < len(TENSOR_TYPES) else f"type {type_index}",
            scale=tuple(float(s) for s in scale),
            zero_point=tuple(int(z) for z in zero_point),
            dynamic=any(int(n) < 0 for n in table.vector(7, np.int32)[1:]),
            constant=buffer > 0 and buffers[buffer].size > 0,
        )

    def option(self, operator: Operator, field: int, format: str = "<i", default: int = 0) -> int:
        """Field ``field`` of the operator's builtin options, by its number in ``schema.fbs``; ``default`` where the
        file does not hold it.

        Raises:
            BundleError: an offset leads out of the file.
        """
        options = operator.options
        return default if options is None else self._read(lambda _: options.number(field, format, default), b"")

    def constant(self, index: int) -> npt.NDArray[np.generic] | None:
        """The data of tensor ``index`` in its shape, a view of the file; None where the file holds none, or where
        numpy has no such type.

        Raises:
            BundleError: the data does not fill the shape.
        """
        tensor = self.tensors[index]
        if not tensor.constant or tensor.dtype not in _NUMPY_TYPES:
            return None
        data = self._data[index]
        return self._read(lambda _: data.view(tensor.dtype).reshape(tensor.shape), b"")

    @cached_property
    def last_operator(self) -> str:
        """Name of the operator that makes the first output, seen through changes of type and shape."""
        producers = {output: operator for operator in self.operators for output in operator.outputs}
        tensor = self._output_indices[0] if self._output_indices else -1
        while (operator := producers.pop(tensor, None)) is not None:
            if operator.name not in ("QUANTIZE", "DEQUANTIZE", "RESHAPE", "SQUEEZE", "CAST"):
                return operator.name
            tensor = operator.inputs[0] if operator.inputs else -1
        return ""

    @cached_property
    def normalization(self) -> Normalization | None:
        """Normalization of the first input by the TFLite Metadata, if the model has it."""
        return self._read(self._normalization, self.metadata["TFLITE_METADATA"]) if self._has_metadata else None

    @cached_property
    def associated_files(self) -> list[str]:
        """Names of the files that the TFLite Metadata says are packed with the model."""
        return [name for name, _ in self._files]

    @cached_property
    def label_file(self) -> str | None:
        """Name of the packed file with the labels of the first output's axis."""
        return next((name for name, kind in self._files if kind == _TENSOR_AXIS_LABELS), None)

    @property
    def _has_metadata(self) -> bool:
        return "TFLITE_METADATA" in self.metadata

    @cached_property
    def _files(self) -> list[tuple[str, int]]:
        return self._read(self._associated, self.metadata["TFLITE_METADATA"]) if self._has_metadata else []

    @staticmethod
    def _normalization(content: bytes) -> Normalization | None:
        for subgraph in Table.root(content, b"M001").tables(3)[:1]:
            for tensor in subgraph.tables(2)[:1]:
                for unit in tensor.tables(4):
                    options = unit.table(1)
                    if unit.number(0, "<B") == _NORMALIZATION_OPTIONS and options:
                        mean, std = (tuple(float(v) for v in options.vector(field, np.float32)) for field in (0, 1))
                        if mean and std and all(std):
                            return Normalization(mean, std)
        return None

    @staticmethod
    def _associated(content: bytes) -> list[tuple[str, int]]:
        root = Table.root(content, b"M001")
        files = root.tables(6)
        for subgraph in root.tables(3):
            files += subgraph.tables(4)
            for tensor in subgraph.tables(2) + subgraph.tables(3):
                files += tensor.tables(6)
        return [(file.string(0), file.number(2, "<b")) for file in files]


# Members of ProcessUnitOptions and AssociatedFileType in metadata_schema.fbs.
_NORMALIZATION_OPTIONS = 1
_TENSOR_AXIS_LABELS = 2
