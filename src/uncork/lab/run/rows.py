"""The kept rows of finished runs: a file of one JSON object a line, to which each run adds a row when it ends.

A row holds at least

    key       the digest of everything that decides its numbers (`uncork.lab.run.key`)
    config    the settings as they were asked for
    record    everything that decides its numbers; the key is its digest
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.run.files import os_errors, plain
from uncork.lab.run.key import differences, flat, told

Rows = Mapping[str, Mapping[str, Any]]
"""Kept rows by their keys."""
_DIGITS = 6


class RowStore:
    """The file FOLDER/NAME. A last line that a killed process left unfinished is ignored.

    Raises:
        LabError: the file cannot be read, or a line of it is damaged (the message has its number).
    """

    def __init__(self, folder: Path, name: str = "rows.jsonl") -> None:
        self.path = folder / name

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by their keys, in the order in which they were kept."""
        if not self.path.exists():
            return {}
        with os_errors(self.path, "cannot be read"):
            *lines, rest = self.path.read_text(encoding="utf-8").split("\n")
        found = {}
        for number, line in enumerate([*lines, *([rest] if _parsed(rest) else [])], start=1):
            row = _parsed(line)
            if row is None:
                raise LabError(f"{self.path}: line {number} is damaged: {line[:60]!r}")
            found[row["key"]] = row
        return found

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. A last line that a killed process left unfinished is removed first."""
        import fcntl  # not on Windows, where no run can be trained (see Run.lock) and kept rows can still be read

        with os_errors(self.path, "cannot be written"):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                data = file.read()
                whole = data.rfind(b"\n") + 1
                if data[whole:]:
                    unfinished = _parsed(data[whole:].decode(errors="replace")) is None
                    file.truncate(whole) if unfinished else file.write(b"\n")
                file.write(json.dumps(plain(row)).encode() + b"\n")


def outdated(
    wanted: Iterable[Mapping[str, Any]],
    rows: Rows,
    asked: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: config,
) -> list[str]:
    """Why kept rows do not count for wanted runs of the same given settings, one line a reason.

    Args:
        wanted: the records, with `asked`, of the runs that have no row under their keys.
        asked: turns a row's config into the form that `asked` has in `wanted`.
    """
    was = {_canonical(asked(row["config"])): row for row in rows.values() if "config" in row}
    reasons: dict[str, int] = {}
    for record in wanted:
        row = was.get(_canonical(record["asked"]))
        if row is not None:
            reason = told(differences({**row["record"], "asked": asked(row["config"])}, record))
            reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} kept runs do not count: {reason}" for reason, count in reasons.items() if reason]


def _canonical(asked: Mapping[str, Any]) -> str:
    return json.dumps(flat(asked), sort_keys=True)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and "key" in row else None


def rounded(value: Any) -> Any:
    """JSON with its floats cut to 6 significant digits.

    >>> rounded({"a": [0.123456789, 3]})
    {'a': [0.123457, 3]}
    """
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, list) else value
