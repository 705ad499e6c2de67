"""MusicTaggerCRNN (Choi et al., "Convolutional recurrent neural networks for music classification", 2017): log-mel
spectrogram -> tags, in the published size and in others of the same family."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import keras
import msgspec

from edgekit.converters.weights import load_weights
from edgekit.errors import ConversionError
from edgekit.manifest import LogMel

BatchNormAxis = Literal["time", "frequency"]

# Of each block: the channels of its convolution and the side of its pooling, frequency and time alike.
CHANNELS, POOLS = (64, 128, 128, 128), (2, 3, 4, 4)
UNITS = 32
EPSILON = 1e-3
TOP = "output"
SAMPLE_RATE_HZ = 12_000
# 29.12 s at 12 kHz in 1,366 frames, as published: squared power, 80 dB below the loudest.
FRAMES, MEL_BINS = 1366, 96
FRONT_END = LogMel(
    fft_samples=512,
    frame_hop_samples=256,
    num_mel_bins=MEL_BINS,
    low_hz=0.0,
    high_hz=6000.0,
    power=2.0,
    floor=1e-10,
    range_db=80.0,
)
TAGS = (
    "rock", "pop", "alternative", "indie", "electronic", "female vocalists", "dance", "00s", "alternative rock", "jazz",
    "beautiful", "metal", "chillout", "male vocalists", "classic rock", "soul", "indie rock", "Mellow", "electronica",
    "80s", "folk", "90s", "chill", "instrumental", "punk", "oldies", "blues", "hard rock", "ambient", "acoustic",
    "experimental", "female vocalist", "guitar", "Hip-Hop", "70s", "party", "country", "easy listening", "sexy",
    "catchy", "funk", "electro", "heavy metal", "Progressive rock", "60s", "rnb", "indie pop", "sad", "House", "happy",
)  # fmt: skip
# What the author trained on the Million Song Dataset (github.com/keunwoochoi/music-auto_tagging-keras, MIT).
WEIGHTS_FILE = "music_tagger_crnn_weights_tensorflow.h5"
WEIGHTS_URL = f"https://github.com/keunwoochoi/music-auto_tagging-keras/raw/master/data/{WEIGHTS_FILE}"
WEIGHTS_SHA256 = "df63638de9f3113780768181670c554f122fbd1297c63c065836d70a251115a8"


HARD_SIGMOID_SLOPE = 0.2


def front_end(num_mel_bins: int = MEL_BINS, *, streaming: bool = False) -> LogMel:
    """What makes the log-mel levels of a model, in training as on the device. A stream does not know its loudest frame,
    and so has no ``range_db``."""
    range_db = None if streaming else FRONT_END.range_db
    return msgspec.structs.replace(FRONT_END, num_mel_bins=num_mel_bins, range_db=range_db)


def hard_sigmoid(x: Any) -> Any:
    """``clip(0.2 x + 0.5, 0, 1)``, that of Keras 1 and 2. Keras 3's has a slope of 1/6."""
    return keras.ops.clip(HARD_SIGMOID_SLOPE * x + 0.5, 0.0, 1.0)


keras.saving.register_keras_serializable("edgekit")(hard_sigmoid)


