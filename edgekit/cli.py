"""The command line: a thin face of :func:`edgekit.convert`, :func:`edgekit.run`, :class:`edgekit.Subscriber`,
:func:`edgekit.inspect` and :func:`edgekit.bench`."""

from __future__ import annotations

import functools
import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

import edgekit
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from edgekit.messages import PredictionMessage
    from edgekit.received import Message


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time, so that a progress bar can put log lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), file=sys.stderr)


def _command(function: Callable[..., None]) -> click.Command:
    """A command with ``--debug``; log lines go to stderr, results to stdout."""

    @click.option("--debug", is_flag=True, help="Log more, and show where an error came from.")
    @functools.wraps(function)
    def wrapped(debug: bool, **options: Any) -> None:
        click.get_current_context().find_root().obj = debug
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("edgekit: %(levelname)s: %(message)s"))
        logging.basicConfig(handlers=[handler], level=logging.DEBUG if debug else logging.WARNING)
        logging.addLevelName(logging.WARNING, "warning")
        logging.addLevelName(logging.INFO, "info")
        logging.addLevelName(logging.ERROR, "error")
        logging.getLogger("edgekit").setLevel(logging.DEBUG if debug else logging.INFO)
        function(**options)

    return click.command(context_settings={"help_option_names": ["-h", "--help"]})(wrapped)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgekit.__version__, prog_name="edgekit")
def cli() -> None:
    """Image and sound models on small devices: convert a Keras model, run it, receive its predictions over MQTT."""


@_command
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


def _thresholds(given: tuple[str, ...]) -> dict[str, float]:
    """By label; "*" are all that are not named."""
    by_label = {}
    for one in given:
        label, _, score = one.rpartition("=")
        try:
            by_label[label or "*"] = float(score)
        except ValueError as error:
            raise click.BadParameter(f"{one!r} is neither a score nor LABEL=SCORE") from error
    return by_label


def _broker_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a broker's certificates and password, joined with its URL into ``broker``."""

    @click.option("--cafile", metavar="FILE", help="For mqtts: trust this authority (PEM) and no other.")
    @click.option("--cert", "certfile", metavar="FILE", help="For mqtts: our certificate (PEM).")
    @click.option("--key", "keyfile", metavar="FILE", help="For mqtts: its key (PEM, without a password).")
    @click.option("--password-file", metavar="FILE", help="The broker's password, in the first line of this file.")
    @functools.wraps(function)
    def wrapped(broker: str, **options: Any) -> None:
        from edgekit.broker import parse_broker

        files = {name: options.pop(name) for name in ("cafile", "certfile", "keyfile", "password_file")}
        is_url = broker not in ("none", "embedded") and not broker.startswith("embedded:")
        address = parse_broker(broker, **files) if is_url else broker
        if is_url and urlsplit(broker).password:
            logger.warning("the password in --broker shows in the process list; give --password-file instead")
        function(broker=address, **options)

    return wrapped


_kernels = click.option(
    "--ops",
    multiple=True,
    metavar="LIB",
    help="Kernels of custom operators, of `edgekit ops build`; may be given again.",
)


@_command
@click.argument("bundle")
@click.option(
    "--source",
    required=True,
    help="camera:N, rtsp://…, http://… (MJPEG), a video, an image, a folder of images, mic, mic:NAME or an audio file.",
)
@click.option(
    "--broker",
    default="mqtt://localhost",
    show_default=True,
    help="mqtt://[user:pass@]host[:port], mqtts://…, embedded or none.",
)
@click.option("--device-id", help="This device's name in the topics.  [default: the host's name]")
@click.option("--stream", default="main", show_default=True, help="This stream's name in the topics.")
@click.option("--delegate", type=click.Choice(["auto", "cpu"]), default="auto", show_default=True)
@click.option(
    "--threads", type=click.IntRange(1, 256), default=1, show_default=True, help="Threads of the CPU kernels."
)
@click.option(
    "--threshold",
    multiple=True,
    metavar="SCORE|LABEL=SCORE",
    callback=lambda _context, _option, given: _thresholds(given),
    help="Leave out classes with a lower score, or one class; may be given again.  [default: 0]",
)
@click.option("--top-k", type=int, default=3, show_default=True, help="Name so many classes at most.")
@click.option("--max-fps", type=float, help="Take no more frames a second.")
@click.option("--hop", "hop_s", type=float, metavar="SECONDS", help="Of sound: take a window so often.")
@click.option("--loop", is_flag=True, help="Start a file source again at its end.")
@click.option("--labels", metavar="FILE", help="A label file to use instead of the packed one.")
@_kernels
@_broker_options
@click.option("--prefix", default="edgekit", show_default=True, help="What the topics begin with.")
@click.option(
    "--spool",
    metavar="DIR",
    help="Keep predictions in this folder until the broker has them.  [default: ~/.local/state/edgekit]",
)
@click.option(
    "--spool-size",
    "spool_mb",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    metavar="MB",
    help="Keep no more.",
)
@click.option(
    "--spool-days",
    type=click.FloatRange(0, min_open=True),
    default=7,
    show_default=True,
    help="Keep none for longer.",
)
@click.option("--no-commands", is_flag=True, help="Take no commands over MQTT.")
@click.option("--no-home-assistant", is_flag=True, help="Do not announce the device to Home Assistant.")
@click.option(
    "--label-group",
    "label_groups",
    multiple=True,
    metavar="NAME=LABEL,LABEL",
    help="A binary sensor of Home Assistant for these labels; may be given again.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each prediction on stdout too, one JSON object a line.")
