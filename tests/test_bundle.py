from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgekit import bundle, manifest
from edgekit.errors import BundleError, EdgekitError

proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")


def test_bundle_carries_manifest_labels_and_preprocessing(models: Path) -> None:
    read = bundle.read(models / "int8.tflite")
    of_bundle = read.file.manifest
    assert of_bundle is not None
    assert (of_bundle.schema, read.name, read.version) == ("edgekit.bundle/1", "int8", "1")
    assert read.labels == ("red", "green", "blue")
    assert (read.input.size_wh, read.input.mean, read.input.std) == ((32, 32), (127.5,), (127.5,))
    assert (read.output.activation, read.output.in_graph, of_bundle.quantization) == ("softmax", True, "int8")
    assert of_bundle.sha256 == read.file.sha256
    assert of_bundle.calibration and of_bundle.calibration.count == 120 and len(of_bundle.calibration.digest) == 64


def test_bundle_is_a_zip_for_any_tool(models: Path) -> None:
    with zipfile.ZipFile(models / "int8.tflite") as archive:
        assert archive.testzip() is None
        assert archive.read("labels.txt") == b"red\ngreen\nblue\n"
        assert json.loads(archive.read("edgekit.json"))["schema"] == "edgekit.bundle/1"


def test_pack_gives_the_same_bytes_each_time(models: Path) -> None:
    whole = (models / "int8.tflite").read_bytes()
    read = bundle.read(models / "int8.tflite")
    assert read.file.manifest
    assert bundle.pack(read.file.content, read.file.manifest, read.labels) == whole


def test_buffers_are_aligned_as_the_schema_demands(models: Path) -> None:
    content = bundle.read_file(models / "float32.tflite").content
    for data in (
        b"\x00\x00\x40\x40" + b"\0" * 12,
        bundle.read_file(models / "float32.tflite").model.metadata["TFLITE_METADATA"],
    ):
        assert content.find(data) % 16 == 0  # the first kernel row of the last layer, and the metadata


def test_every_cut_is_refused(models: Path, tmp_path: Path) -> None:
    whole = (models / "int8.tflite").read_bytes()
    path = tmp_path / "cut.tflite"
    for length in [0, 3, 100, len(whole) // 2, *range(len(whole) - 1500, len(whole), 50), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError, match=r"cut short|not a TFLite model|cannot be read"):
            bundle.read(path)


def test_no_altered_byte_changes_what_is_read(models: Path, tmp_path: Path) -> None:
    whole = (models / "int8.tflite").read_bytes()
    original = bundle.read_file(models / "int8.tflite")
    path = tmp_path / "altered.tflite"
    refused = 0
    for at in range(8, len(whole), 53):
        altered = bytearray(whole)
        altered[at] ^= 0xFF
        path.write_bytes(altered)
        try:
            read = bundle.read_file(path)
        except BundleError:
            refused += 1
        else:  # a byte that says nothing, as the time in a ZIP header
            assert (read.content, read.packed) == (original.content, original.packed), at
    assert refused > len(whole) / 53 * 0.8


def test_manifest_of_a_later_schema_is_refused(models: Path) -> None:
    of_bundle = json.loads(zipfile.ZipFile(models / "int8.tflite").read("edgekit.json"))
    of_bundle["schema"] = "edgekit.bundle/9"
    with pytest.raises(BundleError, match=r"expected edgekit.bundle/1, got edgekit.bundle/9"):
        manifest.decode(json.dumps(of_bundle).encode(), "x")


@pytest.mark.parametrize(("field", "value"), [("input", 3), ("sha256", None), ("task", "juggling")])
def test_manifest_with_a_wrong_field_is_refused(models: Path, field: str, value: Any) -> None:
    of_bundle = json.loads(zipfile.ZipFile(models / "int8.tflite").read("edgekit.json"))
    of_bundle[field] = value
    with pytest.raises(BundleError, match=field):
        manifest.decode(json.dumps(of_bundle).encode(), "x")


def test_manifest_with_more_than_we_know_is_read(models: Path) -> None:
    of_bundle = json.loads(zipfile.ZipFile(models / "int8.tflite").read("edgekit.json"))
    assert manifest.decode(json.dumps({**of_bundle, "later": 1}).encode(), "x").name == "int8"


def test_foreign_model_is_read_from_its_tensors_and_labels(vision_data: Path) -> None:
    read = bundle.read(vision_data / "mobilenet_v2_1.0_224_quant.tflite", vision_data / "imagenet_labels.txt")
    assert (read.file.manifest, read.input.size_wh, read.labels[89]) == (None, (224, 224), "macaw")
    # packed labels and TFLite Metadata of its makers
    packed = bundle.read(vision_data / "mobilenet_v1_0.25_128_quant.tflite")
    assert (len(packed.labels), packed.labels[1]) == (1001, "tench, Tinca tinca")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("red\ngreen\n", "expected 3 lines.*got 2"),
        ("red\n\nblue\n", "line 2 is empty"),
        (b"\xff\xfe\0", "not UTF-8"),
    ],
)
def test_labels_that_do_not_fit_are_refused(models: Path, tmp_path: Path, text: Any, complaint: str) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(EdgekitError, match=complaint):
        bundle.read(models / "int8.tflite", labels)


