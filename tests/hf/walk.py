"""Walks transformers' registry of causal language models: which can be fused, and is each answer the model's own?

    python -m tests.hf.walk results/hf/classes.csv

Every class is built small and random, computes its loss and gradients as transformers does, and then fused.
"""

import contextlib
import csv
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from tests.hf.small import batch, build, class_names
from uncork import Compose, LogitFunction
from uncork.hf import NotRecordable, fuse_loss, read_logit_function

_RTOL = 2e-4


@dataclass(frozen=True)
class Finding:
    """What became of a class.

    Attributes:
        outcome: "recorded", "refused", "skipped" or "wrong".
        function: the logit function read from the model, where it is recorded.
        reason: why it is not.
    """

    class_name: str
    outcome: str
    function: str = ""
    reason: str = ""


class _TooLong(Exception):
    pass


@contextlib.contextmanager
def _limit(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise _TooLong(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def gradients(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor], Any]:
    """The loss, every parameter's gradient, and the model's outputs."""
    model.zero_grad(set_to_none=True)
    outputs = model(**inputs)
    outputs.loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return outputs.loss.detach(), found, outputs


def difference(found: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]) -> str:
    """Where a loss and gradients are not those wanted, in words; empty if they are equal but for rounding."""
    (loss, grads), (own_loss, own_grads) = found, wanted
    if not torch.allclose(loss, own_loss, rtol=1e-5, atol=1e-6):
        return f"the loss is {float(loss)}, the model's own {float(own_loss)}"
    if set(grads) != set(own_grads):
        return f"gradients of {sorted(set(grads) ^ set(own_grads))} are given by one of the two alone"
    largest = max((float(grad.norm()) for grad in own_grads.values()), default=0.0)
    for name, own in own_grads.items():
        error = float((grads[name] - own).norm())
        if not error <= _RTOL * float(own.norm()) + 1e-6 * largest:
            return f"the gradient of {name} is off by {error:.3g}, its norm is {float(own.norm()):.3g}"
    return ""


def described(function: LogitFunction | None) -> str:
    """A logit function in a few words: "Scale(factor=0.5, learnable=False), Softcap(cap=20.0)"."""
    parts = function.functions if isinstance(function, Compose) else [function]
    return ", ".join("identity" if part is None else repr(part) for part in parts)


def examine(class_name: str, *, seconds: float = 30.0, **config: Any) -> Finding:
    """Builds a class small, and compares it fused with itself."""

    def finding(outcome: str, error: object, function: str = "") -> Finding:
        words = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
        return Finding(class_name, outcome, function, " ".join(words.split())[:300])

    try:
        with _limit(seconds):
            model = build(class_name, **config)
    except Exception as error:
        return finding("skipped", f"does not build small: {type(error).__name__}: {error}")
    inputs = batch()
    try:
        with _limit(seconds):
            own_loss, own_grads, own = gradients(model, inputs)
    except Exception as error:
        return finding("skipped", f"its own forward fails: {type(error).__name__}: {error}")
    try:
        fuse_loss(model)
    except (TypeError, NotRecordable) as error:
        left = difference(gradients(model, inputs)[:2], (own_loss, own_grads))
        return finding("wrong", f"after it was refused {left}") if left else finding("refused", error)
    except Exception as error:
        return finding("wrong", error)
    try:
        with _limit(seconds):
            loss, grads, outputs = gradients(model, inputs)
            wrong = difference((loss, grads), (own_loss, own_grads))
            model.zero_grad()
            if not wrong and not torch.allclose(outputs.logits + 0, own.logits, rtol=1e-5, atol=1e-5):
                wrong = "outputs.logits are not the model's own"
    except Exception as error:
        return finding("wrong", error)
    return finding("wrong" if wrong else "recorded", wrong, described(read_logit_function(model)))


def walk(names: list[str], *, progress: bool = False) -> list[Finding]:
    """Examines classes one after another, without transformers' advice about them."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    findings = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in names:
                findings.append(examine(name))
                if progress:
                    print(*dataclass_row(findings[-1]), sep=" | ", flush=True)
    finally:
        logging.set_verbosity(verbosity)
    return findings


def dataclass_row(finding: Finding) -> tuple[str, str, str, str]:
    """A row of the table."""
    return finding.class_name, finding.outcome, finding.function, finding.reason


def write_summary(path: Path, findings: list[Finding]) -> None:
    """Writes how many classes have which function, or are left out for which reason, with some of their names."""
    groups: dict[tuple[str, str], list[str]] = {}
    for finding in findings:
        what = finding.function or finding.reason.partition(": ")[2].partition(" for validator")[0][:90]
        groups.setdefault((finding.outcome, what), []).append(finding.class_name)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["outcome", "function, or reason", "classes", "for example"])
        for (outcome, what), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
            writer.writerow([outcome, what, len(names), ", ".join(names[:3])])


def main(path: str) -> int:
    """Writes the table of all classes, and beside classes.csv a summary.csv; returns 1 if a class is wrong."""
    findings = walk(class_names(), progress=True)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "outcome", "function", "reason"])
        writer.writerows(dataclass_row(finding) for finding in findings)
    write_summary(Path(path).with_name(Path(path).name.replace("classes", "summary")), findings)
    outcomes = Counter(finding.outcome for finding in findings)
    print(dict(outcomes))
    return int(outcomes["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
