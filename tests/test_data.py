from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgekit.converters import data
from edgekit.converters.images import Images
from edgekit.errors import ConversionError
from edgekit.manifest import ImageInput
from edgekit.preprocess import IMAGE_SUFFIXES

KIND = Images(ImageInput(size_wh=(8, 8), mean=(127.5,), std=(127.5,)))
TAGS = np.array([[0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., data.Dataset]:
    """Loads arrays as validation data of three classes, several of which an image may be of."""

    def run(limit: int = 100, multi_label: bool = True, **arrays: Any) -> data.Dataset:
        x = np.arange(len(arrays["y"]), dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)
        np.savez(tmp_path / "data.npz", **{"x": x, **arrays})
        return data.load(
            str(tmp_path / "data.npz"), "validation", KIND, tmp_path, limit=limit, classes=3, multi_label=multi_label
        )

    return run


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64])
def test_load_for_several_labels_takes_a_truth_for_each_class(load: Any, dtype: Any) -> None:
    dataset = load(y=TAGS.astype(dtype))
    np.testing.assert_array_equal(dataset.class_ids, TAGS)
    assert dataset.class_ids.dtype == np.int64


def test_load_for_several_labels_keeps_image_and_truth_together(load: Any) -> None:
    dataset = load(y=TAGS, limit=2)
    np.testing.assert_array_equal(dataset.x[:, 0, 0, 0], [0, 3])
    np.testing.assert_array_equal(dataset.class_ids, TAGS[[0, 3]])


@pytest.mark.parametrize(
    ("y", "complaint"),
    [
        (TAGS[:, :2], r"or a 0 or 1 for each class of each image, shape \(4, 3\), got int64 of shape \(4, 2\)"),
        (TAGS.astype(np.float32), r"0 or 1 for each .* got float32 of shape \(4, 3\)"),
        (2 * TAGS, "expected a 0 or 1 for each class, got 0 to 2"),
        (-TAGS, "expected a 0 or 1 for each class, got -1 to 0"),
    ],
    ids=["classes", "type", "above 1", "below 0"],
)
def test_load_for_several_labels_of_another_truth_is_refused(load: Any, y: np.ndarray, complaint: str) -> None:
    with pytest.raises(ConversionError, match=complaint):
        load(y=y)


def test_load_for_several_labels_takes_one_label_too(load: Any, tmp_path: Path, colour: Any) -> None:
    np.testing.assert_array_equal(load(y=np.array([0, 2, 1, 1])).class_ids, np.eye(3)[[0, 2, 1, 1]])
    for label in ("red", "green", "blue"):
        (tmp_path / "data" / label).mkdir(parents=True)
        cv2.imwrite(str(tmp_path / "data" / label / "0.png"), colour(label))
    dataset = data.load(
        str(tmp_path / "data"), "validation", KIND, tmp_path, limit=9, classes=3, multi_label=True, labels=()
    )
    np.testing.assert_array_equal(dataset.class_ids, np.eye(3))


def test_load_for_one_label_refuses_a_truth_for_each_class(load: Any) -> None:
    with pytest.raises(ConversionError, match=r"expected 4 whole class numbers, got int64 of shape \(4, 3\)"):
        load(y=TAGS, multi_label=False)


def noise(count: int, side: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, channels), np.uint8)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (noise(100, 64), "look like noise"),
        (noise(40, 8, 1), "look like noise"),
        (np.random.default_rng(0).normal(size=(20, 32, 32, 3)).astype(np.float32), "look like noise"),
        (((noise(20, 32) - np.array([124, 116, 104])) / [58, 57, 57]).astype(np.float32), "look like noise"),
        (np.zeros((10, 8, 8, 3), np.uint8), "of one colour"),
        (np.ones((10, 8, 8, 1), np.float32) * np.arange(10)[:, None, None, None], "of one colour"),
        (np.repeat(noise(1, 16), 5, 0), "are the same"),
    ],
    ids=["noise", "small noise", "normal noise", "noise as tensors", "black", "one value each", "one image"],
)
def test_suspicion_of_what_is_no_data(x: np.ndarray, words: str) -> None:
    line = KIND.suspicion(x)
    assert words in line and "give 100 or more typical images" in line and "\n" not in line


def test_suspicion_of_pictures_of_colours(colour: Any) -> None:
    labels = ["red", "green", "blue"] * 10
    assert KIND.suspicion(np.stack([colour(label, (32, 32), n) for n, label in enumerate(labels)])) == ""


@pytest.mark.parametrize("name", ["parrot.jpg", "cat_720p.jpg"])
@pytest.mark.parametrize(
    "change",
    [
        lambda image, _: cv2.resize(image, (224, 224)),
        lambda image, _: cv2.resize(image, (8, 8), interpolation=cv2.INTER_AREA),
        lambda image, _: cv2.GaussianBlur(cv2.resize(image, (224, 224)), (31, 31), 0),
        lambda image, random: cv2.resize(image, (224, 224)) + random.normal(0, 60, (224, 224, 3)),
        lambda image, random: cv2.resize(image, (224, 224)) / 20 + random.normal(0, 5, (224, 224, 3)),
    ],
    ids=["sharp", "tiny", "blurry", "noisy", "dark and noisy"],
)
def test_suspicion_of_a_photograph(vision_data: Path, name: str, change: Callable[..., np.ndarray]) -> None:
    image = change(cv2.imread(str(vision_data / name)), np.random.default_rng(0)).clip(0, 255).astype(np.uint8)
    assert KIND.suspicion(image[None]) == ""
    assert KIND.suspicion((image[None].astype(np.float32) - 127.5) / 127.5) == ""


@pytest.mark.host
@pytest.mark.parametrize("side", [8, 64])
def test_suspicion_of_handwriting(digits: Path, side: int) -> None:
    paths = sorted(path for path in (digits / "calibration").rglob("*") if path.suffix in IMAGE_SUFFIXES)
    images = [cv2.resize(cv2.imread(str(path)), (side, side), interpolation=cv2.INTER_AREA) for path in paths]
    assert KIND.suspicion(np.stack(images)) == ""
