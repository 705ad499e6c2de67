"""Calibration and validation data: images or arrays, checked before they are used."""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.errors import ConversionError, EdgekitError
from edgekit.manifest import ImageInput
from edgekit.preprocess import IMAGE_SUFFIXES, ImagePreprocessor, quantize, read_image_bgr

# Fewer leave int8 ranges to chance.
FEW = 32

# Neighbouring pixels of a photograph correlate by 0.9, with noise as strong as its contrast still by 0.4; those of
# noise by less than 0.03, even in 32 images of 8 x 8.
_NOISE_CORRELATION, _SAMPLE = 0.05, 32


@dataclass(frozen=True)
class Dataset:
    """Images at the model's size, or float tensors ready for it, in ``x`` of shape (n, height, width, channels).

    Attributes:
        x: uint8 pixels as :meth:`ImagePreprocessor.resize` gives them, or float32 input tensors.
        class_ids: where the data is labelled, the class of each, shape (n,); for a model of several labels at once what
            is true of each, 0 or 1, shape (n, classes).
        digest: SHA-256 of ``x``.
    """

    x: npt.NDArray[Any]
    class_ids: npt.NDArray[np.int64] | None
    digest: str

    def tensors(
        self, preprocess: ImagePreprocessor, scale: float = 0.0, zero_point: int = 0
    ) -> Iterator[npt.NDArray[Any]]:
        """The input tensors, each (1, height, width, channels), exactly as the device makes them from these images."""
        for item in self.x:
            if item.dtype == np.uint8:
                yield preprocess(item)
            else:
                yield (quantize(item, preprocess.dtype, scale, zero_point) if scale else item)[None]


def load(
    path: str,
    what: str,
    input: ImageInput,
    folder: Path,
    *,
    limit: int,
    classes: int | None = None,
    multi_label: bool = False,
    labels: tuple[str, ...] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Dataset:
    """Reads a folder of images, or an ``.npz`` with ``x`` (and ``y``), or an ``.npy``.

    Args:
        path: the folder or file.
        what: ``calibration`` or ``validation``, for the messages.
        input: size and preprocessing of the model.
        folder: where the resized images are kept, on disk, as they may be many.
        limit: take at most so many, evenly spread over the data.
        classes: the data must be labelled (a folder per class, or ``y``), with class numbers below this.
        multi_label: an image may be of several classes: ``y`` may have a 0 or 1 for each image and class; class numbers
            and folders give each image one.
        labels: names of the classes, which the folders must have; without them the folders count by name.
        progress: called with how many are read, of how many.

    Raises:
        ConversionError: there is no data, or it does not fit: not finite, of another shape or type, not readable.
    """
    where = f"{what} {path}"
    source = Path(path)
    items: Any
    if source.is_dir():
        items, class_ids = _from_folder(source, where, classes, labels)
    elif source.suffix in (".npz", ".npy") and source.is_file():
        items, class_ids = _from_arrays(source, where, classes, multi_label, input)
    else:
        raise ConversionError(
            where,
            expected="a folder of images, or an .npz or .npy file",
            got="neither" if source.exists() else "nothing there",
        )
    if not len(items):
        raise ConversionError(where, expected="at least one image", got="none", mend="give 100 or more")
    if class_ids is not None and classes is not None:
        highest = 1 if class_ids.ndim == 2 else classes - 1
        if not 0 <= class_ids.min() <= class_ids.max() <= highest:
            raise ConversionError(
                where,
                expected="a 0 or 1 for each class" if class_ids.ndim == 2 else f"class numbers 0 to {highest}",
                got=f"{class_ids.min()} to {class_ids.max()}",
            )
        if multi_label and class_ids.ndim == 1:
            class_ids = np.eye(classes, dtype=np.int64)[class_ids]
    chosen = np.linspace(0, len(items) - 1, min(limit, len(items))).round().astype(int)
    preprocess = ImagePreprocessor(input)
    shape = (len(chosen), *preprocess.shape_nhwc[1:])
    floats = isinstance(items, np.ndarray) and items.dtype != np.uint8
    x = allocate(folder / f"{what}.npy", np.float32 if floats else np.uint8, shape)
    digest = hashlib.sha256()
    for number, index in enumerate(chosen):
        item = items[index]
        x[number] = item if floats else preprocess.resize(*_image(item, where))
        digest.update(x[number].tobytes())
        progress(number + 1, len(chosen))
    x.flush()
    if floats and not np.isfinite(x).all():
        raise ConversionError(where, expected="finite numbers", got="NaN or infinity", mend="mend the data")
    return Dataset(x, None if class_ids is None else class_ids[chosen], digest.hexdigest())


def allocate(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """An array in a new ``.npy`` file. All of its room is taken now: a mapped file that finds none later ends the
    process.

    Raises:
        ConversionError: there is not room enough.
    """
    try:
        array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except (OSError, TypeError) as error:  # NumPy raises TypeError where not even the header finds room
        needed = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raise ConversionError(
            f"no room for {needed / 1e6:,.0f} MB in {path.parent.parent}",
            mend="make room, or set TMPDIR to where there is",
        ) from error
    return array


def suspicion(x: npt.NDArray[Any]) -> str:
    """What makes ``x``, images or tensors of shape (n, height, width, channels), look like no data at all: a line for
    the user, empty if nothing does.

    Noise is known by the Pearson correlation of each pixel with its neighbour to the right and below, over all images
    of the sample: a camera's pixels resemble their neighbours.
    """
    sample = np.asarray(x[np.linspace(0, len(x) - 1, min(_SAMPLE, len(x))).round().astype(int)], np.float64)
    mend = "int8 ranges made from them fit no camera; give 100 or more typical images"
    if (sample == sample[:, :1, :1]).all():
        return f"each calibration image is of one colour only: {mend}"
    if len(sample) > 1 and (sample == sample[0]).all():
        return f"all calibration images are the same: {mend}"
    pairs = (sample[:, :, :-1], sample[:, :, 1:]), (sample[:, :-1], sample[:, 1:])
    correlations = [abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) for a, b in pairs if a.size and a.std() and b.std()]
    if correlations and np.mean(correlations) < _NOISE_CORRELATION:
        return f"the calibration images look like noise (no pixel resembles its neighbours): {mend}"
    return ""


def _image(item: Path | npt.NDArray[np.uint8], where: str) -> tuple[npt.NDArray[np.uint8], Any]:
    """The image and its channel order."""
    if isinstance(item, np.ndarray):
        return item, "rgb"
    try:
        return read_image_bgr(item), "bgr"
    except EdgekitError as error:
        raise ConversionError(f"{where}: {error.what}", mend=error.mend) from error


def _from_folder(
    folder: Path, where: str, classes: int | None, labels: tuple[str, ...]
) -> tuple[list[Path], npt.NDArray[np.int64] | None]:
    if classes is None:
        return _images(folder), None
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ConversionError(where, expected="a folder of images for each class", got="no folders")
    if labels:
        if strange := [name for name in names if name not in labels]:
            raise ConversionError(
                where,
                expected="folders named as the labels are",
                got=repr(strange[0]),
                mend="rename it or mend --labels",
            )
        numbers = [labels.index(name) for name in names]
    elif len(names) != classes:
        raise ConversionError(where, expected=f"{classes} folders, one for each class", got=str(len(names)))
    else:
        numbers = list(range(classes))
    items = [(path, number) for name, number in zip(names, numbers, strict=True) for path in _images(folder / name)]
    return [path for path, _ in items], np.array([number for _, number in items], np.int64)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)


