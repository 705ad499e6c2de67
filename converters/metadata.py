"""Writes the standard TFLite Metadata into a flatbuffer, so that other TFLite tools read its labels and preprocessing.

Field numbers are those of TFLite Support's ``metadata_schema.fbs``; :mod:`edgekit.flatbuffer` reads them back.
"""

from __future__ import annotations

from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema

from edgekit.bundle import LABELS_NAME, MANIFEST_NAME
from edgekit.converters import rewrite
from edgekit.manifest import AudioInput, ImageInput

METADATA_NAME = "TFLITE_METADATA"
IDENTIFIER = b"M001"

_RGB, _GRAYSCALE = 1, 2  # ColorSpaceType
_FEATURE_PROPERTIES, _IMAGE_PROPERTIES, _AUDIO_PROPERTIES = 1, 2, 4  # ContentProperties
_NORMALIZATION_OPTIONS = 1  # ProcessUnitOptions
_UNKNOWN, _TENSOR_AXIS_LABELS = 0, 2  # AssociatedFileType


def attach(
    content: bytes, input: ImageInput | AudioInput, *, name: str, version: str, labelled: bool, states: int = 0
) -> bytes:
    """``content``, a TFLite flatbuffer, with metadata that tells its input, its normalization and its packed files.

    Args:
        states: how many tensors a streaming model has beside its input and its scores, on either side.
    """
    model = rewrite.load(content)
    buffer = schema.BufferT()
    buffer.data = np.frombuffer(_metadata(input, name, version, labelled, states), np.uint8)
    model.buffers.append(buffer)
    entry = schema.MetadataT()
    entry.name, entry.buffer = METADATA_NAME, len(model.buffers) - 1
    model.metadata = [old for old in model.metadata or [] if old.name != METADATA_NAME.encode()] + [entry]
    return rewrite.save(model)


def _metadata(input: ImageInput | AudioInput, name: str, version: str, labelled: bool, states: int) -> bytes:
    builder = flatbuffers.Builder(1024)

    def string(text: str) -> int:
        return int(builder.CreateString(text))

    def table(slots: int, **fields: Any) -> int:
        """A table; ``o3=offset`` sets field 3 to an offset, ``b3=`` to a byte, ``u3=`` to a uint32."""
        builder.StartObject(slots)
        for key, value in fields.items():
            kind, slot = key[0], int(key[1:])
            put = {
                "o": builder.PrependUOffsetTRelativeSlot,
                "b": builder.PrependInt8Slot,
                "u": builder.PrependUint32Slot,
            }[kind]
            put(slot, value, 0)
        return int(builder.EndObject())

    def tables(offsets: list[int]) -> int:
        builder.StartVector(4, len(offsets), 4)
        for offset in reversed(offsets):
            builder.PrependUOffsetTRelative(offset)
        return int(builder.EndVector())

    def floats(values: tuple[float, ...]) -> int:
        builder.StartVector(4, len(values), 4)
        for value in reversed(values):
            builder.PrependFloat32(value)
        return int(builder.EndVector())

    def file(file_name: str, description: str, kind: int) -> int:
        return table(5, o0=string(file_name), o1=string(description), b2=kind)

    def image(input: ImageInput) -> int:
        normalization = table(2, o0=floats(input.mean), o1=floats(input.std))
        unit = table(2, b0=_NORMALIZATION_OPTIONS, o1=normalization)
        size = table(2, u0=input.size_wh[0], u1=input.size_wh[1])
        properties = table(2, b0=_RGB if input.channels == 3 else _GRAYSCALE, o1=size)
        return table(
            7,
            o0=string("image"),
            o1=string("Input image, resized to the size of the tensor."),
            o3=table(3, b0=_IMAGE_PROPERTIES, o1=properties),
            o4=tables([unit]),
            o5=table(
                2,
                o0=floats(tuple((255 - m) / s for m, s in zip(input.mean, input.std, strict=True))),
                o1=floats(tuple(-m / s for m, s in zip(input.mean, input.std, strict=True))),
            ),
        )

    def sound(input: AudioInput) -> int:
        what = "what is new of the sound" if input.streaming else f"{input.window_samples} samples"
        log_mel = f"Log-mel spectrogram in dB of {what}; {MANIFEST_NAME} has its parameters."
        samples = f"Sound in -1..1: {what}."
        properties = table(2, u0=input.sample_rate_hz, u1=1)
        return table(
            7,
            o0=string("sound" if input.front_end_in_graph else "log_mel"),
            o1=string(samples if input.front_end_in_graph else log_mel),
            o3=table(3, b0=_AUDIO_PROPERTIES, o1=properties),
        )

    def state(number: int) -> int:
        what = f"State {number}: what it gave in the call before, zeros at first."
        return table(7, o0=string(f"state_{number}"), o1=string(what), o3=table(3, b0=_FEATURE_PROPERTIES, o1=table(0)))

    is_image = isinstance(input, ImageInput)
    given = image(input) if isinstance(input, ImageInput) else sound(input)
    scores: dict[str, Any] = {"o3": table(3, b0=_FEATURE_PROPERTIES, o1=table(0))}
    if labelled:
        scores["o6"] = tables([file(LABELS_NAME, "Labels of the classes, one a line.", _TENSOR_AXIS_LABELS)])
    made = table(7, o0=string("probability"), o1=string("Score of each class."), **scores)
    kept = [[state(number) for number in range(1, states + 1)] for _ in range(2)]
    subgraph = table(9, o2=tables([given, *kept[0]]), o3=tables([made, *kept[1]]))
    root = table(
        8,
        o0=string(name),
        o1=string("Image classifier." if is_image else "Sound tagger."),
        o2=string(version),
        o3=tables([subgraph]),
        o6=tables([file(MANIFEST_NAME, "EdgeKit's manifest.", _UNKNOWN)]),
        o7=string("1.0.0"),
    )
    builder.Finish(root, IDENTIFIER)
    return bytes(builder.Output())
