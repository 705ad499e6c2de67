"""A bundle in a TFLite interpreter: preprocess, invoke and decode, each by itself and all in one."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit import bundle as bundles
from edgekit import runtimes
from edgekit.audio import as_samples
from edgekit.audio_preprocess import StreamPreprocessor, WindowPreprocessor
from edgekit.bundle import Bundle
from edgekit.custom_ops import Ops, resolver
from edgekit.decode import Prediction, Threshold, scores, thresholds, top
from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import AudioInput

if TYPE_CHECKING:
    from edgekit.preprocess import ChannelOrder, ImagePreprocessor


class Model:
    """A classifier ready to predict. One thread at a time may use it.

    One that streams keeps states from call to call: give it the sound of one source without a gap, or :meth:`reset` it.

    Attributes:
        bundle: what was loaded.
        runtime: name of the TFLite runtime that runs it.
        delegate, requested_delegate: the delegate in use, and what was asked for.
        preprocess: turns an image, a window of sound or the next hop of a stream into the input tensor:
            :class:`~edgekit.preprocess.ImagePreprocessor`, :class:`~edgekit.audio_preprocess.WindowPreprocessor` or
            :class:`~edgekit.audio_preprocess.StreamPreprocessor`.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        delegate: str = "auto",
        threads: int = 1,
        runtime: str | None = None,
        ops: Ops = (),
        strict: bool = False,
        order: Sequence[str] = ("coral", "gpu", "cpu"),
        hang_s: float = 30.0,
    ) -> None:
        if not 1 <= threads <= 256:
            raise BundleError(
                "threads", expected="1 to 256", got=str(threads), mend="give as many as the device has cores"
            )
        if delegate not in ("auto", "cpu"):
            raise BundleError(
                f"delegate {delegate!r}", expected="auto or cpu", mend="other delegates are not supported yet"
            )
        self.bundle, self.delegate, self.requested_delegate = bundle, "cpu", delegate
        self.operators, self.operators_delegated = len(bundle.file.model.operators), None
        self.began_s: float | None = None
        self.runtime, module = runtimes.load(runtime)
        custom = any(operator.custom for operator in bundle.file.model.operators)
        self._ops = resolver(ops) if ops or custom else None
        if self._ops and (problem := self._ops.outdated(bundle.file.model)):
            raise BundleError(f"bundle {bundle.file.path} needs {problem}")
        delegates = [self._ops.delegate(module)] if self._ops and self._ops.wanted(bundle.file.model) else []
        try:
            # From memory, not by path: the file may be replaced or cut while the model runs.
            self._interpreter: Any = module.Interpreter(
                model_content=bundle.file.content, num_threads=threads, experimental_delegates=delegates
            )
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self._failure("does not load", error) from error
        input_details, *states = self._interpreter.get_input_details()
        output_details, *new_states = self._interpreter.get_output_details()
        self._input_index, self._output_index = input_details["index"], output_details["index"]
        # What a call leaves in an output tensor is what the next one finds in the input tensor.
        self._states = [
            (old["index"], new["index"], old["quantization"][1]) for old, new in zip(states, new_states, strict=True)
        ]
        self.preprocess: Callable[..., npt.NDArray[Any]]
        self.preprocess = preprocessor = _preprocessor(
            bundle, np.dtype(input_details["dtype"]).name, *input_details["quantization"]
        )
        self._stream = preprocessor if isinstance(preprocessor, StreamPreprocessor) else None
        if tuple(input_details["shape"]) != preprocessor.tensor_shape:
            raise BundleError(
                f"bundle {bundle.file.path}: input tensor",
                expected=str(preprocessor.tensor_shape),
                got=str(tuple(int(n) for n in input_details["shape"])),
                mend="convert the model again",
            )
        self._output_quantization = output_details["quantization"]
        self.reset()

    @property
    def warm(self) -> bool:
        """Whether a prediction now would be about a whole window: of a stream, so much was heard without a gap."""
        window = self.bundle.input
        if self._stream is None or not isinstance(window, AudioInput):
            return True
        return self._stream.heard_samples >= window.window_samples

    def reset(self) -> None:
        """Forgets the stream so far, as after a gap. Other models have nothing to forget."""
        if self._stream:
            self._stream.reset()
        self._unheard: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._heard: npt.NDArray[Any] = np.empty(0, np.float32)
        for old, _, zero in self._states:
            self._interpreter.tensor(old)()[...] = zero

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The input tensor, as :attr:`preprocess` makes it -> the raw output, shape (classes,). A stream goes on.

        Raises:
            BundleError: the runtime failed. What the Python kernel of a custom operator raises comes as it is.
        """
        self.began_s = time.monotonic()
        try:
            self._interpreter.set_tensor(self._input_index, tensor)
            self._interpreter.invoke()
            raw: npt.NDArray[Any] = self._interpreter.get_tensor(self._output_index)
            for old, new, _ in self._states:  # from tensor to tensor, without a copy in between
                self._interpreter.tensor(old)()[...] = self._interpreter.tensor(new)()
        except (ValueError, RuntimeError) as error:
            raise self._failure("failed in the interpreter", error) from error
        finally:
            self.began_s = None
        return raw.reshape(-1)

    def tend(self) -> None:
        """Tries a preferred delegate again, in the thread that calls."""

    def probe(self) -> None:
        """Predicts once, of nothing.

        Raises:
            BundleError: it fails.
        """
        self.invoke(np.zeros(self.preprocess.tensor_shape, self.preprocess.dtype))  # type: ignore[attr-defined]
        self.reset()

    def scores(self, raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The raw output, as :meth:`invoke` gives it -> scores in 0..1, (classes,).

        Raises:
            NotFiniteError: the model gave NaN or infinity.
        """
        return scores(raw, self.bundle.output, *self._output_quantization)

    def decode(
        self, raw: npt.NDArray[Any], *, threshold: Threshold | npt.NDArray[np.float32] = 0.0, top_k: int = 3
    ) -> list[Prediction]:
        """The raw output -> the highest classes that reach ``threshold``, highest first.

        Args:
            raw: as :meth:`invoke` gives it.
            threshold: a score for all, by label (see :func:`edgekit.decode.thresholds`), or by class number.
            top_k: name so many at most.

        Raises:
            NotFiniteError: the model gave NaN or infinity.
        """
        limits = thresholds(threshold, self.bundle.labels) if isinstance(threshold, Mapping) else threshold
        return top(scores(raw, self.bundle.output, *self._output_quantization), self.bundle.labels, limits, top_k)

    def predict(
        self,
        image_or_sound: npt.NDArray[Any],
        *,
        threshold: Threshold = 0.0,
        top_k: int = 3,
        channel_order: ChannelOrder = "rgb",
    ) -> list[Prediction]:
        """Names what is in an image or in sound.

        An image is 8-bit RGB (height, width, 3) or grey (height, width), of any size. Sound is mono, float in -1..1 or
        int16, shape (n,), at the ``sample_rate_hz`` of the bundle: of more than its ``window_samples`` the middle is
        taken, to fewer silence is added at the end.

        A model that streams hears the sound as what follows that of the call before, however much it is, and names what
        is in the last window; nothing while it is not :attr:`warm`.

        Raises:
            EdgekitError: the image or sound is of another shape or type, or some samples are NaN or infinite; then a
                stream begins anew.
        """
        if self._stream:
            return self._predict_stream(image_or_sound, threshold, top_k)
        given = (image_or_sound,) if isinstance(self.bundle.input, AudioInput) else (image_or_sound, channel_order)
        return self.decode(self.invoke(self.preprocess(*given)), threshold=threshold, top_k=top_k)

    def _predict_stream(self, sound: npt.NDArray[Any], threshold: Threshold, top_k: int) -> list[Prediction]:
        assert self._stream
        self._unheard = np.concatenate([self._unheard, as_samples(sound)])
        hop_samples = self._stream.input.hop_samples
        try:
            while len(self._unheard) >= hop_samples:
                hop, self._unheard = self._unheard[:hop_samples], self._unheard[hop_samples:]
                self._heard = self.invoke(self.preprocess(hop))
            return self.decode(self._heard, threshold=threshold, top_k=top_k) if self.warm else []
        except EdgekitError:
            self.reset()
            raise

    def close(self) -> None:
        """Frees the interpreter's memory."""
        self._interpreter = None

    def _failure(self, what: str, error: Exception) -> BaseException:
        if self._ops and (raised := self._ops.take_error()):
            return raised
        if self._ops and (missing := self._ops.unresolved(self.bundle.file.model, str(error))):
            return BundleError(f"bundle {self.bundle.file.path} needs {missing}")
        return BundleError(
            f"bundle {self.bundle.file.path} {what} ({self.runtime}: {error})", mend="try `edgekit inspect` on it"
        )

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _preprocessor(bundle: Bundle, *tensor: Any) -> ImagePreprocessor | WindowPreprocessor | StreamPreprocessor:
    """For an input tensor of the type, scale and zero point given."""
    if not isinstance(bundle.input, AudioInput):
        from edgekit.preprocess import ImagePreprocessor  # with OpenCV, of which sound has no need

        return ImagePreprocessor(bundle.input, *tensor)
    return (StreamPreprocessor if bundle.input.streaming else WindowPreprocessor)(bundle.input, *tensor)


def load(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    delegate: str = "auto",
    threads: int = 1,
    runtime: str | None = None,
    ops: Ops = (),
) -> Model:
    """Loads an audio-tagging bundle, or any ``.tflite`` that classifies images.

    Args:
        path: the bundle.
        labels: a label file to use instead of the packed one.
        delegate: ``auto`` or ``cpu``.
        threads: threads of the CPU kernels.
        runtime: ``litert`` or ``tflite-runtime``; None takes LiteRT where it is installed, else tflite-runtime.
        ops: kernels of custom operators beside EdgeKit's own: a :class:`edgekit.CustomOpResolver`, or the libraries
            that ``edgekit ops build`` made.

    Raises:
        BundleError: the file is not whole, no classifier, or the runtime refuses it.
        RuntimeMissingError: no TFLite runtime is installed.
    """
    return Model(bundles.read(path, labels), delegate=delegate, threads=threads, runtime=runtime, ops=ops)
