"""The music tagger in each recipe: how faithful it stays, its size and its latency; and what streaming saves.

    python benchmarks/crnn.py CLIPS [FOLDER] [--weights msd] [--seconds S]

CLIPS is a folder of music, or of log-mel levels as ``.npy``, for calibration and comparison: of each clip many copies
are made, moved in time and a little louder or quieter. FOLDER keeps the bundles. Each runtime here is measured; see
docs/measure.md for tflite-runtime beside LiteRT.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import edgekit
from edgekit import bundle
from edgekit.errors import EdgekitError
from edgekit.manifest import Manifest

RECIPES = ("float32", "float16", "int8-weights", "dynamic", "int8", "int16x8")


def convert(folder: Path, weights: str, clips: str) -> dict[str, Manifest | EdgekitError]:
    found: dict[str, Manifest | EdgekitError] = {}
    for recipe in RECIPES:
        try:
            found[recipe] = edgekit.convert(
                "crnn",
                folder / f"{recipe}.tflite",
                weights=weights,
                calibration=clips,
                quantize=recipe,  # type: ignore[arg-type]
            )
        except EdgekitError as error:
            found[recipe] = error
    return found


def print_recipes(folder: Path, found: dict[str, Manifest | EdgekitError], seconds: float) -> None:
    converted = {name: of_bundle for name, of_bundle in found.items() if isinstance(of_bundle, Manifest)}
    paths = {name: folder / f"{name}.tflite" for name in converted}
    measured = edgekit.bench(list(paths.values()), delegates=["cpu"], threads=[1], seconds=seconds)
    size = {name: len(bundle.read_file(path).content) for name, path in paths.items()}
    print(f"{measured.machine}; latency against float32 in the same runtime")
    print("| recipe | runtime | size | SNR before the GRUs | worst score | copies within .03 | latency |")
    print("|---|---|---|---|---|---|---|")
    for name, path in paths.items():
        of_bundle = converted[name]
        features_db = of_bundle.verification and of_bundle.verification.features_sqnr_db
        for row in measured.inference:
            check = of_bundle.runtimes[row.runtime]
            if row.bundle == str(path):
                cells = [name, row.runtime, f"{size[name] / size['float32']:.2f} x"]
                cells.append("" if features_db is None else f"{features_db:.0f} dB")
                cells += ["-" if check.max_abs_difference is None else f"{check.max_abs_difference:.4f}"]
                cells += ["-" if check.within_0_03 is None else f"{check.within_0_03:.0%}"]
                cells.append(f"{row.ratio:.2f} x, {row.pieces} pieces" if row.latency_ms else row.problem)
                print("| " + " | ".join(cells) + (f" | {check.status}" * (check.status != "ok")) + " |")
    for name, refused in found.items():
        if isinstance(refused, EdgekitError):
            print(f"\n{name} is refused: {refused}")


def print_streaming(folder: Path, seconds: float) -> None:
    """With random weights: they make no difference to the time."""
    options = {"bn_axis": "frequency", "quantize": "int8-weights"}
    for name, more in (("window", {}), ("stream", {"streaming": True}), ("exact", {"streaming": True, "exact": True})):
        edgekit.convert("crnn", folder / f"{name}.tflite", **options, **more)  # type: ignore[arg-type]
    paths = [folder / f"{name}.tflite" for name in ("window", "stream", "exact")]
    measured = edgekit.bench(paths, delegates=["cpu"], threads=[1], seconds=seconds)
    print("\n| for each result, on one thread | runtime | time |\n|---|---|---|")
    for row in measured.inference:
        if row.ratio:
            print(f"| {Path(row.bundle).stem} | {row.runtime} | 1/{1 / row.ratio:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the recipes of the music tagger, and streaming.")
    parser.add_argument("clips")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/benchmarks"))
    parser.add_argument("--weights", default="msd", help="msd, or the file of the published weights")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure each")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print_recipes(options.folder, convert(options.folder, options.weights, options.clips), options.seconds)
    print_streaming(options.folder, options.seconds)


if __name__ == "__main__":
    main()
