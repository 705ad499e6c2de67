"""The bundle: one ``.tflite`` file with its labels and its manifest packed behind the flatbuffer as a ZIP."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import secrets
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgekit import flatbuffer, manifest
from edgekit.errors import BundleError, EdgekitError
from edgekit.manifest import AudioInput, ImageInput, Manifest, Output
from edgekit.signature import check_audio_tagger, check_image_classifier

logger = logging.getLogger(__name__)

LABELS_NAME = "labels.txt"
MANIFEST_NAME = "edgekit.json"

# A larger file is no model for a small device: 2 GB is as far as the offsets in a flatbuffer reach.
MOST_BYTES = 1 << 31
# Of a label file, of a manifest, and of the list of the packed files: 20,000 labels are less than half of it.
_MOST_PACKED_BYTES = 1 << 20


@dataclass(frozen=True)
class File:
    """A ``.tflite`` file that is whole, of whatever kind.

    ``content`` is the flatbuffer alone, ``sha256`` its digest, ``packed`` the labels and the manifest packed behind it,
    ``packed_names`` the names of all files there, ``manifest`` None where EdgeKit did not write it.
    """

    path: Path
    content: bytes
    sha256: str
    model: flatbuffer.Model
    packed: dict[str, bytes]
    packed_names: tuple[str, ...]
    manifest: Manifest | None


@dataclass(frozen=True)
class Bundle:
    """A classifier with all that is needed to run it: EdgeKit's own, of images or sound, or any other ``.tflite`` that
    names what is in an image.

    ``labels`` has one label per class, made up of the class number where the model has none; ``version`` is empty for a
    model without a manifest.
    """

    file: File
    name: str
    version: str
    labels: tuple[str, ...]
    input: ImageInput | AudioInput
    output: Output


def read_file(path: str | os.PathLike[str]) -> File:
    """Reads and checks any ``.tflite`` file. Of what is packed with the model, only the labels and the manifest are
    read.

    Raises:
        BundleError: the file is missing, cut short, altered, no TFLite model or over 2 GB, or its labels or its
            manifest are over 1 MB.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise BundleError(f"bundle {path} is not a file", mend="give the path of a .tflite file")
        with _Reader(io.FileIO(path)) as file:
            flatbuffer.check_identifier(file.read(8), str(path))  # before all of another file is read
            if (size := os.fstat(file.fileno()).st_size) > MOST_BYTES:
                raise BundleError(
                    f"bundle {path}", expected="2 GB at most", got=f"{size / 2**30:.1f} GB", mend="give a smaller model"
                )
            names, flatbuffer_bytes = _list_packed(file, size, str(path))
            content = file.read_first(flatbuffer_bytes)
            model = flatbuffer.Model(content, str(path))
            wanted = {LABELS_NAME, MANIFEST_NAME, model.label_file}
            packed = {name: _read_packed(file, name, str(path)) for name in names if name in wanted}
    except OSError as error:
        raise BundleError(f"bundle {path}: {error.strerror}", mend="give the path of a .tflite file") from error
    except MemoryError as error:
        raise BundleError(f"bundle {path} does not fit in memory", mend="give a smaller model") from error
    if missing := [name for name in model.associated_files if name and name not in names]:
        raise BundleError(
            f"bundle {path}: the packed file {missing[0]} is missing", mend="it was cut short: copy or convert it again"
        )
    sha256 = hashlib.sha256(content).hexdigest()
    try:
        of_bundle = manifest.decode(packed[MANIFEST_NAME], str(path)) if MANIFEST_NAME in packed else None
    except RecursionError as error:
        raise BundleError(
            f"bundle {path}: its manifest is nested too deeply", mend="copy or convert it again"
        ) from error
    if of_bundle and of_bundle.sha256 != sha256:
        raise BundleError(
            f"bundle {path} was altered",
            expected=f"sha256 {of_bundle.sha256[:12]}…",
            got=f"{sha256[:12]}…",
            mend="copy or convert it again",
        )
    return File(path, content, sha256, model, packed, names, of_bundle)


