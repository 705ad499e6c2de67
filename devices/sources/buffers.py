"""The memory of frames, used again and again."""

from __future__ import annotations

import ctypes
import mmap
import weakref
from contextlib import suppress

import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]

# So many that nobody looks at are kept; more were needed for a moment only.
KEPT = 2


class Buffers:
    """Of images that nobody looks at any more, for the next ones.

    An image takes megabytes. Were each a new array, malloc would cut up what the ones before left, and a process would
    grow by some images whenever a camera is opened again. So they have memory of their own, and the system has back
    what is not kept.
    """

    def __init__(self) -> None:
        self._free: list[Image] = []
        self._shape: tuple[int, ...] = ()

    def take(self) -> Image | None:
        """One to write the next image into; None: its size is not known yet, and OpenCV makes one."""
        try:
            return self._free.pop()
        except IndexError:  # rather than asking before: a thread that was left behind may take one too
            pass
        shape = self._shape
        return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), np.uint8).reshape(shape) if shape else None

    def lend(self, image: Image) -> Image:
        """What others look at. ``image`` is free again when this and all that was cut out of it are no more."""
        known, self._shape = self._shape, image.shape
        # By way of a memoryview (data): what is cut out of a plain view would refer to the image, not to the view.
        view = np.asarray(image.data)
        # One that OpenCV has made is not for us to keep.
        weakref.finalize(view, self._take_back, image, known == image.shape).atexit = False
        return view

    def _take_back(self, image: Image, ours: bool) -> None:
        if ours and image.shape == self._shape and len(self._free) < KEPT:
            self._free.append(image)

    def give_back(self) -> None:
        """Gives the system the memory that is free, here and wherever malloc keeps it.

        A camera that was closed leaves megabytes in pieces, and the next one may need others beside them. Only glibc
        has such a call, and the need for it.
        """
        self._free.clear()
        with suppress(AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
