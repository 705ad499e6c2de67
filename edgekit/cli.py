"""The command line: ``edgekit COMMAND``."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress

import click

import edgekit
from edgekit.errors import EdgekitError

# Each in the module that has it: a device that runs for months keeps in memory what its command needs.
_MODULES = {
    "convert": "cli_model",
    "run": "cli_stream",
    "listen": "cli_stream",
    "inspect": "cli_model",
    "bench": "cli_model",
    "soak": "cli_stream",
    "ops": "cli_model",
    "doctor": "cli_device",
    "service": "cli_device",
}


class _Commands(click.Group):
    """Imports a command when it is asked for, as click's documentation shows under "Lazily Loading Subcommands"."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        command: click.Command = getattr(importlib.import_module(f"edgekit.{_MODULES[cmd_name]}"), cmd_name)
        return command


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgekit.__version__, prog_name="edgekit")
def cli() -> None:
    """Image and sound models on small devices: convert a Keras model, run it, receive its predictions over MQTT."""


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
        with suppress(OSError):
            click.echo(f"edgekit: error: {' '.join(line.split())}", err=True)
        sys.exit(1)
    finally:
        try:
            if sys.stderr:
                sys.stderr.flush()
        except OSError:  # Python would try again at its end, and have another exit status for it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
