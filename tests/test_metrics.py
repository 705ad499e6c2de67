from __future__ import annotations

import warnings
from typing import Any

import msgspec
import numpy as np
import pytest

pytestmark = pytest.mark.host
pytest.importorskip("sklearn")

from edgekit.converters.metrics import Figures, figures, headline  # noqa: E402
from edgekit.errors import ConversionError  # noqa: E402


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("default", ResourceWarning)  # of what other tests left to be collected
        yield


def one_hot(class_ids: list[int], classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[class_ids]


def test_figures_of_one_label_by_hand() -> None:
    # truth: 3 cats, 2 dogs, no fox; a cat is taken for a dog, a dog for a fox
    found = figures(one_hot([0, 0, 1, 1, 2], 3), np.array([0, 0, 0, 1, 1]), ("cat", "dog", "fox"), False)
    assert found.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 0))
    cat, dog, fox = found.classes
    assert (cat.support, cat.precision, cat.recall, cat.f1) == pytest.approx((3, 1, 2 / 3, 4 / 5))
    assert (dog.support, dog.precision, dog.recall, dog.f1) == pytest.approx((2, 1 / 2, 1 / 2, 1 / 2))
    assert (fox.support, fox.precision, fox.recall, fox.f1) == (0, 0, 0, 0)
    assert found.f1_macro == pytest.approx((4 / 5 + 1 / 2) / 2)  # the fox does not count
    assert headline(found) == found.top1 == pytest.approx(3 / 5)
    assert found.top5 is None


def test_figures_of_one_class() -> None:
    found = figures(np.ones((3, 1), np.float32), np.zeros(3, int), ("cat",), False)
    assert (found.confusion, found.top1, found.f1_macro) == (((3,),), 1.0, 1.0)


def test_figures_of_several_labels_by_hand() -> None:
    truth = np.array([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    scores = np.array([[0.9, 0.1, 0.6], [0.4, 0.8, 0.0], [0.5, 0.7, 0.1], [0.3, 0.9, 0.2]], np.float32)
    found = figures(scores, truth, ("cat", "dog", "fox"), True)
    assert found.confusion == (((1, 1), (1, 1)), ((1, 1), (0, 2)), ((3, 1), (0, 0)))
    cat, dog, fox = found.classes
    assert (cat.support, cat.precision, cat.recall, cat.f1) == pytest.approx((2, 1 / 2, 1 / 2, 1 / 2))
    assert (dog.support, dog.precision, dog.recall, dog.f1) == pytest.approx((2, 2 / 3, 1, 4 / 5))
    # of the pairs of one with and one without, the share in which the one with scores higher
    assert (cat.auc, dog.auc, fox.auc) == pytest.approx((3 / 4, 2 / 4, None))
    assert headline(found) == found.f1_macro == pytest.approx((1 / 2 + 4 / 5) / 2)
    assert found.top1 is None and found.top5 is None


def test_figures_of_several_labels_with_one_class() -> None:
    scores = np.array([[0.9], [0.2], [0.6]], np.float32)
    found = figures(scores, np.array([[1], [0], [0]]), ("cat",), True)
    assert found.confusion == (((1, 1), (0, 1)),)
    assert found.classes[0].auc == 1.0


def test_figures_of_several_labels_with_class_numbers() -> None:
    scores = np.array([[0.9, 0.2], [0.1, 0.8]], np.float32)
    by_number, by_row = (figures(scores, truth, ("a", "b"), True) for truth in (np.array([0, 1]), np.eye(2)))
    assert by_number == by_row


@pytest.mark.parametrize("truth", [np.zeros((3, 2)), np.ones((3, 2))])
def test_figures_of_several_labels_that_are_always_or_never_there(truth: np.ndarray) -> None:
    found = figures(np.full((3, 2), 0.7, np.float32), truth, ("a", "b"), True)
    assert [c.auc for c in found.classes] == [None, None]
    assert found.f1_macro == truth[0, 0]


def test_figures_of_equal_scores_counts_the_lower_class_number_first() -> None:
    scores, labels = np.full((8, 8), 0.5, np.float32), tuple("abcdefgh")
    found = figures(scores, np.arange(8), labels, False)
    assert (found.top1, found.top5) == (1 / 8, 5 / 8)
    assert found.top1 == np.mean(scores.argmax(-1) == np.arange(8))


def test_figures_with_many_classes_agree_with_plain_arithmetic() -> None:
    random = np.random.default_rng(0)
    scores, truth = random.random((2000, 300), np.float32), random.integers(0, 299, 2000)
    scores[np.arange(2000), truth] += 0.6
    found = figures(scores, truth, tuple(f"class {i}" for i in range(300)), False)
    order = np.argsort(-scores, -1)
    assert found.top1 == pytest.approx(np.mean(order[:, 0] == truth))
    assert found.top5 == pytest.approx(np.mean((order[:, :5] == truth[:, None]).any(-1)))
    for class_id, row in enumerate(found.classes):
        named, true = order[:, 0] == class_id, truth == class_id
        both = int((named & true).sum())
        assert row.support == true.sum()
        assert row.precision == pytest.approx(both / max(named.sum(), 1))
        assert row.recall == pytest.approx(both / max(true.sum(), 1))
    assert sum(map(sum, found.confusion)) == 2000


@pytest.mark.parametrize("multi_label", [False, True])
def test_figures_fit_json(multi_label: bool) -> None:
    found = figures(one_hot([0, 1, 1], 6), np.array([0, 1, 2]), tuple("abcdef"), multi_label)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Figures) == found


def test_figures_with_nothing_right_fit_json() -> None:
    """scikit-learn counts in floating point then."""
    found = figures(one_hot([1, 2, 0], 3), np.array([0, 1, 2]), tuple("abc"), False)
    assert msgspec.json.decode(msgspec.json.encode(found), type=Figures) == found and found.top1 == 0


@pytest.mark.parametrize(
    ("rows", "truth", "multi_label", "line"),
    [
        (3, np.zeros(2, int), False, r"for 4 classes, got shape \(2,\)"),
        (3, np.zeros((3, 4), int), False, r"got shape \(3, 4\)"),
        (3, np.zeros((3, 2), int), True, r"got shape \(3, 2\)"),
        (0, np.zeros(0, int), False, r"got shape \(0,\)"),
        (2, np.array([0, 4]), False, "expected class numbers 0 to 3, got 0 to 4"),
    ],
)
def test_figures_of_labels_that_do_not_fit_is_an_error(
    rows: int, truth: np.ndarray, multi_label: bool, line: str
) -> None:
    with pytest.raises(ConversionError, match=line):
        figures(np.zeros((rows, 4), np.float32), truth, tuple("abcd"), multi_label)
