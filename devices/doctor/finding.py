"""What ``edgekit doctor`` finds: one line each."""

from __future__ import annotations

from typing import Literal

import msgspec

from edgekit.errors import EdgekitError


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one thing: it is there and works (``ok``), is not there (``missing``), or does not work
    (``failed``). ``needed``: nothing runs without it, or it was asked for."""

    check: str
    status: Literal["ok", "missing", "failed"]
    detail: str
    mend: str = ""
    needed: bool = False

    def __str__(self) -> str:
        return f"{self.status:8}{self.check}: {self.detail}" + (f"; {self.mend}" if self.mend else "")


def ok(check: str, detail: str, *, needed: bool = False) -> Finding:
    return Finding(check=check, status="ok", detail=detail, needed=needed)


def missing(check: str, detail: str, mend: str = "", *, needed: bool = False) -> Finding:
    return Finding(check=check, status="missing", detail=detail, mend=mend, needed=needed)


def failed(check: str, detail: str, mend: str = "", *, needed: bool = False) -> Finding:
    return Finding(check=check, status="failed", detail=detail, mend=mend, needed=needed)


def from_error(check: str, error: EdgekitError, *, needed: bool = False) -> Finding:
    """That of an error: what is wrong, and how to mend it."""
    mend = " ".join(error.mend.split())
    return failed(check, str(error).removesuffix(f"; {mend}"), mend, needed=needed)
