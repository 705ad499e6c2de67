from __future__ import annotations

import numpy as np
import pytest

from edgekit.converters import fidelity

KERAS = np.tile(np.array([[0.5, 0.3, 0.1]], np.float32), (20, 1))


def off(rows: int, by: float, tag: int = 2) -> np.ndarray:
    """Scores as Keras gives them, but that of a tag in the last rows."""
    scores = KERAS.copy()
    scores[len(scores) - rows :, tag] += by
    return scores


@pytest.mark.parametrize(
    ("scores", "within", "first"),
    [
        (KERAS, 1.0, 1.0),
        (off(20, 0.029), 1.0, 1.0),
        (off(5, 0.031), 0.75, 1.0),
        (off(10, 0.5), 0.5, 0.5),  # another tag comes first
    ],
    ids=["the same", "near", "some far", "some wrong"],
)
def test_judge_counts_clips_whose_every_score_is_near(scores: np.ndarray, within: float, first: float) -> None:
    found = fidelity.judge(scores, KERAS, 20)
    assert (found.within, found.first) == (within, first)


def test_judge_counts_copies_for_the_share_and_clips_for_the_first_tag() -> None:
    scores = off(16, 0.1)
    found = fidelity.judge(scores, KERAS, 4)
    assert (found.within, found.first) == (0.0, 1.0)
    found = fidelity.judge(scores[::-1], KERAS, 16)
    assert (found.within, found.first) == (1.0, 1.0)


def test_judge_takes_no_order_from_scores_that_are_as_good_as_equal() -> None:
    keras = np.array([[0.500, 0.498, 0.1]], np.float32)
    swapped = np.array([[0.498, 0.500, 0.1]], np.float32)
    assert fidelity.judge(swapped, keras, 1).problem == ""
    apart = np.array([[0.52, 0.498, 0.1]], np.float32)
    assert fidelity.judge(swapped, apart, 1).first == 0


@pytest.mark.parametrize(
    ("rows", "by", "problem"),
    [
        (6, 0.1, ""),
        (7, 0.1, "65% of clips within 0.03 of the Keras model, 70% are needed"),
        (7, 0.5, "another tag comes first on 35% of the clips"),
    ],
)
def test_problem_of_too_many_clips_says_how_many(rows: int, by: float, problem: str) -> None:
    assert fidelity.judge(off(rows, by), KERAS, 20).problem == problem
