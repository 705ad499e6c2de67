"""Calibration and validation data: files or arrays, checked before they are used."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.converters.kinds import Array, Kind
from edgekit.errors import ConversionError, EdgekitError


@dataclass(frozen=True)
class Dataset:
    """Items of a kind of input, and what is true of them.

    Attributes:
        x: the items, of shape (n, ...).
        class_ids: where the data is labelled, the class of each, shape (n,); for a model of several labels at once what
            is true of each, 0 or 1, shape (n, classes).
        digest: SHA-256 of ``x``.
    """

    x: Array
    class_ids: npt.NDArray[np.int64] | None
    digest: str


def load(
    path: str,
    what: str,
    kind: Kind,
    folder: Path,
    *,
    limit: int,
    classes: int | None = None,
    multi_label: bool = False,
    labels: tuple[str, ...] = (),
    progress: Callable[[int, int], None] = lambda *_: None,
) -> Dataset:
    """Reads a folder of files, or an ``.npz`` with ``x`` (and ``y``), or an ``.npy``.

    Args:
        path: the folder or file.
        what: ``calibration`` or ``validation``, for the messages.
        kind: what the data is.
        folder: where the items are kept, on disk, as they may be many.
        limit: take at most so many, evenly spread over the data.
        classes: the data must be labelled (a folder per class, or ``y``), with class numbers below this.
        multi_label: an item may be of several classes: ``y`` may have a 0 or 1 for each item and class; class numbers
            and folders give each item one.
        labels: names of the classes, which the folders must have; without them the folders count by name.
        progress: called with how many files or rows are read, of how many.

    Raises:
        ConversionError: there is no data, or it does not fit: not finite, of another shape or type, not readable.
    """
    where = f"{what} {path}"
    source = Path(path)
    given: list[Path] | Array
    if source.is_dir():
        given, class_ids = _from_folder(source, where, kind, classes, labels)
    elif source.suffix in (".npz", ".npy") and source.is_file():
        given, class_ids = _from_arrays(source, where, kind, classes, multi_label)
    else:
        raise ConversionError(
            where,
            expected=f"a folder of {kind.sources}, or an .npz or .npy file",
            got="neither" if source.exists() else "nothing there",
        )
    if not len(given):
        raise ConversionError(where, expected=f"at least one {kind.thing}", got="none", mend="give more")
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
    chosen = np.linspace(0, len(given) - 1, min(limit, len(given))).round().astype(int)
    digest = hashlib.sha256()
    origins: list[int] = []

    def items() -> Iterator[Array]:
        most = max(1, min(kind.max_of_file, limit // len(chosen)))
        for number, index in enumerate(chosen, 1):
            for item in _read(given[index], kind, most, where):
                if item.dtype != np.uint8 and not np.isfinite(item).all():
                    in_file = "" if isinstance(given[index], np.ndarray) else f": {given[index].name}"
                    raise ConversionError(
                        where + in_file, expected="finite numbers", got="NaN or infinity", mend="mend the data"
                    )
                digest.update(item.tobytes())
                origins.append(index)
                yield item
            progress(number, len(chosen))

    x = save(folder / f"{what}.npy", items(), limit)
    return Dataset(x, None if class_ids is None else class_ids[origins], digest.hexdigest())


def _read(given: Path | Array, kind: Kind, most: int, where: str) -> Iterable[Array]:
    """The items in a file, or of a row of an array."""
    if isinstance(given, np.ndarray):
        return [kind.item(given)]
    try:
        return list(kind.read(given, most))
    except EdgekitError as error:
        raise ConversionError(
            f"{where}: {error.what}", expected=error.expected, got=error.got, mend=error.mend
        ) from error


def save(path: Path, items: Iterator[Array], most: int) -> Array:
    """Writes ``items``, at least one and all of one shape and type, into a new ``.npy`` file, one after the other: how
    many they are is known at the end only.

    Returns:
        The array in the file, (n, ...).
    """
    first = next(items)

    def header(count: int) -> bytes:
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(first.dtype)
        np.lib.format.write_array_header_1_0(
            buffer, {"descr": descr, "fortran_order": False, "shape": (count, *first.shape)}
        )
        return buffer.getvalue()

    with path.open("wb") as file:
        # NumPy pads a header to multiples of 64 bytes: that of fewer items fits the same room.
        file.write(header(most))
        count = 0
        for item in itertools.chain([first], items):
            file.write(item.tobytes())
            count += 1
        file.seek(0)
        file.write(header(count))
    return np.asarray(np.load(path, mmap_mode="r"))


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


def _from_folder(
    folder: Path, where: str, kind: Kind, classes: int | None, labels: tuple[str, ...]
) -> tuple[list[Path], npt.NDArray[np.int64] | None]:
    if classes is None:
        return kind.files(folder), None
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    if not names:
        raise ConversionError(where, expected=f"a folder of {kind.sources} for each class", got="no folders")
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
    items = [(path, number) for name, number in zip(names, numbers, strict=True) for path in kind.files(folder / name)]
    return [path for path, _ in items], np.array([number for _, number in items], np.int64)


def _from_arrays(
    source: Path, where: str, kind: Kind, classes: int | None, multi_label: bool
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
    x = kind.check(arrays["x"], where)
    if classes is None:
        return x, None
    y = arrays["y"]
    one, several = y.shape == (len(x),), multi_label and y.shape == (len(x), classes)
    if not (one or several) or y.dtype.kind not in ("biu" if several else "iu"):
        or_each = f", or a 0 or 1 for each class of each {kind.thing}, shape {(len(x), classes)}" if multi_label else ""
        raise ConversionError(
            f"{where}: y", expected=f"{len(x)} whole class numbers{or_each}", got=f"{y.dtype} of shape {y.shape}"
        )
    return x, y.astype(np.int64)
