"""The commands about predictions: ``run``, ``listen`` and ``soak``, thin faces of what does it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import signal
import sys
import threading
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import click

import edgekit
from edgekit.cli_options import broker_options, command, kernels, prefix
from edgekit.errors import EdgekitError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from edgekit.messages import PredictionMessage
    from edgekit.received import Message

# A run that is told to stop is ended after so long, whatever hangs; while it opens models and sources, sooner, as there
# is nothing to send yet.
STOP_S, OPENING_STOP_S = 4.8, 1.0


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


@command
@click.argument("bundle", required=False)
@click.option("--config", metavar="FILE", help="Run the streams of this TOML file, instead of all that follows.")
@click.option(
    "--source",
    help="camera:N, camera:csi, /dev/video…, rtsp://…, http://… (MJPEG), a video, an image, a folder of images, mic, "
    "mic:NAME or an audio file.",
)
@click.option(
    "--broker",
    default="mqtt://localhost",
    show_default=True,
    help="mqtt://[user:pass@]host[:port], mqtts://…, embedded or none.",
)
@click.option("--device-id", help="This device's name in the topics.  [default: the host's name]")
@click.option("--stream", default="main", show_default=True, help="This stream's name in the topics.")
@click.option("--delegate", default="auto", show_default=True, help="auto, cpu, coral, gpu or the path of a library.")
@click.option("--strict", is_flag=True, help="Fail where the delegate does, instead of going on with the next.")
@click.option(
    "--threads", type=click.IntRange(1, 256), help="Threads of the CPU kernels.  [default: as the profile says]"
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
@click.option(
    "--drop",
    type=click.Choice(["oldest", "newest", "none"]),
    default="oldest",
    show_default=True,
    help="What a live source drops when the model is behind.",
)
@click.option("--labels", metavar="FILE", help="A label file to use instead of the packed one.")
@click.option("--smoothing", type=int, default=1, show_default=True, help="Decide by so many predictions.")
@click.option(
    "--hysteresis",
    type=float,
    default=0.1,
    show_default=True,
    help="A label that is held ends so much below its threshold.",
)
@kernels
@broker_options
@prefix
@click.option("--profile", help="The device's profile.  [default: the one detected]")
@click.option(
    "--spool",
    metavar="DIR",
    help="Keep predictions in this folder until the broker has them, or none: in memory.  "
    "[default: ~/.local/state/edgekit]",
)
@click.option(
    "--spool-size",
    "spool_size_mb",
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
@click.option(
    "--replay-rate",
    "replay_rate",
    type=click.FloatRange(0, min_open=True),
    default=500,
    show_default=True,
    help="Send what was kept no faster, in messages a second.",
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
@click.option(
    "--hang",
    "hang_s",
    type=click.FloatRange(0, min_open=True),
    default=30,
    show_default=True,
    metavar="SECONDS",
    help="A model that takes longer hangs, and is ended.",
)
@click.option("--json", "as_json", is_flag=True, help="Print each prediction on stdout too, one JSON object a line.")
@click.pass_context
def run(
    context: click.Context,
    /,
    bundle: str | None,
    source: str | None,
    config: str | None,
    as_json: bool,
    no_commands: bool,
    no_home_assistant: bool,
    **options: Any,
) -> None:
    """Stream SOURCE through BUNDLE and publish what it sees or hears.

    BUNDLE is one for audio tagging, or any .tflite that classifies images.
    """
    from edgekit.messages import encode

    if config is None:
        if bundle is None or source is None:
            raise click.UsageError("Give BUNDLE and --source, or --config.")
        options |= {
            "bundle": bundle,
            "source": source,
            "commands": not no_commands,
            "home_assistant": not no_home_assistant,
        }
    else:
        given = [
            parameter.opts[0]
            for parameter in context.command.params
            if parameter.name not in ("config", "as_json", "debug")
            and context.get_parameter_source(parameter.name or "") is not click.core.ParameterSource.DEFAULT
        ]
        if given:
            raise click.UsageError(f"{', '.join(given)} cannot be given with --config; write it into the file.")
        options = {"config": config}

    stop, reload, started, ended = (threading.Event() for _ in range(4))
    interrupted = []
    # A handler is not to set an event: another signal may come in the midst of it, which would wait for ever. Nor to
    # raise: what it interrupts may be another thread's beginning, or hold a lock.
    asked: queue.SimpleQueue[threading.Event] = queue.SimpleQueue()

    def obey() -> None:
        while (event := asked.get()) is not stop:
            event.set()
        stop.set()
        if not ended.wait(STOP_S if started.is_set() else OPENING_STOP_S):
            if started.is_set():
                logger.warning("it does not end, and is ended; what was not sent is sent by the next run")
            os._exit(130 if signal.SIGINT in interrupted else 0)

    threading.Thread(target=obey, name="signals", daemon=True).start()

    def on_signal(number: int, _frame: object) -> None:
        interrupted.append(number)
        asked.put(stop)
        signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    if config is not None:  # without one it is a terminal that was closed
        signal.signal(signal.SIGHUP, lambda _number, _frame: asked.put(reload))

    bar: Any = nullcontext()
    shown = itertools.count(1)
    if sys.stderr and sys.stderr.isatty():  # a service needs no bar, nor the memory of what draws it
        from edgekit.terminal import progress_bar

        bar = progress_bar()
    with bar as progress:

        def show(message: PredictionMessage) -> None:
            if as_json:
                try:
                    click.echo(encode(message))
                except BrokenPipeError:  # of `edgekit run … | head`
                    raise
                except OSError as error:
                    raise EdgekitError(
                        f"stdout cannot be written ({error.strerror})", mend="free disk space, or leave out --json"
                    ) from error
            if progress:
                progress("frames", next(shown), 0)

        edgekit.run(stop=stop, reload=reload, on_start=started.set, on_prediction=show, **options)
        ended.set()
    if signal.SIGINT in interrupted:
        raise KeyboardInterrupt


@command
@click.option(
    "--broker", default="mqtt://localhost", show_default=True, help="mqtt://[user:pass@]host[:port] or mqtts://…"
)
@broker_options
@prefix
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

            shown = live_table(subscriber.accounting, subscriber.events)
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
    if message.held_s is not None:
        shown["held_s"] = message.held_s
    if message.left_open:
        shown["left_open"] = [event.event_id for event in message.left_open]
    click.echo(json.dumps(shown, ensure_ascii=False))


@command
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
    import msgspec

    from edgekit.terminal import progress_bar

    with progress_bar() as progress:
        result = edgekit.soak(progress=progress, **options)
    click.echo(msgspec.json.encode(result) if as_json else str(result))
    if not result.sound:
        raise EdgekitError(
            f"{len(result.lost)} predictions lost, {result.duplicates_unflagged} duplicates not marked as such",
            mend="look at the logs that --folder leaves",
        )
