"""What is converted: an image classifier or a music tagger, opened, each with its own way through a conversion."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import numpy.typing as npt
import tensorflow as tf

from edgekit.converters import crnn, custom_ops, layer_norm, models, recipes, rewrite, targets
from edgekit.converters.clips import Clips
from edgekit.converters.images import Images
from edgekit.converters.kinds import Array, Kind, Tensors
from edgekit.custom_ops import CustomOpResolver
from edgekit.errors import ConversionError
from edgekit.manifest import AudioInput, ImageInput

if TYPE_CHECKING:
    from edgekit.converters.worker import Job

logger = logging.getLogger(__name__)

Progress = Callable[[int], None]


@dataclass
class Subject:
    """A model with the kind of its input.

    Attributes:
        predict: items' float tensors, as many as ``batch`` at most -> scores (n, classes), of the model itself.
        convert: recipe, calibration items where there are some, progress -> a flatbuffer.
        calibrated: the recipes that look at them.
        features: items' float tensors -> what comes before the part that saturates; None where there is none.
        remade: the recipes whose graph has other layers than the float one, which cannot be held against each other.
        check: items' float tensors -> holds the kernels of custom operators against their functions; None without any.
        resolver: has these kernels.
    """

    kind: Kind
    classes: int
    labels: tuple[str, ...]
    multi_label: bool
    batch: int
    predict: Callable[[Array], Array]
    convert: Callable[[str, Array | None, Progress], bytes]
    calibrated: tuple[str, ...] = targets.CALIBRATED
    features: Callable[[Array], Array] | None = None
    remade: tuple[str, ...] = ()
    check: Callable[[Tensors], None] | None = None
    resolver: CustomOpResolver | None = None
    warnings: list[str] = field(default_factory=list)


def open_images(job: Job, resolver: CustomOpResolver) -> Subject:
    """The image classifier that ``job`` names; ``resolver`` has the kernels of its custom operators.

    Raises:
        ConversionError: as :func:`edgekit.converters.models.open_model`.
    """
    classifier = models.open_model(
        job.model,
        weights=job.weights,
        classes=job.classes or len(job.labels) or None,
        input_size=job.input_size,
        alpha=job.alpha,
        minimalistic=job.minimalistic,
        dropout=job.dropout,
        head=job.head,
        mean=job.mean,
        std=job.std,
    )
    warnings = [*classifier.warnings]
    if job.model in models.MOBILENETS and job.weights == "none":
        warnings.append(_random(job.model))
    if classifier.assumed:
        warnings.append(
            "the model does not say how its pixels are normalized: "
            f"(x - {classifier.mean[0]:g}) / {classifier.std[0]:g} is assumed; say otherwise with --mean and --std"
        )
    kind = Images(
        ImageInput(
            size_wh=classifier.size_wh,
            channels=3 if classifier.channels == 3 else 1,
            mean=classifier.mean,
            std=classifier.std,
        )
    )

    custom = job.edgekit_ops or custom_ops.marked()
    made: dict[str, bytes] = {}

    def convert(recipe: str, calibration: Array | None, progress: Progress) -> bytes:
        def tensors() -> Tensors:
            assert calibration is not None
            return _counted(kind.ranging(calibration), progress)

        if not custom:
            return rewrite.rewrite(recipes.convert(classifier.static, recipe, tensors), recipe)
        if recipe not in made:
            with layer_norm.as_operator(classifier.static) if job.edgekit_ops else nullcontext():
                content = custom_ops.convert(classifier.static, recipe, tensors, resolver)
            made[recipe] = rewrite.rewrite(content, recipe)
        return made[recipe]

    def check(tensors: Tensors) -> None:
        content = convert("float32", None, lambda _: None)
        if job.edgekit_ops and not custom_ops.having(content, layer_norm.OPERATOR):
            logger.warning("--edgekit-ops changed nothing: the model has no LayerNormalization over its last axis")
        custom_ops.check(content, tensors, resolver)

    dynamic = classifier.model.inputs[0].shape[0] is None
    return Subject(
        kind=kind,
        classes=classifier.classes,
        labels=job.labels,
        multi_label=_multi_label(classifier, kind),
        batch=32 if dynamic else 1,
        predict=_function(classifier.model if dynamic else classifier.static),
        convert=convert,
        check=check if custom else None,
        resolver=resolver,
        warnings=warnings,
    )


def open_sound(job: Job) -> Subject:
    """The music tagger that ``job`` describes.

    Raises:
        ConversionError: an option or the weights do not fit.
    """
    from edgekit.converters import crnn_graph, crnn_quantize

    published = crnn.is_published(job.weights)
    labels = job.labels or (crnn.TAGS if published and job.classes in (None, len(crnn.TAGS)) else ())
    axis = job.bn_axis or ("frequency" if job.streaming and not published else "time")
    if job.streaming and axis == "time":
        given = f"--weights {job.weights}" if published else "--bn-axis time"
        raise ConversionError(
            f"--streaming with {given}: the first normalization depends on the place in the window",
            expected="one over the mel bands",
            mend="train the model with --bn-axis frequency, or leave out --streaming",
        )
    model = crnn.build(
        frames=job.frames or crnn.FRAMES,
        num_mel_bins=job.mels or crnn.MEL_BINS,
        tags=job.classes or len(labels) or len(crnn.TAGS),
        bn_axis=axis,
    )
    warnings = [_random(job.model)] if job.weights == "none" else [*crnn.load(model, job.weights)]
    kind = Clips(_audio_input(model, job))

    def convert(recipe: str, calibration: Array | None, progress: Progress) -> bytes:  # noqa: ARG001 it does not tell
        return crnn_quantize.convert(model, recipe, calibration, streaming=job.streaming, exact=job.exact)

    features = keras.Model(model.input, model.get_layer("reshape").output)
    predict = _function(model)
    if job.exact:  # the last window of what was heard
        whole, frames = predict, model.input_shape[2]
        predict = lambda tensors: whole(tensors[:, :, -frames:])  # noqa: E731
    elif job.streaming:
        predict = lambda tensors: np.concatenate([crnn_graph.reference(model, x[None]) for x in tensors])  # noqa: E731
    return Subject(
        kind=kind,
        classes=model.output_shape[1],
        labels=labels,
        multi_label=True,
        batch=4,
        predict=predict,
        convert=convert,
        calibrated=(*targets.CALIBRATED, "int8-weights"),
        features=None if job.streaming else _function(features),
        remade=("int8",) if not job.streaming else tuple(recipes.RECIPES),
        warnings=warnings,
    )


def _audio_input(model: Any, job: Job) -> AudioInput:
    """The window and the hop of ``model``, and its front end."""
    from edgekit.converters import crnn_graph

    _, num_mel_bins, frames, _ = model.input_shape
    frame_hop = crnn.FRONT_END.frame_hop_samples
    # The batch form has a frame about the end of the window too.
    window_samples = (frames - 1) * frame_hop
    hop_samples = round(job.hop * crnn.SAMPLE_RATE_HZ) if job.hop else window_samples // 2
    if job.streaming:
        window_samples = crnn_graph.streaming_window_samples(frames, frame_hop, exact=job.exact)
        of_graph = crnn_graph.STEP * frame_hop
        if job.hop and hop_samples != of_graph:
            raise ConversionError(
                f"--hop {job.hop:g}",
                expected=f"{of_graph / crnn.SAMPLE_RATE_HZ:g} s with --streaming, as its graph is made",
                got=f"{job.hop:g}",
                mend="leave it out",
            )
        hop_samples = of_graph
    return AudioInput(
        sample_rate_hz=crnn.SAMPLE_RATE_HZ,
        window_samples=window_samples,
        hop_samples=max(hop_samples, 1),
        streaming=job.streaming,
        front_end=crnn.front_end(num_mel_bins, streaming=job.streaming),
    )


def _random(model: str) -> str:
    return f"{model} without --weights has random ones: good for measuring speed, and nothing else"


def _function(model: Any) -> Callable[[Array], Array]:
    # Without XLA, which takes longer to compile than this takes to run.
    function = tf.function(model, jit_compile=False, reduce_retracing=True)
    return lambda tensors: np.asarray(function(tf.constant(tensors), training=False))


def _counted(tensors: Tensors, progress: Progress) -> Iterator[Array]:
    for done, tensor in enumerate(tensors, 1):
        yield tensor
        progress(done)


def _multi_label(classifier: models.Classifier, kind: Images) -> bool:
    """Whether each class has a score of its own: they lie in 0..1 and do not add up to 1. A SavedModel does not tell
    its last activation otherwise."""
    tensors = kind.tensors(kind.noise()[:2])
    scores: npt.NDArray[Any] = np.concatenate(
        [np.asarray(classifier.static(tensor, training=False)) for tensor in tensors]
    )
    return bool((scores >= 0).all() and (scores <= 1).all() and (np.abs(scores.sum(1) - 1) > 1e-2).any())
