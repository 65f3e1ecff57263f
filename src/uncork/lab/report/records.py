"""The runs of a comparison with their settings, labels, results and analyses, each file read once."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from uncork.heads import HeadSpec
from uncork.heads.spec import titled, value_text
from uncork.lab.report.statistics import BASELINE
from uncork.lab.run.files import read_json
from uncork.lab.run.store import Run
from uncork.lab.train.config import TrainConfig

__all__ = ["Record", "read_records"]

_BEFORE = {"output_lr_scale": 1.0}
"""Settings that config files of version 0.1.0 lack, with the values that it used."""


@dataclass(frozen=True)
class Record:
    """One run: what it is called in this comparison, how it was trained, and what came of it."""

    run: Run
    label: str
    settings: Mapping[str, Any]
    """The fields of TrainConfig in their order, nested ones joined by dots, with the defaults of the head's options and
    of fields that the run's version did not have. Left out are the head, the seed, fields that no number depends on,
    and other keys of config.json."""
    result: Mapping[str, Any] | None
    """None if the run has not finished."""
    analysis: Mapping[str, Any] | None
    """What its head does on held-out text; None where the run has not finished or was not analysed."""

    @property
    def head(self) -> str:
        """The name of its head, without the settings that the label adds in brackets."""
        return _head(self.run)

    @property
    def seed(self) -> Any:
        """The seed in its config.json."""
        return self.run.config.get("seed")


def read_records(runs: Sequence[Run]) -> list[Record]:
    """The records of runs that are compared with one another, in the order given.

    Raises:
        LabError: a run is damaged.
    """
    settings = [_settings(run.config) for run in runs]
    labels = _labels([_head(run) for run in runs], settings)
    results = [run.result for run in runs]
    analyses = [_analysis(run, result) for run, result in zip(runs, results, strict=True)]
    return [Record(*parts) for parts in zip(runs, labels, settings, results, analyses, strict=True)]


def _head(run: Run) -> str:
    return str(run.config.get("head", "?"))


def _analysis(run: Run, result: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The analysis in the run's result, else in its analysis.json; None if there is none."""
    if result is None:
        return None
    inside = result.get("analysis")
    if isinstance(inside, dict) and inside:
        return inside
    path = run.path / "analysis.json"
    return read_json(path) if path.exists() else None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    known = [name for name in TrainConfig.of().to_dict() if name not in ("head", "seed")]
    values = {**_BEFORE, **config, "head_options": _head_options(config)}
    return _flatten({name: values[name] for name in known if name in values})


def _head_options(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The head's options, with the defaults if this version knows the head and its options."""
    options: Mapping[str, Any] = config.get("head_options") or {}
    try:
        return HeadSpec(str(config.get("head")), options).resolved
    except (TypeError, ValueError):
        return options


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping as one, with keys joined by dots.

    >>> _flatten({"head": "plif", "training": {"lr": 0.1}})
    {'head': 'plif', 'training.lr': 0.1}
    """
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _labels(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The label of each run's output layer: its head, and in brackets the settings that are not the usual ones.

    The usual value of an option that only this head has is its default. That of a setting which every head has (scale,
    bias, settings of the training) is the value that most heads of the comparison have; if two values are tied, it is
    the default, if there is one. So a softmax with the others' settings is "softmax", beside a
    "softmax (in_features=20)".
    """
    distinct = {titled(name, own): own for name, own in zip(names, settings, strict=True)}
    usual = _usual(list(distinct.values()))
    labels = []
    for name, own in zip(names, settings, strict=True):
        defaults = _head_options({"head": name})
        expected = {f"head_options.{option}": value_text(value) for option, value in defaults.items()} | usual
        telling = {key: value for key, value in own.items() if value_text(value) != expected.get(key)}
        ends = [key.rpartition(".")[2] for key in telling]
        short = (end if ends.count(end) == 1 else key for key, end in zip(telling, ends, strict=True))
        labels.append(titled(name, dict(zip(short, telling.values(), strict=True))))
    return labels


def _usual(heads: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    """For each setting that every head can have, the commonest value as text; if two are tied, its default or None."""
    shared = {f"head_options.{option}": value_text(value) for option, value in HeadSpec(BASELINE).defaults.items()}
    keys = {key: None for own in heads for key in own if not key.startswith("head_options.") or key in shared}
    usual: dict[str, str | None] = {}
    for key in keys:
        common = Counter(value_text(own.get(key)) for own in heads).most_common(2)
        tied = len(common) == 2 and common[0][1] == common[1][1]
        usual[key] = shared.get(key) if tied else common[0][0]
    return usual
