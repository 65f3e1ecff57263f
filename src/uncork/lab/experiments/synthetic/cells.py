"""One cell of the experiment (targets, sizes, head, seed and fitting) and the row that running it gives."""

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from uncork.heads import HEAD_NAMES, Head, HeadSpec, build_head
from uncork.lab.data.corpora import load_corpus
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import targets
from uncork.lab.experiments.synthetic.fitting import Fit, Fitting, fit, start
from uncork.lab.experiments.synthetic.targets import Targets
from uncork.lab.run.key import key_of
from uncork.lab.train.config import text_record
from uncork.lab.train.head import parse_head
from uncork.logit_functions import LogitFunction
from uncork.messages import close_to

RULES = 1
"""Version of how targets, starts and fits are computed: to be raised when the same settings would give other numbers.
Rows of earlier versions then do not count.

1: version 0.1.0 and after.
"""
_QUANTILES, _CURVE_POINTS = 201, 400


@dataclass(frozen=True)
class Cell:
    """One fit.

    Attributes:
        target: dirichlet:BETA, sharpened:BETA:POWER, known-rank:RANK, planted:HEAD:FEATURES, modes:NUMBER, or sotu.
        head: a head and its options, as plif:num_pieces=50; `equal_parameters=true` among them narrows it until it has
            no more parameters, its contexts included, than a softmax of `in_features`.

    Raises:
        LabError: settings that cannot be run.
    """

    target: str
    num_contexts: int
    num_words: int
    in_features: int
    head: str
    seed: int
    fitting: Fitting

    def __post_init__(self) -> None:
        for name in ("num_contexts", "num_words", "in_features"):
            if getattr(self, name) < 1:
                raise LabError(f"{name.replace('_', '-')}: expected at least 1, got {getattr(self, name)}")
        self._check_target()
        _ = self.resolved  # refuses what cannot be built

    @functools.cached_property
    def key(self) -> str:
        """The key of its row; cells that differ in anything that decides their numbers have different keys."""
        return key_of(self.record())

    @property
    def title(self) -> str:
        """The text that stands for it in progress lines."""
        return f"{self.target} M={self.num_words} d={self.in_features} seed {self.seed} {self.head}"

    def record(self) -> dict[str, Any]:
        """Everything that decides its numbers; see `uncork.lab.run.key`.

        Raises:
            LabError: the text of its targets cannot be read.
        """
        name, options, features = self.resolved
        with torch.device("meta"):
            head = build_head(name, features, self.num_words, **{"bias": False, **options}).spec()
        settings = {key: value for key, value in self.to_dict().items() if key != "head"}
        record = {"rules": RULES, "settings": settings, "head": head, "asked": self.to_dict()}
        return {**record, "text": {"sha256": _sotu_digest()}} if self.target == "sotu" else record

    def to_dict(self) -> dict[str, Any]:
        """The fields, as types that JSON has."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The cell that `to_dict` wrote."""
        return cls(**{**values, "fitting": Fitting.from_dict(values["fitting"])})

    @functools.cached_property
    def resolved(self) -> tuple[str, dict[str, Any], int]:
        """The head's name, its options, and its number of features, to which `equal_parameters=true` narrows it.

        Raises:
            LabError: a head that `build_head` would refuse.
        """
        name, options, settings = parse_head(self.head)
        if settings:
            raise LabError(f"heads: {', '.join(settings)} belongs to training on text, got {self.head!r}")
        equal = options.pop("equal_parameters", False)
        if not isinstance(equal, bool):
            raise LabError(f"heads: expected equal_parameters=true or false, got {self.head!r}")
        if name not in HEAD_NAMES:
            near = close_to(name, HEAD_NAMES)
            raise LabError(f"heads: expected some of {', '.join(HEAD_NAMES)}, got {name!r}{near}")
        try:
            features = self.in_features
            most = self._parameters("softmax", features, {}) if equal else math.inf
            while (found := self._parameters(name, features, options)) > most and features > 1:
                features -= 1
            if found > most:
                raise LabError(f"heads: {self.head} has more parameters than a softmax even with one feature")
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # torch's, for sizes it cannot hold
            raise LabError(f"heads: {self.head}: {str(error).splitlines()[0]}") from error
        return name, options, features

    @property
    def memory(self) -> float:
        """Bytes that it needs, roughly: targets, a chunk of scores, the measures in float64, and Adam's state."""
        name, options, features = self.resolved
        components = int(HeadSpec(name, options).resolved.get("num_components", 1))
        return self.num_contexts * self.num_words * (40 + 24 * components) + 24 * self._parameters(
            name, features, options
        )

    def _check_target(self) -> None:
        kind, rest = _read_target(self.target)
        most = {"known-rank": min(self.num_contexts, self.num_words), "modes": self.num_words}
        if kind in most and int(rest[0]) > most[kind]:
            raise LabError(f"targets: expected at most {most[kind]} in {kind} with these sizes, got {self.target!r}")
        if kind == "planted" and rest[0] not in targets.PLANTED_OPTIONS:
            raise LabError(
                f"targets: expected one of {', '.join(targets.PLANTED_OPTIONS)} planted, got {self.target!r}"
            )

    def _parameters(self, name: str, features: int, options: dict[str, Any]) -> int:
        with torch.device("meta"):
            head = build_head(name, features, self.num_words, **{"bias": False, **options})
        return _count(head) + self.num_contexts * features

    def make_targets(self) -> Targets:
        """The distributions that the head has to model; the same for all heads of a seed."""
        kind, rest = _read_target(self.target)
        n, m = self.num_contexts, self.num_words
        if kind == "dirichlet":
            return targets.dirichlet(n, m, float(rest[0]), self.seed)
        if kind == "sharpened":
            return targets.sharpened(targets.dirichlet(n, m, float(rest[0]), self.seed), float(rest[1]))
        if kind == "known-rank":
            return targets.known_rank(n, m, int(rest[0]), self.seed)
        if kind == "planted":
            return targets.planted(rest[0], n, m, int(rest[1]), self.seed)
        if kind == "modes":
            return targets.several_modes(n, m, int(rest[0]), self.seed)
        return targets.sotu_targets(n, m)

    def build(self, found: Targets) -> tuple[Head, Tensor]:
        """The head and its contexts (N, features), at their random start."""
        name, options, features = self.resolved
        return start(name, found, features, self.seed, options)


