"""What the commands show on a terminal: tables, and how far long work has got."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from edgekit.accounting import Accounting
    from edgekit.events import Events
    from edgekit.received import Message

logger = logging.getLogger(__name__)


def _console() -> Console:
    # Elsewhere than on a terminal nothing is folded to fit a width.
    width = None if sys.stdout.isatty() else 240
    return Console(highlight=False, soft_wrap=True, markup=False, emoji=False, width=width)


def print_inspection(found: dict[str, Any]) -> None:
    """``found`` as :func:`edgekit.inspect` returns it."""
    console = _console()
    manifest, how = found["manifest"] or {}, found["classifier"]
    facts = {
        "name": f"{manifest['name']} {manifest['version']}" if manifest else "no manifest: not converted by EdgeKit",
        "size": f"{found['bytes']:,} bytes, sha256 {found['sha256'][:12]}…",
        "packed files": ", ".join(found["packed_files"]) or "none",
    }
    if isinstance(how, str):
        facts["classifier"] = f"no: {how}"
    else:
        facts["classes"] = (
            f"{len(how['labels'])}: {', '.join(how['labels'][:5])}{', …' if len(how['labels']) > 5 else ''}"
        )
        facts["input"] = _input(how["input"])
        facts["output"] = "{activation}, in the graph: {in_graph}, multi-label: {multi_label}".format(**how["output"])
    if manifest:
        reason = manifest["quantization_reason"]
        facts["quantization"] = manifest["quantization"] + (f": {reason}" if reason else "")
        checked = manifest["verification"] or {}
        facts["verification"] = ", ".join(f"{key} {value}" for key, value in checked.items() if value is not None)
        for name, check in manifest["runtimes"].items():
            facts[name] = " ".join(filter(None, (check["version"], check["status"], check["detail"])))
    summary = Table(show_header=False, box=None)
    for key, value in facts.items():
        summary.add_row(key, value)
    console.print(summary)
    tensors = Table("tensor", "shape", "type", "scale", "zero point", box=None, title_justify="left")
    for which in ("inputs", "outputs"):
        for tensor in found[which]:
            tensors.add_row(
                f"{which[:-1]} {tensor['name']}",
                str(tuple(tensor["shape"])),
                tensor["dtype"],
                *(" ".join(f"{value:g}" for value in tensor[key]) for key in ("scale", "zero_point")),
            )
    console.print(tensors)
    operators = Table("operator", "version", "count", box=None)
    for operator in found["operators"]:
        operators.add_row(
            operator["name"] + (_kernel(operator["kernel"]) if operator["custom"] else ""),
            str(operator["version"]),
            str(operator["count"]),
        )
    console.print(operators)
    delegates = Table("delegate", "takes", "pieces", "leaves", box=None)
    for coverage in found["delegates"]:
        how_known = "" if coverage["measured"] else " (predicted)"
        left = [f"{left['count']} {left['operator']}: {left['reason']}" for left in coverage["left"]] or ["nothing"]
        delegates.add_row(
            coverage["delegate"] + how_known,
            f"{coverage['delegated']} of {coverage['operators']}",
            str(coverage["pieces"]),
            left[0],
        )
        for line in left[1:]:
            delegates.add_row("", "", "", line)
    console.print(delegates)


def _kernel(version: int | None) -> str:
    return " (custom)" if version is None else f" (custom, kernel of version {version})"


def _input(given: dict[str, Any]) -> str:
    if given["kind"] == "image":
        return "{size_wh[0]} x {size_wh[1]} x {channels}, {resize}, mean {mean}, std {std}".format(**given)
    window_s, hop_s = (given[key] / given["sample_rate_hz"] for key in ("window_samples", "hop_samples"))
    streaming = ", streaming" if given["streaming"] else ""
    in_graph = ", in the graph" if given["front_end_in_graph"] else ""
    front_end = (
        "{kind} of {num_mel_bins} bands from {low_hz:g} to {high_hz:g} Hz, {fft_samples} samples every "
        "{frame_hop_samples}"
    ).format(**given["front_end"])
    return f"{window_s:.2f} s every {hop_s:.2f} s at {given['sample_rate_hz']:,} Hz{streaming}; {front_end}{in_graph}"


def print_bench(measured: Any) -> None:
    """``measured`` as :func:`edgekit.bench` returns it."""
    console = _console()
    versions = dict.fromkeys(f"{row.runtime} {row.version}" for row in measured.inference)
    console.print(f"{measured.machine}, {measured.cores} cores; {', '.join(versions)}")
    names = _names([row.bundle for row in measured.inference])
    table = Table(box=None)
    for heading in ("bundle", "runtime", "delegate", "threads"):
        table.add_column(heading)
    for heading in ("p50 ms", "p95 ms", "p99 ms", "ratio", "memory", "delegated"):
        table.add_column(heading, justify="right")
    problems: dict[str, dict[str, None]] = {}
    for row in measured.inference:
        if row.latency_ms is None or row.ratio is None:
            problems.setdefault(f"{row.delegate} in {row.runtime}: {row.problem}", {})[names[row.bundle]] = None
            continue
        table.add_row(
            names[row.bundle],
            row.runtime,
            row.delegate,
            str(row.threads),
            *_cells(row.latency_ms),
            f"{row.ratio:.2f}",
            f"{row.memory_bytes / 1e6:.1f} MB" if row.memory_bytes else "?",
            "?" if row.delegated is None else f"{row.delegated}/{row.operators} in {row.pieces}",
        )
    console.print(table)
    stages = Table(box=None)
    for heading in ("bundle", "given", "stage"):
        stages.add_column(heading)
    for heading in ("p50 ms", "p95 ms", "p99 ms"):
        stages.add_column(heading, justify="right")
    for row in measured.stages:
        for stage in ("preprocess", "inference", "decode"):
            if times := getattr(row, f"{stage}_ms"):
                stages.add_row(names[row.bundle], row.given, stage, *_cells(times))
        if row.problem:
            problems.setdefault(f"stages: {row.problem}", {})[names[row.bundle]] = None
    if stages.row_count:
        console.print(stages)
    for problem, bundles in problems.items():
        of_which = "" if len(bundles) == len(names) else f" {', '.join(bundles)}"
        console.print(f"not measured:{of_which} {problem}")


def print_diagnosis(diagnosis: Any) -> None:
    """``diagnosis`` as :func:`edgekit.doctor` returns it."""
    colours = {"ok": "green", "missing": "yellow", "failed": "red"}
    table = Table(show_header=False, box=None)
    for finding in diagnosis.findings:
        table.add_row(
            Text(finding.status, colours[finding.status]),
            finding.check + (" *" if finding.needed else ""),
            f"{finding.detail}\n→ {finding.mend}" if finding.mend else finding.detail,
        )
    Console(highlight=False, markup=False, emoji=False).print(table)


def _cells(times: Any) -> tuple[str, str, str]:
    return f"{times.p50:.3f}", f"{times.p95:.3f}", f"{times.p99:.3f}"


def _names(paths: list[str]) -> dict[str, str]:
    """The paths by their last part, where that tells them apart."""
    short = {path: Path(path).name for path in paths}
    return short if len(set(short.values())) == len(set(paths)) else {path: path for path in paths}


# A prediction counts for the rate for about so long.
RATE_S = 5.0


@dataclass
class _Row:
    """The newest prediction of a stream, and how many came lately, each for less the longer ago it was."""

    newest: Message
    since_s: float
    lately: float = 0.0
    lately_s: float = 0.0

    def add(self, message: Message, now_s: float) -> None:
        self.newest = message
        self.lately = self.lately * math.exp((self.lately_s - now_s) / RATE_S) + 1
        self.lately_s = now_s

    def rate(self, now_s: float) -> float:
        of_time = RATE_S * -math.expm1(-max(now_s - self.since_s, 1.0) / RATE_S)
        return self.lately * math.exp((self.lately_s - now_s) / RATE_S) / of_time


@contextmanager
def live_table(accounting: Accounting, events: Events) -> Iterator[Callable[[Message], None]]:
    """Gives a callback for each message, and keeps a table of all streams on the terminal, as high as that; with what
    they hold, once one of them held something."""
    from edgekit.messages import OFFLINE
    from edgekit.received import printable

    rows: dict[tuple[str, str], _Row] = {}
    offline: set[str] = set()
    held_any = False

    def show(message: Message) -> None:
        nonlocal held_any
        now_s = time.monotonic()
        held_any |= message.kind == "event"
        if message.kind == "status":
            (offline.add if message.payload == OFFLINE else offline.discard)(message.device)
        elif message.kind == "prediction":
            rows.setdefault((message.device, message.stream), _Row(message, now_s)).add(message, now_s)

    def table() -> Table:
        now_s, all_rows = time.monotonic(), sorted(rows.items(), key=itemgetter(0))
        shown = all_rows[: max(1, console.height - 3)]
        more = len(all_rows) - len(shown)
        made = Table(box=None, caption=f"and {more:,} more" if more else None, caption_justify="left")
        for heading in ("device", "stream", "label", *(["held"] if held_any else [])):
            made.add_column(heading, overflow="ellipsis", no_wrap=True)
        for heading in ("score", "when (UTC)", "rate", "received", "missing", "duplicates"):
            made.add_column(heading, justify="right", no_wrap=True)
        for (device, stream), row in shown:
            came, newest = accounting.of(device, stream), row.newest
            replayed = newest.prediction and newest.prediction.replayed
            held = sorted(events.of(device, stream), key=lambda event: -event.score)
            made.add_row(
                device + (" (offline)" if device in offline else ""),
                stream,
                "-" if newest.label is None else printable(newest.label),
                *([printable(", ".join(event.label for event in held)) or "-"] if held_any else []),
                "" if newest.score is None else f"{newest.score:.2f}",
                ("replayed " if replayed else "") + str(newest.captured_at)[11:19],
                f"{row.rate(now_s):.1f}/s",
                f"{came.predictions:,}",
                "?" if came.missing is None else f"{came.missing:,}",
                f"{came.duplicates:,}",
            )
        return made

    console = Console(highlight=False, markup=False, emoji=False)
    with Live(get_renderable=table, console=console):
        yield show


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a callback ``(stage, done, total)``: a bar on a terminal, a line a stage elsewhere."""
    if not sys.stderr.isatty():
        stages: set[str] = set()

        def line(stage: str, *_: int) -> None:
            if stage not in stages:
                stages.add(stage)
                logger.info("%s", stage)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                for task in progress.tasks:  # the ones before it are done
                    progress.update(task.id, total=max(task.completed, 1), completed=max(task.completed, 1))
                tasks[stage] = progress.add_task(stage, total=None)
            progress.update(tasks[stage], completed=done, total=total or None)

        yield update