def run(
    bundle: str,
    source: str,
    as_json: bool,
    spool_mb: int,
    spool_days: float,
    no_commands: bool,
    no_home_assistant: bool,
    **options: Any,
) -> None:
    """Stream SOURCE through BUNDLE and publish what it sees or hears.

    BUNDLE is one for audio tagging, or any .tflite that classifies images.
    """
    from edgekit.messages import encode

    stop, started = threading.Event(), threading.Event()
    interrupted = []

    def on_signal(number: int, _frame: object) -> None:
        interrupted.append(number)
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
        if not started.is_set():  # still opening or connecting: nothing is lost
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(0)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)

    bar: Any = nullcontext()
    if sys.stderr.isatty():  # a service needs no bar, nor the memory of what draws it
        from edgekit.terminal import progress_bar

        bar = progress_bar()
    with bar as progress:

        def show(message: PredictionMessage) -> None:
            if as_json:
                click.echo(encode(message))
            if progress:
                progress("frames", message.seq, 0)

        edgekit.run(
            bundle,
            source,
            spool_bytes=spool_mb << 20,
            spool_age_s=spool_days * 86400,
            commands=not no_commands,
            home_assistant=not no_home_assistant,
            stop=stop,
            on_start=started.set,
            on_prediction=show,
            **options,
        )
    if signal.SIGINT in interrupted:
        raise KeyboardInterrupt


@_command
@click.option(
    "--broker", default="mqtt://localhost", show_default=True, help="mqtt://[user:pass@]host[:port] or mqtts://…"
)
@_broker_options
@click.option("--prefix", default="edgekit", show_default=True, help="What the topics begin with.")
@click.option("--device", help="Only this device.")
@click.option("--stream", help="Only this stream.")
@click.option("--group", help="Share the messages with the other listeners of this group.")
@click.option("--client-id", help="Our name at the broker, for --session-expiry.  [default: a random one]")
@click.option(
    "--session-expiry",
    "session_expiry_s",
    type=click.IntRange(0, 2**32 - 1),
    default=0,
    metavar="SECONDS",
    help="Have the broker keep for so long what comes while we are away.  [default: not at all]",
)
@click.option("--count", type=click.IntRange(1), help="End after so many predictions.")
@click.option("--timeout", type=float, metavar="SECONDS", help="Fail when nothing arrives for so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line: topic and payload.")
def listen(broker: Any, count: int | None, timeout: float | None, as_json: bool, **options: Any) -> None:
    """Show predictions, events and status as devices publish them: a table on a terminal, lines elsewhere.

    At the end it says whether a prediction is missing.
    """

    def on_terminate(_number: int, _frame: object) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, on_terminate)
    patience_s = 30.0 if timeout is None else timeout
    with edgekit.Subscriber(
        broker, kinds=("prediction", "event", "status"), patience_s=patience_s, **options
    ) as subscriber:
        logger.info("listening")
        shown: Any = nullcontext(_echo_json if as_json else click.echo)
        if not as_json and sys.stdout.isatty():
            from edgekit.terminal import live_table

            shown = live_table(subscriber.accounting)
        seen = 0
        try:
            with shown as show:
                while count is None or seen < count:
                    message = subscriber.next(timeout)
                    show(message)
                    seen += message.kind == "prediction"
        except TimeoutError as error:
            raise EdgekitError(f"{error} ({seen} predictions so far)", mend="check that the device runs") from error
        finally:
            click.echo(subscriber.accounting, err=True)