def run_cell(cell: Cell) -> dict[str, Any]:
    """Fits a cell; returns its "row", and the "function" of its head or None, as types that JSON has.

    Raises:
        LabError: the targets cannot be made, or the loss became nan.
    """
    found = cell.make_targets()
    head, contexts = cell.build(found)
    outcome = fit(found, head, contexts, cell.fitting)
    row = {
        **{k: v for k, v in cell.to_dict().items() if k != "fitting"},
        "entropy": found.entropy,
        **dataclasses.asdict(outcome.measures),
        "converged": outcome.converged,
        "steps": outcome.steps,
        "last_gain": outcome.last_gain,
        "parameters": _count(head) + contexts.numel(),
        "width": contexts.shape[1],
        "seconds": round(outcome.seconds, 2),
        **cell.fitting.to_dict(),
    }
    return {"row": row, "function": _curve(outcome)}


@functools.cache
def _sotu_digest() -> str:
    """The digest of the text whose words `targets.sotu_targets` counts."""
    digest: str = text_record(load_corpus("sotu", min_count=2))["sha256"]
    return digest


def _count(head: Head) -> int:
    return sum(p.numel() for p in head.parameters() if p.requires_grad)


@torch.no_grad()
def _curve(outcome: Fit) -> dict[str, list[float]] | None:
    """The function and its slope at points x, and 201 quantiles of the scores; None for a head without a function.

    x are the lowest score, and evenly spaced points from the 5 % quantile to the highest score. The lowest 5 % are
    often far below the others, where the function is a straight line.
    """
    function = outcome.head.logit_function
    if not isinstance(function, LogitFunction):
        return None
    scores = outcome.head.double().scores(outcome.contexts.double()).flatten()
    quantiles = torch.linspace(0, 1, _QUANTILES, dtype=torch.float64)
    at = torch.from_numpy(np.quantile(scores.numpy(), quantiles.numpy()))
    low = float(at[_QUANTILES // 20])
    x = torch.cat([at[:1], torch.linspace(low, float(at[-1]), _CURVE_POINTS, dtype=torch.float64)])
    curve = {"x": x, "f": function(x), "slope": function.derivative(x), "scores": at}
    return {name: values.tolist() for name, values in curve.items()}


def _read_target(text: str) -> tuple[str, list[str]]:
    """The kind of targets and its arguments. Raises LabError for anything else."""
    kind, *rest = text.split(":")
    kinds: dict[str, tuple[type, ...]] = {
        "dirichlet": (float,), "sharpened": (float, float), "known-rank": (int,), "planted": (str, int),
        "modes": (int,), "sotu": (),
    }  # fmt: skip
    if kind not in kinds or len(rest) != len(kinds[kind]):
        expected = "dirichlet:BETA, sharpened:BETA:POWER, known-rank:RANK, planted:HEAD:FEATURES, modes:NUMBER or sotu"
        raise LabError(f"targets: expected {expected}, got {text!r}")
    for value, wanted in zip(rest, kinds[kind], strict=True):
        try:
            good = wanted is str or (math.isfinite(wanted(value)) and wanted(value) > 0)
        except ValueError:
            good = False
        if not good:
            raise LabError(f"targets: expected a number above 0 in {kind}, got {text!r}")
    return kind, rest
