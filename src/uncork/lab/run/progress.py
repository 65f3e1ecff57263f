"""Where a run stands, and the one line that the terminal shows of it."""

from dataclasses import dataclass

from uncork.lab.terminal import clock


@dataclass(frozen=True)
class Progress:
    """Where training stands; `train` hands one to `on_progress` with every row of the metrics."""

    step: int
    steps_total: int
    epoch: float
    cross_entropy: float
    """Mean nats per token since the last row."""
    valid_perplexity: float | None
    """Per word, at the last validation; None before the first."""
    tokens_per_second: float
    seconds_left: float
    """To the end of training, validations and checkpoints included, at the speed of this session so far."""


def progress_line(name: str, p: Progress, left: float | None) -> str:
    """The line that the terminal shows of a run. left: seconds, None if unknown."""
    validation = "" if p.valid_perplexity is None else f"  valid ppl {p.valid_perplexity:8.2f}"
    return (
        f"{name:28} step {p.step:>6}/{p.steps_total}  loss {p.cross_entropy:6.3f}{validation}  "
        f"{p.tokens_per_second:8,.0f} tok/s  {clock(left)} left"
    )
