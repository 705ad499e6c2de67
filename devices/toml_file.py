"""TOML files that people write: read into a struct, with errors that name the file, the line and the key."""

from __future__ import annotations

import difflib
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgekit.errors import EdgekitError

# The names and, in lists, the numbers that lead to a value: ("stream", 1, "top_k").
Key = tuple[str | int, ...]
Struct = TypeVar("Struct", bound=msgspec.Struct)

# What to do about most values.
MEND = "give it so, or leave it out"
# What is larger is another file, given by mistake.
_MOST_BYTES = 1 << 18
# Of TOML that is right: where texts and comments are, what is open, and where lines end.
_TOKENS = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5}|'{3}.*?'{3,5}|"(?:\\.|[^"\\])*"|'[^']*'|#[^\n]*|[][{}\n]''', re.DOTALL
)
# msgspec's names of types, as people call them.
_WORDS = {"str": "text", "int": "a number", "float": "a number", "bool": "true or false", "array": "a list"}


class TomlFile:
    """A TOML file, parsed.

    Args:
        path: of the file.
        what: what it is, for errors.

    Raises:
        EdgekitError: it cannot be read, or is not TOML.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        self._text = _read(self.path, what)
        try:
            self.data = _parse(self._text)
        except (ValueError, RecursionError) as error:  # ValueError: tomllib's own, or of a number with 5,000 digits
            found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", str(error), re.S)
            line = found[2] if found and found[2] else self._text.rstrip().count("\n") + 1
            raise EdgekitError(
                f"{self.path} line {line}: {found[1] if found else 'not TOML'}",
                expected="[table], [[table]] or key = value, with text in quotes",
                mend="correct this line, or what it goes on from",
            ) from error

    def line(self, key: Key) -> int:
        """Where ``key`` is given, else the table that it would be in; counted from 1."""
        while key and not _holds(self.data, key):
            key = key[:-1]
        if not key:
            return 1
        lines = self._text.split("\n")
        ends, number, depth = [0], 0, 0  # of statements, which may have several lines
        for token in _TOKENS.findall(self._text):
            number += token.count("\n")
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(token, 0)
            if token == "\n" and not depth:
                ends.append(number)
        ends.append(len(lines))
        # All up to the end of a statement is TOML too, and has the key from the statement on that gives it.
        first = bisect_left(ends, True, key=lambda end: _holds(_parse("\n".join(lines[:end])), key))
        return ends[first - 1] + 1

    def error(self, key: Key, what: str, *, expected: str = "", got: str = "", mend: str = "") -> EdgekitError:
        """About the value at ``key``, which ``what`` names."""
        return EdgekitError(f"{self.path} line {self.line(key)}: {what}", expected=expected, got=got, mend=mend)

    def convert(
        self, to: type[Struct], tables: Mapping[str, type[msgspec.Struct]], expected: Mapping[str, str]
    ) -> Struct:
        """The file as a struct.

        Args:
            to: what the file is.
            tables: what the tables in it are, by header: ``[camera]``, ``[[stream]]``.
            expected: what each key is to be, in words.

        Raises:
            EdgekitError: there is no such key, one is missing, or a value is of another type.
        """
        try:
            return msgspec.convert(self.data, to)
        except msgspec.ValidationError as error:
            # "Expected `int`, got `str` - at `$.stream[0].top_k`", where "[...]" is any key of a table
            message, _, place = str(error).partition(" - at `$")
            path, inside, _ = place.partition("[...]")
            key: Key = tuple(int(i) if i else name for name, i in re.findall(r"\.([^.\[`]+)|\[(\d+)\]", path))
            if found := re.search("unknown field `(.*)`", message, re.S):
                raise self._unknown(key, found[1], {"": to, **tables}) from error
            if found := re.search("required field `(.*)`", message):
                what = f"{self._name((*key, found[1]))} is missing"
                raise self.error(key, what, expected=expected[found[1]], mend="add it") from error
            if inside:
                found = re.search("got `(.*)`", message)
                got = f"{_WORDS.get(found[1], found[1]) if found else 'something else'} in it"
            else:
                got = shown(_value(self.data, key))
            named = [name for name in key if isinstance(name, str)][-1]
            raise self.error(key, self._name(key), expected=expected[named], got=got, mend=MEND) from error

    def _unknown(self, key: Key, name: str, tables: Mapping[str, type[msgspec.Struct]]) -> EdgekitError:
        fields = {header.strip("[]"): table.__struct_fields__ for header, table in tables.items()}
        here = fields[str(key[0]) if key else ""]
        elsewhere = [header for header, table in tables.items() if name in table.__struct_fields__]
        if elsewhere:
            mend = f"put it below {elsewhere[0]}" if elsewhere[0] else "put it above the first table"
        elif close := difflib.get_close_matches(name, here, 1):
            mend = f"did you mean {close[0]!r}?"
        else:
            mend = "leave it out"
        table = f"{self._name(key)}: " if key else ""
        return self.error(
            (*key, name),
            f"{table}unknown key {name!r}",
            expected=" or ".join([", ".join(here[:-1]), here[-1]]),
            mend=mend,
        )

    def _name(self, key: Key) -> str:
        """As people call it: ``stream door: top_k``."""
        names = [name for name in key if isinstance(name, str)]
        if len(key) > 1 and isinstance(key[1], int):
            table = _value(self.data, key[:2])
            names[0] += f" {(isinstance(table, dict) and table.get('name')) or key[1] + 1}"
        return ": ".join(names)


def _read(path: Path, what: str) -> str:
    try:
        if not path.is_file():
            got = "a folder" if path.is_dir() else "something else" if path.exists() else "nothing"
            raise EdgekitError(f"{what} {path}", expected="a TOML file", got=got, mend="check the path")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise EdgekitError(
            f"{what} {path} cannot be read ({error.strerror or error})", mend="check who may read it"
        ) from error
    if len(content) > _MOST_BYTES:
        raise EdgekitError(
            f"{what} {path}", expected=f"{_MOST_BYTES >> 10} kB at most", got="more", mend="check the path"
        )
    try:
        return content.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise EdgekitError(
            f"{path} line {content[: error.start].count(10) + 1}",
            expected="UTF-8",
            got=f"the byte 0x{content[error.start]:02x}",
            mend="save the file as UTF-8",
        ) from error


def _parse(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


def _value(data: Any, key: Key) -> Any:
    for place in key:
        data = data[place]
    return data


def _holds(data: Any, key: Key) -> bool:
    try:
        _value(data, key)
    except (LookupError, TypeError):
        return False
    return True


def shown(value: Any) -> str:
    """As an error tells of a value."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict | list | tuple):
        return f"{'a' if value else 'an empty'} {'table' if isinstance(value, dict) else 'list'}"
    shown = repr(value) if isinstance(value, str) else str(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
