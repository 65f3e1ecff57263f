"""The plan of a study, read from a TOML file: places (a text and a d), heads and seeds, part by part."""

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import pydantic

from uncork.lab.errors import LabError
from uncork.lab.experiments.study.run import Cell, is_kept
from uncork.lab.experiments.study.store import asked
from uncork.lab.run.files import os_errors
from uncork.lab.run.key import key_of
from uncork.lab.run.rows import Rows, outdated
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.head import parse_head
from uncork.messages import close_to

Place = tuple[str, int]
"""The name of a text, and d, the features of the output layer."""


class _Read(pydantic.BaseModel):
    """Base class of what is read from the file: unknown fields are refused, and instances cannot be changed."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Part(_Read):
    """A grid of runs: every text, d, head and seed.

    Attributes:
        heads: by their labels in tables, heads as the command line writes them, with "{d}" for the d of the place. The
            file may have a list of heads instead, which are then their own labels.
        grid: more heads, which are their own labels: every combination of `head` and its options, each given as a list.
        tuned: labels of the heads that take the best of their trials at each place.
        settings: fields of TrainConfig that all runs of this part have.
        test: whether numbers of the test split are kept.
    """

    about: str
    texts: tuple[str, ...]
    in_features: tuple[pydantic.PositiveInt, ...]
    seeds: tuple[pydantic.NonNegativeInt, ...]
    heads: dict[str, str] = {}
    grid: dict[str, tuple[str | bool | int | float, ...]] = {}
    tuned: tuple[str, ...] = ()
    settings: dict[str, Any] = {}
    test: bool = True

    @pydantic.field_validator("heads", mode="before")
    @classmethod
    def _called_what_they_are(cls, heads: object) -> object:
        return {head: head for head in heads} if isinstance(heads, list) else heads

    @pydantic.model_validator(mode="after")
    def _grid_names_its_heads(self) -> Self:
        if self.grid and "head" not in self.grid:
            raise ValueError(f"grid: expected head beside {', '.join(self.grid)}")
        return self

    @property
    def written(self) -> dict[str, str]:
        """The heads that are not tuned, by label: those of `heads`, then those of `grid`."""
        options = {name: [_written(value) for value in values] for name, values in self.grid.items() if name != "head"}
        heads = [
            f"{head}:{','.join(f'{name}={value}' for name, value in zip(options, values, strict=True))}".rstrip(":")
            for head in self.grid.get("head", ())
            for values in itertools.product(*options.values())
        ]
        return {**self.heads, **{head: head for head in heads}}

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its heads, the tuned ones first."""
        return (*self.tuned, *self.written)

    @property
    def own_model(self) -> bool:
        """Whether its model is not that of the rest of the study, whose measured costs then do not apply."""
        return not self.settings.keys().isdisjoint(("preset", "model_options"))

    @property
    def size(self) -> int:
        """The number of its runs."""
        return len(self.seeds) * len(self.texts) * len(self.in_features) * len(self.labels)

    def narrowed(self, **given: Sequence[Any] | int | None) -> Self:
        """The part restricted to the given heads, texts and in_features, and to the first `seeds` of its seeds.

        Raises:
            LabError: a value that the part does not have.
        """
        fields: dict[str, Any] = {name: value for name, value in given.items() if value}
        for name, has in (("heads", self.labels), ("texts", self.texts), ("in_features", self.in_features)):
            unknown = [value for value in fields.get(name, ()) if value not in has]
            if unknown:
                near = close_to(str(unknown[0]), map(str, has))
                raise LabError(f"{name.replace('_', '-')}: this part has {has}, got {unknown[0]!r}{near}")
        if "heads" in fields:
            wanted = fields["heads"]
            fields["tuned"] = tuple(label for label in wanted if label in self.tuned)
            fields["heads"] = {label: self.written[label] for label in wanted if label in self.written}
            fields["grid"] = {}
        if "seeds" in fields:
            fields["seeds"] = self.seeds[: fields["seeds"]]
        return self.model_copy(update=fields)


def _written(value: str | bool | int | float) -> str:
    """A value as the command line writes it."""
    return value if isinstance(value, str) else json.dumps(value)


