"""A bundle in a TFLite interpreter: preprocess, invoke and decode, each by itself and all in one."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import bundle as bundles
from edgekit import runtimes
from edgekit.bundle import Bundle
from edgekit.decode import Prediction, scores, top
from edgekit.errors import BundleError
from edgekit.preprocess import ChannelOrder, ImagePreprocessor


class Model:
    """A classifier ready to predict. One thread at a time may use it.

    Attributes:
        bundle: what was loaded.
        runtime: name of the TFLite runtime that runs it.
        delegate: the delegate in use.
    """

    def __init__(self, bundle: Bundle, *, delegate: str = "auto", threads: int = 1, runtime: str | None = None) -> None:
        if not 1 <= threads <= 256:
            raise BundleError(
                "threads", expected="1 to 256", got=str(threads), mend="give as many as the device has cores"
            )
        if delegate not in ("auto", "cpu"):
            raise BundleError(
                f"delegate {delegate!r}", expected="auto or cpu", mend="other delegates are not supported yet"
            )
        self.bundle, self.delegate = bundle, "cpu"
        self.runtime, module = runtimes.load(runtime)
        try:
            # From memory, not by path: the file may be replaced or cut while the model runs.
            self._interpreter: Any = module.Interpreter(model_content=bundle.file.content, num_threads=threads)
            self._interpreter.allocate_tensors()
        except (ValueError, RuntimeError) as error:
            raise self._failure("does not load", error) from error
        (input_details,) = self._interpreter.get_input_details()
        (output_details,) = self._interpreter.get_output_details()
        self._input_index, self._output_index = input_details["index"], output_details["index"]
        self.preprocess = ImagePreprocessor(
            bundle.input, np.dtype(input_details["dtype"]).name, *input_details["quantization"]
        )
        if tuple(input_details["shape"]) != self.preprocess.shape_nhwc:
            raise BundleError(
                f"bundle {bundle.file.path}: input tensor",
                expected=str(self.preprocess.shape_nhwc),
                got=str(tuple(int(n) for n in input_details["shape"])),
                mend="convert the model again",
            )
        self._output_quantization = output_details["quantization"]

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The input tensor, shape (1, height, width, channels) -> the raw output, shape (classes,).

        Raises:
            BundleError: the runtime failed.
        """
        try:
            self._interpreter.set_tensor(self._input_index, tensor)
            self._interpreter.invoke()
            raw: npt.NDArray[Any] = self._interpreter.get_tensor(self._output_index)
        except (ValueError, RuntimeError) as error:
            raise self._failure("failed in the interpreter", error) from error
        return raw.reshape(-1)

    def decode(self, raw: npt.NDArray[Any], *, threshold: float = 0.0, top_k: int = 3) -> list[Prediction]:
        """The raw output -> the highest classes, highest first.

        Raises:
            NotFiniteError: the model gave NaN or infinity.
        """
        return top(scores(raw, self.bundle.output, *self._output_quantization), self.bundle.labels, threshold, top_k)

    def predict(
        self,
        image: npt.NDArray[np.uint8],
        *,
        threshold: float = 0.0,
        top_k: int = 3,
        channel_order: ChannelOrder = "rgb",
    ) -> list[Prediction]:
        """Names what is in ``image``, 8-bit RGB (height, width, 3) or grey (height, width), of any size."""
        return self.decode(self.invoke(self.preprocess(image, channel_order)), threshold=threshold, top_k=top_k)

    def close(self) -> None:
        """Frees the interpreter's memory."""
        self._interpreter = None

    def _failure(self, what: str, error: Exception) -> BundleError:
        custom = [operator for operator in self.bundle.file.model.operators if operator.custom]
        if custom and custom[0].name in str(error):
            return BundleError(
                f"bundle {self.bundle.file.path} needs the custom operator {custom[0].name} version "
                f"{custom[0].version}, which {self.runtime} does not have",
                mend="give a model made of built-in operators",
            )
        return BundleError(
            f"bundle {self.bundle.file.path} {what} ({self.runtime}: {error})", mend="try `edgekit inspect` on it"
        )

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
    delegate: str = "auto",
    threads: int = 1,
    runtime: str | None = None,
) -> Model:
    """Loads any classification ``.tflite``.

    Args:
        path: the bundle.
        labels: a label file to use instead of the packed one.
        delegate: ``auto`` or ``cpu``.
        threads: threads of the CPU kernels.
        runtime: ``litert`` or ``tflite-runtime``; None takes LiteRT where it is installed, else tflite-runtime.

    Raises:
        BundleError: the file is not whole, no classifier, or the runtime refuses it.
        RuntimeMissingError: no TFLite runtime is installed.
    """
    return Model(bundles.read(path, labels), delegate=delegate, threads=threads, runtime=runtime)
