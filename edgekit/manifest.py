"""The manifest: what a bundle says of itself, packed into it as ``edgekit.json``."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgekit.errors import BundleError

SCHEMA: Literal["edgekit.bundle/1"] = "edgekit.bundle/1"

Resize = Literal["bilinear", "area", "bicubic", "nearest"]
Activation = Literal["softmax", "sigmoid", "none"]
VerifiedOn = Literal["validation", "calibration", "noise"]


class ImageInput(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="image"):
    """How an 8-bit image becomes the input tensor: resized to ``size_wh`` without regard to its aspect ratio, in RGB
    (``channels`` 3) or grey (1), then ``(x - mean) / std`` per channel with x in 0..255."""

    size_wh: tuple[int, int]
    channels: Literal[1, 3] = 3
    resize: Resize = "bilinear"
    mean: tuple[float, ...]
    std: tuple[float, ...]


class LogMel(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="log-mel"):
    """How sound becomes a log-mel spectrogram, frames of ``num_mel_bins`` levels in dB:
    ``10 log10(max((mel_filters @ |STFT|^2) ^ power, floor))``.

    The STFT has a periodic Hann window of ``fft_samples`` every ``frame_hop_samples``, centred: frame i is about sample
    ``i * frame_hop_samples``, and the sound is mirrored at its ends (librosa's ``center=True, pad_mode="reflect"``).

    Attributes:
        low_hz, high_hz: edges of the lowest and the highest of the triangular filters.
        mel_scale, mel_norm: spacing and height of the filters: ``slaney`` (linear below 1 kHz; each of the same area)
            is librosa's default, ``htk`` and ``none`` (each of height 1) its ``htk=True`` and ``norm=None``.
        power: 1 for the mel power spectrogram itself, 2 where it is squared.
        floor: lower limit before the logarithm.
        range_db: levels further below the highest of the window are raised to that; None leaves them, as a stream must,
            whose frames do not know what is yet to come.
    """

    fft_samples: Annotated[int, msgspec.Meta(ge=2, le=65_536)]
    frame_hop_samples: Annotated[int, msgspec.Meta(ge=1, le=65_536)]
    num_mel_bins: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    low_hz: float
    high_hz: float
    mel_scale: Literal["slaney", "htk"] = "slaney"
    mel_norm: Literal["slaney", "none"] = "slaney"
    power: float = 1.0
    floor: float = 1e-10
    range_db: float | None = None


class AudioInput(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="audio"):
    """How mono sound, samples in -1..1 at ``sample_rate_hz``, becomes the input tensor (1, num_mel_bins, frames, 1).

    ``front_end_in_graph``: it does so in the graph, by the operator EdgekitLogMel, and the input tensor is the sound
    itself, (1, samples).

    A prediction is about ``window_samples``, and there is none before so many were heard without a gap. The next one
    comes ``hop_samples`` later. ``streaming``: the model is given the frames of each hop once, and keeps what it needs
    of them in its states: input tensor i > 0 is what output tensor i gave in the call before, and zeros at first.
    Otherwise it is given the frames of the whole window each time.
    """

    sample_rate_hz: Annotated[int, msgspec.Meta(ge=1000, le=384_000)]
    window_samples: Annotated[int, msgspec.Meta(ge=1)]
    hop_samples: Annotated[int, msgspec.Meta(ge=1)]
    streaming: bool = False
    front_end: LogMel
    front_end_in_graph: bool = False

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        """Of the input tensor, which holds the frames of a hop where ``streaming``, else those of the window."""
        if self.front_end_in_graph:
            return 1, self.hop_samples if self.streaming else self.window_samples
        return self.log_mel_shape

    @property
    def log_mel_shape(self) -> tuple[int, int, int, int]:
        """Of the log-mels: (1, num_mel_bins, frames, 1)."""
        frame_hop = self.front_end.frame_hop_samples
        frames = self.hop_samples // frame_hop if self.streaming else 1 + self.window_samples // frame_hop
        return 1, self.front_end.num_mel_bins, frames, 1


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
    ``differs``: it loaded and they are not, or are too far from those of the Keras model; ``failed``: it did not load,
    run or end; ``not-installed``: not tried.

    Attributes:
        max_abs_difference: of a score from that of the Keras model, over the data.
        top1_agreement: share of the data on which it names what the Keras model names.
        within_0_03: of sound, share of the clips, or of shifted copies where the clips are few, whose every score is
            within 0.03 of the Keras model's, with the right tag first.
    """

    status: Literal["ok", "differs", "failed", "not-installed"]
    version: str = ""
    max_abs_difference: float | None = None
    top1_agreement: float | None = None
    within_0_03: float | None = None
    detail: str = ""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle held against the Keras model, through the device's own preprocessing.

    ``data`` is what it was held against: the validation data, for want of it the calibration data, or noise (which
    proves only that it runs). Accuracies are None where the data has no labels; several labels at once have a macro F1
    and no top-1. The figures are of the preferred runtime.

    Attributes:
        copies: of sound, how many shifted copies of the clips were tried too: a tag network that saturates flips rather
            than drifts, which a few clips do not show. ``within_0_03`` is the share of them that came out right.
        features_sqnr_db: of sound, signal to noise ratio before the part that saturates.
    """

    data: VerifiedOn
    count: int
    top1_agreement: float | None = None
    mean_abs_difference: float
    max_abs_difference: float | None = None
    copies: int = 0
    within_0_03: float | None = None
    features_sqnr_db: float | None = None
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
    task: Literal["image-classification", "audio-tagging"] = "image-classification"
    input: ImageInput | AudioInput
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
        if isinstance(given := head.get("input"), dict):  # bundles of before there was sound do not say
            given.setdefault("kind", "image")
        return msgspec.convert(head, Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"{where}: manifest edgekit.json does not fit ({error})", mend="convert the model again"
        ) from error


def encode(manifest: Manifest) -> bytes:
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1)
