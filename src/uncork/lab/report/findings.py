"""The conclusions of a comparison as sentences computed from its numbers, and the reasons to doubt them."""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from uncork.heads import HEAD_NAMES, HeadSpec
from uncork.lab.report.statistics import BASELINE, MIN_SEEDS_FOR_TEST, baseline, paired
from uncork.lab.report.tables import by_seed, heads_of, misleading_rank, perplexity, plus_minus, probability, rank_text

__all__ = ["caveats", "control_sentence", "headline", "rank_sentence", "verdict"]

SIGNIFICANT = 0.05
SHORT_EPOCHS = 10
MORE_PARAMETERS = 0.02


def verdict(summary: pd.DataFrame, runs: pd.DataFrame) -> str:
    """The verdict of the runs: the result of each head's test against the softmax, or why there was no test.

    Args:
        summary, runs: what `summarise` and `runs_table` make of the runs.
    """
    done = _finished(summary)
    base = baseline(heads_of(summary)) if len(summary) else None
    others = _contenders(done, base)
    if done.empty:
        return "No verdict: no run has finished."
    if base is None:
        return "No verdict: there is no softmax to compare with."
    if base not in set(done["head"]):
        return f"No verdict: {base} has not finished."
    if not others:
        return "No verdict: no other head has finished."
    tested = [row for row in others if not math.isnan(row["p_holm"])]
    undecided = [row for row in others if math.isnan(row["p_holm"])]
    said = [_decided(row, base, runs) for row in tested]
    reasons: dict[str, list[str]] = {}
    for row in undecided:
        reasons.setdefault(_why_undecided(row, base, runs), []).append(row["head"])
    for reason, heads in reasons.items():
        of_some = f" on {_listed(heads)}" if len(heads) < len(others) else ""
        said.append(f"No verdict{of_some}: {reason}.")
    return " ".join(said)


def _finished(summary: pd.DataFrame) -> pd.DataFrame:
    return summary[summary["seeds"] > 0] if len(summary) else summary


def _contenders(done: pd.DataFrame, base: str | None) -> list[Any]:
    """Rows of the heads to compare with the softmax, the lowest first; controls only if there is no other head."""
    if done.empty:
        return []
    rows = [row for _, row in done.sort_values("test_perplexity", kind="stable").iterrows() if row["head"] != base]
    return [row for row in rows if not _is_control(row["name"])] or rows


def _decided(row: Any, base: str, runs: pd.DataFrame) -> str:
    """The sentence on a head that was tested."""
    both = paired(by_seed(runs, row["head"]), by_seed(runs, base))
    numbers = f"{_p_text(row['p_holm'])}, {plus_minus(both.change_percent, math.nan, 1, '+')} %"
    way, count = ("lower", both.lower) if both.change_percent < 0 else ("higher", both.higher)
    if row["p_holm"] < SIGNIFICANT:
        return f"{row['head']} ends {way} than {base} in {count} of {both.pairs} seeds, {numbers}."
    return f"{row['head']} is not told apart from {base}: {way} in {count} of {both.pairs} seeds, {numbers}."


def _why_undecided(row: Any, base: str, runs: pd.DataFrame) -> str:
    values = by_seed(runs, row["head"]), by_seed(runs, base)
    if not all(math.isfinite(value) for own in values for value in own):
        return "a test perplexity is not a finite number"
    if not row["pairs"]:
        return f"no seed is shared with {base}"
    if row["pairs"] == 1:
        return "one seed"
    return f"{row['pairs']:.0f} seeds, and a test takes {MIN_SEEDS_FOR_TEST}"


