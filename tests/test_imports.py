from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = (
    "tensorflow",
    "keras",
    "cv2",
    "ai_edge_litert",
    "tflite_runtime",
    "paho",
    "amqtt",
    "rich",
    "numpy",
    "soundfile",
    "soxr",
    "pyaudio",
)


def loaded_after(code: str, cwd: Path) -> set[str]:
    """Top-level modules that a fresh Python has loaded after ``code``."""
    script = f"import sys\n{code}\nprint(*{{name.partition('.')[0] for name in sys.modules}}, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", script], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return set(result.stderr.split())


@pytest.mark.parametrize("code", ["import edgekit", "import edgekit.cli", "import edgekit.converters, edgekit.devices"])
def test_import_loads_nothing_heavy(code: str, tmp_path: Path) -> None:
    assert not loaded_after(code, tmp_path) & set(HEAVY)


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = loaded_after("import edgekit.cli\ntry: edgekit.cli.main(['--help'])\nexcept SystemExit: pass", tmp_path)
    assert not loaded & set(HEAVY)
    assert "click" in loaded


@pytest.mark.parametrize(
    "module",
    ["interpreter", "sources.images", "sources.sound", "run", "publish.publisher"],
    ids=lambda name: f"devices.{name}",
)
def test_devices_import_without_tensorflow(module: str, tmp_path: Path) -> None:
    loaded = loaded_after(f"import edgekit.devices.{module}", tmp_path)
    assert not loaded & {"tensorflow", "keras", "h5py", "litert_quantizer"}
    assert "numpy" in loaded or "paho" in loaded


def test_sound_needs_no_opencv(sound_models: Path, tmp_path: Path) -> None:
    """Nor do images need what reads sound."""
    loaded = loaded_after(
        "import edgekit, wave\n"
        "with wave.open('a.wav', 'wb') as file:\n"
        "    file.setnchannels(1), file.setsampwidth(2), file.setframerate(12000), file.writeframes(bytes(20000))\n"
        f"assert len(list(edgekit.stream({str(sound_models / 'window.tflite')!r}, 'a.wav'))) == 3",
        tmp_path,
    )
    assert "soundfile" in loaded and not loaded & {"cv2", "soxr", "pyaudio", "tensorflow"}
    assert not loaded_after("import edgekit.devices.sources.images", tmp_path) & {"soundfile", "soxr", "pyaudio"}


def imported_names(path: Path, *, at_once: bool = False) -> set[str]:
    """``at_once``: only what it imports when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("side", "other"), [("converters", "devices"), ("devices", "converters")])
def test_sides_do_not_import_each_other(side: str, other: str) -> None:
    files = list((ROOT / side).rglob("*.py"))
    assert files
    for path in files:
        assert not [name for name in imported_names(path) if name.startswith(f"edgekit.{other}")], path


def test_common_part_imports_the_sides_lazily_only() -> None:
    for path in (ROOT / "edgekit").glob("*.py"):
        names = imported_names(path, at_once=True)
        assert not [name for name in names if name.startswith(("edgekit.devices", "edgekit.converters"))], path


def test_attribute_that_is_not_there_is_an_attribute_error() -> None:
    import edgekit

    with pytest.raises(AttributeError, match="nonsense"):
        edgekit.nonsense  # noqa: B018
    host = {"convert", "custom_op"}  # they need TensorFlow
    assert all(getattr(edgekit, name) for name in edgekit.__all__ if name not in host)
