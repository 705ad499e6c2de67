"""The manifest: what a bundle says of itself, packed into it as ``edgekit.json``."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgekit.errors import BundleError

SCHEMA: Literal["edgekit.bundle/1"] = "edgekit.bundle/1"

Resize = Literal["bilinear", "area", "bicubic", "nearest"]
Activation = Literal["softmax", "sigmoid", "none"]
VerifiedOn = Literal["validation", "calibration", "noise"]


class ImageInput(msgspec.Struct, frozen=True, kw_only=True):
    """How an 8-bit image becomes the input tensor: resized to ``size_wh`` without regard to its aspect ratio, in RGB
    (``channels`` 3) or grey (1), then ``(x - mean) / std`` per channel with x in 0..255."""

    size_wh: tuple[int, int]
    channels: Literal[1, 3] = 3
    resize: Resize = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Output(msgspec.Struct, frozen=True, kw_only=True):
    """What the output tensor holds. ``activation`` turns it into scores; ``in_graph`` says that the graph itself
    ends with it, else the runtime applies it. ``multi_label``: each class has a score of its own."""

    activation: Activation
    in_graph: bool = True
    multi_label: bool = False


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """The data that fixed the quantization ranges. ``digest`` is the SHA-256 of the images at the model's size, or of
    the float tensors given instead, one after the other."""

    count: int
    digest: str


class CustomOp(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: int


class RuntimeCheck(msgspec.Struct, frozen=True, kw_only=True):
    """How one TFLite runtime did with the bundle. ``ok``: it loaded and its outputs are those of the other runtimes;
    ``differs``: it loaded and they are not; ``failed``: it did not load, run or end; ``not-installed``: not tried."""

    status: Literal["ok", "differs", "failed", "not-installed"]
    version: str = ""
    max_abs_difference: float | None = None
    top1_agreement: float | None = None
    detail: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle held against the Keras model, through the device's own preprocessing.

    ``data`` is what it was held against: the validation data, for want of it the calibration data, or noise (which
    proves only that it runs). Accuracies are None where the data has no labels; several labels at once have a macro F1
    and no top-1.
    """

    data: VerifiedOn
    count: int
    top1_agreement: float | None = None
    mean_abs_difference: float
    top1_keras: float | None = None
    top1: float | None = None
    top5_keras: float | None = None
    top5: float | None = None
    f1_macro_keras: float | None = None
    f1_macro: float | None = None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    schema: Literal["edgekit.bundle/1"] = SCHEMA
    name: str
    version: str
    task: Literal["image-classification"] = "image-classification"
    input: ImageInput
    output: Output
    quantization: str
    quantization_reason: str = ""
    target: str = ""
    calibration: Calibration | None = None
    custom_ops: tuple[CustomOp, ...] = ()
    runtimes: dict[str, RuntimeCheck] = {}
    verification: Verification | None = None
    sha256: str


def decode(content: bytes, where: str) -> Manifest:
    """The manifest in ``content``.

    Raises:
        BundleError: it is not JSON, not of the schema this version reads, or a field does not fit.
    """
    try:
        head = msgspec.json.decode(content)
        if not isinstance(head, dict) or head.get("schema") != SCHEMA:
            raise BundleError(
                f"{where}: manifest schema",
                expected=SCHEMA,
                got=str(head.get("schema") if isinstance(head, dict) else head)[:80],
                mend="upgrade edgekit or convert the model again",
            )
        return msgspec.convert(head, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{where}: manifest edgekit.json does not fit ({error})", mend="convert the model again"
        ) from error


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)
