"""The plots of the report, as ``svg`` elements of its page."""

from __future__ import annotations

import io
import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from edgekit.converters.metrics import Figures

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

    from edgekit.converters.report import Latency, Layer

# More do not fit a page: the others are in the table, or in the JSON.
MAX_PLOTTED_CLASSES = 30
MAX_PLOTTED_LAYERS = 20

# INK is written as the page's own text colour, dark on light and light on dark; the others are seen on both.
INK, PALE, BLUE, ORANGE = "#010203", "#8d949c", "#2f6fb5", "#c2570c"


def most_confused(figures: Figures) -> list[int]:
    """The classes to plot, in order: all, or those that are most often taken for another or another for them."""
    wrong = np.array(figures.confusion)
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-(wrong.sum(0) + wrong.sum(1)), kind="stable")
    return sorted(order[:MAX_PLOTTED_CLASSES].tolist())


def confusion_plot(figures: Figures, shown: list[int]) -> Markup:
    """Right answers blue, wrong ones orange, the stronger the greater their share of the row."""
    whole = np.array(figures.confusion)
    share = (whole / np.maximum(whole.sum(1, keepdims=True), 1))[np.ix_(shown, shown)]
    counts, strength = whole[np.ix_(shown, shown)], np.sqrt(share)  # the root, so that a few wrong ones are seen
    labels = [_shortened(figures.classes[i].label, 22) for i in shown]
    cell_in, margin_in = min(max(5.5 / len(shown), 0.3), 0.8), _width_in(labels)

    def draw(axes: Axes) -> None:
        from matplotlib.colors import to_rgba

        colours = np.where(np.eye(len(shown), dtype=bool)[..., None], to_rgba(BLUE), to_rgba(ORANGE))
        colours[..., 3] = strength
        axes.pcolormesh(colours, edgecolors=[(*to_rgba(INK)[:3], 0.12)], linewidth=0.5)
        for row, column in np.argwhere(counts):
            axes.text(
                column + 0.5,
                row + 0.5,
                f"{counts[row, column]}",
                ha="center",
                va="center_baseline",
                fontsize=7 if len(shown) > 15 else 9,
                color="white" if strength[row, column] > 0.78 else INK,  # by contrast, on a light and a dark page
            )
        # held by its end, so that it does not count how wide Matplotlib takes it to be
        axes.set_xticks(
            np.arange(len(shown)) + 0.5, labels, rotation=90, rotation_mode="anchor", ha="right", va="center"
        )
        axes.set_yticks(np.arange(len(shown)) + 0.5, labels)
        axes.tick_params(length=0)
        axes.invert_yaxis()

    side_in = cell_in * len(shown)
    wrong = np.where(np.eye(len(whole), dtype=bool), 0, whole)
    row, column = divmod(int(wrong.argmax()), len(whole))
    most = (
        f"the most frequent error is {figures.classes[row].label} taken for {figures.classes[column].label}, "
        f"{wrong[row, column]} times"
    )
    return _svg(
        "confusion",
        f"Confusion matrix; {most if wrong.any() else 'no errors'}.",
        (margin_in + side_in + 0.1, margin_in + side_in + 0.1),
        (margin_in, margin_in, side_in, side_in),
        draw,
    )


def layer_plot(layers: Sequence[Layer]) -> Markup | Literal[""]:
    """The worst layers: what their output has left, and what they lost of their input."""
    rows = [
        (layer.name, layer.sqnr_db, max(layer.lost_db or 0.0, 0.0))
        for layer in layers
        if layer.sqnr_db is not None and math.isfinite(layer.sqnr_db) and math.isfinite(layer.lost_db or 0.0)
    ][:MAX_PLOTTED_LAYERS]
    if not rows:
        return ""
    names, left_db, lost_db = zip(*rows, strict=True)

    def draw(axes: Axes, y: npt.NDArray[Any]) -> None:
        axes.barh(y, left_db, 0.9, color=BLUE, label="left in its output")
        axes.barh(y, lost_db, 0.9, left=left_db, color=ORANGE, alpha=0.55, label="lost in this layer")
        for at, left, lost in zip(y, left_db, lost_db, strict=True):
            _write_at(axes, f"{left:.1f}", max(left + lost, 0.0), at)

    described = f"The worst layers; the worst is {names[0]} with {left_db[0]:.1f} dB."
    return _bars("layers", described, names, 1, "signal to quantization noise, dB", draw)


