"""Coral's ``edgetpu_compiler``: called where it is at hand, and its log read."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from pathlib import Path

from edgekit.coverage import Coverage, Left
from edgekit.errors import ConversionError

logger = logging.getLogger(__name__)

COMPILER = "edgetpu_compiler"
TIMEOUT_S = 600.0
# A row of its table: operator, count, status.
_ROW = re.compile(r"^([A-Z][A-Z0-9_]*|[A-Za-z_][\w-]*)\s+(\d+)\s+(\S.*?)\s*$", re.M)
_MAPPED = "Mapped to Edge TPU"


def find() -> str | None:
    """The compiler's path, where it is on the PATH. Google offers it for x86-64 Debian only."""
    return shutil.which(COMPILER)


def compile(compiler: str, model: Path, folder: Path) -> tuple[Path, Coverage]:
    """Compiles an int8 ``.tflite`` for the Edge TPU.

    Args:
        compiler: its path.
        model: the flatbuffer.
        folder: where the compiled model goes.

    Returns:
        The compiled model, and which operators it took by the compiler's own log.

    Raises:
        ConversionError: it failed, or left no compiled model.
    """
    try:
        ran = subprocess.run(
            [compiler, "-s", "-o", str(folder), str(model)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConversionError(f"{COMPILER} failed ({error})", mend="run it by hand on the bundle") from error
    said = ran.stdout + ran.stderr
    logger.debug("%s", said)
    compiled = folder / f"{model.stem}_edgetpu.tflite"
    if ran.returncode or not compiled.exists():
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        reason = next((line for line in lines if re.search("error|invalid|fail|abort|not ", line, re.I)), "")
        raise ConversionError(
            f"{COMPILER} ended with status {ran.returncode}: {reason or (lines or ['it said nothing'])[-1]}",
            mend="leave out --target coral for a bundle that runs on the CPU",
        )
    rows = [(name, int(count), status) for name, count, status in _ROW.findall(said)]
    if not rows:
        raise ConversionError(
            f"the log of {COMPILER} has no table of operators", mend="use version 16, the last that Google released"
        )
    pieces = re.search(r"Number of Edge TPU subgraphs: (\d+)", said)
    return compiled, Coverage(
        delegate="edge-tpu",
        measured=True,
        operators=sum(count for _, count, _ in rows),
        delegated=sum(count for _, count, status in rows if status == _MAPPED),
        pieces=int(pieces[1]) if pieces else 1,
        left=tuple(
            Left(operator=name, count=count, reason=status) for name, count, status in rows if status != _MAPPED
        ),
    )
