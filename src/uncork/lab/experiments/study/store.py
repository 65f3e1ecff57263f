"""What is kept of a finished run of the study."""

from collections.abc import Mapping
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.run.files import plain, read_json
from uncork.lab.run.key import RECORD, key_of
from uncork.lab.run.provenance import current_commit
from uncork.lab.run.rows import rounded
from uncork.lab.run.store import Run
from uncork.lab.train.config import TrainConfig

_POINTS = 5  # of the 201 points of a function, every fifth is kept


def asked(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings that a row's config asks for, in this version's form; unchanged if this version cannot read them."""
    try:
        return TrainConfig.from_dict(dict(config)).asked()
    except LabError:
        return config


def row_of(run: Run, config: TrainConfig, *, keep_test: bool) -> dict[str, Any]:
    """The row of a finished run (see `uncork.lab.run.rows`) with its numbers, to 6 significant digits.

    Args:
        keep_test: False leaves out every number of the test split, so that nothing can be chosen by it; the loss of the
            training text is kept.
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
    found = read_json(run.path / "analysis.json")
    own = {"analysis": _analysis(found)} if keep_test else {"train_cross_entropy": found["train_cross_entropy"]}
    kept: dict[str, Any] = rounded(plain({**row, **own}))
    return kept


def _analysis(found: dict[str, Any]) -> dict[str, Any]:
    """The part of analysis.json that tables and figures read."""
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
