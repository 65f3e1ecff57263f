"""Fits a head and free contexts to given distributions, by full-batch training until it has converged."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from uncork.heads import Head, build_head
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic.targets import Targets
from uncork.lab.run.progress import Meter

_WARM_UP = 0.05  # share of a round's steps
_LEAST_KL = 0.05
_LARGEST = 1e30  # limit of learning rates and tolerance, well within float32
_MOST_ROUNDS = 20  # together as long as a million first rounds
_LEAST_ROUNDS = 3  # a function that has hardly moved yet may look converged
_POLISHING = 500  # iterations of L-BFGS


@dataclass(frozen=True)
class Fitting:
    """How long to train, and with which learning rates.

    Training goes in rounds of Adam over all contexts at once: each round warms up, then lets the learning rates fall
    along a cosine to 0, and is twice as long as the one before. It has converged when a round, which doubles all the
    work so far, changes the KL divergence by less than the fraction `tolerance` of it (of 0.05 nats, if it is lower),
    in the third round at the earliest. A round that ends with a higher loss than the one before is undone.
    """

    learning_rate: float = 0.1
    """The highest learning rate in a round, for contexts, words, bias and the parameters of a mixture."""
    function_scale: float = 0.1
    """The learning rate of the logit function's parameters, as a multiple of `learning_rate`."""
    first_round: int = 250
    """Steps of the first round."""
    rounds: int = 4
    """The largest number of rounds: 4 rounds have 15 times the steps of the first."""
    tolerance: float = 0.02
    """Rounds follow while each changes the KL divergence by at least this fraction of it (or of 0.05 nats)."""
    optimizer: Literal["adam", "adam-short", "lbfgs"] = "adam"
    """adam-short: Adam with a shorter memory, betas of 0.8 and 0.95. lbfgs: Adam, then L-BFGS in float64 from
    Adam's result."""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "function_scale", "tolerance"):
            value = getattr(self, name)
            if not 0 < value <= _LARGEST:
                raise LabError(
                    f"{name.replace('_', '-')}: expected a number above 0, {_LARGEST:g} at most, got {value}"
                )
        for name in ("first_round", "rounds"):
            most = _MOST_ROUNDS if name == "rounds" else 10**9
            if not 1 <= getattr(self, name) <= most:
                raise LabError(f"{name.replace('_', '-')}: expected 1 to {most:,}, got {getattr(self, name)}")

    @property
    def most_steps(self) -> int:
        """The most steps that all rounds can have; an iteration of L-BFGS counts as three, since float64 is slower."""
        return self.first_round * (2**self.rounds - 1) + 3 * _POLISHING * (self.optimizer == "lbfgs")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as types that JSON has."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings that `to_dict` wrote."""
        return cls(**values)


@dataclass(frozen=True)
class Measures:
    """How well a head fits its targets: nats, but mode_matching in percent; computed in float64."""

    cross_entropy: float
    kl: float
    mode_matching: float
    largest_score: float


@dataclass(frozen=True)
class Fit:
    """The result of one fit: the trained head and its contexts (N, in_features)."""

    head: Head
    contexts: Tensor
    measures: Measures
    converged: bool
    steps: int
    last_gain: float
    """Nats by which the last round lowered the cross-entropy; nan if it was the only one."""
    seconds: float


