"""Two heads compared seed by seed, Holm's correction over several such tests, and the head that all are compared with.

Every table of the laboratory compares heads by `paired`; the caller chooses the quantity (a test perplexity, a KL
divergence) and the runs (the seeds of one place, of one point).
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats

__all__ = ["BASELINE", "MIN_SEEDS_FOR_TEST", "Paired", "baseline", "holm", "paired"]

MIN_SEEDS_FOR_TEST = 5
BASELINE = "softmax"
"""The head that all others are compared with."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """The values of two heads with the same seeds, (pairs,) each.

    A seed whose value is not finite is not left out: it makes the differences, their mean and deviation, the change in
    percent and the p-value NaN, and `lower` and `higher` 0. The same holds if there is no pair.
    """

    mine: Array
    theirs: Array

    @property
    def pairs(self) -> int:
        """The number of seeds that both have."""
        return len(self.mine)

    @property
    def differences(self) -> Array:
        """(pairs,) mine - theirs."""
        return self.mine - self.theirs if self._finite else np.full(self.pairs, math.nan)

    @property
    def difference(self) -> float:
        """The mean of mine - theirs."""
        return _mean(self.differences)

    @property
    def difference_std(self) -> float:
        """The sample standard deviation of mine - theirs."""
        return _std(self.differences)

    @property
    def change_percent(self) -> float:
        """By how many percent mine is above theirs: exp of the mean difference of the logarithms, minus 1."""
        return 100 * math.expm1(_mean(np.log(self.mine) - np.log(self.theirs))) if self._finite else math.nan

    @property
    def interval_percent(self) -> tuple[float, float]:
        """The 95 % interval of `change_percent`, that of the paired t-test on the logarithms; NaN below 5 pairs."""
        if self.pairs < MIN_SEEDS_FOR_TEST or not self._finite:
            return math.nan, math.nan
        ratios = np.log(self.mine) - np.log(self.theirs)
        reach = float(stats.t.ppf(0.975, self.pairs - 1) * stats.sem(ratios))
        low, high = (100 * math.expm1(float(ratios.mean()) + side * reach) for side in (-1, 1))
        return low, high

    def ratio(self, least: float = 0.0) -> tuple[float, float]:
        """Mean and sample standard deviation of mine / theirs, over the pairs where theirs is above `least`."""
        large = self.theirs > least
        ratios = self.mine[large] / self.theirs[large]
        return _mean(ratios), _std(ratios)

    @property
    def lower(self) -> int:
        """In how many pairs mine is the lower one."""
        return int((self.differences < 0).sum())

    @property
    def higher(self) -> int:
        """In how many pairs mine is the higher one."""
        return int((self.differences > 0).sum())

    @property
    def p_value(self) -> float:
        """That of the two-sided paired t-test on the logarithms; NaN below 5 pairs, 1 where all pairs are equal."""
        if self.pairs < MIN_SEEDS_FOR_TEST or not self._finite:
            return math.nan
        if np.array_equal(self.mine, self.theirs):
            return 1.0
        with warnings.catch_warnings():  # scipy warns where all differences are the same number
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(stats.ttest_rel(np.log(self.mine), np.log(self.theirs)).pvalue)

    @property
    def _finite(self) -> bool:
        return bool(np.isfinite([self.mine, self.theirs]).all())


def _mean(values: Array) -> float:
    return float(values.mean()) if len(values) else math.nan


def _std(values: Array) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def paired(mine: "pd.Series[Any]", theirs: "pd.Series[Any]") -> Paired:
    """Two heads side by side over the seeds that both have.

    Args:
        mine, theirs: a number by seed (the index), each seed once.

    >>> both = paired(pd.Series({1: 90.0, 2: 110.0}), pd.Series({0: 70.0, 1: 100.0, 2: 100.0}))
    >>> both.pairs, both.difference, both.lower, both.higher
    (2, 0.0, 1, 1)
    """
    seeds = mine.index.intersection(theirs.index)
    return Paired(mine[seeds].to_numpy(dtype=float), theirs[seeds].to_numpy(dtype=float))


def holm(p_values: Array) -> Array:
    """Holm's step-down correction over the p-values that are numbers (Holm 1979)."""
    adjusted = np.full(len(p_values), math.nan)
    tested = np.flatnonzero(~np.isnan(p_values))
    largest = 0.0
    for before, index in enumerate(tested[np.argsort(p_values[tested], kind="stable")]):
        largest = max(largest, min(1.0, (len(tested) - before) * float(p_values[index])))
        adjusted[index] = largest
    return adjusted


def baseline(heads: Mapping[str, str]) -> str | None:
    """The label of the head that all others are compared with, in tables, figures and sentences alike.

    It is the softmax whose label is its name alone, without settings; if every softmax has settings in its label, the
    first in the table; None without a softmax.

    Args:
        heads: the name (of HEAD_NAMES) by the label, in the order of the table.

    >>> baseline({"softmax (scale=1)": "softmax", "plif": "plif", "softmax": "softmax"})
    'softmax'
    """
    found = [label for label, name in heads.items() if name == BASELINE]
    return BASELINE if BASELINE in found else next(iter(found), None)
