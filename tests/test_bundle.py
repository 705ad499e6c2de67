from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from edgekit import bundle, manifest
from edgekit.errors import BundleError, EdgekitError


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


def refused_within_100_mb(path: Path) -> str:
    """The error that reading ``path`` gives, in a process of its own; fails where that takes more memory."""
    script = (
        "import resource, sys\n"
        "from edgekit import bundle\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: bundle.read(sys.argv[1])\n"
        "except bundle.BundleError as error: print(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    error, more_kb = result.stdout.splitlines()
    assert int(more_kb) < 100_000, error
    return error


@pytest.mark.parametrize("head", [b"\0\0\0\0ftypisom", b"\x1c\0\0\0TFL3"], ids=["video", "model"])
def test_file_of_8_gb_is_refused_unread(head: bytes, tmp_path: Path) -> None:
    path = tmp_path / "large.tflite"
    path.write_bytes(head)
    os.truncate(path, 8 << 30)
    assert str(path) in refused_within_100_mb(path)


@pytest.mark.parametrize("name", ["junk.bin", "edgekit.json", "labels.txt"])
def test_packed_file_that_inflates_to_much_more_is_refused(models: Path, name: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.tflite"
    path.write_bytes(models.joinpath("int8.tflite").read_bytes())
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(name, "w", force_zip64=True) as entry,
    ):
        for _ in range(300):
            entry.write(bytes(1 << 20))
    assert "at most" in refused_within_100_mb(path)


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
