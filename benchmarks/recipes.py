"""Latency, size and accuracy of each recipe against float32: a trained MobileNetV3-Small at 224 x 224.

    python benchmarks/recipes.py [FOLDER] [--seconds S]

FOLDER keeps the bundles and the model, trained on scikit-learn's digits (five minutes, the first time). Each runtime
here is measured; see docs/measure.md for tflite-runtime beside LiteRT.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import cv2
import numpy as np

import edgekit
from edgekit import bundle
from edgekit.manifest import Verification

RECIPES = ("float32", "float16", "int8-weights", "dynamic", "int8", "int16x8")
TRAIN = Path(__file__).parents[1] / "examples" / "train_digits.py"


def train(folder: Path) -> None:
    """At 64 x 64, which is quick, and from there at 224 x 224."""
    import keras

    subprocess.run([sys.executable, TRAIN, folder / "64", "--epochs", "12"], check=True)
    weights = folder / "64.weights.h5"
    keras.models.load_model(folder / "64" / "digits.keras").save_weights(weights)
    subprocess.run([sys.executable, TRAIN, folder, "--epochs", "5", "--size", "224", "--start", weights], check=True)


def hold_out(folder: Path) -> None:
    """The held-out digits, each as it is and moved by a sixteenth of its side in four directions: 360 images alone
    tell half a point from none by two of them."""
    paths = sorted((folder / "validation").glob("*/*.png"))
    images = np.stack([cv2.imread(str(path))[..., ::-1] for path in paths])
    step = images.shape[1] // 16
    moves = ((0, 0), (step, 0), (-step, 0), (0, step), (0, -step))
    x = np.concatenate([np.roll(images, move, (1, 2)) for move in moves])
    np.savez(folder / "held-out.npz", x=x, y=np.tile([int(path.parent.name) for path in paths], len(moves)))


def convert(folder: Path) -> dict[str, Verification]:
    """Writes a bundle for each recipe, and int8 as the converter leaves it."""
    found = {}
    for recipe in RECIPES:
        of_bundle = edgekit.convert(
            folder / "digits.keras",
            folder / f"{recipe}.tflite",
            quantize=recipe,  # type: ignore[arg-type]
            labels=folder / "labels.txt",
            calibration=folder / "calibration",
            validation=folder / "held-out.npz",
            mean=127.5,
            std=127.5,
        )
        assert of_bundle.verification
        found[recipe] = of_bundle.verification
    (folder / "int8-as-converted.tflite").write_bytes(as_converted(folder))
    return found


def as_converted(folder: Path) -> bytes:
    from edgekit.converters import data, models, recipes
    from edgekit.preprocess import ImagePreprocessor

    classifier = models.open_model(
        str(folder / "digits.keras"), weights="none", classes=None, input_size=None, mean=127.5, std=127.5
    )
    of_bundle = bundle.read(folder / "int8.tflite")
    with tempfile.TemporaryDirectory() as scratch:
        calibration = data.load(str(folder / "calibration"), "calibration", of_bundle.input, Path(scratch), limit=500)
        preprocess = ImagePreprocessor(of_bundle.input)
        return recipes.convert(classifier.static, "int8", lambda: calibration.tensors(preprocess))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures each recipe against float32.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/benchmarks"))
    parser.add_argument("--seconds", type=float, default=5.0, help="how long to measure each")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "digits.keras").exists():
        train(folder)
    hold_out(folder)
    verified = convert(folder)
    names = ["float32", *[recipe for recipe in RECIPES if recipe != "float32"], "int8-as-converted"]
    measured = edgekit.bench(
        [folder / f"{name}.tflite" for name in names], delegates=["cpu"], threads=[1], seconds=arguments.seconds
    )
    size = {name: len(bundle.read_file(folder / f"{name}.tflite").content) for name in names}
    print(f"{measured.machine}; {', '.join(dict.fromkeys(f'{r.runtime} {r.version}' for r in measured.inference))}")
    print(
        "| recipe | size | top-1 | agrees | " + " | ".join(dict.fromkeys(r.runtime for r in measured.inference)) + " |"
    )
    print("|---|---|---|---|" + "---|" * len({row.runtime for row in measured.inference}))
    for name in names:
        cells = [name, f"{size[name] / size['float32']:.2f} x"]
        of_bundle = verified.get(name)
        cells += [f"{of_bundle.top1:.1%}", f"{of_bundle.top1_agreement:.1%}"] if of_bundle else ["", ""]
        for row in measured.inference:
            if row.bundle == str(folder / f"{name}.tflite"):
                cells.append(f"{row.ratio:.2f} x, {row.pieces} pieces" if row.latency_ms else row.problem)
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
