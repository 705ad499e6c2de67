"""The commands about a device: ``doctor`` and ``service``, thin faces of what does it."""

from __future__ import annotations

import logging
import sys
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

import click

import edgekit
from edgekit.cli_options import broker_options, command
from edgekit.errors import EdgekitError

if TYPE_CHECKING:
    from edgekit.devices.service.service import ServiceStatus


@command
@click.option("--config", metavar="FILE.toml", help="Check also what this configuration needs.")
@click.option(
    "--broker",
    default="mqtt://localhost",
    metavar="URL",
    help="Check that this broker lets us in.  [default: that of --config, or one on this machine]",
)
@broker_options
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def doctor(config: str | None, broker: Any, as_json: bool) -> None:
    """Show what this device has, what is missing, and how to mend it.

    Fails if something that is needed fails: a runtime, and all that --config and --broker name.
    """
    import msgspec

    if not logging.getLogger("edgekit").isEnabledFor(logging.DEBUG):
        logging.getLogger("edgekit").setLevel(logging.CRITICAL)  # each is told as a finding
    given = click.get_current_context().get_parameter_source("broker") is not click.core.ParameterSource.DEFAULT
    diagnosis = edgekit.doctor(config, broker=broker if given else None)
    if as_json:
        click.echo(msgspec.json.encode(diagnosis))
    elif sys.stdout.isatty():
        from edgekit.terminal import print_diagnosis

        print_diagnosis(diagnosis)
    else:
        for finding in diagnosis.findings:
            click.echo(finding)
    if failing := diagnosis.failing:
        raise EdgekitError(f"needed, and not so: {', '.join(failing)}", mend="mend what is told of it above")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def service() -> None:
    """Run a configuration as a systemd service, from the start of the machine on."""


_name = click.option("--name", default="edgekit", show_default=True, help="Of the service.")


@command
@click.argument("config", metavar="CONFIG.toml")
@_name
@click.option("--user", default="edgekit", show_default=True, help="Whose rights it has; made if there is none.")
@click.option("--dry-run", is_flag=True, help="Print the unit and change nothing.")
def install(config: str, name: str, user: str, dry_run: bool) -> None:
    """Have systemd run CONFIG, now and whenever the machine starts. Needs root."""
    from edgekit.devices.service import service

    if dry_run:
        from edgekit.devices.service.unit import unit_text

        click.echo(unit_text(config, name=name, user=user), nl=False)
        return
    path = service.install(config, name=name, user=user)
    click.echo(f"{path}: runs as {user}; look at it with `edgekit service status{_named(name)}`")


@command
@_name
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON.")
def status(name: str, as_json: bool) -> None:
    """Show how the service fares, and the newest lines of its log."""
    import msgspec

    from edgekit.devices.service import service

    found = service.status(name)
    click.echo(msgspec.json.encode(found) if as_json else status_text(found))


@command
@_name
def remove(name: str) -> None:
    """End the service and delete its unit. Needs root."""
    from edgekit.devices.service import service

    path = service.remove(name)
    click.echo(f"{path}: removed. Its user stays, and /var/lib/{name} with what was not sent yet: delete them yourself")


for _item in (install, status, remove):
    service.add_command(_item)


def _named(name: str) -> str:
    return "" if name == "edgekit" else f" --name {name}"


def status_text(found: ServiceStatus) -> str:
    """For people: a line each, and the log."""
    since = ""
    if found.since_s is not None:
        since = f" since {datetime.now() - timedelta(seconds=found.since_s):%Y-%m-%d %H:%M:%S}"
    why = f", {found.result}" if found.result not in ("", "success") else ""
    facts = {
        "": f"{found.active} ({found.detail}{why}){since}, {found.enabled}",
        "says": found.status,
        "process": found.pid and f"{found.pid}, {(found.memory_bytes or 0) / 1e6:.0f} MB",
        "restarts": found.restarts,
        "watchdog": found.watchdog_s and f"{found.watchdog_s:g} s",
    }
    lines = [f"{key or found.name}: {value}" for key, value in facts.items() if value not in (None, "")]
    return "\n".join([*lines, *(f"  {line}" for line in found.log or ["no log, or it is for root to read"])])
