"""Commands from afar: each is answered, and one that is wrong changes nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone

import msgspec

from edgekit.devices.pipeline import CHANGEABLE, Pipeline
from edgekit.errors import EdgekitError
from edgekit.messages import (
    PREFIX,
    CommandMessage,
    Pause,
    ResponseMessage,
    Resume,
    Set,
    Snapshot,
    SnapshotImage,
    StreamSettings,
    encode,
    timestamp,
    topic,
)

logger = logging.getLogger(__name__)

# Larger ones are not read.
MAX_COMMAND_BYTES = 4096
# Longer ones are not answered to.
MAX_TOPIC_BYTES = 256
# Of an error in an answer and in the log.
_MAX_ERROR = 300

_decode = msgspec.json.Decoder(CommandMessage).decode


class Commands:
    """Carries out what arrives on ``<base>/command``, at once and in the thread that calls.

    Args:
        pipelines: those of the device now, by stream.
    """

    def __init__(self, pipelines: Callable[[], Mapping[str, Pipeline]]) -> None:
        self._pipelines = pipelines

    def answer(self, payload: bytes | bytearray, *, retained: bool) -> list[bytes]:
        """The JSON of a :class:`~edgekit.messages.ResponseMessage` for each stream that the command is for, whatever
        came; none for what is no command of ours but that of another run.

        Args:
            payload: as it came.
            retained: the broker had kept it: it was meant for another time, and would come again on each connection.
        """
        pipelines = dict(self._pipelines())
        try:
            command = _read(payload, retained)
        except EdgekitError as wrong:
            return [self._respond(pipeline, None, _told(wrong), None) for pipeline in list(pipelines.values())[:1]]
        return [
            self._respond(pipeline, command, *_attempt(command, pipeline))
            for stream, pipeline in pipelines.items()
            if command.stream in (None, stream)
        ]

    def _respond(
        self, pipeline: Pipeline, command: CommandMessage | None, error: str, snapshot: SnapshotImage | None
    ) -> bytes:
        config = pipeline.config
        threshold = config.threshold
        response = ResponseMessage(
            schema="edgekit.response/1",
            device=pipeline.device_id,
            stream=config.name,
            at=timestamp(datetime.now(timezone.utc)),
            command=command.__struct_config__.tag if command else None,  # type: ignore[arg-type]
            ok=not error,
            error=error or None,
            settings=StreamSettings(
                paused=pipeline.paused,
                threshold=dict(threshold) if isinstance(threshold, Mapping) else threshold,
                top_k=config.top_k,
                max_fps=config.max_fps,
            ),
            snapshot=snapshot,
        )
        return encode(response)


def _attempt(command: CommandMessage, pipeline: Pipeline) -> tuple[str, SnapshotImage | None]:
    """What went wrong, if anything, and the snapshot that was asked for."""
    try:
        return "", _carry_out(command, pipeline)
    except Exception as failure:  # whatever it is, the device goes on
        logger.debug("command failed", exc_info=True)
        return _told(failure), None


def _carry_out(command: CommandMessage, pipeline: Pipeline) -> SnapshotImage | None:
    match command:
        case Pause():
            pipeline.pause()
        case Resume():
            pipeline.resume()
        case Snapshot():
            return pipeline.snapshot()
        case Set():
            given = {name: getattr(command, name) for name in CHANGEABLE}
            changes = {name: value for name, value in given.items() if value is not msgspec.UNSET}
            if not changes:
                raise EdgekitError("command set", expected=", ".join(sorted(CHANGEABLE)), mend="give one at least")
            pipeline.change(**changes)
    return None


def _told(failure: Exception) -> str:
    """In a line, which is logged too."""
    line = str(failure)
    if not isinstance(failure, EdgekitError):
        line = f"command failed unexpectedly ({type(failure).__name__}: {failure})"
    line = line if len(line) <= _MAX_ERROR else line[: _MAX_ERROR - 1] + "…"
    logger.warning("%s; nothing was changed", line)
    return line


def response_topic(requested: str, device: str, *, prefix: str = PREFIX) -> str | None:
    """``requested`` if an answer may go there; None if not, with a warning, or if it is empty.

    Who may command a device must not thereby get it to publish in its own name, or in that of other devices: of the
    topics below ``prefix`` only ``<prefix>/<device>/response`` and those below it will do.
    """
    if not requested:
        return None
    own = topic(device, "response", prefix=prefix)
    fits = (
        len(requested.encode(errors="replace")) <= MAX_TOPIC_BYTES
        and not requested.startswith("$")
        and not re.search(r"[+#\x00-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufffe\uffff]", requested)
        and requested.split("/")[0] != "homeassistant"
        and (f"{requested}/".startswith(f"{own}/") or not f"{requested}/".startswith(f"{prefix}/"))
    )
    if not fits:
        logger.warning("a command asks for its answer on %r, where none may go; use %s/…", requested[:80], own)
    return requested if fits else None


def _read(payload: bytes | bytearray, retained: bool) -> CommandMessage:
    """The command in ``payload``.

    Raises:
        EdgekitError: it is none.
    """
    if retained:
        raise EdgekitError("retained command", mend="send it without the retain flag, and clear the topic")
    if len(payload) > MAX_COMMAND_BYTES:
        raise EdgekitError(
            "command", expected=f"at most {MAX_COMMAND_BYTES} bytes", got=str(len(payload)), mend="send a shorter one"
        )
    try:
        command: CommandMessage = _decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EdgekitError(
            f"malformed command ({error})",
            expected="JSON of the command schema",
            mend='such as {"command":"ping"}',
        ) from error
    return command
