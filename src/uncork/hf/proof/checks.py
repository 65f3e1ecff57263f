"""The checks of `uncork.hf.verify`, each against the reference of a `Problem`.

Shapes in comments: B batch, T time, S steps, N tokens, D features, V vocabulary, U words left of it.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig

from uncork.hf.proof.candidates import nearest
from uncork.hf.proof.drive import Drive, Steps
from uncork.hf.proof.gradients import Gradients
from uncork.hf.proof.problem import IGNORED, Problem, directions
from uncork.hf.proof.reference import cross_entropy, loss_tolerance
from uncork.hf.proof.verification import Row, Worst, left_out, raised

FORWARD = "logits without labels", "what the model returns without labels is not f(W h + b)"
LABELLED = "logits with labels", "what the model returns beside its loss is not f(W h + b)"
TRAINING = "training loss", "the loss that it is trained on is not the cross-entropy of its own logits"
EVALUATION = "evaluation loss", "the loss that it is evaluated by is not the cross-entropy of its own logits"
COUNT = (
    "loss with num_items_in_batch",
    "the sum over tokens is not divided by the given number: accumulated steps differ",
)
GENERATED = "logits of generate", "what it samples from is not f(W h + b)"
SAMPLED = "log-probabilities of generate", "the log-probabilities of sampled words are not those of its own logits"
GIVEN = "the given loss", "it is not the cross-entropy of this model's logits"
_COUNT, _STEPS = 7, 4


def logits_of(outputs: Any) -> Tensor | None:
    """The logits among a forward's outputs, in float64 on the CPU; None if there are none."""
    found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, tuple):
        found = next((value for value in outputs if isinstance(value, Tensor) and value.ndim > 1), None)
    if found is None:
        return None
    with torch.no_grad():  # where they are computed only now
        return cast(Tensor, found.detach().double()).cpu()


def loss_of(outputs: Any) -> Tensor:
    """The loss among a forward's outputs. Raises TypeError if there is none."""
    loss = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.ndim:
        raise TypeError("the forward with labels returned no loss")
    return loss


def compare_logits(name: tuple[str, str], problem: Problem, measured: list[Tensor]) -> Row:
    """Logits of all tokens, several times, with the reference."""
    worst, found = Worst(), ""
    for logits in measured:
        flat = logits.reshape(len(problem.logits), -1)
        if flat.shape != problem.logits.shape:
            what = nearest(flat, problem.logits, problem.other_logits())
            size = f"{flat.shape[-1]} words, where the reference has {problem.logits.shape[-1]}"
            worst.add_errors(torch.tensor([torch.inf]), torch.zeros(1))
            found = f"{size} ({what})" if what else size
            continue
        before = worst.ratio
        worst.add(flat, problem.logits, problem.tolerance)
        if worst.ratio > before and not worst.passed:
            found = nearest(flat, problem.logits, problem.other_logits())
    return worst.row(*name, found)


def check_forward(drive: Drive, problem: Problem) -> Row:
    """A forward without labels."""
    with torch.no_grad():
        logits = logits_of(drive.forward(problem.rows))
    if logits is None:
        return raised(*FORWARD, TypeError("the forward without labels returned no logits"))
    return compare_logits(FORWARD, problem, [logits])


