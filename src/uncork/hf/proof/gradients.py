"""The gradients of a loss to the hidden states and to the output layer's parameters, against float64.

Shapes in comments: N tokens, n of them at a time, D features, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from uncork.hf.proof.candidates import ROUNDED, nearest
from uncork.hf.proof.problem import Problem
from uncork.hf.proof.verification import Row, Worst

_SINGLE, _SMALLEST = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny


@dataclass
class Sums:
    """Sums over the elements of one parameter's gradient g, whose right value is r."""

    error: float = 0.0  # |g - r|^2
    own: float = 0.0  # the same of the model's own modules
    size: float = 0.0  # of the sizes of its terms, squared
    slack: float = 0.0  # of what the rounding of logits may change, squared
    product: float = 0.0  # g r
    right: float = 0.0  # r^2
    measured: float = 0.0  # g^2

    def add(self, g: Tensor, own: Tensor, r: Tensor, size: Tensor, slack: Tensor | None) -> None:
        """Some elements of it."""
        self.error += float((g - r).square().sum())
        self.own += float((own - r).square().sum())
        self.size += float(size.square().sum())
        self.slack += 0.0 if slack is None else float(slack.square().sum())
        self.product += float((g * r).sum())
        self.right += float(r.square().sum())
        self.measured += float(g.square().sum())