def headline(summary: pd.DataFrame) -> str:
    """The result in one sentence: every head's mean test perplexity against the softmax's, tested from 5 seeds on.

    With a test, a head is said to be lower or higher only where p < 0.05 after Holm's correction.
    """
    done = _finished(summary)
    if done.empty:
        return "No run has finished, so there is nothing to compare yet."
    base = baseline(heads_of(summary))
    others = _contenders(done, base)
    if base not in set(done["head"]):
        if len(done) == 1:
            lacking = "there is no softmax" if base is None else f"{base} has not finished,"
            (row,) = (row for _, row in done.iterrows())
            reached = f"{row['head']} reaches a test perplexity of {_level(row)} on {_seeds(row)}"
            return f"{reached}; {lacking} to compare it with."
        lacking = "without a softmax to compare with" if base is None else f"before {base} has finished to compare with"
        ranked = [row for _, row in done.sort_values("test_perplexity", kind="stable").iterrows()]
        return f"Test perplexity {lacking}: {', '.join(_value(row) for row in ranked)}."
    (softmax,) = (row for _, row in done[done["head"] == base].iterrows())
    if not others:
        return (
            f"{base} reaches a test perplexity of {_level(softmax)} on {_seeds(softmax)}; no other head has finished."
        )
    against = f"Against the softmax's test perplexity of {_level(softmax)} ({_seeds(softmax)}):"
    if base != BASELINE:
        against = f"Against {base} with a test perplexity of {_level(softmax)} ({_seeds(softmax)}):"
    return f"{against} {_verdicts(others, softmax)}."


def control_sentence(summary: pd.DataFrame, runs: pd.DataFrame) -> str | None:
    """The controls' perplexities, and how the learned PLIF compares with the frozen one; None without a control."""
    if summary.empty:
        return None
    rows = {row["head"]: row for _, row in summary.iterrows() if row["seeds"] > 0}
    names = heads_of(summary)
    controls = [label for label in rows if _is_control(names[label])]
    if not controls or len(controls) == len([label for label in rows if names[label] != BASELINE]):
        return None
    named = [f"{_as_control(label, names[label])} {_level(rows[label])}{_tested(rows[label])}" for label in controls]
    sentence = f"Controls: {', '.join(named)}."
    frozen = next((label for label in controls if names[label] == "plif-frozen"), None)
    learned = next((label for label in rows if names[label] == "plif"), None)
    if frozen is None or learned is None:
        return sentence
    both = paired(by_seed(runs, learned), by_seed(runs, frozen))
    if both.pairs == 0:
        return sentence
    sentence += f" {learned} is below the frozen random one in {both.lower} of {both.pairs} seeds"
    if not rows[learned]["test_perplexity"] < rows[frozen]["test_perplexity"]:
        sentence += ", and not below it in the mean: these runs do not show that learning the function helps"
    return f"{sentence}."


def caveats(summary: pd.DataFrame, runs: pd.DataFrame) -> list[str]:
    """Reasons to doubt the headline, one sentence each: short training, few seeds, missing controls and runs."""
    notes = [*_training_caveats(runs), *_seed_caveats(summary)]
    unfinished = runs[~runs["done"]]
    if len(unfinished):
        names = ", ".join(unfinished["run"])
        notes.append(f"Not finished, and left out of every number here: {names}.")
    for _, row in summary.iterrows() if len(summary) else ():
        if row["not_finite"]:
            notes.append(
                f"{row['head']}: {row['not_finite']:.0f} of {row['seeds']:.0f} finished runs have a test "
                "perplexity that is not a finite number, so no mean is given and no test made."
            )
    return notes + _control_caveats(summary)


def rank_sentence(summary: pd.DataFrame) -> str | None:
    """Why the numerical rank is not shown; None where it does not mislead."""
    misleading = misleading_rank(summary)
    if not misleading:
        return None
    base = summary[summary["baseline"]]
    rows = pd.concat([base, summary[summary["head"].isin(misleading)]]).to_dict("records")
    ranks = (f"{row['head']} {rank_text(row['numerical_rank'])} ({rank_text(row['effective_rank'])})" for row in rows)
    return f"left out, since it counts what is too small to matter. Rank (ε-rank): {', '.join(ranks)}."


def _training_caveats(runs: pd.DataFrame) -> list[str]:
    done = runs[runs["done"]]
    if done.empty:
        return []
    notes = []
    epochs = done["epochs"].max()
    unit = "epoch" if epochs == 1 else "epochs"
    at_end = int((done["best_step"] >= done["steps"]).sum())
    if epochs < SHORT_EPOCHS:
        notes.append(
            f"Training was short ({epochs:.3g} {unit}): a head that merely learns faster "
            "looks better here, and the order may change with longer training."
        )
    if at_end:
        notes.append(
            f"In {at_end} of {len(done)} runs validation was best at the very last step: "
            f"{'that run' if at_end == 1 else 'those runs'} may not have converged."
        )
    early = int((done["state"] != "finished").sum())
    if early:
        notes.append(f"{early} of {len(done)} runs stopped before the planned number of steps.")
    return notes


