"""The kinds of input that a model takes: how files and arrays become items of data, and items its input tensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy.typing as npt

from edgekit.manifest import AudioInput, ImageInput

Array = npt.NDArray[Any]
Tensors = Iterator[Array]


class Kind(Protocol):
    """One kind of input, of the size that a model takes.

    Attributes:
        thing, sources: what an item, and what the files are called.
        enough: with fewer, quantization ranges are left to chance.
        max_calibration, max_validation: more make no better ranges, and no truer figure.
        max_of_file: how many items a file may give.
        noise_count: how many items of noise stand in for data.
        input: as the manifest has it.
        shape: of an item.
        saturates: whether such models flip rather than drift, as :mod:`edgekit.converters.fidelity` has it.
    """

    thing: str
    sources: str
    enough: int
    max_calibration: int
    max_validation: int
    max_of_file: int
    noise_count: int
    saturates: bool

    @property
    def input(self) -> ImageInput | AudioInput: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def files(self, folder: Path) -> list[Path]:
        """Those in ``folder`` and below that may be of this kind, in order."""

    def read(self, path: Path, most: int) -> Iterator[Array]:
        """The items of a file, at most so many.

        Raises:
            EdgekitError: it cannot be read.
        """

    def check(self, x: Array, where: str) -> Array:
        """``x`` of a user's array file as an array of items, each fit for :meth:`item`.

        Raises:
            ConversionError: its shape or type does not fit.
        """

    def item(self, x: Array) -> Array:
        """One row of what :meth:`check` gives -> as :meth:`read` gives it."""

    def suspicion(self, x: Array) -> str:
        """What makes the items ``x`` look like no data at all: a line for the user, empty if nothing does."""

    def noise(self) -> Array:
        """Items that only prove that a model runs."""

    def tensors(self, x: Array, dtype: str = "float32", scale: float = 0.0, zero_point: int = 0) -> Tensors:
        """The input tensor of each of the items ``x``, (1, ...), of a type, exactly as the device makes it. ``scale`` 0
        stands for a tensor that is not quantized."""

    def inputs(self, x: Array) -> Tensors:
        """What the Keras model takes for each of the items ``x``, float (1, ...)."""

    def copies(self, x: Array) -> Iterator[Array]:
        """Items that resemble the items ``x``, where these are too few to judge by; none where they are not."""


def of(input: ImageInput | AudioInput) -> Kind:
    """The kind of ``input``."""
    if isinstance(input, AudioInput):
        from edgekit.converters.clips import Clips

        return Clips(input)
    from edgekit.converters.images import Images

    return Images(input)