def test_labels_from_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfred\r\ngr\xc3\xbcn\r\n")
    assert bundle.read_labels(tmp_path / "labels.txt") == ("red", "grün")
    (tmp_path / "labels.txt").write_bytes(b"\n\n")
    with pytest.raises(EdgekitError, match="is empty"):
        bundle.read_labels(tmp_path / "labels.txt")


def altered_model(models: Path, tmp_path: Path, tensor: int, change: Any) -> Path:
    """float32.tflite without manifest, with its input (0) or output (-1) tensor changed."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    flatbuffers = pytest.importorskip("flatbuffers")
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(bundle.read_file(models / "float32.tflite").content, 0))
    graph = model.subgraphs[0]
    change(graph.tensors[graph.inputs[0] if tensor == 0 else graph.outputs[0]])
    model.metadata = []
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    path = tmp_path / "altered.tflite"
    path.write_bytes(bytes(builder.Output()))
    return path


@pytest.mark.parametrize(
    ("tensor", "field", "value", "complaint"),
    [
        (0, "shapeSignature", [1, -1, -1, 3], "fixed height and width"),
        (0, "shape", [1, 0, 32, 3], "fixed height and width"),
        (0, "type", 4, "input: expected type float32"),
        (-1, "type", 4, "output: expected type float32"),
        (-1, "shape", [1, 2_000_000_000], "one score per class"),
    ],
)
def test_foreign_model_that_cannot_be_served_is_refused(
    models: Path, tmp_path: Path, tensor: int, field: str, value: Any, complaint: str
) -> None:
    path = altered_model(models, tmp_path, tensor, lambda of_model: setattr(of_model, field, value))
    with pytest.raises(BundleError, match=complaint):
        bundle.read(path)


def test_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tflite")
    with pytest.raises(BundleError, match="is not a file"):
        bundle.read(tmp_path / "pipe.tflite")


def test_replacing_leaves_the_old_file_when_the_block_fails(tmp_path: Path) -> None:
    path = tmp_path / "out.tflite"
    path.write_text("old")
    with pytest.raises(RuntimeError), bundle.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    with pytest.raises(EdgekitError, match="No space left"), bundle.replacing(path) as temporary:
        raise OSError(errno.ENOSPC, "No space left on device")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with bundle.replacing(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_replacing_in_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EdgekitError, match="cannot write"), bundle.replacing(tmp_path / "no" / "out.tflite"):
        pass


def test_new_file_has_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        with bundle.replacing(tmp_path / "out.tflite") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(old)
    assert (tmp_path / "out.tflite").stat().st_mode & 0o777 == 0o640


def test_files_of_other_threads_keep_their_permissions(tmp_path: Path) -> None:
    old, done = os.umask(0o077), threading.Event()

    def replace() -> None:
        for _ in range(300):
            with bundle.replacing(tmp_path / "out.tflite"):
                pass
        done.set()

    thread = threading.Thread(target=replace)
    try:
        thread.start()
        modes = set()
        while not done.is_set():
            os.close(os.open(tmp_path / "other", os.O_CREAT | os.O_WRONLY, 0o666))
            modes.add((tmp_path / "other").stat().st_mode & 0o777)
            (tmp_path / "other").unlink()
    finally:
        thread.join()
        os.umask(old)
    assert modes <= {0o600}


def pack(models: Path, path: Path, name: str, megabytes: int, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """float32.tflite with its files and one more, or another one of that name, of so many MB."""
    read = bundle.read_file(models / "float32.tflite")
    path.write_bytes(read.content)
    files: dict[str, bytes | None] = {**read.packed, name: None}
    with zipfile.ZipFile(path, "a", compression) as archive:
        for packed, data in files.items():
            with archive.open(packed, "w") as file:
                for part in [data] if data is not None else [b" " * (1 << 20)] * megabytes:
                    file.write(part)


def hostile(case: str, models: Path, path: Path) -> None:
    if case in ("sparse", "sparse model"):
        with path.open("wb") as file:
            file.write(b"\x1c\0\0\0TFL3" if case == "sparse model" else b"")
            file.truncate(8 << 30)
    elif case == "stored manifest":
        pack(models, path, "edgekit.json", 100, zipfile.ZIP_STORED)
    elif case == "nested manifest":
        path.write_bytes(bundle.read_file(models / "float32.tflite").content)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("labels.txt", "red\ngreen\nblue\n")
            archive.writestr("edgekit.json", b"[" * 1_000_000)
    elif case == "many files":
        path.write_bytes(bundle.read_file(models / "float32.tflite").content)
        with zipfile.ZipFile(path, "a") as archive:
            for i in range(30_000):
                archive.writestr(zipfile.ZipInfo(f"{i:040}"), b"")
    elif case in ("bzip2 labels", "lying labels"):
        pack(models, path, "labels.txt", 300, zipfile.ZIP_BZIP2 if case == "bzip2 labels" else zipfile.ZIP_DEFLATED)
        whole = path.read_bytes()  # saying that it is small
        path.write_bytes(whole.replace((300 << 20).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    else:
        pack(models, path, {"labels": "labels.txt", "manifest": "edgekit.json"}[case], 600)


@proc
@pytest.mark.parametrize(
    "case",
    [
        "sparse",
        "sparse model",
        "labels",
        "manifest",
        "stored manifest",
        "nested manifest",
        "bzip2 labels",
        "lying labels",
        "many files",
    ],
)
def test_hostile_file_is_refused_in_little_memory(models: Path, tmp_path: Path, case: str) -> None:
    path = tmp_path / "hostile.tflite"
    hostile(case, models, path)
    read, grown = read_in_a_child(path)
    assert read.startswith("BundleError: ") and read.count("\n") == 1 and "; " in read
    assert grown < 100 << 20


@proc
def test_packed_file_that_is_not_needed_is_not_read(models: Path, tmp_path: Path) -> None:
    pack(models, tmp_path / "notes.tflite", "notes.bin", 600)
    read, grown = read_in_a_child(tmp_path / "notes.tflite")
    assert (read, grown < 100 << 20) == ("edgekit.json labels.txt notes.bin\n", True)


def read_in_a_child(path: Path) -> tuple[str, int]:
    """The names of the packed files, or the error, and the bytes of memory that reading took."""
    code = """
import sys
from pathlib import Path
from edgekit import bundle
from edgekit.errors import EdgekitError
def peak():  # not ru_maxrss, which begins with that of the parent
    return next(int(s.split()[1]) for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
before = peak()
try:
    print(*sorted(bundle.read_file(sys.argv[1]).packed_names))
except EdgekitError as error:
    print(f"{type(error).__name__}: {error}")
print(1024 * (peak() - before))
"""
    out = subprocess.run([sys.executable, "-c", code, path], check=True, capture_output=True, text=True).stdout
    *read, grown = out.splitlines(keepends=True)
    return "".join(read), int(grown)


def test_label_file_that_is_another_file_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "labels.txt").open("wb") as file:
        file.truncate(8 << 30)
    with pytest.raises(EdgekitError, match="expected 1 MB at most"):
        bundle.read_labels(tmp_path / "labels.txt")