def _echo_json(message: Message) -> None:
    shown = {"topic": message.topic, "payload": message.payload}
    if message.missing:
        shown["missing"] = message.missing[0], message.missing[-1]
    if message.duplicate:
        shown["duplicate"] = True
    click.echo(json.dumps(shown, ensure_ascii=False))


@_command
@click.argument("bundle")
@_kernels
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def inspect(bundle: str, ops: tuple[str, ...], as_json: bool) -> None:
    """Show what is in BUNDLE, any .tflite: manifest, tensors, operators, and what each delegate would take."""
    found = edgekit.inspect(bundle, ops=ops)
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
        return
    from edgekit.terminal import print_inspection

    print_inspection(found)


@_command
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
@_kernels
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


@_command
@click.argument("bundle", required=False)
@click.option("--source", help="What BUNDLE is to see or hear: a file or a folder, over and over.")
@click.option("--rate", type=float, default=50.0, show_default=True, help="Predictions a second.")
@click.option(
    "--duration", "duration_s", type=float, default=60.0, show_default=True, metavar="SECONDS", help="Of all faults."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of when the faults come and how long they last.")
@click.option("--broker-kills", type=click.IntRange(0), default=3, show_default=True, help="Kill the broker so often.")
@click.option("--broker-restarts", type=click.IntRange(0), default=1, show_default=True, help="Restart it so often.")
@click.option(
    "--runtime-kills", type=click.IntRange(0), default=2, show_default=True, help="Kill the runtime so often."
)
@click.option("--cuts", type=click.IntRange(0), default=1, show_default=True, help="Reset its connection so often.")
@click.option("--delays", type=click.IntRange(0), default=1, show_default=True, help="Hold what is sent so often.")
@click.option("--disk-full", type=click.IntRange(0), default=1, show_default=True, help="Fill its disk so often.")
@click.option("--folder", metavar="DIR", help="Leave spool and logs here.  [default: a temporary one]")
@click.option("--json", "as_json", is_flag=True, help="Print the account as JSON.")
def soak(as_json: bool, **options: Any) -> None:
    """Let a broker, a runtime, its network and its disk fail, and account for every prediction.

    The broker is a Mosquitto of its own. The runtime runs BUNDLE, or without one publishes made predictions. Fails if a
    prediction was lost, or came twice without being marked.
    """
    import dataclasses

    import msgspec

    from edgekit.devices.soak import Faults, soak
    from edgekit.terminal import progress_bar

    faults = Faults(**{field.name: options.pop(field.name) for field in dataclasses.fields(Faults)})
    with progress_bar() as progress:
        result = soak(faults=faults, progress=progress, **options)
    click.echo(msgspec.json.encode(result) if as_json else str(result))
    if not result.sound:
        raise EdgekitError(
            f"{len(result.lost)} predictions lost, {result.duplicates_unflagged} duplicates not marked as such",
            mend="look at the logs that --folder leaves",
        )


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def ops() -> None:
    """Custom operators of your own."""


@_command
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

for _name, _item in (
    ("convert", convert),
    ("run", run),
    ("listen", listen),
    ("inspect", inspect),
    ("bench", bench),
    ("soak", soak),
    ("ops", ops),
):
    cli.add_command(_item, _name)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: the exit status is 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    context: list[click.Context] = []
    try:
        with cli.make_context("edgekit", list(sys.argv[1:] if arguments is None else arguments)) as root:
            context.append(root)
            cli.invoke(root)
    except click.exceptions.Exit as exit_request:
        sys.exit(exit_request.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone, as in `edgekit listen | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        if context and context[0].obj:
            raise
        line = f"unexpected {type(error).__name__}: {error}; please report it"
        if isinstance(error, EdgekitError):
            line = str(error)
        elif operator := getattr(error, "edgekit_operator", ""):
            line = f"the kernel of the custom operator {operator} raised {type(error).__name__}: {error}; mend it"
        click.echo(f"edgekit: error: {' '.join(line.split())}", err=True)
        sys.exit(1)