class Plan(_Read):
    """A study.

    Attributes:
        base: fields of TrainConfig that all runs have. texts: by name, the fields of TrainConfig that select a text,
            and the digest (sha256) of that text.
        tuned_by: the part whose validation losses choose among the trials.
        trials: by label, the heads with settings, as the command line writes them, among which a tuned head chooses.
        controls: by label or name of a head, the labels of the heads that it is tested against.
    """

    base: dict[str, Any]
    texts: dict[str, dict[str, Any]]
    tuned_by: str
    trials: dict[str, tuple[str, ...]]
    controls: dict[str, tuple[str, ...]]
    parts: dict[str, Part]

    @classmethod
    def read(cls, path: Path) -> Self:
        """Reads a plan from a file. Raises LabError that names the file and the field that is wrong."""
        with os_errors(path, "cannot be read", "plan: "):
            data = path.read_bytes()
        try:
            return cls(**tomllib.loads(data.decode()))
        except ValueError as error:  # pydantic's errors too
            wrong = error.errors()[0] if isinstance(error, pydantic.ValidationError) else None
            said = str(error)
            if wrong is not None:  # errors of the whole plan have no loc: their message names the field
                said = ": ".join([*([".".join(map(str, wrong["loc"]))] if wrong["loc"] else []), wrong["msg"]])
                said = said.removeprefix("Value error, ")
            raise LabError(f"{path}: is no plan of a study: {said}") from error

    @pydantic.model_validator(mode="after")
    def _names_what_there_is(self) -> Self:
        for name, part in self.parts.items():
            for kind, used, there in (("texts", part.texts, self.texts), ("tuned", part.tuned, self.trials)):
                missing = [value for value in used if value not in there]
                if missing:
                    raise ValueError(f"parts.{name}.{kind}: there is no {missing[0]!r}, but {', '.join(there)}")
        for name, part in self.parts.items():
            twice = set(part.tuned) & part.written.keys()
            if twice:
                raise ValueError(f"parts.{name}: {min(twice)!r} stands in tuned and in heads")
        fields = {"base": self.base, **{f"texts.{name}": text for name, text in self.texts.items()}}
        for where, given in (fields | {f"parts.{n}.settings": p.settings for n, p in self.parts.items()}).items():
            elsewhere = given.keys() & {"head", "head_options", "seed", "in_features"}
            if elsewhere:
                raise ValueError(f"{where}: {min(elsewhere)} is not set here: each part has its own")
        if self.tuned_by not in self.parts:
            raise ValueError(f"tuned_by: there is no part {self.tuned_by!r}")
        if any("sha256" not in text for text in self.texts.values()):
            raise ValueError("texts: each needs its sha256")
        return self

    def part(self, name: str) -> Part:
        """The part of that name. Raises LabError, with the names there are, for any other."""
        if name not in self.parts:
            raise LabError(f"part: the plan has {', '.join(self.parts)}, got {name!r}{close_to(name, self.parts)}")
        return self.parts[name]

    def cells(self, part: Part, rows: Rows) -> list[Cell]:
        """The cells of a part, ordered by seed, so that a partly finished part covers all heads.

        Args:
            rows: the kept rows, by which the trials of tuned heads are chosen.

        Raises:
            LabError: a tuned head whose trials have not been run.
        """
        return [
            self._cell(part, rows, seed, (text, d), label)
            for seed, text, d, label in itertools.product(part.seeds, part.texts, part.in_features, part.labels)
        ]

    def tuned_cells(self, part: Part, rows: Rows) -> list[Cell]:
        """Those of `cells` at places where the trials of all tuned heads have been run."""
        found = []
        for text, d in itertools.product(part.texts, part.in_features):
            with suppress(LabError):
                found += self.cells(part.narrowed(texts=(text,), in_features=(d,)), rows)
        return found

    def kept_cells(self, part: Part, rows: Rows) -> list[Cell]:
        """Those of `cells` that have a row; others may not have been run or tuned yet."""
        return [cell for cell in self.tuned_cells(part, rows) if is_kept(cell, rows)]

    def _cell(self, part: Part, rows: Rows, seed: int, place: Place, label: str) -> Cell:
        head = self.chosen(rows, label, place) if label in part.tuned else part.written[label]
        config = self.config_of(head.replace("{d}", str(place[1])), place, seed, part.settings)
        return Cell(f"{place[0]} d={place[1]}", label, config, part.test, self.texts[place[0]]["sha256"])

    def config_of(self, head: str, place: Place, seed: int, settings: Mapping[str, Any]) -> TrainConfig:
        """The settings of one run."""
        name, options, own = parse_head(head)
        text = {key: value for key, value in self.texts[place[0]].items() if key != "sha256"}
        fields: dict[str, Any] = {**self.base, **text, "in_features": place[1], **settings, **own}
        return TrainConfig.of(head=name, head_options=options, seed=seed, **fields)

    def chosen(self, rows: Rows, label: str, place: Place) -> str:
        """The trial of this head with the lowest validation cross-entropy at this place.

        Raises:
            LabError: not all of its trials are kept.
        """
        losses = {trial: self._validation(rows, trial, place) for trial in self.trials[label]}
        return min(losses, key=losses.__getitem__)

    def _validation(self, rows: Rows, trial: str, place: Place) -> float:
        """The validation cross-entropy of a trial at a place, mean over the seeds of the part `tuned_by`."""
        part = self.parts[self.tuned_by]
        losses = []
        for seed in part.seeds:
            config = self.config_of(trial, place, seed, part.settings)
            record = config.record({"sha256": self.texts[place[0]]["sha256"]})
            row = rows.get(key_of(record))
            if row is None:
                reasons = "".join(f" ({reason})" for reason in outdated([record], rows, asked))
                raise LabError(
                    f"part {self.tuned_by}: {trial} at {place[0]} d={place[1]} has not been run{reasons}; "
                    f"run `uncork study --part {self.tuned_by}`"
                )
            losses.append(float(row["result"]["valid"]["cross_entropy"]))
        return sum(losses) / len(losses)
