"""The named parts of the synthetic experiment: which targets, shapes, heads and seeds each of them fits."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from uncork.lab.experiments.synthetic.cells import Cell
from uncork.lab.experiments.synthetic.fitting import Fitting
from uncork.lab.experiments.synthetic.targets import MIXTURES
from uncork.lab.train.head import parse_head

_MIXED = "latent_activation=null"
_MOS = f"mos:{_MIXED}"
_MOS_EQUAL = f"mos:{_MIXED},equal_parameters=true"
_CONTROLS = ("softmax", "temperature", "plif", "plif-frozen")
_GRID = tuple(itertools.product((10, 100, 500, 2000), (2, 5, 20, 100)))
_SMALL = ((100, 5), (500, 10))
_SPARSE = ("dirichlet:0.01",)
_RATES = {"learning_rate": 0.03}  # for mixtures: the part `optimizers` shows that 0.1 is too high for them


@dataclass(frozen=True)
class Part:
    """Cells of every target, shape, head, setting and seed; shapes (M, d) with d >= M are left out.

    Attributes:
        fewer_seeds: by shape, a number of seeds below `seeds`, since its cells take long.
        settings: each some fields of `Fitting`, with which all cells are run once.
    """

    about: str
    heads: tuple[str, ...] = _CONTROLS
    shapes: tuple[tuple[int, int], ...] = _SMALL
    targets: tuple[str, ...] = _SPARSE
    num_contexts: int = 1000
    seeds: int = 3
    fewer_seeds: dict[tuple[int, int], int] = field(default_factory=dict)
    settings: tuple[dict[str, Any], ...] = ({},)

    @property
    def most_cells(self) -> int:
        """An upper limit of the number of cells."""
        return len(self.heads) * len(self.shapes) * len(self.targets) * len(self.settings) * self.seeds

    def cells(self, fitting: Fitting, given: dict[str, Any]) -> list[Cell]:
        """All cells, ordered by seed, so that a partly finished part covers all heads.

        Args:
            fitting: the defaults; the heads' own learning rates override them, and `settings` override both.
            given: fields of `Fitting` that the user has given, which override all.
        """
        return [
            Cell(target, self.num_contexts, words, features, head, seed, _fitting(fitting, head, setting, given))
            for seed in range(self.seeds)
            for target, (words, features) in itertools.product(self.targets, self._shapes())
            if seed < self.fewer_seeds.get((words, features), self.seeds)
            for head, setting in itertools.product(self.heads, self.settings)
        ]

    def _shapes(self) -> Sequence[tuple[int, int]]:
        return [(words, features) for words, features in self.shapes if features < words]


def _fitting(base: Fitting, head: str, setting: dict[str, Any], given: dict[str, Any]) -> Fitting:
    own = _RATES if parse_head(head)[0] in MIXTURES else {}
    return Fitting.from_dict({**base.to_dict(), **own, **setting, **given})


PARTS: dict[str, Part] = {
    "default": Part("softmax, temperature, PLIF learned and frozen over a grid of words and features", shapes=_GRID),
    "monotone": Part(
        "the monotone network of 100 units beside softmax, over the same grid",
        heads=("softmax", "monotone:num_units=100"),
        shapes=tuple(shape for shape in _GRID if shape not in ((2000, 2), (2000, 100))),
        fewer_seeds={(words, d): 1 for words in (500, 2000) for d in (2, 5, 20, 100)},
    ),
    "beta": Part(
        "from nearly one-hot to nearly uniform targets",
        targets=tuple(f"dirichlet:{beta}" for beta in (0.001, 0.01, 0.1, 1.0)),
        shapes=((100, 5),),
    ),
    "heads": Part(
        "all heads at four points",
        heads=(
            "softmax", "softmax:bias=true", "temperature", "softcap:cap=10", "softcap:cap=30", "sigsoftmax", "gss",
            "monotone:num_units=100", "monotone:num_units=1000", "plif", "plif-frozen", _MOS,
            _MOS_EQUAL, f"moss:{_MIXED}", f"mop:{_MIXED}",
            f"moc:{_MIXED}",
        ),
        shapes=((100, 5), (500, 10), (1000, 20), (2000, 50)),
        fewer_seeds={(500, 10): 2, (1000, 20): 1, (2000, 50): 1},
    ),
    "pieces": Part(
        "PLIF of 10 to 100,000 pieces, learned and frozen, and of other bounds",
        heads=(
            "softmax",
            *(f"{name}:num_pieces={n}" for n in (10, 100, 1000, 10_000, 100_000) for name in ("plif", "plif-frozen")),
            "plif:num_pieces=100,bound=5", "plif:num_pieces=100,bound=100",
            "plif:num_pieces=100,init=random", "plif:num_pieces=100000,init=random",
        ),
        fewer_seeds={(500, 10): 1},
    ),
    "optimizers": Part(
        "how much of a difference between heads could be one between optimisers",
        heads=(*_CONTROLS, "monotone:num_units=100", _MOS),
        seeds=1,
        settings=(
            *({"learning_rate": rate} for rate in (0.03, 0.1, 0.3)),
            {"learning_rate": 0.1, "function_scale": 0.3},
            {"learning_rate": 0.1, "optimizer": "adam-short"},
            {"learning_rate": 0.1, "optimizer": "lbfgs"},
        ),
        shapes=((100, 5),),
    ),
    "known": Part(
        "targets of known rank, targets that a head can represent exactly, and contexts of several modes",
        heads=("softmax", "plif", _MOS),
        targets=("known-rank:11", "planted:plif:5", "planted:mos:5", "modes:2", "modes:4"),
        shapes=tuple((100, d) for d in (2, 5, 8, 10, 12)),
        num_contexts=300,
        seeds=1,
        settings=({"tolerance": 0.01},),
    ),
    "language": Part(
        "next words after the 1,000 commonest words of sotu",
        heads=("softmax", "plif", "plif-frozen", _MOS_EQUAL),
        targets=("sotu",),
        shapes=tuple((1000, d) for d in (5, 20, 100)),
        seeds=1,
    ),
    "sharpened": Part(
        "the same distributions to the powers 2 and 8, where the likeliest word is most of the loss",
        heads=("softmax", "plif"),
        targets=(*_SPARSE, "sharpened:0.01:2", "sharpened:0.01:8"),
        shapes=((100, 5),),
    ),
    "quick": Part(
        "a look of two minutes", shapes=((100, 2), (100, 5), (100, 20)), num_contexts=500, seeds=2
    ),
}  # fmt: skip