def _seed_caveats(summary: pd.DataFrame) -> list[str]:
    done = _finished(summary)
    if done.empty:
        return []
    notes = []
    low, high = int(done["seeds"].min()), int(done["seeds"].max())
    if low == 1:
        notes.append(
            "With one seed it is unknown how far another seed would move a head's result: ignore small differences."
        )
    if low != high:
        notes.append(
            f"The heads have between {low} and {high} finished seeds; differences are taken over the seeds that a head "
            "and the softmax share."
        )
    return notes


def _control_caveats(summary: pd.DataFrame) -> list[str]:
    """Sentences on controls that are missing, and on heads with more parameters than the softmax."""
    if summary.empty:
        return []
    known = [HeadSpec(name) for name in HEAD_NAMES if name in set(summary["name"])]
    wanted = {control for head in known if head.learns_function for control in head.controls}
    missing = [name for name in HEAD_NAMES if name in wanted - {head.name for head in known}]
    notes = []
    if missing:
        notes.append(
            f"Not run: {', '.join(missing)}. A gain of a learned function is only shown beside the frozen random PLIF, "
            "a temperature and a tuned softcap."
        )
    softmax = summary[summary["baseline"]]["parameters"]
    if len(softmax) and not math.isnan(softmax.iloc[0]):
        size = float(softmax.iloc[0])
        larger = summary[summary["parameters"] > (1 + MORE_PARAMETERS) * size]
        shown = [f"{row['head']} {row['parameters'] / size - 1:+.0%}" for _, row in larger.iterrows()]
        if shown:
            notes.append(
                f"More parameters than the softmax's model: {', '.join(shown)}. Their gains are to be compared "
                "with those of a softmax of the same size."
            )
    return notes


def _verdicts(others: Sequence[Any], softmax: Any) -> str:
    """The heads, grouped by the outcome of their tests, as one sentence."""
    groups: dict[str, list[str]] = {"lower": [], "higher": [], "not told apart from it": []}
    untested, broken = [], []
    for row in others:
        if math.isnan(row["test_perplexity"]) or math.isnan(softmax["test_perplexity"]):
            broken.append(f"{row['head']} has no finite mean")
        elif math.isnan(row["p_holm"]):
            untested.append(f"{_value(row)}{_in_seeds(row)}")
        else:
            way = "lower" if row["difference"] < 0 else "higher"
            verdict = way if row["p_holm"] < SIGNIFICANT else "not told apart from it"
            groups[verdict].append(f"{_value(row)}{_tested(row)}")
    parts = [
        f"{_listed(group)} {'is' if len(group) == 1 else 'are'} {verdict}" for verdict, group in groups.items() if group
    ]
    if parts:
        parts[-1] += " (paired t-tests on log-perplexity, p after Holm's correction)"
    if untested:
        reason = f"no test was made, since that takes {MIN_SEEDS_FOR_TEST} seeds"
        parts.append(f"{_listed(untested)}; {reason}")
    return "; ".join([*parts, *broken])


def _listed(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _is_control(name: str) -> bool:
    """Whether a head is a control: it shows how much of another head's gain needs no learned function."""
    return name in HEAD_NAMES and HeadSpec(name).is_control


def _as_control(label: str, name: str) -> str:
    return HeadSpec(name).as_control + label.removeprefix(name)


def _level(row: Any) -> str:
    return perplexity(row["test_perplexity"], row["test_perplexity_std"])


def _value(row: Any) -> str:
    return f"{row['head']} {_level(row)}"


def _seeds(row: Any) -> str:
    return f"{row['seeds']:.0f} seed{'' if row['seeds'] == 1 else 's'}"


def _in_seeds(row: Any) -> str:
    if not row["pairs"]:
        return f" ({_seeds(row)}, none shared with the softmax)"
    if row["difference"] > 0:
        return f" (higher in {row['losses']:.0f} of {_shared(row)})"
    return f" (lower in {row['wins']:.0f} of {_shared(row)})"


def _shared(row: Any) -> str:
    return f"{row['pairs']:.0f} seed{'' if row['pairs'] == 1 else 's'}"


def _tested(row: Any) -> str:
    return "" if math.isnan(row["p_holm"]) else f" ({_p_text(row['p_holm'])})"


def _p_text(p_value: float) -> str:
    shown = probability(p_value)
    return f"p {shown}" if shown.startswith("<") else f"p = {shown}"
