"""What `uncork.hf.verify` returns: a table of checks."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class VerificationError(AssertionError):
    """A model does not compute the same function of its logits everywhere; the message is the table."""


@dataclass(frozen=True)
class Row:
    """One check.

    Attributes:
        name: what was compared with the reference. passed: None if it could not be made; `found` says why.
        error, tolerance: the largest error in units of what is allowed, and that allowance.
        meaning: what it means if the check fails. found: what the measured values are instead, if that is known.
    """

    name: str
    passed: bool | None
    error: float
    tolerance: float
    meaning: str
    found: str = ""

    @property
    def result(self) -> str:
        """In a word."""
        return "left out" if self.passed is None else "ok" if self.passed else "FAILED"


@dataclass(frozen=True)
class Verification:
    """The checks of one model; `str()` is a table of them.

    Attributes:
        model: its class and what was done to it. function: f of its logits f(W h + b), None for the identity.
        description: f in words. rows: the checks.
    """

    model: str
    function: nn.Module | None
    description: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return all(row.passed is not False for row in self.rows)

    def __getitem__(self, name: str) -> Row:
        """The check of that name. Raises KeyError."""
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r}: expected one of {[row.name for row in self.rows]}")

    def require(self) -> "Verification":
        """Returns itself. Raises VerificationError, with the table, if a check failed."""
        if not self.passed:
            raise VerificationError(str(self))
        return self

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; a number that is not finite becomes None."""
        rows = [
            {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in dataclasses.asdict(row).items()
            }
            for row in self.rows
        ]
        return {"model": self.model, "function": self.description, "passed": self.passed, "rows": rows}

    def __str__(self) -> str:
        width = max(len(row.name) for row in self.rows)
        lines = [f"{self.model}: logits = {self.description}", ""]
        lines.append(f"{'check':{width}}  {'result':8}  {'error':>9}  {'tolerance':>9}")
        for row in self.rows:
            numbers = f"{_number(row.error):>9}  {_number(row.tolerance):>9}"
            lines.append(f"{row.name:{width}}  {row.result:8}  {numbers}".rstrip())
        for row in self.rows:
            if row.passed is None:
                lines.append(f"\n{row.name}: left out, since {row.found}.")
            elif not row.passed:
                what = f" It is: {row.found}." if row.found else " It is none of the known mistakes."
                lines.append(f"\n{row.name}: {row.meaning}.{what}")
        verdict = "every path uses this function" if self.passed else "the paths differ"
        return "\n".join([*lines, "", f"{'verified' if self.passed else 'NOT VERIFIED'}: {verdict}"])


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1e}"


class Worst:
    """The largest of errors, each in units of its own tolerance."""

    def __init__(self) -> None:
        self.error = self.tolerance = 0.0
        self.ratio = -1.0

    def add(self, measured: Tensor, right: Tensor, tolerance: Tensor) -> None:
        """Of tensors of one shape; an error that is not finite is infinitely large."""
        self.add_errors((measured.double() - right).abs(), tolerance)

    def add_errors(self, error: Tensor, tolerance: Tensor) -> None:
        """The same of errors."""
        error = error.flatten().nan_to_num(nan=math.inf)
        ratio = error / tolerance.flatten().clamp(min=1e-300)
        if not ratio.numel():
            return
        worst = int(ratio.argmax())
        if float(ratio[worst]) > self.ratio:
            self.error, self.tolerance = float(error[worst]), float(tolerance.flatten()[worst])
            self.ratio = float(ratio[worst])

    @property
    def passed(self) -> bool:
        """Whether all are within their tolerance."""
        return self.ratio <= 1

    def row(self, name: str, meaning: str, found: str = "") -> Row:
        """As a check."""
        return Row(name, self.passed, self.error, self.tolerance, meaning, "" if self.passed else found)


def left_out(name: str, meaning: str, why: str) -> Row:
    """A check that could not be made."""
    return Row(name, None, math.nan, math.nan, meaning, why)


def raised(name: str, meaning: str, error: BaseException) -> Row:
    """A check that failed since the model's own code raised."""
    said = " ".join(str(error).split())
    return Row(name, False, math.nan, math.nan, meaning, f"{type(error).__name__}: {said[:200]}")
