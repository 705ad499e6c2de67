from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekit.errors import ConversionError
from edgekit.manifest import ImageInput
from edgekit.preprocess import ImagePreprocessor

pytestmark = pytest.mark.host
keras = pytest.importorskip("keras")
h5py = pytest.importorskip("h5py")
pytest.importorskip("tensorflow")

from edgekit.converters import models  # noqa: E402

layers = keras.layers
SIDE = 32


def open_model(name: str | Path = "mobilenet-v3-small", **options: Any) -> models.Classifier:
    given = {"weights": "none", "classes": None, "input_size": None, "mean": None, "std": None}
    return models.open_model(str(name), **{**given, **options})


def pictures(count: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, SIDE, SIDE, channels), np.uint8)


def through_manifest(classifier: models.Classifier, images: np.ndarray) -> np.ndarray:
    """What the model makes of images that the device's preprocessing prepares."""
    assert classifier.channels in (1, 3)
    preprocess = ImagePreprocessor(
        ImageInput(
            size_wh=classifier.size_wh,
            channels=1 if classifier.channels == 1 else 3,
            mean=classifier.mean,
            std=classifier.std,
        )
    )
    return np.concatenate([np.asarray(classifier.static(preprocess(image), training=False)) for image in images])


def body(x: Any, classes: int = 3) -> Any:
    """A convolution whose outputs depend on every channel, and a softmax."""
    seed = keras.initializers.RandomNormal(stddev=0.2, seed=1)
    x = layers.Conv2D(8, 3, strides=2, activation="relu", kernel_initializer=seed)(x)
    return layers.Dense(classes, activation="softmax", kernel_initializer=seed)(layers.GlobalAveragePooling2D()(x))


class TestMobileNet:
    """The named models."""

    @pytest.mark.parametrize(
        ("options", "channels", "kernel"),
        [
            ({}, 576, 5),
            ({"alpha": 0.5}, 288, 5),
            ({"alpha": 0.35, "minimalistic": True}, 192, 3),
            ({"name": "mobilenet-v3-large", "alpha": 0.75}, 720, 5),
        ],
    )
    def test_open_model_builds_the_variant(self, options: Any, channels: int, kernel: int) -> None:
        model = open_model(classes=7, input_size=SIDE, **options)
        assert model.model.get_layer("conv_1").output.shape == (None, 1, 1, channels)
        kernels = {layer.kernel_size[0] for layer in model.model.layers if isinstance(layer, layers.DepthwiseConv2D)}
        assert max(kernels) == kernel
        assert (model.size_wh, model.classes, model.mean, model.std) == ((SIDE, SIDE), 7, (127.5,), (127.5,))
        assert model.static.output.shape == (1, 7) and not model.assumed

    @pytest.mark.parametrize(("dropout", "rates"), [(None, [0.2]), (0.5, [0.5]), (0, [])])
    def test_open_model_takes_a_dropout(self, dropout: float | None, rates: list[float]) -> None:
        model = open_model(classes=2, input_size=SIDE, dropout=dropout).model
        assert [layer.rate for layer in model.layers if isinstance(layer, layers.Dropout)] == rates

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"alpha": 0}, "--alpha 0: expected a width multiplier above 0"),
            ({"alpha": float("nan")}, "--alpha nan: expected a width"),
            ({"dropout": 1}, "--dropout 1: expected a rate from 0 to below 1"),
            ({"head": "boxes"}, "--head boxes: expected classes or attention"),
            ({"input_size": 16}, "expected 32 or more"),
            ({"weights": "imagenet", "alpha": 0.5}, r"expected --alpha 0\.75 or 1, got 0\.5"),
            ({"weights": "imagenet", "alpha": 0.75, "minimalistic": True}, "expected --alpha 1 with --minimalistic"),
            ({"weights": "imagenet", "classes": 3}, "expected 1000 classes, got 3"),
        ],
    )
    def test_open_model_with_an_option_that_does_not_fit_is_refused(self, options: Any, complaint: str) -> None:
        with pytest.raises(ConversionError, match=complaint):
            open_model(**options)

    @pytest.mark.parametrize(
        ("options", "file"),
        [
            ({}, "small_224_1.0_float.h5"),
            ({"alpha": 1}, "small_224_1.0_float.h5"),
            ({"name": "mobilenet-v3-large", "alpha": 0.75}, "large_224_0.75_float.h5"),
            ({"minimalistic": True}, "small_minimalistic_224_1.0_float.h5"),
            ({"head": "attention"}, "small_224_1.0_float_no_top_v2.h5"),
        ],
    )
    def test_open_model_without_a_network_names_the_file_of_the_variant(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, file: str
    ) -> None:
        asked: list[str] = []

        def no_network(file_name: str, *_: Any, **__: Any) -> None:
            asked.append(file_name)
            raise Exception("URL fetch failure")

        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        monkeypatch.setattr("keras.src.applications.mobilenet_v3.file_utils.get_file", no_network)
        with pytest.raises(ConversionError) as caught:
            open_model(weights="imagenet", **options)
        assert asked == [f"weights_mobilenet_v3_{file}"]  # what Keras itself would have fetched
        assert f"put Keras's file {asked[0]} into {tmp_path / 'models'}" in str(caught.value)

    @pytest.mark.parametrize(
        "options",
        [{"alpha": 0.5}, {"minimalistic": True}, {"dropout": 0.1}, {"head": "attention"}, {"weights": "imagenet"}],
    )
    def test_open_model_with_options_of_a_named_model_for_a_path_is_refused(self, options: Any) -> None:
        with pytest.raises(ConversionError, match=r"^--.*expected mobilenet-v3-small or .*got model mine\.keras"):
            open_model("mine.keras", **options)


