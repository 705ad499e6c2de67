from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.host
ROOT = Path(__file__).parents[1]


def build(folder: Path, **options: Any) -> Path:
    subprocess.run(["git", "clone", "-q", ROOT, folder / "clone"], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(folder / "clone")]
    subprocess.run(command, check=True, capture_output=True, **options)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_wheel_installs_edgekit_and_nothing_beside_it(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"edgekit"}
    for name in ("py.typed", "schemas/prediction.json", "converters/convert.py", "devices/pipeline.py", "cli.py"):
        assert f"edgekit/{name}" in names
    profiles = {f"edgekit/devices/profiles/{path.name}" for path in (ROOT / "devices" / "profiles").iterdir()}
    assert profiles and profiles <= set(names)
    assert {"edgekit/ops/libedgekit_ops.so", "edgekit/ops/edgekit_op.h"} <= set(names)
    assert "-py3-none-linux" in wheel.name  # of no particular Python


def test_wheel_is_built_without_a_compiler(tmp_path: Path) -> None:
    """It lacks the library of custom operators; test_custom_ops.py has what is said then."""
    names = zipfile.ZipFile(build(tmp_path, env={**os.environ, "PATH": str(tmp_path), "CC": "none"})).namelist()
    assert "edgekit/cli.py" in names and not [name for name in names if name.endswith(".so")]


def test_wheel_works_from_its_own_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = "import edgekit.devices, edgekit.converters as c; print(c.__file__)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert Path(result.stdout.strip()) == tmp_path / "edgekit" / "converters" / "__init__.py"