class Gradients:
    """Collects the gradients of the losses of groups of tokens.

    A gradient may be off, in the norm of a token's row or of a parameter, by four times the error that the model's own
    modules have under autograd, by four roundings of the sum of the sizes of its terms, and by what the tolerance of
    the logits changes in the probabilities.

    Args:
        of: whose they are, in front of the names of their rows.
    """

    def __init__(self, problem: Problem, *, of: str = "") -> None:
        self.problem, self.of = problem, f"{of}: " if of else ""
        self.eps = max(torch.finfo(problem.rows.dtype).eps, _SINGLE)
        self.of_input = Worst()
        self.measured: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.right: list[Tensor] = []
        self.of_parameters: dict[str, Worst] = {}
        self.factors: dict[str, list[tuple[float, float]]] = {}

    def add(self, tokens: Tensor, found: Mapping[str, Tensor], *, alone: bool = False) -> None:
        """Those of the mean loss over n tokens.

        Args:
            found: "input": (B, T, D), or (n, D) where alone; and the head's parameters by name. A parameter that is
                missing is not checked.
        """
        problem, reference = self.problem, self.problem.reference
        hidden, target = problem.hidden[tokens], problem.target[tokens]
        grad, of_function = reference.grad_scores(problem.scores[tokens], target, len(tokens))
        own = self._own(tokens)
        scores = self._slack(tokens)
        right, size = reference.grad_hidden(hidden, grad)
        every = found["input"].detach().double().cpu().reshape(-1, hidden.shape[-1])
        measured = every if alone else every[tokens]
        allowed = 4 * (own["input"].double().cpu() - right).norm(dim=-1) + 4 * self.eps * size.norm(dim=-1)
        if scores is not None:
            allowed += reference.grad_hidden(hidden, scores)[1].norm(dim=-1)
        self.of_input.add_errors((measured - right).norm(dim=-1), allowed)
        if not alone:  # tokens whose label is -100
            others = every.clone()
            others[tokens] = 0
            self.of_input.add_errors(others.norm(dim=-1), torch.zeros(len(others)))
        self.measured.append(measured)
        self.right.append(right)
        self.tokens.append(tokens)
        self._add_parameters(self._sums(hidden, grad, scores, of_function, own, found))

    def _sums(
        self,
        hidden: Tensor,
        grad: Tensor,
        slack: Tensor | None,
        of_function: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        found: Mapping[str, Tensor],
    ) -> dict[str, Sums]:
        reference, sums = self.problem.reference, dict[str, Sums]()
        moved = None if slack is None else reference.grad_parameters(hidden, slack)
        for name, part, right, size in reference.grad_parameters(hidden, grad):
            more = None if moved is None else next(moved)[3]
            if name in found:
                g, mine = (whole[name][part].detach().cpu().double() for whole in (found, own))
                sums.setdefault(name, Sums()).add(g, mine, right, size, more)
        for name, right in of_function.items():
            if name in found:
                g, mine = (whole[name].detach().cpu().double() for whole in (found, own))
                sums.setdefault(name, Sums()).add(g, mine, right, 1e-3 / self.eps * right.abs(), None)
        return sums

    def _add_parameters(self, sums: Mapping[str, Sums]) -> None:
        for name, total in sums.items():
            allowed = 4 * total.own**0.5 + 4 * self.eps * total.size**0.5 + total.slack**0.5
            worst = self.of_parameters.setdefault(name, Worst())
            worst.add_errors(torch.tensor([total.error**0.5]), torch.tensor([allowed]))
            # The factor by which it is off, and how well that explains it.
            factor = total.product / max(total.right, 1e-300)
            rest = max(total.measured - factor * total.product, 0.0) ** 0.5
            self.factors.setdefault(name, []).append((factor, rest / max(total.measured, 1e-300) ** 0.5))

    def _own(self, tokens: Tensor) -> dict[str, Tensor]:
        """The gradients that the model's own modules give by autograd, in its dtype."""
        problem, reference = self.problem, self.problem.reference
        leaf = problem.rows.detach().flatten(0, -2)[tokens].requires_grad_()
        leaves = {"input": leaf, **reference.parameters()}
        with torch.enable_grad():
            logits = reference.own_logits(leaf)
            loss = F.cross_entropy(logits.float(), problem.target[tokens].to(logits.device))
            found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        return {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found, strict=True)}

    def _slack(self, tokens: Tensor) -> Tensor | None:
        """How far the gradient to the scores (n, V) may be off since the logits, and so the probabilities, may be.

        None for a head that computes more than W h + b, which is judged by the sizes of its terms.
        """
        problem, reference = self.problem, self.problem.reference
        if not reference.plain:
            return None
        p, tolerance = problem.logits[tokens].softmax(-1), problem.tolerance[tokens]
        off = p * (tolerance + (p * tolerance).sum(-1, keepdim=True)).clamp(max=1) / len(tokens)
        leaf = problem.scores[tokens].requires_grad_()
        with torch.enable_grad():
            (slack,) = torch.autograd.grad(reference.logits(leaf), leaf, grad_outputs=off)
        return slack.abs() + _SMALLEST

    def rows(self) -> list[Row]:
        """The checks; none if nothing was added."""
        if not self.measured:
            return []
        meaning = "training moves the body of the model by another gradient than its loss has"
        what = "" if self.of_input.passed else self._what()
        rows = [self.of_input.row(f"{self.of}gradient to h", meaning, what)]
        for name, worst in self.of_parameters.items():
            factors, rests = zip(*self.factors[name], strict=True)
            same = max(rests) < 0.03 and max(factors) - min(factors) < 0.03 * abs(factors[0])
            same = same and abs(factors[0] - 1) > 0.01
            meaning = "training moves it by another gradient than the loss has"
            found = f"{factors[0]:.4g} times the right gradient" if same else ""
            rows.append(worst.row(f"{self.of}gradient to {name}", meaning, found))
        return rows

    def _what(self) -> str:
        """Whose gradient to the hidden states the measured one is."""
        problem, reference = self.problem, self.problem.reference
        wrong: dict[str, Tensor] = {}
        for name, apply in problem.maps.items():
            if name.startswith(ROUNDED):
                continue
            parts = []
            for tokens in self.tokens:
                hidden = problem.hidden[tokens]
                grad, _ = reference.grad_of(
                    lambda z, apply=apply, hidden=hidden: apply(z, hidden),  # type: ignore[misc]
                    problem.scores[tokens], problem.target[tokens], len(tokens),
                )  # fmt: skip
                parts.append(reference.grad_hidden(hidden, grad)[0])
            wrong[name] = torch.cat(parts)
        return nearest(torch.cat(self.measured), torch.cat(self.right), wrong)