def read(path: str | os.PathLike[str], labels: str | os.PathLike[str] | None = None) -> Bundle:
    """Reads and checks a classifier.

    Without a manifest it is one of images, and the preprocessing comes from the TFLite Metadata, else from the input's
    type.

    Args:
        path: the ``.tflite`` file.
        labels: a text file with one label a line, instead of the packed one.

    Raises:
        BundleError: as :func:`read_file`, or it is no classifier.
        EdgekitError: the labels cannot be read or are not as many as the classes.
    """
    return classifier(read_file(path), labels)


def classifier(file: File, labels: str | os.PathLike[str] | None = None) -> Bundle:
    """``file`` as a classifier. Arguments and errors as :func:`read`."""
    model, of_bundle = file.model, file.manifest
    if of_bundle and isinstance(of_bundle.input, AudioInput):
        classes = check_audio_tagger(model, of_bundle.input, file.path)
    else:
        classes = check_image_classifier(model, file.path)
    if labels:
        names = read_labels(labels, classes)
    elif label_file := (LABELS_NAME if LABELS_NAME in file.packed else model.label_file):
        names = _parse_labels(file.packed[label_file], f"{file.path}!{label_file}", classes)
    else:
        names = tuple(f"class {i}" for i in range(classes))
    return Bundle(
        file=file,
        name=of_bundle.name if of_bundle else file.path.stem,
        version=of_bundle.version if of_bundle else "",
        labels=names,
        input=of_bundle.input if of_bundle else _guess_input(model, file.path),
        output=of_bundle.output if of_bundle else guess_output(model),
    )


def pack(content: bytes, of_bundle: Manifest, labels: tuple[str, ...]) -> bytes:
    """The bytes of a bundle. The same input gives the same bytes: the packed files carry no time of day."""
    whole = io.BytesIO(content)
    whole.seek(0, io.SEEK_END)
    files = {MANIFEST_NAME: manifest.encode(of_bundle)}
    if labels:
        files[LABELS_NAME] = "".join(f"{label}\n" for label in labels).encode()
    with zipfile.ZipFile(whole, "a") as archive:
        for name, data in files.items():
            # Stored, not deflated, as TFLite Support packs them: readers map them straight from memory.
            archive.writestr(zipfile.ZipInfo(name), data)
    return whole.getvalue()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the block ends well, and is removed otherwise."""
    path = path.resolve()  # the file behind a link, not the link
    try:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        # with the permissions that the user's umask leaves, as any new file
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o666))
    except OSError as error:
        raise EdgekitError(
            f"cannot write {path}: {error.strerror}", mend="give an output path in a folder you can write to"
        ) from error
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise EdgekitError(f"cannot write {path}: {error.strerror}", mend="make room or give another path") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_labels(path: str | os.PathLike[str], classes: int | None = None) -> tuple[str, ...]:
    """The labels in a text file, one a line; checked against the number of classes where that is known."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_MOST_PACKED_BYTES + 1)
    except OSError as error:
        raise EdgekitError(f"labels {path}: {error.strerror}", mend="give a text file with one label a line") from error
    if len(content) > _MOST_PACKED_BYTES:
        raise EdgekitError(
            f"labels {path}", expected="1 MB at most", got="more", mend="give a text file with one label a line"
        )
    return _parse_labels(content, str(path), classes)


def _parse_labels(content: bytes, where: str, classes: int | None) -> tuple[str, ...]:
    try:
        # with or without the mark that Windows puts first
        names = tuple(line.strip() for line in content.decode("utf-8-sig").rstrip().splitlines())
    except UnicodeDecodeError as error:
        raise EdgekitError(f"labels {where}: not UTF-8 text", mend="give a text file with one label a line") from error
    if classes is not None and len(names) != classes:
        raise EdgekitError(
            f"labels {where}",
            expected=f"{classes} lines, one for each class of the model",
            got=str(len(names)),
            mend="give the label file that belongs to this model",
        )
    if not names:
        raise EdgekitError(f"labels {where} is empty", mend="give a text file with one label a line")
    if empty := [i for i, name in enumerate(names, 1) if not name]:
        raise EdgekitError(f"labels {where}: line {empty[0]} is empty", mend="give every class a label")
    return names


