from __future__ import annotations

import numpy as np
import pytest

from edgekit.decode import NotFiniteError, scores, top
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
