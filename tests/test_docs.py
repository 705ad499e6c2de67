"""Runs every command and every Python example of the README and of docs/, in order, page by page."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jsonschema
import numpy as np
import pytest

from edgekit.messages import json_schema

pytestmark = [pytest.mark.host, pytest.mark.docs]
ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def files(page: str) -> dict[str, str]:
    """The blocks that stand below the name of a file."""
    return dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M))


def examples(page: str) -> list[str]:
    """The blocks of Python that are to be run as they are."""
    return [block for block in blocks(page, "python") if block not in files(page).values()]


def commands(page: str) -> list[str]:
    text = "\n".join(blocks(page, "console")).replace("\\\n", " ")
    return [line[2:] for line in text.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def folder(digits: Path, sound_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: digits.keras and its data; tagger.tflite and a recording; clips of two tags."""
    folder = shutil.copytree(digits, tmp_path_factory.mktemp("docs"), dirs_exist_ok=True)
    shutil.copy(sound_models / "window.tflite", folder / "tagger.tflite")
    with wave.open(str(folder / "recording.wav"), "wb") as recording:
        recording.setnchannels(1)
        recording.setsampwidth(2)
        recording.setframerate(44_100)
        recording.writeframes(bytes(4 * 44_100))
    (folder / "tags.txt").write_text("low\nhigh\n")
    for tag, hertz in (("low", 300), ("high", 3000)):
        (folder / "clips" / tag).mkdir(parents=True)
        for number in range(3):
            t = np.arange((number + 1) * 12_000) / 12_000
            wave_of_tag = np.sin(2 * np.pi * hertz * t) * (8000 + 4000 * np.sin(2 * np.pi * (number + 1) * t))
            with wave.open(str(folder / "clips" / tag / f"{number}.wav"), "wb") as clip:
                clip.setnchannels(1)
                clip.setsampwidth(2)
                clip.setframerate(12_000)
                clip.writeframes(wave_of_tag.astype("<i2").tobytes())
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkout in ./edgekit, for the page on installing."""
    folder = tmp_path_factory.mktemp("install")
    (folder / "edgekit").mkdir()
    for name in ("edgekit", "converters", "devices", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / "edgekit" / name)
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """``edgekit`` of this Python, and a stand-in for ``scp``: the device is not here."""
    for name, script in {
        "edgekit": f'exec {sys.executable} -m edgekit "$@"',
        "python": f'exec {sys.executable} "$@"',
        "pip": f'exec {sys.executable} -m pip install --dry-run --no-deps "$2"',
        "scp": '[ -f "$1" ] && [ "${2%:}" != "$2" ]',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture
def listeners() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_the_page_run(
    page: str,
    folder: Path,
    checkout: Path,
    environment: dict[str, str],
    broker: Any,
    listeners: list[Any],
    until_listening: Any,
) -> None:
    """A listener is started before the others, and must have heard something if the page runs a model."""
    # the camera, the microphone and the broker that the pages speak of are not here, and time is short
    here = {
        "edgekit bench": "edgekit bench --seconds 0.2",
        "--duration 20": "--duration 5 --broker-kills 1 --runtime-kills 1",
        "camera:0": "held-out.avi",
        "--source mic": "--source recording.wav",
        'source = "mic"': 'source = "recording.wav"',
        "mqtt://hub": broker.url,
    }
    lines, written = commands(page), files(page)
    assert lines, page
    folder = checkout if page == "docs/install.md" else folder
    for old, new in here.items():
        lines = [line.replace(old, new) for line in lines]
        written = {name: content.replace(old, new) for name, content in written.items()}
    for name, content in written.items():
        (folder / name).write_text(content)
    uses_one = "digits.tflite" in "".join([lines[0], *written.values()]) and not lines[0].startswith("edgekit convert")
    if uses_one and not (folder / "digits.tflite").exists():
        subprocess.run(
            commands("README.md")[0], shell=True, cwd=folder, env=environment, check=True, capture_output=True
        )
    publishes = any("edgekit run" in line and broker.url in line for line in lines)
    for line in lines:
        if line.startswith("edgekit listen"):
            listening = subprocess.Popen(
                f"exec {line}",
                shell=True,
                cwd=folder,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            until_listening(listening)
            listeners.append(listening)
    for line in lines:
        if not line.startswith("edgekit listen"):
            result = subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{line}\n{result.stderr}"
    if publishes and listeners:
        time.sleep(1)
    for listening in listeners:
        listening.send_signal(signal.SIGINT)
        output, _ = listening.communicate(timeout=20)
        assert listening.returncode == 130
        if publishes:
            assert len(re.findall(r"pi-4/desk(?:  #|/prediction)", output)) == 360


@pytest.mark.parametrize("page", [page for page in PAGES if examples(page)])
def test_python_of_the_page_runs(page: str, folder: Path, environment: dict[str, str], broker: Any) -> None:
    """Endless loops over a subscriber are ended after one message."""
    if not (folder / "digits.tflite").exists():
        subprocess.run(
            commands("README.md")[0], shell=True, cwd=folder, env=environment, check=True, capture_output=True
        )
    if files(page) and not (folder / "mish.tflite").exists():
        for name, content in files(page).items():
            (folder / name).write_text(content)
        for line in commands(page)[:2]:
            subprocess.run(line, shell=True, cwd=folder, env=environment, check=True, capture_output=True)
    image = cv2.cvtColor(cv2.imread(str(next((folder / "validation" / "7").iterdir()))), cv2.COLOR_BGR2RGB)
    cv2.imwrite(str(folder / "image.png"), image)
    for block in examples(page):
        code = "import cv2\nimage_rgb = cv2.imread('image.png')\n" + block.replace("mqtt://hub", broker.url)
        code = re.sub(r"(print\(message\.captured_at.*\))", r"\1; break", code)
        running = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if "Subscriber" in block:
            time.sleep(4)  # let it subscribe
            command = f"edgekit run digits.tflite --source validation/7 --device-id pi-4 --broker {broker.url}"
            subprocess.run(command, shell=True, cwd=folder, env=environment, check=True, capture_output=True)
        output, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors
        assert output
        if "digits.tflite" in block and "model.predict" in block:
            assert "label='7'" in output


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")])
def test_json_of_the_page_is_within_its_schema(page: str) -> None:
    for block in blocks(page, "json"):
        payload = json.loads(block)
        schema = json_schema(payload["schema"].removeprefix("edgekit.").removesuffix("/1"))
        jsonschema.validate(payload, schema)


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for page in PAGES[1:]:
        assert f"]({page})" in readme
    for link in re.findall(r"\]\(([^)]+)\)", readme):
        assert (ROOT / link).exists()
