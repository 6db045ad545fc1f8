"""Questions and records from files of JSON: what is plainly meant is taken, all else named by file, line and field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class Written(float):
    """A number that remembers how it was written: 45.00."""

    def __new__(cls, text: str) -> Written:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


Corners = tuple[float, float, float, float]


@dataclass(frozen=True)
class Row:
    """One object of a file.

    Args:
        place: file and line, or file and number in its array. number: of the line or entry, from 1 on.
        fields: name -> value.
    """

    place: str
    number: int
    fields: dict[str, Any]

    def refuse(self, field: str, must: str) -> ValueError:
        """What to raise: the field must be so, and is not."""
        return ValueError(f"{self.place}: {field} must be {must}, got {json.dumps(self.fields.get(field))[:200]}")

    def text(self, field: str) -> str:
        """Text that must be there; numbers count as they are written."""
        value = self.fields.get(field)
        if _is_number(value):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise self.refuse(field, "text")
        return value

    def texts(self, field: str) -> tuple[str, ...]:
        """A text, a number or a list of these; none where the field is missing, null or empty."""
        value = self.fields.get(field)
        values = value if isinstance(value, list) else [] if value is None or value == "" else [value]
        if not all(isinstance(one, str) or _is_number(one) for one in values):
            raise self.refuse(field, "text, a number or a list of these")
        return tuple(map(str, values))

    def box(self, field: str) -> Corners | None:
        """Four numbers x0, y0, x1, y1; None where the field is missing or null."""
        value = self.fields.get(field)
        if value is None or value == []:
            return None
        return self._corners(field, value)

    def boxes(self, field: str) -> tuple[Corners, ...] | None:
        """A list of boxes; None where the field is null. It must be there."""
        value = self.fields.get(field, "nothing")
        if value is None:
            return None
        if not isinstance(value, list) or not value:
            raise self.refuse(field, "a list of boxes [x0, y0, x1, y1], or null")
        return tuple(self._corners(field, box) for box in value)

    def file(self, field: str, folder: Path) -> Path:
        """An existing file, named relative to a folder."""
        path = folder / self.text(field)
        if not path.is_file():
            raise self.refuse(field, f"an existing file, as seen from {folder}")
        return path

    def _corners(self, field: str, value: Any) -> Corners:
        if not isinstance(value, list) or len(value) != 4 or not all(map(_is_number, value)):
            raise self.refuse(field, "four numbers x0, y0, x1, y1")
        return tuple(map(float, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def rows(path: Path) -> Iterator[Row]:
    """The objects of a file: one a line, blank lines apart, or one array of them.

    Args:
        path: UTF-8, with or without a byte order mark.
    Raises:
        ValueError: bytes that are no UTF-8, a line that is no JSON object; names file and line.
    """
    data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if data.lstrip()[:1] == b"[":
        try:
            entries = json.loads(data, parse_float=Written)
        except ValueError as error:
            raise ValueError(f"{path}: must be a JSON array or one JSON object a line: {error}") from error
        for number, entry in enumerate(entries, 1):
            yield _row(f"{path}, entry {number}", number, entry)
        return
    for number, line in enumerate(data.split(b"\n"), 1):  # no other break of a line ends one in JSON
        if line.strip():
            try:
                entry = json.loads(line.decode("utf-8"), parse_float=Written)
            except ValueError as error:  # also UnicodeDecodeError
                raise ValueError(f"{path}:{number}: must be one JSON object: {error}") from error
            yield _row(f"{path}:{number}", number, entry)


def _row(place: str, number: int, entry: Any) -> Row:
    if not isinstance(entry, dict):
        raise ValueError(f"{place}: must be a JSON object, got {json.dumps(entry)[:200]}")
    return Row(place, number, entry)
