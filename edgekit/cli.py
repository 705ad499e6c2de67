"""The command line: ``edgekit COMMAND``."""

from __future__ import annotations

import os
import sys

import click

import edgekit
from edgekit.cli_device import doctor, service
from edgekit.cli_model import bench, convert, inspect, ops
from edgekit.cli_stream import listen, run, soak
from edgekit.errors import EdgekitError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(edgekit.__version__, prog_name="edgekit")
def cli() -> None:
    """Image and sound models on small devices: convert a Keras model, run it, receive its predictions over MQTT."""


for _name, _item in (
    ("convert", convert),
    ("run", run),
    ("listen", listen),
    ("inspect", inspect),
    ("bench", bench),
    ("soak", soak),
    ("ops", ops),
    ("doctor", doctor),
    ("service", service),
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
