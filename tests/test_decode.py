from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgekit.decode import NotFiniteError, scores, thresholds, top
from edgekit.errors import EdgekitError
from edgekit.manifest import Output

LABELS = ("a", "b", "c", "d")
READY = Output(activation="softmax")


def test_scores_of_quantized_output_are_dequantized() -> None:
    raw = np.array([[-128, 127, 0, -64]], np.int8)
    assert scores(raw, READY, 1 / 256, -128) == pytest.approx(np.array([[0, 255, 128, 64]]) / 256)


def test_scores_of_logits_are_softmaxed_without_overflow() -> None:
    values = scores(
        np.array([[1000.0, 1000.0, -1000.0, 0.0]], np.float32), Output(activation="softmax", in_graph=False)
    )
    assert values == pytest.approx(np.array([[0.5, 0.5, 0, 0]]))


def test_scores_of_sigmoid_logits_do_not_overflow() -> None:
    with np.errstate(all="raise"):
        values = scores(
            np.array([[-1e4, 0.0, np.log(3), 1e4]], np.float32), Output(activation="sigmoid", in_graph=False)
        )
    assert values == pytest.approx(np.array([[0, 0.5, 0.75, 1]]), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(NotFiniteError):
        scores(np.array([[0.1, bad, 0.2, 0.3]], np.float32), READY)


def test_top_is_sorted_labelled_and_cut() -> None:
    values = np.array([0.2, 0.5, 0.05, 0.25], np.float32)
    assert [(p.class_id, p.label, p.score) for p in top(values, LABELS, 0.1, 2)] == [(1, "b", 0.5), (3, "d", 0.25)]
    assert [p.label for p in top(values, LABELS, 0.1, 9)] == ["b", "d", "a"]
    assert top(values, LABELS, 0.9) == []


def test_top_of_equal_scores_is_the_lower_class_first() -> None:
    assert [p.class_id for p in top(np.full(4, 0.25, np.float32), LABELS, top_k=4)] == [0, 1, 2, 3]


def test_top_reaches_the_threshold_of_its_class() -> None:
    values = np.array([0.2, 0.5, 0.05, 0.25], np.float32)
    limits = np.array([0.1, 0.6, 0.0, 0.25], np.float32)
    assert [p.label for p in top(values, LABELS, limits)] == ["d", "a", "c"]
    assert [p.label for p in top(values, LABELS, limits, top_k=1)] == ["d"]


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.3, [0.3, 0.3, 0.3, 0.3]),
        ({"b": 0.5}, [0, 0.5, 0, 0]),
        ({"*": 0.9, "a": 0, "d": 1}, [0, 0.9, 0.9, 1]),
        ({}, [0, 0, 0, 0]),
    ],
)
def test_thresholds_are_by_class(threshold: Any, expected: list[float]) -> None:
    assert thresholds(threshold, LABELS) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("threshold", "complaint"),
    [
        ({"jaz": 0.5}, r"threshold jaz=0\.5: expected a label of the model; try jazz$"),
        ({"xyz": 0.5}, "try rock or jazz"),
        ({"jazz": 1.5}, r"from 0 to 1, got 1\.5"),
        (-1, "from 0 to 1"),
        (float("nan"), "from 0 to 1"),
    ],
)
def test_threshold_that_fits_no_class_is_an_error(threshold: Any, complaint: str) -> None:
    with pytest.raises(EdgekitError, match=complaint):
        thresholds(threshold, ("rock", "jazz", "acid jazz"))
