"""The flags of `uncork synthetic`, in a module that imports the standard library alone."""

import dataclasses
from pathlib import Path
from typing import Literal

PartName = Literal[
    "default", "monotone", "beta", "heads", "pieces", "optimizers", "known", "language", "sharpened", "quick"
]


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """Free contexts, shared words, given distributions: how near can each output layer come, and where does it stop?

    N distributions over M words are drawn; every context has an embedding of its own of d features, every word
    one that all contexts share, and both are trained with the head's function until the cross-entropy has converged.
    Reported are the share of contexts whose likeliest word is right (mode matching) and the KL divergence. A flag
    replaces the part's own value; finished cells are kept in OUT-DIR/cells.jsonl and not run again.
    """

    part: PartName = "default"
    """The part. default: four heads over a grid, under an hour. monotone: the network of 100 units. beta: how sharp
    the targets are. heads: all heads at four points. pieces: 10 to 100,000. optimizers: learning rates and optimisers.
    known: targets of known rank and of several modes. language: next words of real text. sharpened: powers of the
    targets. quick: two minutes."""
    quick: bool = False
    """The same as --part quick."""
    heads: tuple[str, ...] = ()
    """Heads and their options, as softmax plif:num_pieces=50 mos:latent_activation=null. equal_parameters=true narrows
    a head until it has no more parameters than the softmax."""
    targets: tuple[str, ...] = ()
    """dirichlet:BETA sharpened:BETA:POWER known-rank:RANK planted:HEAD:FEATURES modes:NUMBER sotu."""
    beta: tuple[float, ...] = ()
    """Concentrations of Dirichlet targets: another way to write --targets dirichlet:BETA."""
    num_words: tuple[int, ...] = ()
    """Numbers of words M; each is combined with every d below it."""
    in_features: tuple[int, ...] = ()
    """Numbers of features d that the embeddings of contexts and words have."""
    num_contexts: int | None = None
    """Number of contexts N."""
    seeds: int | None = None
    """How many seeds: 0, 1, ... Targets and start are drawn from them."""
    learning_rate: float | None = None
    """Learning rate of Adam. None: 0.1, for mixtures 0.03."""
    function_scale: float | None = None
    """The function's learning rate, as a multiple of --learning-rate. None: 0.1."""
    first_round: int | None = None
    """Steps of the first round; every round has twice as many as the one before. None: 250."""
    rounds: int | None = None
    """Largest number of rounds. None: 4."""
    tolerance: float | None = None
    """Training ends when a round lowers the KL divergence by less than this fraction of it. None: 0.02."""
    workers: int | None = None
    """Cells at once, one core each. None: as many as there are cores."""
    out_dir: Path = Path("runs/synthetic")
    """Where cells, tables and figures go."""
