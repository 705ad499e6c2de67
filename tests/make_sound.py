"""Writes two small bundles that name sound: window.tflite and, for streaming, stream.tflite. 0.5 s at 12 kHz, tagged
``silence``, ``low`` (below 1 kHz) and ``high`` (above 2 kHz). window_in_graph.tflite and stream_in_graph.tflite are the
same with the front end in the graph."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import tensorflow as tf

from edgekit import bundle
from edgekit.converters import raw_sound
from edgekit.manifest import AudioInput, LogMel, Manifest, Output

LABELS = ("silence", "low", "high")
FRONT_END = LogMel(fft_samples=512, frame_hop_samples=256, num_mel_bins=16, low_hz=0, high_hz=6000)
WINDOW_SAMPLES, HOP_SAMPLES = 6144, 3072


def tags(levels: Any) -> Any:
    """Mean levels (1, 16) in dB -> scores (1, 3)."""
    low, high = (tf.reduce_max(band, 1, keepdims=True) for band in (levels[:, :5], levels[:, 9:]))
    return tf.sigmoid(0.3 * tf.concat([-60 - tf.maximum(low, high), low + 20, high + 20], 1))


def of_window(log_mel: Any) -> Any:
    return tf.reshape(tags(tf.reduce_mean(log_mel[..., 0], 2)), (1, 3))


def of_hop(a_log_mel: Any, b_hops: Any) -> dict[str, Any]:
    """``b_hops`` (1, 2, 16): levels of the two last hops."""
    hops = tf.concat([b_hops[:, 1:], tf.reduce_mean(a_log_mel[..., 0], 2)[:, None]], 1)
    return {"a_scores": tf.reshape(tags(tf.reduce_mean(hops, 1)), (1, 3)), "b_hops": hops}


def convert(function: Any, *shapes: tuple[int, ...]) -> bytes:
    module = tf.Module()
    module.function = tf.function(function, input_signature=[tf.TensorSpec(shape) for shape in shapes])
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(module, folder, signatures=module.function)
        return bytes(tf.lite.TFLiteConverter.from_saved_model(folder).convert())


def write(path: Path, content: bytes, streaming: bool) -> None:
    input = AudioInput(
        sample_rate_hz=12_000,
        window_samples=WINDOW_SAMPLES,
        hop_samples=HOP_SAMPLES,
        streaming=streaming,
        front_end=FRONT_END,
    )
    pack(path, content, input)
    pack(path.with_stem(f"{path.stem}_in_graph"), raw_sound.attach(content, input), raw_sound.in_graph(input))


def pack(path: Path, content: bytes, input: AudioInput) -> None:
    manifest = Manifest(
        name=path.stem,
        version="1",
        task="audio-tagging",
        input=input,
        output=Output(activation="sigmoid", multi_label=True),
        quantization="float32",
        sha256=hashlib.sha256(content).hexdigest(),
    )
    path.write_bytes(bundle.pack(content, manifest, LABELS))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "window.tflite", convert(lambda log_mel: {"scores": of_window(log_mel)}, (1, 16, 25, 1)), False)
    write(folder / "stream.tflite", convert(of_hop, (1, 16, 12, 1), (1, 2, 16)), True)