class _Reader(io.BufferedReader):
    """Reads of a file no more at a time than a list of packed files may have, however long a ZIP says that it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        most = _MOST_PACKED_BYTES + 1
        data = super().read(most if size is None or size < 0 else min(size, most))
        if len(data) == most:
            raise zipfile.BadZipFile("there are too many")
        return data

    def read_first(self, size: int) -> bytes:
        self.seek(0)
        return super().read(size)


@contextmanager
def _archive(file: _Reader, where: str) -> Iterator[zipfile.ZipFile]:
    """The ZIP at the end of ``file``.

    Raises:
        BundleError: it is damaged, also where the block finds that out.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except (
        zipfile.BadZipFile,
        zlib.error,
        struct.error,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise BundleError(
            f"bundle {where}: its packed files cannot be read ({error})", mend="copy or convert it again"
        ) from error


def _list_packed(file: _Reader, size: int, where: str) -> tuple[tuple[str, ...], int]:
    """The names of the packed files, and the length of the flatbuffer before them."""
    file.seek(max(0, size - 65_557))  # end record: 22 bytes and a comment of at most 65,535
    if b"PK\x05\x06" not in file.read(65_557):
        return (), size
    with _archive(file, where) as archive:
        start = min((entry.header_offset for entry in archive.infolist()), default=size)
        if start < 0:
            raise zipfile.BadZipFile("one begins before the file")
        return tuple(archive.namelist()), start


def _read_packed(file: _Reader, name: str, where: str) -> bytes:
    with _archive(file, where) as archive:
        entry = archive.getinfo(name)
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others are not read bit by bit
            raise zipfile.BadZipFile(f"{name} is neither stored nor deflated")
        content = b""
        if entry.file_size <= _MOST_PACKED_BYTES:
            with archive.open(entry) as packed:
                while len(content) <= _MOST_PACKED_BYTES and (part := packed.read(1 << 16)):
                    content += part
    if max(entry.file_size, len(content)) > _MOST_PACKED_BYTES:
        raise BundleError(
            f"bundle {where}: the packed file {name}",
            expected="1 MB at most",
            got=f"{max(entry.file_size, len(content)) / 2**20:.1f} MB",
            mend="convert the model again, with fewer or shorter labels",
        )
    return content


def _guess_input(model: flatbuffer.Model, path: Path) -> ImageInput:
    tensor = model.inputs[0]
    _, height, width, channels = tensor.shape
    mean: tuple[float, ...] = (127.5,)
    std: tuple[float, ...] = (127.5,)
    if tensor.dtype in ("uint8", "int8"):
        # An 8-bit image model takes the pixel itself (uint8) or the pixel less 128 (int8), quantized or not.
        zero_point, scale = (tensor.zero_point[0], tensor.scale[0]) if tensor.scale else (0, 1.0)
        mean, std = (float(zero_point + (128 if tensor.dtype == "int8" else 0)),), (1.0 / scale,)
    elif model.normalization:
        mean, std = model.normalization.mean, model.normalization.std
    else:
        logger.warning("%s does not say how its input is normalized; pixels are scaled to -1..1", path)
    return ImageInput(size_wh=(width, height), channels=1 if channels == 1 else 3, mean=mean, std=std)


def guess_output(model: flatbuffer.Model) -> Output:
    """Read off the end of the graph: softmax or logistic there, or a quantized output that spans 0..1, are scores
    already; anything else is taken for logits."""
    last, tensor = model.last_operator, model.outputs[0]
    if last == "LOGISTIC":
        return Output(activation="sigmoid", multi_label=True)
    spans_unit = bool(tensor.scale) and 0.9 < tensor.scale[0] * (2 ** (16 if tensor.dtype == "int16" else 8)) < 1.1
    return Output(activation="softmax", in_graph=last == "SOFTMAX" or spans_unit)
