from __future__ import annotations

import errno
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

pytestmark = pytest.mark.host
for package in ("jinja2", "matplotlib", "sklearn"):
    pytest.importorskip(package)

from edgekit.converters import metrics  # noqa: E402
from edgekit.converters.report import CalibrationSummary, Latency, Layer, Report, verdict, write  # noqa: E402
from edgekit.coverage import Coverage, Left  # noqa: E402
from edgekit.errors import EdgekitError  # noqa: E402
from edgekit.manifest import (  # noqa: E402
    AudioInput,
    ImageInput,
    LogMel,
    Manifest,
    Output,
    RuntimeCheck,
    Verification,
)

VOID = {"meta", "br", "hr", "img", "input", "link"}
HOSTILE = (
    "<b>bold</b>", "</script><script>alert(1)</script>", "$\\frac{$", "a$b$c_1^2", "nul\0 and \x1b[31m", "\ud800",
    'url(#x) id="y" href="#z', "{{ 7 * 7 }}", "日本語の長いラベルです、本当に長い", "عربى", "&amp;",
    "x" * 5000, " ", "\n", "🦊",
)  # fmt: skip


class Page(HTMLParser):
    """What is on a page: its tags must be closed in order, its ids unique."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.content = path.read_text(encoding="utf-8")
        self.feed(self.content)
        self.close()
        assert self.open == []
        ids = [attributes["id"] for _, attributes in self.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        used = re.findall(r'(?:url\(|href=")#([^)"]+)', "".join(re.findall(r"<[^>]+>", self.content)))
        assert set(used) <= set(ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    def plots(self) -> list[str]:
        return [str(attributes["aria-label"]).partition(" ")[0].strip(";") for attributes in self.all("svg")]


def figures(labels: tuple[str, ...], multi_label: bool = False, noise: float = 0.0) -> metrics.Figures:
    """Of 200 seeded rows, the worse the more ``noise``."""
    random = np.random.default_rng(0)
    truth = random.integers(0, len(labels), 200)
    scores = random.random((200, len(labels)), np.float32) * 0.5
    scores[np.arange(200), truth] += 0.4
    scores += noise * random.random(scores.shape, np.float32)
    return metrics.figures(scores, truth, labels, multi_label)


def make(labels: tuple[str, ...] = ("cat", "dog", "fox"), multi_label: bool = False, **changes: Any) -> Report:
    of_bundle = Manifest(
        name="door",
        version="1",
        input=ImageInput(size_wh=(224, 224), mean=(127.5,), std=(127.5,)),
        output=Output(activation="softmax", multi_label=multi_label),
        quantization="int8",
        runtimes={
            "litert": RuntimeCheck(status="ok", version="2.1.0", max_abs_difference=0.03, top1_agreement=0.995),
            "tflite-runtime": RuntimeCheck(status="differs", version="2.14.0", detail="its outputs are 80% off"),
        },
        verification=Verification(data="validation", count=200, top1_agreement=0.995, mean_abs_difference=0.01),
        sha256="c0ffee",
    )
    report = Report(
        manifest=of_bundle,
        data="validation",
        labels=labels,
        sizes_bytes={"float32": 4_000_000, "int8": 1_200_000},
        keras=figures(labels, multi_label),
        bundle=figures(labels, multi_label, 0.1),
        layers=tuple(
            Layer(name=f"conv_{i}/Relu;conv_{i}/bias", operator="CONV_2D", sqnr_db=i - 2.0, lost_db=i / 10 - 1)
            for i in range(40)
        ),
        latency=tuple(
            Latency(model=model, runtime=runtime, version="2", threads=threads, p50_ms=ms, p95_ms=ms * 1.2)
            for runtime in ("litert", "tflite-runtime")
            for threads in (1, 2)
            for model, ms in (("float32", 2.5), ("int8", 2.0))
        ),
        coverage=(
            Coverage(delegate="XNNPACK", measured=True, operators=90, delegated=90, pieces=1, left=()),
            Coverage(
                delegate="Edge TPU",
                measured=False,
                operators=90,
                delegated=72,
                pieces=2,
                left=(Left(operator="HARD_SWISH", count=18, reason="not among those it takes"),),
            ),
        ),
        calibration=CalibrationSummary(count=100, digest="ab" * 32, minimum=-1, maximum=1, mean=-0.1, std=0.5),
        warnings=("20 calibration images are few",),
    )
    return msgspec.structs.replace(report, **changes)


def of_sound(copies: int = 24) -> Report:
    """Of a music tagger."""
    report = make(multi_label=True)
    front_end = LogMel(fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000)
    of_bundle = msgspec.structs.replace(
        report.manifest,
        task="audio-tagging",
        input=AudioInput(sample_rate_hz=12_000, window_samples=349_440, hop_samples=6_144, front_end=front_end),
        runtimes={"litert": RuntimeCheck(status="ok", version="2.1.0", max_abs_difference=0.02, within_0_03=0.875)},
        verification=Verification(
            data="validation", count=2 if copies else 200, copies=copies, top1_agreement=1.0, within_0_03=0.875,
            mean_abs_difference=0.01, features_sqnr_db=41.26,
        ),
    )  # fmt: skip
    return msgspec.structs.replace(report, manifest=of_bundle, layers=(), warnings=())


def bare(**changes: Any) -> Report:
    """The least there is to report."""
    none = {"keras": None, "bundle": None, "calibration": None}
    empty = dict.fromkeys(("layers", "latency", "coverage", "warnings"), ())
    return msgspec.structs.replace(make(), **{**none, **empty, **changes})


LABELS = {n: tuple(f"class {i}" for i in range(n)) for n in (1, 2, 31, 1000)}
REPORTS: dict[str, Callable[[], Report]] = {
    "three classes": make,
    "one class": lambda: make(LABELS[1]),
    "two classes": lambda: make(LABELS[2]),
    "1,000 classes": lambda: make(LABELS[1000]),
    "several labels": lambda: make(multi_label=True),
    "several labels, one class": lambda: make(LABELS[1], multi_label=True),
    "sound": of_sound,
    "hostile labels": lambda: make(HOSTILE),
    "nothing": bare,
    "no float model": lambda: make(keras=None),
    "no errors": lambda: make(bundle=figures(("cat", "dog", "fox"))),
    "exact layers": lambda: make(layers=(Layer(name="pad", operator="PAD", sqnr_db=None, lost_db=float("nan")),)),
}


@pytest.mark.parametrize("name", REPORTS)
def test_write_gives_a_sound_page_and_a_document_that_reads_back(name: str, tmp_path: Path) -> None:
    report = REPORTS[name]()
    write(tmp_path / "new" / "folder", report)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["report.html", "report.json"]
    page = Page(tmp_path / "new" / "folder" / "report.html")
    assert [tag for tag, _ in page.tags].count("h1") == 1
    assert all(attributes.get("aria-label") and attributes.get("role") == "img" for attributes in page.all("svg"))
    assert page.content.count("<caption>") == len(page.all("table"))
    document = (tmp_path / "new" / "folder" / "report.json").read_bytes()
    assert msgspec.json.decode(document)["schema"] == "edgekit.report/1"
    read = msgspec.json.decode(document, type=Report)
    assert (read.manifest, read.sizes_bytes) == (report.manifest, report.sizes_bytes)
    if name not in ("hostile labels", "exact layers"):  # what JSON cannot hold is replaced
        assert read == report


@pytest.mark.parametrize("name", ["three classes", "hostile labels"])
def test_write_gives_a_page_that_needs_nothing_beside_it(name: str, tmp_path: Path) -> None:
    write(tmp_path, REPORTS[name]())
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "img", "object", "image"}
    for _, attributes in page.tags:
        for attribute, value in attributes.items():
            assert not attribute.startswith("on")
            if attribute in ("src", "href", "xlink:href"):
                assert value and value.startswith("#")
    assert "@import" not in page.content and not re.search(r"url\((?!#)", page.content)


def test_write_keeps_labels_text(tmp_path: Path) -> None:
    write(tmp_path, make(HOSTILE))
    page = Page(tmp_path / "report.html")
    assert not {tag for tag, _ in page.tags} & {"b", "script"}
    for label in HOSTILE[:4] + HOSTILE[6:11]:
        assert page.text.count(label) >= 1, label
    assert page.text.count("$\\frac{$") == 3  # in the table and on both axes of the plot
    assert "nul\ufffd and \ufffd[31m" in page.text and "\0" not in page.content
    labels = msgspec.json.decode((tmp_path / "report.json").read_bytes())["labels"]
    assert labels[0] == "<b>bold</b>" and labels[4:6] == ["nul\ufffd and \ufffd[31m", "\ufffd"]


def test_write_gives_the_same_bytes_for_the_same_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib

    write(tmp_path / "a", make())
    # whatever the user has set for plots of their own
    monkeypatch.setitem(matplotlib.rcParams, "font.size", 20.0)
    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "path")
    write(tmp_path / "b", make())
    for name in ("report.html", "report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert matplotlib.rcParams["font.size"] == 20.0


@pytest.mark.parametrize(
    ("name", "plots"),
    [
        ("three classes", ["Confusion", "The", "Latency"]),
        ("several labels", ["The", "Latency"]),
        ("exact layers", ["Confusion", "Latency"]),
        ("nothing", []),
    ],
)
def test_write_plots_what_there_is(name: str, plots: list[str], tmp_path: Path) -> None:
    write(tmp_path, REPORTS[name]())
    assert Page(tmp_path / "report.html").plots() == plots


def test_write_says_what_is_missing(tmp_path: Path) -> None:
    write(tmp_path, bare())
    text = " ".join(Page(tmp_path / "report.html").text.split())
    for line in (
        "No labelled data: accuracy is not known; give --validation",
        "Not measured",
        "Not worked out",
        "None.",
    ):
        assert line in text


def test_write_of_many_classes_shows_the_worst_and_says_so(tmp_path: Path) -> None:
    write(tmp_path, make(LABELS[1000]))
    text = Page(tmp_path / "report.html").text
    assert "Of 1,000 classes, the 30 most often confused." in text
    assert "The 20 classes with the lowest F1." in text and "All 1,000 classes" in text


def test_write_orders_classes_by_f1_with_those_not_in_the_truth_last(tmp_path: Path) -> None:
    truth, named = np.array([0, 0, 1, 1, 2, 2]), [0, 0, 1, 2, 0, 3]
    found = metrics.figures(np.eye(4, dtype=np.float32)[named], truth, ("good", "fair", "bad", "absent"), False)
    write(tmp_path, make(("good", "fair", "bad", "absent"), keras=None, bundle=found))
    content = (tmp_path / "report.html").read_text()
    assert re.findall(r"<bdi>(\w+)</bdi></th><td>", content) == ["bad", "fair", "good", "absent"]


@pytest.mark.parametrize("name", ["functional/" + "expanded_conv/" * 20 + "relu_7", "層" * 200 + "relu_7"])
def test_write_shortens_long_names_in_the_plot_alone(name: str, tmp_path: Path) -> None:
    write(tmp_path, bare(layers=(Layer(name=name, operator="CONV_2D", sqnr_db=3.0, lost_db=None),)))
    content = (tmp_path / "report.html").read_text(encoding="utf-8")
    (plotted,) = re.findall(r"<text[^>]*>([^<]*…[^<]*relu_7)</text>", content)
    assert plotted[0] == name[0] and len(plotted) <= 56
    assert f"<code>{name}</code>" in content


def test_write_of_a_multi_label_class_shows_its_matrix(tmp_path: Path) -> None:
    scores, truth = np.array([[0.9], [0.8], [0.7], [0.1], [0.2]], np.float32), np.array([[1], [1], [0], [1], [0]])
    found = metrics.figures(scores, truth, ("cat",), True)
    write(tmp_path, make(("cat",), multi_label=True, keras=None, bundle=found))
    cells = re.findall(r"<td>([^<]*)</td>", (tmp_path / "report.html").read_text().partition("<bdi>cat")[2])
    assert cells[:9] == ["3", "66.67 %", "66.67 %", "66.67 %", "0.6667", "2", "1", "1", "1"]


def test_verdict_is_one_sentence_of_numbers() -> None:
    bundle, keras = (
        metrics.figures(np.eye(2, dtype=np.float32)[named], np.zeros(4, int), ("a", "b"), False)
        for named in ([0, 0, 1, 1], [0, 0, 0, 1])
    )
    assert verdict(make(("a", "b"), bundle=bundle, keras=keras)) == (
        "int8: 1.2 MB instead of 4 MB (0.30 x), top-1 accuracy 50.00 % instead of 75.00 % (25.00 points lower), "
        "agreement with the float model on 99.50 % of 200 images, 2 ms instead of 2.5 ms (0.80 x) on litert with one "
        "thread, not to be used on tflite-runtime."
    )


def test_report_of_sound_tells_how_many_clips_came_out_right(tmp_path: Path) -> None:
    write(tmp_path, of_sound())
    text = " ".join(Page(tmp_path / "report.html").text.split())
    assert "29.12 s of sound at 12 kHz, 96 mel bands; a result every 0.512 s" in text
    assert "24 shifted copies of the clips too: 87.50 % came out with every score within 0.03" in text
    assert "stands 41.3 dB above the noise" in text and "image" not in text
    line = verdict(of_sound())
    assert "100.00 % of 2 clips, 87.50 % of 24 shifted copies within 0.03, 41.3 dB before the part" in line
    assert "of 200 clips, 87.50 % within 0.03, 41.3 dB" in verdict(of_sound(copies=0))


def test_verdict_of_what_is_not_known() -> None:
    line = verdict(bare())
    assert "accuracy not known (no labelled data)" in line and "latency not measured" in line


def test_verdict_of_float32_compares_with_nothing() -> None:
    report = make()
    of_float = msgspec.structs.replace(report.manifest, quantization="float32")
    line = verdict(msgspec.structs.replace(report, manifest=of_float, bundle=report.keras))
    assert line.startswith("float32: 4 MB, top-1") and "(the same)" in line and "2.5 ms on litert" in line


def test_write_where_the_folder_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(EdgekitError, match=r"cannot make the report folder .*taken: File exists; give --report"):
        write(tmp_path / "taken", bare())
    assert (tmp_path / "taken").read_text() == "mine"


def test_write_on_a_full_disk_leaves_the_older_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, bare())
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EdgekitError, match=r"cannot write .*: No space left on device; make room"):
        write(tmp_path, make())
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
