"""The study's finished runs: one JSON object a line, so that a row is kept the moment its run ends."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.experiments.bench.tables import current_commit
from uncork.lab.run.files import os_errors, plain, read_json
from uncork.lab.run.key import RECORD, differences, flat, key_of, told
from uncork.lab.run.store import Run
from uncork.lab.train.config import TrainConfig

Rows = Mapping[str, Mapping[str, Any]]
"""Kept rows by their keys."""
_DIGITS = 6
_POINTS = 5  # of the 201 points of a function, every fifth is kept


def outdated(wanted: Iterable[tuple[TrainConfig, str]], rows: Rows) -> list[str]:
    """What keeps rows from being taken for the runs that they were asked for as, one line a reason.

    Args:
        wanted: the settings and the text's digest of each run that has no row under its key.
    """
    by_asked = {json.dumps(flat(_asked(row)), sort_keys=True): row for row in rows.values() if "config" in row}
    reasons: dict[str, int] = {}
    for config, text in wanted:
        row = by_asked.get(json.dumps(flat(config.asked()), sort_keys=True))
        if row is not None:
            was = {**row["record"], "asked": row["config"]}
            reason = told(differences(was, config.record({"sha256": text})))
            reasons[reason] = reasons.get(reason, 0) + 1
    return [f"{count} kept runs do not count: {reason}" for reason, count in reasons.items() if reason]


def _asked(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the run of a row was asked for, as this version says it; one whose head is gone, as it was kept."""
    try:
        return TrainConfig.from_dict(row["config"]).asked()
    except LabError:
        return dict(row["config"])


class RowStore:
    """The file FOLDER/rows.jsonl. A last line that a killed process left unfinished counts as none.

    Raises:
        LabError: the file cannot be read, or a line of it is damaged (the message has its number).
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "rows.jsonl"

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
        """Keep a row. What a killed process left of the last line is taken off first."""
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
                file.write(json.dumps(rounded(plain(row))).encode() + b"\n")


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


def row_of(run: Run, config: TrainConfig, *, keep_test: bool) -> dict[str, Any]:
    """What is kept of a finished run: what was asked for (`config`), all that decides its numbers (`record`, of which
    the key is a digest), and the numbers.

    Args:
        keep_test: False leaves out every number of the test split, so that nothing can be chosen by it.
    """
    result, metrics = run.result, run.metrics()
    assert result is not None
    valid = [row for row in metrics if row["kind"] == "valid"]
    record = run.config[RECORD]
    row = {
        "key": key_of(record),
        "config": config.asked(),
        "record": {name: value for name, value in record.items() if name != "asked"},
        "commit": current_commit(),
        "result": {k: v for k, v in result.items() if keep_test or k != "test"},
        "history": [[r["epoch"], r["cross_entropy"]] for r in valid],
        "slopes": [r["slopes"] for r in valid if "slopes" in r],
    }
    return {**row, "analysis": _analysis(run)} if keep_test else row


def _analysis(run: Run) -> dict[str, Any]:
    """The part of analysis.json that tables and figures read."""
    found = read_json(run.path / "analysis.json")
    function = found["function"]
    return {
        "train_cross_entropy": found["train_cross_entropy"],
        "rank": {k: v for k, v in found["rank"].items() if k != "singular_values"},
        "function": function and {k: v[::_POINTS] for k, v in function.items()},
        "scores": found["histogram"]["quantiles"],
        "target_scores": found["histogram"]["target_quantiles"],
        "deciles": found["deciles"],
        "entropy": found["entropy"],
    }