def latency_plot(latency: Sequence[Latency]) -> Markup | Literal[""]:
    """A group of bars for each runtime and number of threads, a bar for each model."""
    if not latency:
        return ""
    groups: dict[str, dict[str, Latency]] = {}
    for row in latency:
        name = f"{row.runtime} {row.version}, {row.threads} thread{'' if row.threads == 1 else 's'}"
        groups.setdefault(name, {})[row.model] = row
    models = sorted({row.model: None for row in latency}, key=lambda model: model != "float32")
    colours = (PALE, BLUE, ORANGE) if models[0] == "float32" else (BLUE, ORANGE, PALE)

    def draw(axes: Axes, y: npt.NDArray[Any]) -> None:
        for number, model in enumerate(models):
            found = [
                (at + number, group[model]) for at, group in zip(y, groups.values(), strict=True) if model in group
            ]
            axes.barh(
                [at for at, _ in found],
                [row.p50_ms for _, row in found],
                0.9,
                xerr=([0.0] * len(found), [max(row.p95_ms - row.p50_ms, 0.0) for _, row in found]),
                color=colours[number % 3],
                error_kw={"ecolor": INK, "capsize": 2.5, "elinewidth": 1},
                label=model,
            )
            for at, row in found:
                _write_at(axes, f"{row.p50_ms:.3g}", max(row.p50_ms, row.p95_ms), at)

    what = "time of one inference, ms: median, whisker to the 95th percentile"
    return _bars("latency", "Latency; the numbers are in the table below.", list(groups), len(models), what, draw)


def _write_at(axes: Axes, text: str, x: float, y: float) -> None:
    axes.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center_baseline")


def _bars(
    name: str,
    described: str,
    rows: Sequence[str],
    bars: int,
    what: str,
    draw: Callable[[Axes, npt.NDArray[Any]], None],
) -> Markup:
    """Lying bars, ``bars`` to a row, under the name of the row, so that they are wide on a phone too.

    ``draw`` gets where the first bar of each row lies; the others are at steps of 1 after it.
    """
    pitch = bars + 1.5
    first = np.arange(len(rows)) * pitch

    def framed(axes: Axes) -> None:
        draw(axes, first)
        for at, row in zip(first, rows, strict=True):
            axes.text(0, at - 0.6, _shortened(row, 56), transform=axes.get_yaxis_transform(), va="bottom")
        axes.set_ylim(first[-1] + bars, -2)
        axes.set_yticks([])
        axes.margins(x=0.12)
        axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(what)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0, borderpad=0)

    height_in = 0.17 * (first[-1] + bars + 2)
    return _svg(name, described, (5.0, height_in + 0.8), (0.1, 0.5, 4.8, height_in), framed)


def _svg(
    name: str,
    described: str,
    size_in: tuple[float, float],
    box_in: tuple[float, float, float, float],
    draw: Callable[[Axes], None],
) -> Markup:
    """What ``draw`` draws, as an ``svg`` element of an HTML page.

    Args:
        name: unique on the page, as are the element's ids then.
        described: the plot in words, for those who do not see it.
        size_in: width and height of the plot, inches.
        box_in: left, bottom, width and height of its axes in it, inches.
    """
    import warnings

    import matplotlib.style
    from markupsafe import Markup
    from matplotlib.figure import Figure

    (width, height), (left, bottom, box_width, box_height) = size_in, box_in
    # Text stays text, in the page's font and never math; the settings of the user's matplotlibrc do not count.
    text = {"svg.fonttype": "none", "text.parse_math": False, "text.color": INK, "font.size": 9.0}
    ink = {f"{item}.color": INK for item in ("xtick", "ytick")} | {"axes.labelcolor": INK, "axes.edgecolor": INK}
    content = io.StringIO()
    with matplotlib.style.context(["default", {**text, **ink, "svg.hashsalt": name}]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's font counts, not Matplotlib's
        figure = Figure(figsize=size_in)
        draw(figure.add_axes((left / width, bottom / height, box_width / width, box_height / height)))
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(content, format="svg", transparent=True, metadata=metadata)

    def tag(match: re.Match[str]) -> str:
        written = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", match[0])
        return re.sub(r"font-family: [^;\"]*;? ?", "", written).replace(INK, "currentColor")

    inner = re.sub(r"<style.*?</style>", "", content.getvalue().partition("<svg")[2].partition(">")[2], flags=re.DOTALL)
    start = Markup('<svg viewBox="0 0 {:g} {:g}" style="width:{:g}px" role="img" aria-label="{}">')
    # between tags is text, in which < and > are escaped
    return start.format(width * 72, height * 72, round(width * 96), described) + Markup(re.sub(r"<[^>]+>", tag, inner))


def _shortened(text: str, columns: int) -> str:
    """``text`` in at most so many columns, without its middle: the end tells layers apart."""
    if _columns(text) <= columns:
        return text
    head, tail = text[: columns // 3], text[columns // 3 + 1 - columns :]
    while _columns(head + tail) >= columns:
        head, tail = head[:-1], tail[2:]
    return f"{head}…{tail}"


def _columns(text: str) -> int:
    """Width in columns, of which a Chinese, Japanese or Korean character takes two."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _width_in(texts: list[str]) -> float:
    """Room for the widest of ``texts`` at 9 points, inches, in whatever font the page has."""
    return 0.2 + 0.076 * max(map(_columns, texts))
