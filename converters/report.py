"""The report of a conversion: one HTML page for people and one JSON document for machines, from the same data.

The page needs nothing beside itself: style, plots and text are in the one file, and it runs no script.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekit.bundle import replacing
from edgekit.converters import plots
from edgekit.converters.metrics import ClassFigures, Figures, headline
from edgekit.coverage import Coverage
from edgekit.errors import EdgekitError
from edgekit.manifest import Manifest

SCHEMA: Literal["edgekit.report/1"] = "edgekit.report/1"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """How well a layer's output holds against the float model. None: there is no noise, or no signal.

    Attributes:
        name: of its output tensor.
        sqnr_db: signal to quantization noise of the output, ``10 log10(sum x^2 / sum (x - q)^2)``, with all that led to
            it.
        lost_db: how much lower that is than at the worst of the layer's inputs: what the layer itself added.
    """

    name: str
    operator: str
    sqnr_db: float | None
    lost_db: float | None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Time of one inference of ``model``, ``float32`` or the recipe; ``runtime`` as in the manifest's ``runtimes``."""

    model: str
    runtime: str
    version: str
    threads: int
    p50_ms: float
    p95_ms: float


class CalibrationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Of the calibration tensors, in the units that enter the model; ``digest`` as the manifest's."""

    count: int
    digest: str
    minimum: float
    maximum: float
    mean: float
    std: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that a conversion found out; as plain data it is the JSON document.

    Attributes:
        data: what the outputs were compared on, as the manifest's ``verification`` has it.
        labels: one for each class.
        sizes_bytes: of each model by its recipe, ``float32`` among them.
        keras, bundle: figures of the float model and of the bundle; None without labelled data.
        layers: the worst first; empty where none were measured.
        coverage: of each delegate.
    """

    schema: Literal["edgekit.report/1"] = SCHEMA
    manifest: Manifest
    data: str
    labels: tuple[str, ...]
    sizes_bytes: dict[str, int]
    keras: Figures | None = None
    bundle: Figures | None = None
    layers: tuple[Layer, ...] = ()
    latency: tuple[Latency, ...] = ()
    coverage: tuple[Coverage, ...] = ()
    calibration: CalibrationSummary | None = None
    warnings: tuple[str, ...] = ()


def write(folder: Path, report: Report) -> None:
    """Writes ``report.html`` and ``report.json`` into ``folder``, which is made. The same report gives the same bytes.

    Raises:
        EdgekitError: they cannot be written; neither is left half written.
    """
    report = msgspec.convert(_writable(msgspec.to_builtins(report)), Report)
    document, page = msgspec.json.encode(report) + b"\n", _page(report).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EdgekitError(
            f"cannot make the report folder {folder}: {error.strerror}", mend="give --report another folder"
        ) from error
    with replacing(folder / "report.json") as json_path, replacing(folder / "report.html") as html_path:
        json_path.write_bytes(document)
        html_path.write_bytes(page)


def _writable(value: Any) -> Any:
    """Plain data whose text has no control characters or lone surrogates, which neither file can hold."""
    if isinstance(value, str):
        return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, dict):
        return {_writable(key): _writable(item) for key, item in value.items()}
    return [_writable(item) for item in value] if isinstance(value, (list, tuple)) else value


def verdict(report: Report) -> str:
    """What came of the conversion, in one sentence."""
    manifest, recipe = report.manifest, report.manifest.quantization
    target, reason = manifest.target, manifest.quantization_reason
    what = recipe + (f" for {target}" if target else "") + (f" ({reason})" if reason else "")
    parts = []
    if size := report.sizes_bytes.get(recipe):
        parts.append(_instead(size / 1e6, report.sizes_bytes.get("float32", 0) / 1e6, "MB", recipe))
    if report.bundle is None:
        parts.append("accuracy not known (no labelled data)")
    else:
        name = "macro F1" if report.bundle.multi_label else "top-1 accuracy"
        accuracy = f"{name} {_percent(headline(report.bundle))}"
        if report.keras is not None:
            points = round(100 * (headline(report.bundle) - headline(report.keras)), 2)
            change = f"{abs(points):.2f} points {'higher' if points > 0 else 'lower'}" if points else "the same"
            accuracy += f" instead of {_percent(headline(report.keras))} ({change})"
        parts.append(accuracy)
    check = manifest.verification
    if check is not None and check.top1_agreement is not None:
        things = "images" if manifest.task == "image-classification" else "clips"
        parts.append(f"agreement with the float model on {_percent(check.top1_agreement)} of {check.count:,} {things}")
        if check.within_0_03 is not None:
            copies = f" of {check.copies} shifted copies" if check.copies else ""
            parts.append(f"{_percent(check.within_0_03)}{copies} within 0.03")
        if check.features_sqnr_db is not None:
            parts.append(f"{check.features_sqnr_db:.1f} dB before the part that saturates")
    preferred = next((name for name, check in manifest.runtimes.items() if check.status == "ok"), "")
    p50_ms = {row.model: row.p50_ms for row in report.latency if (row.runtime, row.threads) == (preferred, 1)}
    if recipe in p50_ms:
        latency = _instead(p50_ms[recipe], p50_ms.get("float32", 0), "ms", recipe)
        parts.append(f"{latency} on {preferred} with one thread")
    else:
        parts.append("latency not measured")
    wrong = [name for name, check in manifest.runtimes.items() if check.status in ("failed", "differs")]
    if wrong:
        parts.append(f"not to be used on {' and '.join(wrong)}")
    return f"{what}: {', '.join(parts)}."


def _instead(value: float, of_float: float, unit: str, recipe: str) -> str:
    if recipe == "float32" or not of_float:
        return f"{value:.3g} {unit}"
    return f"{value:.3g} {unit} instead of {of_float:.3g} {unit} ({value / of_float:.2f} x)"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _page(report: Report) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = _percent
    environment.filters["fixed"] = lambda value, digits: "-" if value is None else f"{value:,.{digits}f}"
    template = environment.from_string(Path(__file__).with_name("report.html.jinja").read_text(encoding="utf-8"))
    figures = report.bundle
    shown = [] if figures is None or figures.multi_label else plots.most_confused(figures)
    return template.render(
        report=report,
        verdict=verdict(report),
        classes=[] if figures is None else _worst_classes(figures, report.keras),
        shown=shown,
        confusion_plot=plots.confusion_plot(figures, shown) if figures is not None and shown else "",
        layer_plot=plots.layer_plot(report.layers),
        latency_plot=plots.latency_plot(report.latency),
        MAX_LAYERS=plots.MAX_PLOTTED_LAYERS,
    )


def _worst_classes(bundle: Figures, keras: Figures | None) -> list[tuple[ClassFigures, ClassFigures | None, Any]]:
    """Of each class its figures, those of the float model and its row of the confusion matrix; the lowest F1 first, and
    classes that are not in the truth last."""
    of_keras: Sequence[ClassFigures | None] = keras.classes if keras else [None] * len(bundle.classes)
    rows = zip(bundle.classes, of_keras, bundle.confusion, strict=True)
    return sorted(rows, key=lambda row: (not row[0].support, row[0].f1))
