"""A bundle ready to predict, with the delegate asked for or the next that works: preprocess, invoke and decode."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgekit import bundle as bundles
from edgekit.audio import as_samples
from edgekit.audio_preprocess import StreamPreprocessor
from edgekit.bundle import Bundle
from edgekit.custom_ops import CustomOpResolver, Ops, paths_of
from edgekit.decode import Prediction, Threshold, scores, thresholds, top
from edgekit.devices.delegates.chain import Chain
from edgekit.devices.delegates.plans import ORDER
from edgekit.errors import BundleError, EdgekitError, InferenceError
from edgekit.manifest import AudioInput

if TYPE_CHECKING:
    from edgekit.preprocess import ChannelOrder


class Model:
    """A classifier ready to predict. Threads that :meth:`predict` with the same one wait for each other; what calls
    :meth:`preprocess`, :meth:`invoke` and :meth:`decode` itself does so in one thread at a time. Another may
    :meth:`tend` and :meth:`close` it.

    One that streams keeps states from call to call: give it the sound of one source without a gap, or :meth:`reset` it.

    A delegate library, the GPU and kernels given as files run in a process of their own. When they hang, crash or fail,
    the call raises :class:`InferenceError`, and the next delegate has taken over; a model that streams begins anew.

    Args:
        bundle: the model.
        delegate: as :func:`load` takes it.
        threads: threads of the CPU kernels.
        runtime: as :func:`load` takes it.
        ops: as :func:`load` takes it.
        strict: as :func:`load` takes it.
        order: in which ``auto`` tries the delegates.
        hang_s: a call in a process of its own that takes longer hangs.

    Attributes:
        bundle: what was loaded.
        requested_delegate: what was asked for.
        began_s: when the call under way began, on the monotonic clock; None while there is none, or one that ends in
            time because it is in a process of its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        delegate: str | os.PathLike[str] = "auto",
        threads: int = 1,
        runtime: str | None = None,
        ops: Ops = (),
        strict: bool = False,
        order: Iterable[str] = ORDER,
        hang_s: float = 30.0,
    ) -> None:
        if not 1 <= threads <= 256:
            raise BundleError(
                "threads", expected="1 to 256", got=str(threads), mend="give as many as the device has cores"
            )
        delegate = os.fspath(delegate)
        kernels = ops if isinstance(ops, CustomOpResolver) else paths_of(ops)
        self.bundle, self.requested_delegate = bundle, delegate
        self.began_s: float | None = None
        self._in_use = threading.RLock()  # not for close, which ends a call that hangs
        self._chain = Chain(
            bundle, delegate, order=order, runtime=runtime, threads=threads, ops=kernels, strict=strict, hang_s=hang_s
        )
        self._forget()

    @property
    def delegate(self) -> str:
        """The delegate in use: ``cpu``, ``coral``, ``gpu`` or the name of a library."""
        return self._chain.active.plan.name

    @property
    def runtime(self) -> str:
        """Name of the TFLite runtime in use."""
        return self._chain.active.backend.runtime

    @property
    def operators(self) -> int:
        """Operators of the graph in use, which for Coral is the compiled one."""
        return self._chain.active.backend.operators

    @property
    def operators_delegated(self) -> int | None:
        """How many of them the delegate took, on the CPU: XNNPACK; None where the runtime does not tell."""
        return self._chain.active.backend.operators_delegated

    @property
    def warm(self) -> bool:
        """Whether a prediction now would be about a whole window: of a stream, so much was heard without a gap."""
        window, preprocess = self.bundle.input, self._chain.active.preprocess
        if not isinstance(preprocess, StreamPreprocessor) or not isinstance(window, AudioInput):
            return True
        return preprocess.heard_samples >= window.window_samples

    def reset(self) -> None:
        """Forgets the stream so far, as after a gap. Other models have nothing to forget."""
        with self._in_use:
            preprocess = self._chain.active.preprocess
            if isinstance(preprocess, StreamPreprocessor):
                preprocess.reset()
                try:
                    self._chain.active.backend.reset()
                except InferenceError as error:
                    self._chain.replace(error)
            self._forget()

    def _forget(self) -> None:
        self._unheard: npt.NDArray[np.float32] = np.empty(0, np.float32)
        self._heard: npt.NDArray[Any] = np.empty(0, np.float32)

    @property
    def preprocess(self) -> Callable[..., npt.NDArray[Any]]:
        """Makes an image, a window of sound or the next hop of a stream the input tensor of the delegate in use:
        :class:`~edgekit.preprocess.ImagePreprocessor`, :class:`~edgekit.audio_preprocess.WindowPreprocessor` or
        :class:`~edgekit.audio_preprocess.StreamPreprocessor`. Another delegate, which has another one, takes over when
        it is asked for."""
        self._chain.renew()
        return self._chain.active.preprocess

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The input tensor, as :meth:`preprocess` makes it -> the raw output, shape (classes,). A stream goes on.

        Raises:
            InferenceError: the delegate failed, and the model goes on with another one, or with the same one anew.
            BundleError: the runtime failed, and there is nothing to go on with. What the Python kernel of a custom
                operator raises comes as it is.
        """
        with self._in_use:
            backend = self._chain.active.backend
            self.began_s = None if backend.isolated else time.monotonic()
            try:
                return backend.invoke(tensor)
            except InferenceError as error:
                raise self._chain.replace(error) from error
            finally:
                self.began_s = None

    def probe(self) -> None:
        """Predicts once on an input of zeros, to see whether the model works at all; a stream begins anew.

        Raises:
            EdgekitError: it does not.
        """
        given = self._chain.active.backend.input
        self.scores(self.invoke(np.full(given.shape, given.zero_point, given.dtype)))
        self.reset()

    def scores(self, raw: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """The raw output, as :meth:`invoke` gave it last -> the score of each class, (classes,), in 0..1.

        Raises:
            NotFiniteError: the model gave NaN or infinity.
        """
        made = self._chain.active.backend.output
        return scores(raw, self.bundle.output, made.scale, made.zero_point)

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
        return top(self.scores(raw), self.bundle.labels, limits, top_k)

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
        with self._in_use:
            if isinstance(self._chain.active.preprocess, StreamPreprocessor):
                return self._predict_stream(
                    image_or_sound, self._chain.active.preprocess.input.hop_samples, threshold, top_k
                )
            given = (image_or_sound,) if isinstance(self.bundle.input, AudioInput) else (image_or_sound, channel_order)
            return self.decode(self.invoke(self.preprocess(*given)), threshold=threshold, top_k=top_k)

    def _predict_stream(
        self, sound: npt.NDArray[Any], hop_samples: int, threshold: Threshold, top_k: int
    ) -> list[Prediction]:
        self._unheard = np.concatenate([self._unheard, as_samples(sound)])
        try:
            while len(self._unheard) >= hop_samples:
                hop, self._unheard = self._unheard[:hop_samples], self._unheard[hop_samples:]
                self._heard = self.invoke(self.preprocess(hop))
            return self.decode(self._heard, threshold=threshold, top_k=top_k) if self.warm else []
        except EdgekitError:
            self.reset()
            raise

    def tend(self) -> None:
        """Has preferred delegates tried again when it is time. To be called every second or so; it does not wait for
        them."""
        self._chain.tend()

    def close(self) -> None:
        """Frees what the model uses, from any thread."""
        self._chain.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def load(
    path: str | os.PathLike[str],
    *,
    labels: str | os.PathLike[str] | None = None,
    delegate: str | os.PathLike[str] = "auto",
    threads: int = 1,
    runtime: str | None = None,
    ops: Ops = (),
    strict: bool = False,
) -> Model:
    """Loads an audio-tagging bundle, or any ``.tflite`` that classifies images.

    Args:
        path: the bundle.
        labels: a label file to use instead of the packed one.
        delegate: ``cpu``, ``coral``, ``gpu`` or the path of a delegate library, with ``,KEY=VALUE`` behind it for each
            option; ``auto`` takes the first that works, in the order of the profile of this machine.
        threads: threads of the CPU kernels.
        runtime: ``litert`` or ``tflite-runtime``; None takes LiteRT where it is installed, else tflite-runtime.
        ops: kernels of custom operators beside EdgeKit's own: a :class:`edgekit.CustomOpResolver`, or the libraries
            that ``edgekit ops build`` made, which run in a process of their own.
        strict: refuse a delegate that does not work, instead of going on with the next one.

    Raises:
        BundleError: the file is not whole, no classifier, or the runtime refuses it.
        EdgekitError: with ``strict``, what the delegate needs is not here.
        RuntimeMissingError: no TFLite runtime is installed.
    """
    from edgekit.devices import profiles  # which one that is given its order has no need of

    return Model(
        bundles.read(path, labels),
        delegate=delegate,
        threads=threads,
        runtime=runtime,
        ops=ops,
        strict=strict,
        order=profiles.detect().delegates if delegate == "auto" else ORDER,
    )
