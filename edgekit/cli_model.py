"""The commands about models: ``convert``, ``inspect``, ``bench`` and ``ops``, thin faces of functions of that name."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import click

import edgekit
from edgekit.cli_options import command, kernels


@command
@click.argument("model")
@click.option("-o", "--output", required=True, metavar="OUT.tflite", help="The bundle to write.")
@click.option(
    "--weights",
    default="none",
    metavar="none|imagenet|msd|PATH",
    help="For a named model: its weights; msd is the published CRNN.  [default: none]",
)
@click.option("--labels", metavar="FILE", help="A text file with one label a line.  [default: those of msd, or none]")
@click.option(
    "--calibration",
    metavar="PATH",
    help="A folder of images, or for crnn of audio files or log-mels, or an .npy or .npz, to fix int8 ranges with.",
)
@click.option(
    "--validation",
    metavar="PATH",
    help="Labelled data to hold the bundle against: a folder per class, or an .npz with x and y.",
)
@click.option(
    "--quantize",
    type=click.Choice(["auto", "float32", "float16", "int8-weights", "dynamic", "int8", "int16x8"]),
    default="auto",
    show_default=True,
    help="The recipe; int8 and int16x8 need --calibration, auto goes by --target.",
)
@click.option(
    "--target", metavar="TARGET", help="The device: raspberry-pi-3|4|5, jetson-nano|orin, coral, x86-64, android."
)
@click.option(
    "--max-drop",
    type=float,
    metavar="SHARE",
    help="Fail if accuracy on the validation data falls by more: 0.02 is two points.",
)
@click.option("--report", metavar="DIR", help="Write report.html and report.json into this folder.")
@click.option("--input-size", type=int, metavar="PIXELS", help="Side of the input, where the model leaves it open.")
@click.option(
    "--classes", type=int, help="For a named model: how many, if there is no --labels.  [default: 1000, crnn: 50]"
)
@click.option("--alpha", type=float, default=1.0, show_default=True, help="For a named model: its width multiplier.")
@click.option("--minimalistic", is_flag=True, help="For a named model: without hard-swish and squeeze-and-excitation.")
@click.option("--dropout", type=float, help="For a named model: share before the classes.  [default: 0.2]")
@click.option(
    "--head",
    type=click.Choice(["classes", "attention"]),
    default="classes",
    show_default=True,
    help="For a named model: attention gates its features, for defects; 512 px and 10 classes unless told otherwise.",
)
@click.option(
    "--mean", type=float, help="Pixels become (x - mean) / std, x in 0..255.  [default: the model's own, or 127.5]"
)
@click.option("--std", type=float, help="See --mean.  [default: the model's own, or 127.5]")
@click.option("--mels", type=int, help="For crnn: bands of its log-mel spectrogram, 96 or more.  [default: 96]")
@click.option(
    "--frames",
    type=int,
    help="For crnn: frames of its window, one each 256 samples at 12 kHz.  [default: 1366, 29.1 s]",
)
@click.option(
    "--bn-axis",
    type=click.Choice(["time", "frequency"]),
    help="For crnn: what its first normalization is over; time, as published, or what --streaming needs.",
)
@click.option(
    "--streaming", is_flag=True, help="For crnn: a bundle that is given new sound only: a result every 0.512 s."
)
@click.option("--exact", is_flag=True, help="With --streaming: the scores of the padded window, for some more work.")
@click.option(
    "--hop", type=float, metavar="SECONDS", help="For crnn: from one prediction to the next.  [default: half a window]"
)
@click.option(
    "--ops",
    multiple=True,
    metavar="FILE",
    help="Custom operators: a .py with layers, marked functions and kernels, or a .so; may be given again.",
)
@click.option(
    "--edgekit-ops",
    is_flag=True,
    help="Use EdgeKit's own operators: for LayerNormalization, and the front end of crnn, which is given sound then.",
)
@click.option("--name", help="The bundle's name.  [default: that of OUT]")
@click.option("--version", default="1", show_default=True, help="The bundle's version.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def convert(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Turn MODEL into a quantized bundle.

    MODEL is mobilenet-v3-small, mobilenet-v3-large, crnn (a music tagger), or the path of an image classifier: .keras,
    .h5 or a SavedModel folder.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that temporary files are removed
    from edgekit.terminal import progress_bar

    with progress_bar() as progress:
        manifest = edgekit.convert(model, output, progress=progress, **options)
    import msgspec

    if as_json:
        click.echo(msgspec.json.encode(manifest))
        return
    click.echo(
        f"{output}: {manifest.name} {manifest.version}, {manifest.quantization}, {Path(output).stat().st_size:,} bytes"
    )
    if manifest.quantization_reason:
        click.echo(f"  {manifest.quantization} because: {manifest.quantization_reason}")
    if checked := manifest.verification:
        click.echo(_verdict(checked, "image" if manifest.task == "image-classification" else "clip"))
    for name, check in manifest.runtimes.items():
        remarks = [check.detail] if check.detail else []
        if check.within_0_03 is not None and check.status == "ok":
            remarks.append(f"{check.within_0_03:.0%} within 0.03, at most {check.max_abs_difference:.3f} off")
        click.echo(f"  {f'{name} {check.version}'.strip()}: {check.status}{f' ({remarks[0]})' if remarks else ''}")


def _verdict(checked: Any, thing: str) -> str:
    if checked.data == "noise":
        return f"  no data to hold it against: compared on {checked.count} {thing}s of noise only"
    things = f"{checked.count} {checked.data} {thing}{'s' if checked.count > 1 else ''}"
    line = f"  agrees with the Keras model on {checked.top1_agreement:.1%} of {things}"
    if checked.within_0_03 is not None:
        many = f"{checked.copies} shifted copies" if checked.copies else "them"
        line += f"; {checked.within_0_03:.0%} of {many} within 0.03 with the same tag first"
    if checked.features_sqnr_db is not None:
        line += f"; {checked.features_sqnr_db:.0f} dB before the GRU"
    if checked.top1 is not None:
        line += f"; top-1 {checked.top1:.1%}, Keras {checked.top1_keras:.1%}"
    elif checked.f1_macro is not None:
        line += f"; macro F1 {checked.f1_macro:.3f}, Keras {checked.f1_macro_keras:.3f}"
    return line


@command
@click.argument("bundle")
@kernels
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(bundle: str, ops: tuple[str, ...], as_json: bool) -> None:
    """Show what is in BUNDLE, any .tflite: manifest, tensors, operators, and what each delegate would take."""
    found = edgekit.inspect(bundle, ops=ops)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    from edgekit.terminal import print_inspection

    print_inspection(found)


@command
@click.argument("bundles", metavar="BUNDLE…", nargs=-1, required=True)
@click.option(
    "--delegate",
    "delegates",
    multiple=True,
    default=("cpu", "coral", "gpu"),
    metavar="cpu|coral|gpu|PATH.so",
    help="Only this one; may be given again.  [default: all that load]",
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    multiple=True,
    help="Threads of the CPU kernels; may be given again.  [default: 1 and the number of cores]",
)
@click.option("--seconds", type=float, default=2.0, show_default=True, help="How long to measure each combination.")
@kernels
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def bench(bundles: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Measure BUNDLE on this machine: each runtime, delegate and number of threads, and each stage of the pipeline.

    Several bundles take turns within one run and are compared with the first.
    """
    import msgspec

    from edgekit.terminal import print_bench, progress_bar

    with progress_bar() as progress:
        measured = edgekit.bench(bundles, progress=progress, **options)
    if as_json:
        click.echo(msgspec.json.encode(measured))
    else:
        print_bench(measured)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def ops() -> None:
    """Custom operators of your own."""


@command
@click.argument("source")
@click.option("-o", "--output", metavar="OUT.so", help="The library to write.  [default: that of SOURCE]")
@click.option("--json", "as_json", is_flag=True, help="Print the operators as JSON.")
def ops_build(source: str, output: str | None, as_json: bool) -> None:
    """Compile SOURCE, operators in C written with edgekit_op.h, into a library that --ops loads.

    The compiler is cc, or that of the variable CC, with the options in CFLAGS.
    """
    from edgekit.custom_ops import build

    library, versions = build(source, output)
    if as_json:
        click.echo(json.dumps({"library": str(library), "operators": versions}))
    else:
        listed = ", ".join(f"{name} version {version}" for name, version in versions.items())
        click.echo(f"{library}: {listed or 'for another machine, not tried here'}")


ops.add_command(ops_build, "build")