class Labelled:
    """The checks of forwards with labels: each of a few tokens of one magnitude, so that no other hides their error.

    Args:
        more: keyword arguments of the forward, where labels are given. tell: called before each forward of a loss.
    """

    def __init__(
        self, drive: Drive, problem: Problem, more: Mapping[str, Any], tell: Callable[[], None] = lambda: None
    ) -> None:
        self.drive, self.problem, self.more, self.tell = drive, problem, more, tell
        self.logits: list[Tensor] = []
        self.parameters = problem.reference.parameters()

    def rows(self) -> list[Row]:
        """All of them."""
        gradients = Gradients(self.problem)
        found = {
            TRAINING: self._losses(TRAINING, training=True, gradients=gradients),
            EVALUATION: self._losses(EVALUATION, training=False, gradients=None),
            COUNT: self._count(),
        }
        if self.logits:
            logits = compare_logits(LABELLED, self.problem, self.logits)
        else:
            logits = left_out(*LABELLED, "the forward with labels returns no logits")
        return [logits, *found.values(), *gradients.rows()]

    def _losses(self, name: tuple[str, str], *, training: bool, gradients: Gradients | None) -> Row:
        problem, worst = self.problem, Worst()
        measured = []
        for tokens in problem.groups:
            self.tell()
            try:
                loss, grads = self._run(tokens, training=training, with_grads=gradients is not None)
            except Exception as error:
                return raised(*name, error)
            measured.append(loss)
            worst.add(loss, problem.entropy[tokens].mean(), problem.entropy_tolerance[tokens].mean())
            if gradients is not None:
                gradients.add(tokens, grads)
        return worst.row(*name, "" if worst.passed else self._what(torch.stack(measured)))

    def _what(self, measured: Tensor) -> str:
        """Which wrong loss the means of the groups are."""
        problem = self.problem

        def means(entropy: Tensor) -> Tensor:
            return torch.stack([entropy[tokens].mean() for tokens in problem.groups])

        wrong = {name: means(entropy) for name, entropy in problem.other_entropies().items()}
        wrong |= self._unshifted()
        return nearest(measured, means(problem.entropy), wrong)

    def _unshifted(self) -> dict[str, Tensor]:
        means = []
        for tokens in self.problem.groups:
            labels = self.problem.labels(tokens).flatten().cpu()
            means.append(F.cross_entropy(self.problem.logits, labels))
        return {"the loss of labels that are not shifted to the next word": torch.stack(means)}

    def _run(
        self, tokens: Tensor, *, training: bool, with_grads: bool, **more: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss (float64, CPU) of these tokens, and its gradients by name: "input" and the head's parameters'."""
        model = self.drive.model.train(training)
        leaf = self.problem.rows.detach().clone().requires_grad_(with_grads)
        with torch.set_grad_enabled(with_grads):
            outputs = self.drive.forward(leaf, labels=self.problem.labels(tokens), **self.more, **more)
            loss = loss_of(outputs)
            grads: dict[str, Tensor] = {}
            if with_grads:
                leaves = {"input": leaf, **self.parameters}
                found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
                grads = {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}
        model.eval()
        logits = logits_of(outputs)
        if logits is not None:
            self.logits.append(logits)
        return loss.detach().double().cpu(), grads

    def _count(self) -> Row:
        parameters = inspect.signature(self.drive.model.forward).parameters
        if "num_items_in_batch" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            return left_out(*COUNT, "the forward takes no num_items_in_batch")
        problem, worst, measured, right = self.problem, Worst(), [], []
        for tokens in problem.groups[:2]:
            try:
                count = torch.tensor(_COUNT, device=problem.rows.device)
                loss, _ = self._run(tokens, training=True, with_grads=False, num_items_in_batch=count)
            except Exception as error:
                return raised(*COUNT, error)
            measured.append(loss)
            right.append(problem.entropy[tokens].sum() / _COUNT)
            worst.add(loss, right[-1], problem.entropy_tolerance[tokens].sum() / _COUNT)
        found = nearest(torch.stack(measured), torch.stack(right), {})
        return worst.row(*COUNT, found or self._what(torch.stack(measured) * _COUNT / len(problem.groups[0])))


def check_generation(drive: Drive, problem: Problem, generator: torch.Generator) -> list[Row]:
    """A few greedy steps of `generate`, each with hidden states of its own."""
    model, reference, batch = drive.model, problem.reference, problem.rows.shape[0]
    if not hasattr(model, "generate") or not model.can_generate():
        return [left_out(*name, f"{type(model).__name__} cannot generate") for name in (GENERATED, SAMPLED)]
    size = torch.logspace(-1, 2.5, _STEPS * batch).double()[torch.randperm(_STEPS * batch, generator=generator)]
    hidden = directions(reference, len(size), problem.rows, generator) * size[:, None]
    rows = hidden.to(problem.rows.dtype).to(problem.rows.device)
    hidden, steps = rows.cpu().double(), Steps(rows.view(_STEPS, batch, -1))
    model.generation_config = GenerationConfig(pad_token_id=0)
    options = GenerationConfig(
        max_new_tokens=_STEPS, do_sample=False, output_logits=True, output_scores=True, return_dict_in_generate=True,
        pad_token_id=0,
    )  # fmt: skip
    try:
        with torch.no_grad(), drive.at_head(steps):
            made: Any = cast(Any, model).generate(**drive.inputs, generation_config=options)
        logits = torch.stack([step.double().cpu() for step in made.logits]).flatten(0, 1)
        scores = torch.stack([step.double().cpu() for step in made.scores]).flatten(0, 1)
    except Exception as error:
        return [raised(*name, error) for name in (GENERATED, SAMPLED)]
    with torch.no_grad():
        z = reference.scores(hidden)
        right, tolerance = reference.logits(z), reference.tolerance(hidden, rows)
        wrong = {name: apply(z, hidden) for name, apply in problem.maps.items()}
    words = made.sequences[:, -_STEPS:].T.flatten().cpu()
    first, second = Worst(), Worst()
    if logits.shape != right.shape:
        first.add_errors(torch.tensor([torch.inf]), torch.zeros(1))
        found = f"{logits.shape[-1]} words, where the reference has {right.shape[-1]}"
        return [first.row(*name, found) for name in (GENERATED, SAMPLED)]
    first.add(logits, right, tolerance)
    second.add(-cross_entropy(scores, words), -cross_entropy(right, words), loss_tolerance(right, tolerance, words))
    return [
        first.row(*GENERATED, nearest(logits, right, wrong)),
        second.row(*SAMPLED, nearest(scores, right, wrong)),
    ]


def check_given(problem: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> list[Row]:
    """Somebody's loss of hidden states (N, D) and labels (N,): one token at a time, then a mean of some."""
    tokens = (problem.target >= 0).nonzero()[:, 0]
    rows = problem.rows.detach().flatten(0, -2)
    target = problem.target.to(rows.device)
    gradients, worst = Gradients(problem, of=GIVEN[0]), Worst()
    some = target.masked_fill(torch.arange(len(target), device=target.device) % 3 == 0, IGNORED)
    kept = some.cpu() >= 0
    try:
        with torch.no_grad():
            values = [loss(rows[token : token + 1], target[token : token + 1]) for token in tokens]
            mean = loss(rows, some).double().cpu()
        for group in problem.groups:
            leaves = {"input": rows[group].requires_grad_(), **problem.reference.parameters()}
            value = loss(leaves["input"], target[group])
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            gradients.add(group, {n: g for n, g in zip(leaves, found, strict=True) if g is not None}, alone=True)
    except Exception as error:
        return [raised(*GIVEN, error)]
    measured = torch.stack([value.double().cpu() for value in values])
    right = problem.entropy[tokens]
    worst.add(measured, right, problem.entropy_tolerance[tokens])
    wrong = {name: entropy[tokens] for name, entropy in problem.other_entropies().items()}
    what = "" if worst.passed else nearest(measured, right, wrong)
    of_mean = Worst()
    of_mean.add(mean, problem.entropy[kept].mean(), problem.entropy_tolerance[kept].mean())
    name = f"{GIVEN[0]}, with labels of -100", "its mean is not over the tokens whose label is not -100"
    one = nearest(mean[None], problem.entropy[kept].mean()[None], {}) if worst.passed else what
    return [worst.row(*GIVEN, what), of_mean.row(*name, one), *gradients.rows()]
