from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import ConversionError

pytestmark = pytest.mark.host
keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")
pytest.importorskip("tensorflow")

from edgekit.converters import crnn  # noqa: E402

SMALL: Any = {"frames": 96, "tags": 5}
# The ten highest scores that the author published for two of his clips.
PUBLISHED = {
    "cute": {
        "jazz": 0.444, "instrumental": 0.151, "folk": 0.103, "Hip-Hop": 0.103, "ambient": 0.077, "guitar": 0.068,
        "rock": 0.058, "acoustic": 0.054, "experimental": 0.051, "electronic": 0.042,
    },
    "actionable": {
        "jazz": 0.416, "instrumental": 0.181, "Hip-Hop": 0.085, "folk": 0.085, "rock": 0.081, "ambient": 0.068,
        "guitar": 0.062, "Progressive rock": 0.048, "experimental": 0.046, "acoustic": 0.046,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def published(crnn_data: Path) -> Any:
    model = crnn.build()
    crnn.load(model, str(crnn_data / crnn.WEIGHTS_FILE))
    return model


@pytest.mark.parametrize("clip", PUBLISHED)
def test_published_weights_give_the_published_scores(published: Any, crnn_data: Path, clip: str) -> None:
    log_mel = np.load(crnn_data / f"bensound-{clip}.npy").transpose(0, 2, 3, 1)
    scores = np.asarray(published(log_mel, training=False))[0]
    highest = [crnn.TAGS[class_id] for class_id in np.argsort(-scores)[:10]]
    assert highest == list(PUBLISHED[clip])
    assert {tag: scores[crnn.TAGS.index(tag)] for tag in highest} == pytest.approx(PUBLISHED[clip], abs=0.001)


@pytest.mark.parametrize("axis", ["time", "frequency"])
@pytest.mark.parametrize("frames", [24, 96, 100, 1366])
def test_build_of_another_size(axis: Any, frames: int) -> None:
    model = crnn.build(frames=frames, num_mel_bins=128, tags=3, bn_axis=axis)
    assert (model.input_shape, model.output_shape) == ((None, 128, frames, 1), (None, 3))
    padded = frames + sum(crnn.padding(frames))
    assert model.get_layer("bn_0_freq").gamma.shape == (padded if axis == "time" else 128,)
    assert padded % 96 == 0 and model.get_layer("reshape").output.shape == (None, padded // 96, 128)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"num_mel_bins": 64}, "--mels: expected 96 or more for a CRNN, got 64"),
        ({"frames": 10}, "--frames: expected 24 or more"),
        ({"tags": 0}, "--classes: expected 1 or more"),
        ({"bn_axis": "channel"}, "--bn-axis channel: expected time or frequency"),
    ],
)
def test_build_of_what_cannot_be_is_refused(options: Any, complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint):
        crnn.build(**options)


@pytest.fixture(scope="module")
def trained() -> Any:
    """A small CRNN whose every weight is different."""
    model = crnn.build(**SMALL)
    random = np.random.default_rng(1)
    model.set_weights([random.uniform(0.05, 0.15, weight.shape) for weight in model.get_weights()])
    return model


def write_keras1(model: Any, path: Path, *, ordering: str, turned: bool = False, **attributes: Any) -> None:
    """``model``'s weights as the author's files have them: a matrix for each gate, and no word of the ordering."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        file.attrs.update(attributes)
        for layer in model.layers:
            arrays = layer.get_weights()
            names = [f"{layer.name}_{kind}_1:0" for kind in ("W", "b")[: len(arrays)]]
            if isinstance(layer, keras.layers.BatchNormalization):
                names = [f"{layer.name}_{kind}_1:0" for kind in ("gamma", "beta", "running_mean", "running_std")]
            elif isinstance(layer, keras.layers.Conv2D):
                kernel = arrays[0][::-1, ::-1] if turned else arrays[0]
                arrays[0] = kernel.transpose(3, 2, 0, 1) if ordering == "th" else kernel
            elif isinstance(layer, keras.layers.GRU):
                names = [f"{layer.name}_{weight}_{gate}:0" for gate in "zrh" for weight in "WUb"]
                split = [np.split(array, 3, axis=-1) for array in arrays]
                arrays = [of_weight[gate] for gate in range(3) for of_weight in split]
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, array in zip(names, arrays, strict=True):
                group[name] = array


def load(path: Path, **options: Any) -> tuple[Any, tuple[str, ...]]:
    model = crnn.build(**{**SMALL, **options})
    return model, crnn.load(model, str(path))


def assert_same_weights(model: Any, other: Any) -> None:
    for weight, wanted in zip(model.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(weight, wanted)


@pytest.mark.parametrize("ordering", ["tf", "th"])
@pytest.mark.parametrize(
    ("name", "attributes", "turned"),
    [
        ("weights.h5", {}, False),
        ("weights.h5", {"backend": b"tensorflow"}, False),
        ("weights.h5", {"backend": b"theano"}, True),
        ("weights_theano.h5", {}, True),
        ("weights_theano.h5", {"backend": b"tensorflow"}, False),
    ],
)
def test_load_of_keras_1_files_of_either_ordering_and_backend(
    trained: Any, tmp_path: Path, ordering: str, name: str, attributes: Any, turned: bool
) -> None:
    write_keras1(trained, tmp_path / name, ordering=ordering, turned=turned, **attributes)
    model, warnings = load(tmp_path / name)
    assert_same_weights(model, trained)
    assert ["transposed" in warning for warning in warnings].count(True) == (ordering == "th")
    assert ["turned by 180 degrees" in warning for warning in warnings].count(True) == turned
    assert ("as its name says" in " ".join(warnings)) == (turned and not attributes)


@pytest.mark.parametrize("suffix", ["weights.h5", "keras", "h5"])
def test_load_of_keras_3_files(trained: Any, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"tagger.{suffix}"
    trained.save_weights(path) if suffix == "weights.h5" else trained.save(path)
    model, warnings = load(path)
    assert_same_weights(model, trained)
    assert not warnings


def save(model: Any, path: Path) -> Path:
    """In the form that the suffix says, of Keras 1 for a plain ``.h5``."""
    if path.name.endswith(".weights.h5"):
        model.save_weights(path)
    elif path.suffix == ".h5":
        write_keras1(model, path, ordering="th")
    else:
        model.save(path)
    return path


@pytest.mark.parametrize("name", ["tagger.h5", "tagger.weights.h5", "tagger.keras"])
def test_load_of_a_file_with_top_into_a_model_without(trained: Any, tmp_path: Path, name: str) -> None:
    model, _ = load(save(trained, tmp_path / name), include_top=False)
    assert model.output_shape == (None, 32)
    for weight, wanted in zip(model.get_weights(), trained.get_weights(), strict=False):
        np.testing.assert_array_equal(weight, wanted)


@pytest.mark.parametrize("name", ["tagger.h5", "tagger.weights.h5"])
def test_load_of_a_file_without_top_into_a_model_with_one_names_it(tmp_path: Path, name: str) -> None:
    path = save(crnn.build(**SMALL, include_top=False), tmp_path / name)
    with pytest.raises(ConversionError, match=r"layer output is not in the file: expected 12 layers .*, got 11"):
        load(path)


@pytest.mark.parametrize("name", ["tagger.h5", "tagger.weights.h5"])
@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tags": 3}, r"layer output: expected \(32, 3\) \(3,\), got \(32, 5\) \(5,\)"),
        ({"frames": 192}, r"layer bn_0_freq: expected \(192,\) .*, got \(96,\)"),
        ({"num_mel_bins": 192}, r"layer gru1: expected \(256, 96\) \(32, 96\) \(96,\), got \(128, 96\) "),
    ],
    ids=["tags", "frames", "mels"],
)
def test_load_of_another_model_names_the_layer_and_both_shapes(
    trained: Any, tmp_path: Path, name: str, options: Any, complaint: str
) -> None:
    with pytest.raises(ConversionError, match=complaint):
        load(save(trained, tmp_path / name), **options)


def test_published_weights_without_a_network_say_where_to_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def no_network(*arguments: Any, **options: Any) -> None:
        asked.append((*arguments, options))
        raise Exception("URL fetch failure")

    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    monkeypatch.setattr("keras.utils.get_file", no_network)
    with pytest.raises(ConversionError, match=r"cannot be had \(no network\?\); put the file music_tagger") as caught:
        crnn.published_weights()
    assert str(caught.value).endswith(f"into {tmp_path / 'models'}")
    assert asked[0][0] == crnn.WEIGHTS_FILE and asked[0][1].startswith("https://github.com/keunwoochoi/")


def test_published_weights_are_found_where_keras_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crnn_data: Path
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / crnn.WEIGHTS_FILE).write_bytes((crnn_data / crnn.WEIGHTS_FILE).read_bytes())
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert crnn.published_weights() == tmp_path / "models" / crnn.WEIGHTS_FILE


def test_published_weights_leave_another_file_of_that_name_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / crnn.WEIGHTS_FILE).write_text("mine")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    with pytest.raises(ConversionError, match="expected the published file, sha256 df63638de9f3"):
        crnn.published_weights()
    assert (tmp_path / "models" / crnn.WEIGHTS_FILE).read_text() == "mine"
