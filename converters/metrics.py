"""How good scores are against the truth: the figures of the report, and the one that ``--max-drop`` is held to."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgekit.errors import ConversionError

# A class is predicted where its score reaches this, for several labels at once; as verify.agree.
THRESHOLD = 0.5


class ClassFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Of one class. ``support``: how often it is in the truth; where 0, recall and F1 say nothing and are 0. ``auc``:
    area under the ROC curve, for several labels at once; None where the truth has it always or never."""

    label: str
    support: int
    precision: float
    recall: float
    f1: float
    auc: float | None = None


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """Of a model, each a share in 0..1.

    Attributes:
        top1, top5: share of the rows whose class is the first, or among the first five; None for several labels at
            once, ``top5`` also where there are fewer than six classes.
        f1_macro: mean F1 of the classes that are in the truth.
        confusion: rows are the truth and columns what was predicted, (classes, classes); for several labels at once
            ``((tn, fp), (fn, tp))`` of each class.
    """

    top1: float | None
    top5: float | None
    f1_macro: float
    classes: tuple[ClassFigures, ...]
    confusion: tuple[tuple[int | tuple[int, int], ...], ...]
    multi_label: bool


def headline(figures: Figures) -> float:
    """The accuracy that a bundle is judged by, in 0..1: top-1 or, for several labels at once, macro F1."""
    return figures.f1_macro if figures.top1 is None else figures.top1


def figures(
    scores: npt.NDArray[np.float32], truth: npt.NDArray[Any], labels: tuple[str, ...], multi_label: bool
) -> Figures:
    """The figures of ``scores``, shape (n, classes), in 0..1.

    Args:
        truth: class numbers, shape (n,), or for several labels at once 0 or 1, shape (n, classes).
        labels: one for each class.

    Raises:
        ConversionError: the shapes do not fit, there are no rows, or a class number is out of range.
    """
    from sklearn.metrics import multilabel_confusion_matrix, precision_recall_fscore_support

    if multi_label and truth.ndim == 1:  # folders and class numbers name one label of the several
        truth = truth[:, None] == np.arange(len(labels))
    shape = (len(scores), len(labels))
    if not len(scores) or scores.shape != shape or truth.shape != (shape if multi_label else shape[:1]):
        raise ConversionError(
            "labels of the validation data",
            expected=f"one row for each of {scores.shape} scores, for {len(labels)} classes",
            got=f"shape {truth.shape}",
            mend="give labels that belong to this data and model",
        )
    if not multi_label and not 0 <= truth.min() <= truth.max() < len(labels):
        raise ConversionError(
            "labels of the validation data",
            expected=f"class numbers 0 to {len(labels) - 1}",
            got=f"{truth.min()} to {truth.max()}",
            mend="give labels that belong to this model",
        )
    if multi_label:
        # One column alone would be taken for a binary problem with two classes: an empty one stands beside it.
        true, predicted = (np.pad(given, ((0, 0), (0, 1))) for given in (truth > 0, scores >= THRESHOLD))
        confusion = multilabel_confusion_matrix(true, predicted, labels=range(len(labels)))
    else:
        true, predicted = truth, scores.argmax(-1)
        confusion = np.zeros((len(labels), len(labels)), np.int64)  # scikit-learn's warns where there is one class
        np.add.at(confusion, (true, predicted), 1)
    columns = precision_recall_fscore_support(
        true, predicted, labels=range(len(labels)), average=None, zero_division=0.0
    )
    precision, recall, f1, support = (column.tolist() for column in columns)
    auc = _auc(scores, truth > 0) if multi_label else [None] * len(labels)
    rank = None if multi_label else _rank(scores, truth)
    return Figures(
        top1=None if rank is None else float(np.mean(rank < 1)),
        top5=None if rank is None or len(labels) < 6 else float(np.mean(rank < 5)),
        f1_macro=float(np.mean([f for f, s in zip(f1, support, strict=True) if s] or [0.0])),
        classes=tuple(
            ClassFigures(label=label, support=int(s), precision=p, recall=r, f1=f, auc=a)
            for label, p, r, f, s, a in zip(labels, precision, recall, f1, support, auc, strict=True)
        ),
        confusion=msgspec.convert(confusion.tolist(), tuple[tuple[int | tuple[int, int], ...], ...]),
        multi_label=multi_label,
    )


def _rank(scores: npt.NDArray[np.float32], truth: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """How many classes come before the true one, (n,); of equal scores the lower class number first, as the device
    orders them. Quantized scores are often equal, and scikit-learn's top-k would put the higher number first."""
    own = np.take_along_axis(scores, truth[:, None], -1)
    lower = np.arange(scores.shape[1]) < truth[:, None]
    return np.asarray(((scores > own) | ((scores == own) & lower)).sum(-1), np.int64)


def _auc(scores: npt.NDArray[np.float32], truth: npt.NDArray[np.bool_]) -> list[float | None]:
    from sklearn.metrics import roc_auc_score

    auc: list[float | None] = [None] * truth.shape[1]
    mixed = np.flatnonzero(truth.any(0) & ~truth.all(0))
    if len(mixed):
        # take, unlike indexing, gives rows that lie together: ten times as fast for 1,000 classes
        given = truth.take(mixed, axis=1), scores.take(mixed, axis=1)
        found = np.atleast_1d(roc_auc_score(*given, average=None))
        for class_id, value in zip(mixed, found, strict=True):
            auc[class_id] = float(value)
    return auc