class TestAttention:
    """The named models with the head that weighs channels."""

    def test_open_model_with_the_attention_head_has_its_published_sizes(self) -> None:
        model = open_model(head="attention")
        assert (model.size_wh, model.classes, model.static.output.shape) == ((512, 512), 10, (1, 10))
        units = {name: model.model.get_layer(f"attention_{name}").units for name in ("squeeze", "excite")}
        assert units == {"squeeze": 32, "excite": 576}
        assert model.model.get_layer("attention_gate").output.shape == (None, 16, 16, 576)

    def test_open_model_with_the_attention_head_multiplies_features_by_the_gate(self) -> None:
        model = open_model(head="attention", input_size=64, classes=4).model
        ends = [model.get_layer(name).output for name in ("attention_gate", "predictions")]
        features = model.get_layer("attention_gate").input[0]
        x = np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 3)).astype(np.float32)
        mapped, gated, scores = (np.asarray(y) for y in keras.Model(model.input, [features, *ends])(x, training=False))

        def dense(name: str, x: np.ndarray) -> np.ndarray:
            kernel, bias = model.get_layer(name).get_weights()
            return np.asarray(x @ kernel + bias)

        gate = 1 / (1 + np.exp(-dense("attention_excite", dense("attention_squeeze", mapped.mean((1, 2))).clip(0))))
        np.testing.assert_allclose(gated, mapped * gate[:, None, None], atol=1e-5)
        logits = np.exp(dense("predictions", gated.mean((1, 2))))
        np.testing.assert_allclose(scores, logits / logits.sum(-1, keepdims=True), atol=1e-5)

    def test_open_model_with_imagenet_weights_says_that_the_attention_head_has_none(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        """A stand-in for Keras's file: there is no network here."""
        backbone = models.MOBILENETS["mobilenet-v3-small"](
            include_top=False, weights=None, include_preprocessing=False, input_shape=(224, 224, 3)
        )
        backbone.save_weights(tmp_path / "no_top.weights.h5")
        monkeypatch.setattr(
            "keras.src.applications.mobilenet_v3.file_utils.get_file",
            lambda *_, **__: str(tmp_path / "no_top.weights.h5"),
        )
        classifier = open_model(weights="imagenet", head="attention", input_size=64)
        kernels = [model.get_layer("conv").get_weights()[0] for model in (backbone, classifier.model)]
        np.testing.assert_array_equal(*kernels)
        assert len(classifier.warnings) == 1 and "random weights" in classifier.warnings[0]

    def test_open_model_loads_its_own_attention_weights(self, tmp_path: Path) -> None:
        options: Any = {"head": "attention", "input_size": 64, "classes": 4}
        first = open_model(**options)
        first.model.save_weights(tmp_path / "own.weights.h5")
        second = open_model(**options, weights=str(tmp_path / "own.weights.h5"))
        np.testing.assert_array_equal(*(m.model.get_layer("predictions").get_weights()[0] for m in (first, second)))
        assert not second.warnings


def write_legacy(
    model: Any, path: Path, *, ordering: str = "tf", change: Callable[..., Any] | None = None, **attributes: Any
) -> None:
    """``model``'s weights as Keras 1 wrote them. ``change`` alters (layer, names, arrays) before they are written."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        file.attrs.update(attributes)
        for layer in model.layers:
            names = [f"{layer.name}_{weight.name}" for weight in layer.weights]
            if isinstance(layer, layers.BatchNormalization):
                names = [f"{layer.name}_{kind}_1:0" for kind in ("gamma", "beta", "running_mean", "running_std")]
            arrays = layer.get_weights()
            if ordering == "th":
                arrays = [array.transpose(3, 2, 0, 1) if array.ndim == 4 else array for array in arrays]
            if change:
                names, arrays = change(layer, names, arrays)
            group = file.create_group(layer.name)
            group.attrs["weight_names"] = [name.encode() for name in names]
            for name, array in zip(names, arrays, strict=True):
                group[name] = array


@pytest.fixture(scope="module")
def trained() -> Any:
    """A MobileNetV3-Small whose every weight is different."""
    model = open_model(classes=3, input_size=SIDE, alpha=0.5).model
    random = np.random.default_rng(2)
    for layer in model.layers:
        layer.set_weights([random.uniform(0.1, 0.3, w.shape).astype(np.float32) for w in layer.get_weights()])
    return model


def load(path: Path, **options: Any) -> models.Classifier:
    return open_model(**{"classes": 3, "input_size": SIDE, "alpha": 0.5, **options}, weights=str(path))


class TestLegacyWeights:
    """Weight files of Keras 1 and 2."""

    @staticmethod
    def assert_same_weights(model: Any, other: Any) -> None:
        for layer, of_other in zip(model.layers, other.layers, strict=True):
            for weight, wanted in zip(layer.get_weights(), of_other.get_weights(), strict=True):
                np.testing.assert_array_equal(weight, wanted, err_msg=layer.name)

    @pytest.mark.parametrize("ordering", ["tf", "th"])
    def test_load_weights_of_either_ordering_gives_the_model(self, trained: Any, tmp_path: Path, ordering: str) -> None:
        write_legacy(trained, tmp_path / "old.h5", ordering=ordering)
        loaded = load(tmp_path / "old.h5")
        x = np.random.default_rng(3).uniform(-1, 1, (2, SIDE, SIDE, 3)).astype(np.float32)
        np.testing.assert_array_equal(
            np.asarray(loaded.model(x, training=False)), np.asarray(trained(x, training=False))
        )
        self.assert_same_weights(loaded.model, trained)
        assert ["transposed" in warning for warning in loaded.warnings] == [True] * (ordering == "th")

    def test_load_weights_of_depthwise_kernels_by_channel(self, trained: Any, tmp_path: Path) -> None:
        def by_channel(layer: Any, names: Any, arrays: Any) -> Any:
            if isinstance(layer, layers.DepthwiseConv2D):
                arrays = [arrays[0].transpose(1, 0, 2, 3), *arrays[1:]]
            return names, arrays

        write_legacy(trained, tmp_path / "old.h5", ordering="th", change=by_channel)
        self.assert_same_weights(load(tmp_path / "old.h5").model, trained)

    def test_load_weights_of_theano_turns_the_kernels(self, trained: Any, tmp_path: Path) -> None:
        def turned(layer: Any, names: Any, arrays: Any) -> Any:
            return names, [array[::-1, ::-1] if array.ndim == 4 else array for array in arrays]

        write_legacy(trained, tmp_path / "old.h5", change=turned, backend=b"theano")
        loaded = load(tmp_path / "old.h5")
        self.assert_same_weights(loaded.model, trained)
        assert "turned" in loaded.warnings[0]

    def test_load_weights_of_batch_normalization_goes_by_their_names(self, trained: Any, tmp_path: Path) -> None:
        def shuffled(layer: Any, names: Any, arrays: Any) -> Any:
            return (names[::-1], arrays[::-1]) if isinstance(layer, layers.BatchNormalization) else (names, arrays)

        write_legacy(trained, tmp_path / "old.h5", change=shuffled)
        self.assert_same_weights(load(tmp_path / "old.h5").model, trained)

    def test_load_weights_of_a_kernel_that_fits_either_way_follows_the_file(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3))
        x = layers.Conv2D(3, 3, name="square")(given)  # (3, 3, 3, 3) in both orderings
        model = keras.Model(given, layers.Conv2D(5, 3, name="telling")(x))
        random = np.random.default_rng(4)
        model.set_weights([random.normal(size=w.shape) for w in model.get_weights()])
        for ordering in ("tf", "th"):
            write_legacy(model, tmp_path / "old.h5", ordering=ordering)
            other = keras.models.clone_model(model)
            models.load_weights(other, tmp_path / "old.h5")
            self.assert_same_weights(other, model)

    @pytest.mark.parametrize("ordering", ["tf", "th"])
    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"classes": 5}, r"layer logits: expected \(1, 1, 1024, 5\) \(5,\), got \(1, 1, 1024, 3\) \(3,\)"),
            ({"alpha": 0.75}, r"layer expanded_conv_project: expected \(1, 1, 16, 16\), got \(1, 1, 16, 8\)"),
            ({"minimalistic": True}, r"layer expanded_conv_squeeze_excite_conv: expected \(.*\), got \("),
        ],
        ids=["classes", "alpha", "minimalistic"],
    )
    def test_load_weights_of_another_model_names_layer_and_shapes(
        self, trained: Any, tmp_path: Path, ordering: str, options: Any, complaint: str
    ) -> None:
        write_legacy(trained, tmp_path / "old.h5", ordering=ordering)
        with pytest.raises(ConversionError, match=complaint):
            load(tmp_path / "old.h5", **options)

    def test_load_weights_of_mixed_orderings_is_refused(self, trained: Any, tmp_path: Path) -> None:
        def first_only(layer: Any, names: Any, arrays: Any) -> Any:
            return names, [a.transpose(3, 2, 0, 1) if layer.name == "conv" else a for a in arrays]

        write_legacy(trained, tmp_path / "old.h5", change=first_only)
        with pytest.raises(ConversionError, match=r"layer conv: expected \(3, 3, 3, 16\), got \(16, 3, 3, 3\)"):
            load(tmp_path / "old.h5")

    def test_load_weights_with_layers_missing_is_refused(self, trained: Any, tmp_path: Path) -> None:
        def without_head(layer: Any, names: Any, arrays: Any) -> Any:
            return ([], []) if layer.name == "logits" else (names, arrays)

        write_legacy(trained, tmp_path / "old.h5", change=without_head)
        with pytest.raises(ConversionError, match=r"expected \d+ layers with weights, got \d+"):
            load(tmp_path / "old.h5")

    def test_load_weights_of_a_whole_model_in_h5(self, trained: Any, tmp_path: Path) -> None:
        trained.save(tmp_path / "whole.h5")
        self.assert_same_weights(load(tmp_path / "whole.h5").model, trained)


def rescaled() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    return keras.Model(given, body(layers.Rescaling(1 / 127.5, -1)(given)))


def per_channel() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    return keras.Model(given, body(layers.Rescaling([1 / 58, 1 / 57, -1 / 56], [-2.1, -2.0, 1.8])(given)))


def normalized() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    return keras.Model(given, body(layers.Normalization(mean=[123, 116, 103], variance=[3400, 3300, 0])(given)))


def adapted() -> Any:
    normalization = layers.Normalization()
    normalization.adapt(pictures(8).astype(np.float32))
    return keras.Sequential([keras.Input((SIDE, SIDE, 3)), normalization, *tail()])


def several() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    x = layers.RandomRotation(0.1)(layers.RandomFlip()(given))
    x = layers.Normalization(mean=[0.5, 0.4, 0.3], variance=[0.04, 0.05, 0.06])(layers.Rescaling(1 / 255)(x))
    return keras.Model(given, body(x))


def tail() -> list[Any]:
    return [layers.Conv2D(8, 3, activation="relu"), layers.GlobalAveragePooling2D(), layers.Dense(3, "softmax")]


def sequential() -> Any:
    head = keras.Sequential([layers.RandomFlip(), layers.Rescaling(1 / 255)], name="augmentation")
    return keras.Sequential([keras.Input((SIDE, SIDE, 3)), head, *tail()])


def nested() -> Any:
    mobilenet = keras.applications.MobileNetV3Small(
        input_shape=(SIDE, SIDE, 3), weights=None, classes=3, alpha=0.35, include_preprocessing=True
    )
    given = keras.Input((SIDE, SIDE, 3))
    x = mobilenet(layers.Rescaling(2)(given), training=False)
    return keras.Model(given, layers.Dense(3, "softmax")(x))


def grey() -> Any:
    given = keras.Input((SIDE, SIDE, 1))
    return keras.Model(given, body(layers.Rescaling([1 / 255], [-0.5])(given)))


def uint8() -> Any:
    given = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    return keras.Model(given, body(layers.Rescaling(1 / 255)(given)))


def named_ports() -> Any:
    given = keras.Input((SIDE, SIDE, 3), name="image")
    return keras.Model({"image": given}, {"scores": body(layers.Rescaling(1 / 255)(given))})


def listed_ports() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    return keras.Model([given], [body(layers.Rescaling(1 / 255)(given))])


def identity() -> Any:
    given = keras.Input((SIDE, SIDE, 3))
    return keras.Model(given, body(layers.Rescaling(1.0)(given)))


def close(*numbers: float) -> Any:
    return pytest.approx(numbers, rel=1e-5)


FOLDED = {
    rescaled: (close(127.5), close(127.5)),
    per_channel: (close(121.8, 114, 100.8), close(58, 57, -56)),
    normalized: (close(123, 116, 103), close(3400**0.5, 3300**0.5, 1e-7)),
    adapted: None,
    several: (close(127.5, 102, 76.5), close(51, 255 * 0.05**0.5, 255 * 0.06**0.5)),
    sequential: (close(0), close(255)),
    nested: (close(63.75), close(63.75)),
    grey: (close(127.5), close(255)),
    uint8: (close(0), close(255)),
    named_ports: (close(0), close(255)),
    listed_ports: (close(0), close(255)),
    identity: (close(0), close(1)),
}


class TestNormalizationInside:
    """Models that scale their pixels themselves."""

    @pytest.mark.parametrize("build", FOLDED, ids=lambda build: build.__name__)
    def test_open_model_gives_scaling_layers_to_the_device(self, tmp_path: Path, build: Callable[[], Any]) -> None:
        model = build()
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        images = pictures(channels=opened.channels)
        original = keras.Model(model.inputs[0], model.outputs[0])
        wanted = np.asarray(original(images.astype(original.inputs[0].dtype), training=False))
        np.testing.assert_allclose(through_manifest(opened, images), wanted, atol=1e-5)
        if numbers := FOLDED[build]:
            assert (opened.mean, opened.std) == numbers
        assert opened.model.inputs[0].dtype == "float32" and not opened.assumed and not opened.warnings
        kinds = {type(layer) for layer in all_layers(opened.static)}
        assert not kinds & {layers.Rescaling, layers.Normalization, layers.RandomFlip}

    def test_open_model_puts_mean_and_std_before_the_models_own_layers(self, tmp_path: Path) -> None:
        model = rescaled()
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras", mean=10.0, std=2.0)
        images = pictures()
        wanted = np.asarray(model((images.astype(np.float32) - 10) / 2, training=False))
        np.testing.assert_allclose(through_manifest(opened, images), wanted, atol=1e-5)
        assert (opened.mean, opened.std) == (close(265), close(255))

    @pytest.mark.parametrize(
        "head",
        [
            lambda given: layers.Add()([layers.Rescaling(1 / 255)(given), given]),
            lambda given: layers.Rescaling(0.0, 0.5)(given),
            lambda given: layers.Rescaling(np.full((SIDE, SIDE, 3), 1 / 255))(given),
            lambda given: layers.Normalization(mean=1, variance=4, invert=True)(given),
            lambda given: layers.Rescaling(1 / 255)(layers.CenterCrop(24, 24)(given)),
            lambda given: layers.Rescaling(1 / 255)(layers.Resizing(16, 16)(given)),
        ],
        ids=["branch", "zero", "map", "inverted", "crop", "resize"],
    )
    def test_open_model_leaves_what_the_device_cannot_do(self, tmp_path: Path, head: Callable[[Any], Any]) -> None:
        given = keras.Input((SIDE, SIDE, 3))
        model = keras.Model(given, body(head(given)))
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        assert (opened.mean, opened.std, opened.assumed) == ((0,), (1,), False)
        wanted = np.asarray(model(pictures().astype(np.float32), training=False))
        np.testing.assert_allclose(through_manifest(opened, pictures()), wanted, atol=1e-5)

    def test_open_model_without_normalization_assumes_one(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3))
        keras.Model(given, body(given)).save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        assert (opened.mean, opened.std, opened.assumed) == ((127.5,), (127.5,), True)


def all_layers(model: Any) -> list[Any]:
    return [part for layer in model.layers for part in (all_layers(layer) if hasattr(layer, "layers") else [layer])]


class TestOtherInputs:
    """What else a user's model may take."""

    @pytest.mark.parametrize("options", [{"mean": 0.0}, {"std": 255.0}, {"mean": 0.0, "std": 255.0}])
    def test_open_model_on_uint8_takes_no_mean_and_std(self, tmp_path: Path, options: Any) -> None:
        uint8().save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match="takes uint8 pixels as they are: expected neither --mean nor --std"):
            open_model(tmp_path / "mine.keras", **options)

    def test_open_model_on_uint8_without_a_layer_to_fold_gets_a_float_twin(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        model = keras.Model(given, body(keras.ops.cast(given, "float32") / 255.0))
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        assert (opened.model.inputs[0].dtype, opened.mean, opened.std) == ("float32", (0,), (1,))
        np.testing.assert_allclose(through_manifest(opened, pictures()), np.asarray(model(pictures())), atol=1e-5)

    def test_open_model_on_uint8_that_rounds_inside_says_so(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        model = keras.Model(given, body(layers.Rescaling(1 / 5)(layers.Resizing(20, 20)(given))))
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        assert len(opened.warnings) == 1 and "rounds its uint8 pixels" in opened.warnings[0]
        np.testing.assert_allclose(through_manifest(opened, pictures()), np.asarray(model(pictures())), atol=2e-3)

    def test_open_model_on_uint8_that_computes_in_integers_is_refused(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        wrapped = keras.ops.cast(given + given, "float32") / 255  # beyond 255 it starts again from 0
        keras.Model(given, body(wrapped)).save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match=r"takes uint8 pixels: expected the same results .* differ by"):
            open_model(tmp_path / "mine.keras")

    def test_open_model_of_a_saved_model_on_uint8_is_refused_in_a_line(self, tmp_path: Path) -> None:
        uint8().export(str(tmp_path / "saved"), verbose=False)
        with pytest.raises(ConversionError, match=r"takes uint8 pixels only .*; build the model on a float") as caught:
            open_model(tmp_path / "saved")
        assert str(caught.value).isprintable()

    @pytest.mark.parametrize("dtype", ["int32", "int8", "float64"])
    def test_open_model_on_another_type_is_refused(self, tmp_path: Path, dtype: str) -> None:
        given = keras.Input((SIDE, SIDE, 3), dtype=dtype)
        keras.Model(given, body(layers.Rescaling(1 / 255)(given))).save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match=f"input: expected type float32 or uint8, got {dtype}"):
            open_model(tmp_path / "mine.keras")

    def test_open_model_of_any_size_needs_an_input_size(self, tmp_path: Path) -> None:
        given = keras.Input((None, None, 3))
        keras.Model(given, body(layers.Rescaling(1 / 255)(given))).save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match="takes images of any size; say which with --input-size"):
            open_model(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras", input_size=24)
        assert (opened.static.inputs[0].shape, opened.size_wh, opened.std) == ((1, 24, 24, 3), (24, 24), (255,))

    def test_open_model_with_branches_is_left_as_it_is(self, tmp_path: Path) -> None:
        given = keras.Input((SIDE, SIDE, 3))
        x = layers.Rescaling(1 / 255)(given)
        x = layers.Concatenate()([layers.Conv2D(4, 1)(x), layers.Conv2D(4, 3, padding="same")(x)])
        model = keras.Model(given, body(layers.Add()([x, layers.Conv2D(8, 1)(x)])))
        model.save(tmp_path / "mine.keras")
        opened = open_model(tmp_path / "mine.keras")
        wanted = np.asarray(model(pictures().astype(np.float32), training=False))
        np.testing.assert_allclose(through_manifest(opened, pictures()), wanted, atol=1e-5)
        assert opened.std == (255,)

    @pytest.mark.parametrize(("inputs", "outputs"), [(1, 2), (2, 1)], ids=["several outputs", "several inputs"])
    def test_open_model_of_several_ports_is_refused(self, tmp_path: Path, inputs: int, outputs: int) -> None:
        given = [keras.Input((SIDE, SIDE, 3)) for _ in range(inputs)]
        x = layers.Add()(given) if inputs > 1 else given[0]
        keras.Model(given, {str(n): body(x) for n in range(outputs)}).save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match=f"expected one input and one output, got {inputs} and {outputs}"):
            open_model(tmp_path / "mine.keras")

    @pytest.mark.parametrize("suffix", ["keras", "h5"])
    def test_open_model_with_a_lambda_is_refused_in_a_line(self, tmp_path: Path, suffix: str) -> None:
        given = keras.Input((SIDE, SIDE, 3))
        keras.Model(given, body(layers.Lambda(lambda x: x / 255)(given))).save(tmp_path / f"mine.{suffix}")
        with pytest.raises(ConversionError, match=r"cannot be loaded .*Lambda.*made of Keras's own layers") as caught:
            open_model(tmp_path / f"mine.{suffix}")
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 500

    def test_open_model_with_a_custom_layer_is_refused_in_a_line(self, tmp_path: Path) -> None:
        class Halve(layers.Layer):  # type: ignore[misc, name-defined]
            def call(self, x: Any) -> Any:
                return x / 2

        given = keras.Input((SIDE, SIDE, 3))
        keras.Model(given, body(Halve()(given))).save(tmp_path / "mine.keras")
        with pytest.raises(ConversionError, match=r"cannot be loaded .*Halve.*made of Keras's own layers") as caught:
            open_model(tmp_path / "mine.keras")
        assert len(str(caught.value).splitlines()) == 1
