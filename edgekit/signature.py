"""What the input and output tensors of a classifier must look like for EdgeKit to run it."""

from __future__ import annotations

from pathlib import Path

from edgekit.errors import BundleError
from edgekit.flatbuffer import Model, Tensor
from edgekit.manifest import AudioInput

# Beyond these a file is more likely damaged than meant.
_MAX_SIDE_PX, _MAX_CLASSES = 16_384, 1_000_000
_TYPES = ("float32", "uint8", "int8", "int16")


def check_image_classifier(model: Model, path: Path) -> int:
    """The number of classes.

    Raises:
        BundleError: a tensor is none of an image classifier.
    """
    mend = "give an image classifier"
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise BundleError(
            f"bundle {path} is no classifier",
            expected="one input and one output",
            got=f"{len(model.inputs)} and {len(model.outputs)}",
            mend="give a model that maps an image to one score per class",
        )
    shape = model.inputs[0].shape
    if len(shape) != 4 or shape[0] != 1 or shape[3] not in (1, 3):
        raise BundleError(
            f"bundle {path}: input",
            expected="an image of shape (1, height, width, 1 or 3)",
            got=str(shape),
            mend=mend,
        )
    _check_types(model, path, mend)
    if model.inputs[0].dynamic or not all(0 < side <= _MAX_SIDE_PX for side in shape[1:3]):
        raise BundleError(
            f"bundle {path}: input",
            expected=f"a fixed height and width up to {_MAX_SIDE_PX}",
            got=f"{shape}{' (left open)' if model.inputs[0].dynamic else ''}",
            mend="convert it again with the size fixed",
        )
    return _classes(model.outputs[0], path, mend)


def check_audio_tagger(model: Model, input: AudioInput, path: Path) -> int:
    """The number of tags.

    Raises:
        BundleError: a tensor does not fit what the manifest says of the sound, or a stream cannot be cut as it says.
    """
    mend = "convert the model again"
    if input.streaming:
        _check_stream(input, path)
    if len(model.inputs) != len(model.outputs) or not model.inputs or (not input.streaming and len(model.inputs) > 1):
        raise BundleError(
            f"bundle {path}",
            expected="as many outputs as inputs" if input.streaming else "one input and one output",
            got=f"{len(model.inputs)} inputs and {len(model.outputs)} outputs",
            mend=mend,
        )
    if tuple(model.inputs[0].shape) != input.tensor_shape or model.inputs[0].dynamic:
        what = "the samples" if input.front_end_in_graph else "the log-mel frames"
        raise BundleError(
            f"bundle {path}: input",
            expected=f"{what} of its sound, {input.tensor_shape}",
            got=f"{tuple(model.inputs[0].shape)}{' (left open)' if model.inputs[0].dynamic else ''}",
            mend=mend,
        )
    _check_types(model, path, mend)
    if input.front_end_in_graph and model.inputs[0].dtype != "float32":
        raise BundleError(f"bundle {path}: input", expected="sound in float32", got=model.inputs[0].dtype, mend=mend)
    for number, (given, made) in enumerate(zip(model.inputs[1:], model.outputs[1:], strict=True), 1):
        if _kind(given) != _kind(made) or given.dynamic:
            raise BundleError(
                f"bundle {path}: state {number}",
                expected=f"an output as the input, {_kind(given)}",
                got=str(_kind(made)),
                mend=mend,
            )
    return _classes(model.outputs[0], path, mend)


def _check_stream(input: AudioInput, path: Path) -> None:
    front_end = input.front_end
    hop, fft = front_end.frame_hop_samples, front_end.fft_samples
    for name in ("window_samples", "hop_samples"):
        if getattr(input, name) % hop:
            raise BundleError(
                f"bundle {path}: {name} of a stream",
                expected=f"a multiple of frame_hop_samples, {hop}",
                got=str(getattr(input, name)),
                mend="convert the model again",
            )
    if fft > 2 * hop or fft >= 2 * input.hop_samples:  # a hop would not end with the frame that is about its end
        raise BundleError(
            f"bundle {path}: fft_samples of a stream",
            expected=f"at most twice frame_hop_samples, {hop}, and less than twice hop_samples, {input.hop_samples}",
            got=str(fft),
            mend="convert the model again, not for streaming",
        )
    if front_end.range_db is not None:
        raise BundleError(
            f"bundle {path}: range_db of a stream",
            expected="none, as a stream does not know its highest level",
            got=f"{front_end.range_db:g}",
            mend="convert the model again",
        )


def _kind(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tensor.dtype, tuple(tensor.scale), tuple(tensor.zero_point)


def _check_types(model: Model, path: Path, mend: str) -> None:
    for which, tensor in (("input", model.inputs[0]), ("output", model.outputs[0])):
        if tensor.dtype not in _TYPES:
            raise BundleError(
                f"bundle {path}: {which}", expected=f"type {' or '.join(_TYPES)}", got=tensor.dtype, mend=mend
            )


def _classes(output: Tensor, path: Path, mend: str) -> int:
    scores = output.shape
    if not scores or any(n != 1 for n in scores[:-1]) or not 0 < scores[-1] <= _MAX_CLASSES:
        raise BundleError(
            f"bundle {path}: output", expected="one score per class, shape (1, classes)", got=str(scores), mend=mend
        )
    return scores[-1]
