from __future__ import annotations

import getpass
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit.devices.service import service, unit
from edgekit.devices.service.unit import unit_text
from edgekit.errors import EdgekitError

needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="needs systemd-analyze; scripts/test installs it"
)


@pytest.fixture
def config(tmp_path: Path, models: Path) -> Path:
    """A configuration in a folder with all that a unit has to quote."""
    folder = tmp_path / """50% of "Ann's" $HOME \\ x"""
    folder.mkdir()
    shutil.copy(models / "int8.tflite", folder)
    path = folder / "edgekit.toml"
    path.write_text('broker = "mqtt://hub"\n[[stream]]\nbundle = "int8.tflite"\nsource = "camera:0"\n')
    return path


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This Python by another path, which has the EdgeKit that is tested wherever it is run."""
    path = tmp_path / "a venv 100%" / "python"
    path.parent.mkdir()
    packages = os.pathsep.join([str(Path(edgekit.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))
    return path


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("threshold = { zebra = 0.5 }", "stream main: threshold zebra=0.5: expected a label of the model"),
        ("hop_s = 1.0", "stream main: hop: expected a bundle that takes windows of sound"),
        ("ops = ['nowhere.so']", "nowhere.so is not there"),
        ("[[stream]]\nname = 'b'\nbundle = 'int8.tflite'\nsource = 'nowhere.mp4'", "nowhere.mp4 is not there"),
        ("[[stream]]\nname = 'b'\nbundle = 'int8.tflite'\nsource = 'edgekit.toml'", "edgekit.toml cannot be opened"),
        ("[label_groups]\nwild = ['zebra']", "label group wild: 'zebra': expected a label of the model"),
    ],
)
def test_configuration_that_would_not_run_is_refused(config: Path, more: str, said: str) -> None:
    config.write_text(f"{config.read_text()}{more}\n")
    with pytest.raises(EdgekitError, match=re.escape(said)):
        unit.check(config)


def test_source_of_another_kind_than_the_bundle_takes_is_refused(config: Path) -> None:
    config.write_text(config.read_text().replace("camera:0", "mic:USB"))
    with pytest.raises(EdgekitError, match="source mic:USB: expected images, which its bundle takes, got sound"):
        unit.check(config)


class System:
    """A root folder with systemd's places, and stand-ins for its programs, which are not here: each notes what it was
    asked for, answers what was set, and fails where told so."""

    def __init__(self, root: Path, programs: Path) -> None:
        self.root, self._programs, self._log = root, programs, root / "asked"
        for folder in ("etc/systemd/system", "lib/systemd/system", "run/systemd/system"):
            (root / folder).mkdir(parents=True)
        (root / "etc/group").write_text("root:x:0:\nvideo:x:44:\naudio:x:29:\nrender:x:105:\n")
        self._log.touch()
        programs.mkdir()
        for program in ("systemctl", "journalctl", "useradd"):
            self.answer(program)

    def answer(self, program: str, output: str = "", fails_on: str = "nothing") -> None:
        """``fails_on``: a word of its arguments."""
        path = self._programs / program
        (self._programs / f"{program}.out").write_text(output)
        path.write_text(
            f'#!/bin/sh\necho "{program} $*" >> {self._log}\ncat {path}.out\n'
            f'case " $* " in *" {fails_on} "*) echo "Job failed." >&2; exit 1;; esac\n'
        )
        path.chmod(0o755)

    @property
    def asked(self) -> list[str]:
        lines = self._log.read_text().replace("--no-pager ", "").splitlines()
        return [line for line in lines if not line.startswith("journalctl")]

    @property
    def unit(self) -> Path:
        return self.root / "etc/systemd/system/edgekit.service"


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    made = System(tmp_path / "root", tmp_path / "programs")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    return made


# -- the unit --------------------------------------------------------------------------------------------------------


@needs_systemd
def test_unit_is_one_that_systemd_takes_and_calls_well_protected(
    config: Path, python: Path, tmp_path: Path, models: Path
) -> None:
    spool = tmp_path / "a spool"
    spool.mkdir()
    config.write_text(f'spool = "{spool}"\n{config.read_text()}')
    path = tmp_path / "edgekit.service"
    path.write_text(unit_text(config))
    # it looks for the program of ExecStart=
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
    assert (verified.returncode, verified.stderr) == (0, "")
    help_text = subprocess.run(["systemd-analyze", "--help"], capture_output=True, text=True).stdout
    if "--offline" in help_text:
        command = ["systemd-analyze", "security", "--offline=true", "--threshold=25", path]
        assert subprocess.run(command, capture_output=True).returncode == 0


def test_unit_holds_any_path(config: Path, python: Path) -> None:
    lines = unit_text(config, user="ann").splitlines()
    (start,) = (line for line in lines if line.startswith("ExecStart="))
    program, _, arguments = start.partition(" -m edgekit run --config ")
    assert program == f'ExecStart="{str(python).replace("%", "%%")}"'
    assert arguments.endswith("""/50%% of \\"Ann's\\" $$HOME \\\\ x/edgekit.toml\"""")
    assert "User=ann" in lines


def test_unit_names_the_groups_and_devices_of_this_machine(config: Path, system: System) -> None:
    lines = unit_text(config, root=system.root).splitlines()
    assert "SupplementaryGroups=video audio render" in lines and "PrivateTmp=yes" in lines
    assert "DeviceAllow=/dev/nvmap rw" not in lines
    for path in ("usr/sbin/nvargus-daemon", "dev/nvmap"):
        (system.root / path).parent.mkdir(parents=True, exist_ok=True)
        (system.root / path).touch()
    lines = unit_text(config, root=system.root).splitlines()
    assert "PrivateTmp=no" in lines and "DeviceAllow=/dev/nvmap rw" in lines


@pytest.mark.parametrize("at", ["elsewhere", "configuration", "password", "spool"])
def test_unit_lets_a_home_folder_be_read_only_if_it_must(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, at: str, caplog: pytest.LogCaptureFixture
) -> None:
    home = config.parent if at == "configuration" else tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "secret").write_text("hunter2\n")
    given = {"password": f'password_file = "{home / "secret"}"\n', "spool": f'spool = "{home}"\n'}.get(at, "")
    config.write_text(given + config.read_text())
    monkeypatch.setattr(unit, "_HOMES", (home,))
    with caplog.at_level("INFO", "edgekit"):
        text = unit_text(config)
    assert ("ProtectHome=yes" in text) == (at == "elsewhere") == ("home folder" not in caplog.text)
    assert ("ProtectHome=read-only" in text) == (at != "elsewhere")
    assert "hunter2" not in text


def test_dry_run_prints_the_unit(edgekit_cli: Any, config: Path) -> None:
    result = edgekit_cli("service", "install", config, "--name", "door", "--user", "ann", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("# Written by `edgekit service install`")
    assert "\nStateDirectory=door\n" in result.stdout and "\nUser=ann\n" in result.stdout
    assert "\nType=notify\n" in result.stdout and "\nRestart=always\n" in result.stdout


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("missing", "nowhere.toml"),
        ("key", "treshold"),
        ("bundle", "is not a TFLite model"),
        ("certificate", "expected a PEM file"),
        ("name", "name 'Door 1': expected small letters"),
        ("user", "user '-x': expected small letters"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(edgekit_fails: Any, config: Path, case: str, complaint: str) -> None:
    more = {"name": ["--name", "Door 1"], "user": ["--user=-x"]}.get(case, [])
    if case == "key":
        config.write_text(f"treshold = 1\n{config.read_text()}")
    if case == "certificate":
        text = config.read_text().replace("mqtt://", "mqtts://")
        config.write_text(f'cafile = "int8.tflite"\n{text}')
    if case == "bundle":
        (config.parent / "int8.tflite").write_text("this is text\n" * 50)
    path = "nowhere.toml" if case == "missing" else config
    assert complaint in edgekit_fails("service", "install", path, "--dry-run", *more)


# -- installing and removing -----------------------------------------------------------------------------------------


def test_install_writes_the_unit_and_has_it_started(config: Path, python: Path, system: System) -> None:
    user = getpass.getuser()
    assert service.install(config, user=user, root=system.root) == system.unit
    assert system.asked == [
        "systemctl daemon-reload", "systemctl enable edgekit.service", "systemctl restart edgekit.service",
    ]  # fmt: skip
    assert system.unit.read_text() == unit_text(config, user=user, root=system.root)
    assert system.unit.stat().st_mode & 0o777 == 0o644
    assert service.install(config, user=user, root=system.root) == system.unit  # over its own
    assert service.remove(root=system.root) == system.unit
    assert system.asked[-2:] == ["systemctl disable --now edgekit.service", "systemctl daemon-reload"]
    assert list(system.unit.parent.iterdir()) == []


def test_install_makes_the_user(config: Path, system: System) -> None:
    with pytest.raises(EdgekitError, match="there is no user edgekit-test"):  # the stand-in makes none
        service.install(config, user="edgekit-test", root=system.root)
    (asked,) = system.asked
    assert asked.startswith("useradd --system --user-group --no-create-home") and asked.endswith(" edgekit-test")
    assert not system.unit.exists()


def test_install_that_does_not_start_says_what_the_log_says(config: Path, python: Path, system: System) -> None:
    system.answer("systemctl", fails_on="restart")
    system.answer("journalctl", "starting\nedgekit: error: no camera; plug it in\n")
    with pytest.raises(EdgekitError, match=r"does not start \(edgekit: error: no camera; plug it in\); see"):
        service.install(config, user=getpass.getuser(), root=system.root)


@pytest.mark.parametrize("place", ["etc", "lib"])
def test_service_of_others_is_left_alone(config: Path, system: System, place: str) -> None:
    other = system.root / place / "systemd/system/ssh.service"
    other.write_text("[Service]\nExecStart=/usr/sbin/sshd\n")
    for change in (
        lambda: service.install(config, name="ssh", root=system.root),
        lambda: service.remove("ssh", root=system.root),
    ):
        with pytest.raises(EdgekitError, match="ssh"):
            change()
    assert "sshd" in other.read_text() and system.asked == []


def test_install_for_a_user_who_may_not_read_it_is_refused(config: Path, system: System) -> None:
    others = [account.pw_name for account in pwd.getpwall() if account.pw_uid]
    if os.getuid() or not others:
        pytest.skip("only root may act for another user")
    config.chmod(0o600)
    with pytest.raises(EdgekitError, match=f"the user {others[0]}"):
        service.install(config, user=others[0], root=system.root)
    assert not system.unit.exists() and system.asked == []


@pytest.mark.parametrize("what", ["user", "systemd"])
def test_change_is_refused_without_root_or_systemd(
    config: Path, system: System, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    if what == "user":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    else:
        (system.root / "run/systemd/system").rmdir()
    changes: list[Callable[[], object]] = [
        lambda: service.install(config, root=system.root),
        lambda: service.remove(root=system.root),
    ]
    for change in changes:
        with pytest.raises(EdgekitError, match="; sudo " if what == "user" else "systemd does not run here"):
            change()
    assert system.asked == []


# -- looking at it ---------------------------------------------------------------------------------------------------


def test_status_tells_what_systemd_tells(system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    system.unit.touch()
    system.answer(
        "systemctl",
        "ActiveState=active\nSubState=running\nUnitFileState=enabled\nResult=success\nStatusText=2 streams\n"
        "NRestarts=3\nWatchdogUSec=1min\nMainPID=42\nMemoryCurrent=84000000\nStateChangeTimestampMonotonic=1000000\n",
    )
    system.answer("journalctl", "one\ntwo\n")
    found = service.status(root=system.root)
    assert (found.active, found.detail, found.enabled, found.status) == ("active", "running", "enabled", "2 streams")
    assert (found.restarts, found.watchdog_s, found.pid, found.memory_bytes) == (3, 60.0, 42, 84_000_000)
    assert found.since_s is not None and found.since_s > 0 and found.log == ("one", "two")
    from edgekit.cli_device import status_text

    text = status_text(found)
    assert text.startswith("edgekit: active (running) since ") and "restarts: 3\nwatchdog: 60 s\n  one\n  two" in text


def test_status_of_a_service_that_is_down_leaves_out_what_is_not_known(system: System) -> None:
    system.unit.touch()
    system.answer(
        "systemctl",
        "ActiveState=failed\nSubState=failed\nUnitFileState=disabled\nResult=watchdog\nStatusText=\nNRestarts=0\n"
        "WatchdogUSec=0\nMainPID=0\nMemoryCurrent=[not set]\nStateChangeTimestampMonotonic=0\n",
    )
    system.answer("journalctl", fails_on="-u")
    found = service.status(root=system.root)
    assert (found.pid, found.memory_bytes, found.since_s, found.watchdog_s) == (None, None, None, None)
    from edgekit.cli_device import status_text

    assert status_text(found).splitlines()[0] == "edgekit: failed (failed, watchdog), disabled"


def test_status_and_removal_of_no_service_say_so(system: System) -> None:
    for look in (service.status, service.remove):
        with pytest.raises(EdgekitError, match="there is no service door"):
            look("door", root=system.root)
        with pytest.raises(EdgekitError, match="expected small letters"):
            look("../door", root=system.root)


@pytest.mark.skipif(Path("/run/systemd/system").exists(), reason="systemd runs here")
def test_commands_without_systemd_say_so(edgekit_fails: Any, config: Path) -> None:
    for arguments in (["install", config], ["status", "--json"]):
        assert "systemd does not run here" in edgekit_fails("service", *arguments)


def test_status_is_json(system: System) -> None:
    import msgspec

    system.unit.touch()
    shown = json.loads(msgspec.json.encode(service.status(root=system.root)))
    assert shown["schema"] == "edgekit.service/1" and shown["active"] == "unknown"