def _from_arrays(
    source: Path, where: str, classes: int | None, multi_label: bool, input: ImageInput
) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64] | None]:
    try:
        loaded = np.load(source, allow_pickle=False)
        arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConversionError(f"{where} cannot be read ({error})", mend="write it with numpy.savez") from error
    if "x" not in arrays or (classes is not None and "y" not in arrays):
        raise ConversionError(
            where, expected="arrays named x and y" if classes is not None else "an array named x", got=str(list(arrays))
        )
    x, channels = arrays["x"], input.channels
    if x.ndim == 3 and channels == 1:
        x = x[..., None]
    if x.dtype == np.uint8:
        fits = x.ndim == 4 and x.shape[3] in (1, 3)
        expected = "(n, height, width, 3)"
    elif x.dtype in (np.float32, np.float64):
        tensor = (input.size_wh[1], input.size_wh[0], channels)
        fits = x.shape[1:] == tensor
        expected = f"(n, {', '.join(map(str, tensor))}), ready for the model"
    else:
        raise ConversionError(
            f"{where}: x", expected="uint8 images or float32 input tensors", got=str(x.dtype), mend="convert it"
        )
    if not fits:
        raise ConversionError(
            f"{where}: x of {x.dtype}", expected=f"shape {expected}", got=str(x.shape), mend="reshape it"
        )
    if classes is None:
        return x, None
    y = arrays["y"]
    one, several = y.shape == (len(x),), multi_label and y.shape == (len(x), classes)
    if not (one or several) or y.dtype.kind not in ("biu" if several else "iu"):
        or_each = f", or a 0 or 1 for each class of each image, shape {(len(x), classes)}" if multi_label else ""
        raise ConversionError(
            f"{where}: y", expected=f"{len(x)} whole class numbers{or_each}", got=f"{y.dtype} of shape {y.shape}"
        )
    return x, y.astype(np.int64)