def start(
    head_name: str, targets: Targets, in_features: int, seed: int, options: dict[str, Any]
) -> tuple[Head, Tensor]:
    """A head with `options` and contexts (N, in_features), initialised at random, in float32.

    Words are drawn from N(0, 1), contexts from N(0, 0.01): the scores begin near 0, so every head begins near the
    uniform distribution, and the words begin far apart.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_head(head_name, in_features, targets.num_words, **{"bias": False, **options})
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        contexts = 0.1 * torch.randn(targets.num_contexts, in_features, generator=generator)
    return head, contexts


def fit(
    targets: Targets,
    head: Head,
    contexts: Tensor,
    fitting: Fitting,
    *,
    fixed: tuple[nn.Parameter, ...] = (),
    after_round: Callable[[int, float], None] | None = None,
) -> Fit:
    """Minimises the mean cross-entropy over contexts, words, bias and function; trains the head in place.

    Args:
        targets: what is to be modelled. head, contexts: as `start` makes them, or in float64.
        fixed: parameters of the head that do not train.
        after_round: called after each round with the steps so far and the cross-entropy.

    Raises:
        LabError: the loss became nan or inf.
    """
    began = time.perf_counter()
    contexts = contexts.clone().requires_grad_()
    wanted = targets.probabilities.to(contexts.dtype)
    groups = _groups(head, contexts, fitting, {id(p) for p in fixed})
    trained = [p for group in groups for p in group["params"]]
    meter = Meter("fitting, at most")
    steps, before, gain, converged = 0, math.inf, math.nan, False
    for number in range(fitting.rounds):
        length, kept = fitting.first_round * 2**number, [p.detach().clone() for p in trained]
        loss = _adam_round(head, contexts, wanted, groups, fitting, length, steps, meter)
        steps += length
        gain = before - loss if number else math.nan
        enough = abs(gain) < fitting.tolerance * max(min(before, loss) - targets.entropy, _LEAST_KL)
        converged = enough and number + 1 >= _LEAST_ROUNDS
        if after_round is not None:
            after_round(steps, loss)
        if gain < 0:
            _restore(trained, kept)
        if converged:
            break
        before = min(before, loss)
    if fitting.optimizer == "lbfgs":
        head, contexts = _polish(head, contexts, targets, groups)
    contexts, seconds = contexts.detach(), time.perf_counter() - began
    measures = measure(head, contexts, targets)
    if not math.isfinite(measures.cross_entropy):
        raise LabError(f"the cross-entropy became {measures.cross_entropy}: try a smaller learning rate")
    return Fit(head, contexts, measures, converged, steps, gain, seconds)


@torch.no_grad()
def measure(head: Head, contexts: Tensor, targets: Targets) -> Measures:
    """Cross-entropy, KL to the targets, the share of contexts with the right likeliest word, the largest |score|."""
    wide = _in_float64(head)
    log_prob = wide(contexts.double()).log_softmax(-1)
    truth = targets.probabilities
    terms = torch.where(truth > 0, truth * log_prob, 0.0)
    cross_entropy = -float(terms.sum(-1).mean())
    predicted = wide.predict(contexts.double()).unsqueeze(-1)
    right = truth.gather(-1, predicted).squeeze(-1) == truth.amax(-1)  # if several words are likeliest, each is right
    return Measures(
        cross_entropy=cross_entropy,
        kl=cross_entropy - targets.entropy,
        mode_matching=100 * float(right.double().mean()),
        largest_score=float(wide.scores(contexts.double()).abs().max()),
    )


def _in_float64(head: Head) -> Head:
    return copy.deepcopy(head).double()


def _groups(head: Head, contexts: Tensor, fitting: Fitting, fixed: set[int]) -> list[dict[str, Any]]:
    """The optimiser's groups: all other parameters, then the function's; "top" is the highest rate in a round."""
    function = [] if head.logit_function is None else list(head.logit_function.parameters())
    own = {id(p) for p in function}
    trained = [p for p in head.parameters() if p.requires_grad and id(p) not in fixed]
    rate = fitting.learning_rate
    groups = [
        {"params": [contexts, *(p for p in trained if id(p) not in own)], "top": rate},
        {"params": [p for p in trained if id(p) in own], "top": rate * fitting.function_scale},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def _restore(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _adam_round(
    head: Head,
    contexts: Tensor,
    wanted: Tensor,
    groups: list[dict[str, Any]],
    fitting: Fitting,
    length: int,
    before: int,
    meter: Meter,
) -> float:
    """One round from where the last one ended, after `before` steps; returns the cross-entropy before its last step."""
    betas = (0.8, 0.95) if fitting.optimizer == "adam-short" else (0.9, 0.999)
    optimizer = torch.optim.Adam([dict(group) for group in groups], lr=0.0, betas=betas)
    loss = torch.zeros(())
    for step in range(length):
        meter(before + step, fitting.most_steps)
        factor = min(1.0, (step + 1) / (_WARM_UP * length)) * (1 + math.cos(math.pi * step / length)) / 2
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * factor
        optimizer.zero_grad()
        loss = head.loss(contexts, wanted)
        loss.backward()
        optimizer.step()
    value = float(loss.detach())
    if not math.isfinite(value):
        raise LabError(f"the cross-entropy became {value}: try a smaller learning rate")
    return value


def _polish(head: Head, contexts: Tensor, targets: Targets, groups: list[dict[str, Any]]) -> tuple[Head, Tensor]:
    """Copies of head and contexts in float64, trained on from Adam's result by L-BFGS with a line search."""
    trained = {id(p) for group in groups for p in group["params"]}
    wide = _in_float64(head)
    for old, new in zip(head.parameters(), wide.parameters(), strict=True):
        new.requires_grad_(id(old) in trained)
    contexts = contexts.detach().double().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [contexts, *(p for p in wide.parameters() if p.requires_grad)],
        max_iter=_POLISHING, history_size=20, tolerance_grad=0.0, tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        loss = wide.loss(contexts, targets.probabilities)
        loss.backward()
        return float(loss.detach())

    optimizer.step(closure)
    return wide, contexts