def build(
    *,
    frames: int = FRAMES,
    num_mel_bins: int = MEL_BINS,
    tags: int = len(TAGS),
    bn_axis: BatchNormAxis = "time",
    include_top: bool = True,
) -> Any:
    """The Keras model (batch, num_mel_bins, frames, 1) -> (batch, tags), each tag with a score of its own in 0..1.

    Args:
        frames: length of the window; it is padded with zeros on both sides to a multiple of 96.
        num_mel_bins: 96 or more.
        tags: how many.
        bn_axis: what the first batch normalization is over: ``time``, as published, where each frame of the window has
            its own statistics, or ``frequency``, where each mel band has, and which can be computed as a stream.
        include_top: without it the result are the 32 features before the tags.

    Raises:
        ConversionError: a size is too small, or ``bn_axis`` is neither.
    """
    for what, value, least in (("--mels", num_mel_bins, 96), ("--frames", frames, 24), ("--classes", tags, 1)):
        if value < least:
            raise ConversionError(what, expected=f"{least} or more for a CRNN", got=str(value), mend="give more")
    if bn_axis not in ("time", "frequency"):
        raise ConversionError(f"--bn-axis {bn_axis}", expected="time or frequency", mend="give one of these")
    layers = keras.layers
    before, after = padding(frames)
    x = given = keras.Input((num_mel_bins, frames, 1), name="log_mel")
    x = layers.ZeroPadding2D(((0, 0), (before, after)), name="padding")(x)
    axis = 2 if bn_axis == "time" else 1
    x = layers.BatchNormalization(axis=axis, epsilon=EPSILON, name="bn_0_freq")(x)
    for number, (channels, pool) in enumerate(zip(CHANNELS, POOLS, strict=True), 1):
        x = layers.Conv2D(channels, 3, padding="same", name=f"conv{number}")(x)
        x = layers.BatchNormalization(epsilon=EPSILON, name=f"bn{number}")(x)
        x = layers.ELU(name=f"elu{number}")(x)
        x = layers.MaxPooling2D(pool, name=f"pool{number}")(x)
        x = layers.Dropout(0.1, name=f"dropout{number}")(x)
    x = layers.Permute((2, 1, 3), name="permute")(x)
    x = layers.Reshape((x.shape[1], x.shape[2] * x.shape[3]), name="reshape")(x)
    for name, sequences in (("gru1", True), ("gru2", False)):
        x = layers.GRU(
            UNITS, return_sequences=sequences, recurrent_activation=hard_sigmoid, reset_after=False, name=name
        )(x)
    x = layers.Dropout(0.3, name="dropout")(x)
    if include_top:
        x = layers.Dense(tags, activation="sigmoid", name=TOP)(x)
    return keras.Model(given, x, name="music_tagger_crnn")


def padding(frames: int) -> tuple[int, int]:
    """How many frames of zeros come before and after ``frames`` to make a multiple of 96: 37 and 37 for 1,366."""
    missing = -frames % 96
    return missing // 2, missing - missing // 2


def load(model: Any, weights: str) -> tuple[str, ...]:
    """Loads ``weights``, ``msd`` or a file, into a model of :func:`build`.

    Returns:
        What was done to the weights that the user should know of.

    Raises:
        ConversionError: they cannot be had, or are not this model's.
    """
    return load_weights(model, published_weights() if weights == "msd" else Path(weights), top=TOP)


def is_published(weights: str) -> bool:
    """Whether ``weights``, a name or a file, are those that the author published, of his tags."""
    return weights == "msd" or (Path(weights).is_file() and _sha256(Path(weights)) == WEIGHTS_SHA256)


def published_weights() -> Path:
    """The file of ``--weights msd``, in the folder of Keras's own downloads; fetched where it is not there.

    Raises:
        ConversionError: it cannot be fetched, or another file of that name is there.
    """
    folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"
    path = folder / WEIGHTS_FILE
    if path.is_file():  # keras.utils.get_file would remove one that it does not know
        if (found := _sha256(path)) != WEIGHTS_SHA256:
            raise ConversionError(
                f"weights {path}",
                expected=f"the published file, sha256 {WEIGHTS_SHA256[:12]}…",
                got=f"{found[:12]}…",
                mend="remove it, or give it with --weights PATH if it is yours",
            )
        return path
    try:
        return Path(keras.utils.get_file(WEIGHTS_FILE, WEIGHTS_URL, file_hash=WEIGHTS_SHA256, cache_subdir="models"))
    except Exception as error:
        # Keras raises a bare Exception for a failed download.
        raise ConversionError(
            "the published weights of the CRNN cannot be had (no network?)",
            mend=f"put the file {WEIGHTS_FILE} from {WEIGHTS_URL} into {folder}",
        ) from error


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
