"""What the commands share: logging, and options that several have."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import click

logger = logging.getLogger(__name__)


class _StderrHandler(logging.Handler):
    """Writes to what ``sys.stderr`` is at the time, so that a progress bar can put log lines above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if sys.stderr:
            # A full disk, or a pipe that nobody reads any more, is not to end the thread that logs.
            with suppress(OSError, ValueError):
                click.echo(self.format(record), file=sys.stderr)


def command(function: Callable[..., None]) -> click.Command:
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


def broker_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options of a broker's certificates and password, joined with its URL into ``broker``."""

    @click.option("--cafile", metavar="FILE", help="For mqtts: trust this authority (PEM) and no other.")
    @click.option("--cert", "certfile", metavar="FILE", help="For mqtts: our certificate (PEM).")
    @click.option("--key", "keyfile", metavar="FILE", help="For mqtts: its key (PEM, without a password).")
    @click.option("--password-file", metavar="FILE", help="The broker's password, in the first line of this file.")
    @functools.wraps(function)
    def wrapped(broker: str, **options: Any) -> None:
        from edgekit.broker import is_embedded, parse_broker

        files = {name: options.pop(name) for name in ("cafile", "certfile", "keyfile", "password_file")}
        is_url = broker != "none" and not is_embedded(broker)
        address = parse_broker(broker, **files) if is_url else broker
        if is_url and urlsplit(broker).password:
            logger.warning("the password in --broker shows in the process list; give --password-file instead")
        function(broker=address, **options)

    return wrapped


kernels = click.option(
    "--ops",
    multiple=True,
    metavar="LIB",
    help="Kernels of custom operators, of `edgekit ops build`; may be given again.",
)

prefix = click.option("--prefix", default="edgekit", show_default=True, help="What the topics begin with.")
