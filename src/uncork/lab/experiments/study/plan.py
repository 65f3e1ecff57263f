"""Which runs each part of the study consists of: places (a corpus and a d), heads, and seeds."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.experiments.compare import parse_head
from uncork.lab.experiments.study.run import Cell, is_kept
from uncork.lab.experiments.study.store import Rows, outdated
from uncork.lab.run.key import key_of
from uncork.lab.train.config import TrainConfig

Place = tuple[str, int]

CORPORA: dict[str, dict[str, Any]] = {
    "ptb": {"corpus": "ptb"},
    "sotu": {"corpus": "sotu", "vocab_size": 5000, "max_train_tokens": 1_000_000, "min_count": 2},
    "wikitext-2": {"corpus": "wikitext-2", "vocab_size": 10_000, "max_train_tokens": 1_000_000},
}
# The digests of the texts that these come to, by corpus and most training tokens (`text_record`): the study is of
# these, and a run on another text would not be one of it.
TEXTS: dict[tuple[str, int | None], str] = {
    ("ptb", None): "ce86786c21fa783db1bf3dfd29b96b99429b611a4b731604520d763257e59bb6",
    ("sotu", 1_000_000): "386b69e33e902ca56a56cbf7b440fc79c7129e4166e64c5361371de820a51e0b",
    ("sotu", None): "26d449dfbb35c4fd1ffa5da27196951c206d53a8972ac72d069c7ec34e2eeaef",
    ("wikitext-2", 1_000_000): "1f6ca6ed1d8ae129f9b02621b10a10558bb172037048723340d13d654aa226ed",
}
# A random bias, the body's learning rate for the output layer too, decay of all weights: as the presets had it when
# these parts were run.
BASE: dict[str, Any] = {
    "preset": "lstm-small", "eval_every": 600, "epochs": 4.0, "bias_prior": False, "output_lr_scale": 1.0,
    "training_options": {"decay": "all"},
}  # fmt: skip
TUNE_SEED, FRESH_SEEDS = 0, (1, 2, 3, 4, 5)
CONFIRMED = ("softmax", "temperature", "softcap", "plif", "plif-frozen", "mos")
TUNED_FEATURES = (16, 64)
_HALF = MappingProxyType({"epochs": 2.0})


def _trials(name: str, *options: str) -> tuple[str, ...]:
    return tuple(f"{name}:{option}" for option in options)


# Three trials for each head, whatever it has to set.
_RATES = ("lr=0.004", "lr=0.008", "lr=0.016")
TRIALS: dict[str, tuple[str, ...]] = {
    "softmax": _trials("softmax", *_RATES),
    "temperature": _trials("temperature", *_RATES),
    "softcap": _trials("softcap", "lr=0.008,cap=10", "lr=0.008,cap=30", "lr=0.016,cap=30"),
    "plif": _trials("plif", *_RATES),
    "plif-frozen": _trials("plif-frozen", "lr=0.008,spread=0.3", "lr=0.008,spread=1", "lr=0.016,spread=0.3"),
    "mos": _trials("mos", "lr=0.008,latent_activation=null", "lr=0.016,latent_activation=null", "lr=0.016"),
}


@dataclass(frozen=True)
class Part:
    """Every corpus, d, head and seed.

    Attributes:
        heads: how they are called in tables, and what each is: a head as the command line writes it, "{d}" where it
            needs the d of the place; None takes the tuned head of that name.
        settings: fields of TrainConfig.
        test: whether the test split is read.
    """

    about: str
    heads: Mapping[str, str | None]
    corpora: tuple[str, ...] = ("ptb", "sotu")
    in_features: tuple[int, ...] = TUNED_FEATURES
    seeds: tuple[int, ...] = (1,)
    settings: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    test: bool = True

    def cells(self, rows: Rows) -> list[Cell]:
        """All runs, seed by seed, so that what is done at any moment compares all heads.

        Args:
            rows: what is kept; the tuned settings are chosen from it.

        Raises:
            LabError: a tuned head whose trials have not been run.
        """
        grid = itertools.product(self.seeds, self.corpora, self.in_features, self.heads)
        return [self._cell(rows, seed, (corpus, d), label) for seed, corpus, d, label in grid]

    @property
    def own_model(self) -> bool:
        """Whether it has another body than the rest of the study, whose costs are not its own."""
        return not self.settings.keys().isdisjoint(("preset", "model_options"))

    @property
    def size(self) -> int:
        """How many runs there are."""
        return len(self.seeds) * len(self.corpora) * len(self.in_features) * len(self.heads)

    def tuned_cells(self, rows: Rows) -> list[Cell]:
        """Those of `cells` at places where all heads are tuned."""
        found = []
        for corpus, d in itertools.product(self.corpora, self.in_features):
            with suppress(LabError):
                found += dataclasses.replace(self, corpora=(corpus,), in_features=(d,)).cells(rows)
        return found

    def kept_cells(self, rows: Rows) -> list[Cell]:
        """Those of `cells` that have a row, whatever else has not been run or tuned yet."""
        return [cell for cell in self.tuned_cells(rows) if is_kept(cell, rows)]

    def _cell(self, rows: Rows, seed: int, place: Place, label: str) -> Cell:
        head = self.heads[label] or chosen(rows, label, place)
        config = config_of(head.format(d=place[1]), place, seed, self.settings)
        return Cell(f"{place[0]} d={place[1]}", label, config, self.test, text_of(config))


def config_of(head: str, place: Place, seed: int, settings: Mapping[str, Any] = MappingProxyType({})) -> TrainConfig:
    """The settings of one run."""
    corpus, d = place
    name, options, own = parse_head(head)
    fields: dict[str, Any] = {**BASE, **CORPORA[corpus], "in_features": d, **settings, **own}
    return TrainConfig.of(head=name, head_options=options, seed=seed, **fields)


def text_of(config: TrainConfig) -> str:
    """The digest of the text that a run of the study is on."""
    return TEXTS[config.corpus, config.max_train_tokens]


def row_key(config: TrainConfig) -> str:
    """The key of a run's row."""
    return key_of(config.record({"sha256": text_of(config)}))


def chosen(rows: Rows, label: str, place: Place) -> str:
    """The trial of this head with the lowest validation cross-entropy at this place.

    Raises:
        LabError: not all of its trials are kept.
    """
    return min(TRIALS[label], key=lambda trial: _validation(rows, trial, place))


def _validation(rows: Rows, trial: str, place: Place) -> float:
    config = config_of(trial, place, TUNE_SEED, PARTS["tune"].settings)
    row = rows.get(row_key(config))
    if row is None:
        reasons = "".join(f" ({reason})" for reason in outdated([(config, text_of(config))], rows))
        raise LabError(
            f"part tune: {trial} at {place[0]} d={place[1]} has not been run{reasons}; run `uncork study --part tune`"
        )
    return float(row["result"]["valid"]["cross_entropy"])


def _plain(heads: Iterable[str]) -> dict[str, str | None]:
    return {head: head for head in heads}


_MIXED = "latent_activation=null"
# Every head with the same fixed factor on the scores, which the first confirmatory part did not have.
_SCALED = {
    "softmax": "softmax:lr=0.008,scale=4",
    "temperature": "temperature:lr=0.008,factor=4",
    "softcap": "softcap:lr=0.008,cap=30,scale=4",
    "plif (unit slope)": "plif:lr=0.008,unit_slope=true,scale=4",
    "plif-frozen": "plif-frozen:lr=0.008,spread=0.3,scale=4",
    "softmax (scale 1)": "softmax:lr=0.008",
    "mos": f"mos:lr=0.008,scale=4,{_MIXED}",
    "plif": "plif:lr=0.008,scale=4",
    "monotone": "monotone:lr=0.008,scale=4",
    "gss (learned)": "gss:lr=0.008,learnable=true,scale=4",
}
# Four components of d features each, from all units of the body. The mixture of contexts has the same features, and no
# higher rank than the softmax.
_WIDE = {
    f"{name} (of all 128 units)": f"{name}:in_features=128,latent_features={{d}},lr=0.008,scale=4,{_MIXED}"
    for name in ("mos", "moc")
}
_MOS = "mos (of all 128 units)"
_LONG = {"softmax (11 epochs)": f"{_SCALED['softmax']},epochs=11"}  # the time that the mixture of softmaxes takes
_AGAIN_SEEDS = (6, 7, 8, 9, 10)
_BRIEF = ("softmax", "softmax (scale 1)", "plif (unit slope)")
_TRANSFORMER = MappingProxyType({"preset": "transformer-small"})


def _scaled(*labels: str) -> dict[str, str | None]:
    return {label: _SCALED[label] for label in labels}


_PILOT = (
    "softmax", "plif", "plif:function_lr_scale=0.1", "plif:function_lr_scale=3", "plif:num_pieces=10",
    "plif:num_pieces=1000", "plif:num_pieces=20,bound=10",
    "softcap:cap=8", "temperature:lr=0.008", "gss:center=-5,steepness=0.2", "gss:center=0,steepness=0.5",
    "gss:center=0,steepness=1,learnable=true", "gss:center=0,steepness=0.3,learnable=true", "monotone",
    "mop:num_components=2,latent_activation=null", "mos:num_components=2,latent_activation=null",
)  # fmt: skip
_FACTORS = (
    "softmax:lr=0.008", *(f"softmax:lr=0.008,scale={c}" for c in (2, 4, 8, 16)),
    "plif:lr=0.008", "plif:lr=0.008,scale=4", "plif:lr=0.008,unit_slope=true,scale=4", "temperature:lr=0.008,factor=4",
    "mos:lr=0.008,scale=4", f"mos:lr=0.008,scale=4,{_MIXED}",
)  # fmt: skip
PARTS: dict[str, Part] = {
    "pilot": Part(
        "variants of the learned function at d = 16, half the epochs, one seed, on the validation split",
        heads=_plain(_PILOT),
        corpora=("ptb",),
        in_features=(16,),
        seeds=(TUNE_SEED,),
        settings=_HALF,
        test=False,
    ),
    "tune": Part(
        "three trials for each head at each place, half the epochs, one seed, on the validation split",
        heads=_plain(itertools.chain.from_iterable(TRIALS.values())),
        seeds=(TUNE_SEED,),
        settings=_HALF,
        test=False,
    ),
    "confirm": Part("the tuned heads with five fresh seeds", heads=dict.fromkeys(CONFIRMED), seeds=FRESH_SEEDS),
    "again": Part(
        "what was found after `confirm`, scores times 4 and PLIF with unit slope, with five seeds that chose nothing",
        heads=_scaled("softmax", "temperature", "softcap", "plif (unit slope)", "plif-frozen", "softmax (scale 1)"),
        seeds=_AGAIN_SEEDS,
    ),
    "scale": Part(
        "a fixed factor on the scores, half the epochs, one seed, on the validation split",
        heads=_plain(_FACTORS),
        seeds=(TUNE_SEED,),
        settings=_HALF,
        test=False,
    ),
    "double": Part(
        "twice the epochs of `again`: whether training had converged, one seed, on the validation split",
        heads=_scaled("softmax", "plif (unit slope)", "softmax (scale 1)") | {"plif (scale 1)": "plif:lr=0.008"},
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:1],
        settings=MappingProxyType({"epochs": 8.0}),
        test=False,
    ),
    "rate": Part(
        "the two halves of the factor 4: its larger start, and its larger rate of the output layer",
        heads={
            **_scaled("softmax", "softmax (scale 1)"),
            "larger start": "softmax:lr=0.008,scale=4,output_lr_scale=0.25",
            "larger rate": "softmax:lr=0.008,output_lr_scale=4",
        },
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:3],
    ),
    "variants": Part(
        "the pilot's question with scores times 4: other learned functions, one seed, on the validation split",
        heads={
            **_scaled("softmax", "plif (unit slope)", "plif", "monotone", "gss (learned)"),
            **{
                f"plif (unit slope, {about})": f"plif:lr=0.008,unit_slope=true,scale=4,{option}"
                for about, option in {
                    "bound 80": "bound=80",
                    "10 pieces": "num_pieces=10",
                    "rate times 0.1": "function_lr_scale=0.1",
                }.items()
            },
        },
        corpora=("ptb",),
        seeds=_AGAIN_SEEDS[:1],
        test=False,
    ),
    "width": Part(
        "d from 8 to 128, scores times 4",
        heads={**_scaled(*_BRIEF), **_WIDE},
        corpora=("ptb",),
        in_features=(8, 16, 32, 64, 128),
        seeds=_AGAIN_SEEDS[:1],
    ),
    "wide": Part(
        "d = 400 before a body of 400 units, half the epochs",
        heads={label: _SCALED[label].replace("0.008", "0.004") for label in _BRIEF},
        corpora=("ptb",),
        in_features=(400,),
        seeds=_AGAIN_SEEDS[:1],
        settings=_HALF | {"model_options": {"embedding_size": 400, "hidden_sizes": [400]}},
    ),
    "heads": Part(
        "the heads that are in no other part, scores times 4, beside softmax and PLIF",
        heads={
            **_scaled("softmax", "plif (unit slope)", "mos"),
            "softmax (bias prior)": "softmax:lr=0.008,bias_prior=true,scale=4",
            **{name: f"{name}:lr=0.008,scale=4" for name in ("sigsoftmax", "gss")},
            **_scaled("monotone", "plif", "gss (learned)"),
            **{name: f"{name}:lr=0.008,scale=4,{_MIXED}" for name in ("moss", "mop", "moc")},
            **_WIDE,
            "mop (of all 128 units)": _WIDE[_MOS].replace("mos", "mop"),
            **{f"mos of {k} (all units)": f"{_WIDE[_MOS]},num_components={k}" for k in (2, 8)},
            **_LONG,
        },
        corpora=("sotu",),
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:1],
    ),
    "mixture": Part(
        "mixtures of wider features, one of which ended well below the softmax in part heads, with five seeds",
        heads={**_scaled("softmax"), **_WIDE, **_LONG},
        seeds=_AGAIN_SEEDS,
    ),
    "wikitext": Part(
        "WikiText-2, V = 10,000, scores times 4",
        heads=_scaled(*_BRIEF),
        corpora=("wikitext-2",),
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:1],
    ),
    "transformer-tune": Part(
        "learning rates for two transformer blocks, scores times 4, half the epochs, one seed, on the validation split",
        heads={
            f"{label}, lr {rate}": _SCALED[label].replace("0.008", rate)
            for label in _BRIEF
            for rate in ("0.002", "0.004", "0.008")
        },
        corpora=("ptb",),
        in_features=(16,),
        seeds=(TUNE_SEED,),
        settings=_HALF | _TRANSFORMER,
        test=False,
    ),
    "transformer": Part(
        "two transformer blocks in place of the LSTM, scores times 4, at the rates of transformer-tune",
        heads=_scaled(*_BRIEF) | {"softmax": "softmax:lr=0.004,scale=4"},
        corpora=("ptb",),
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:3],
        settings=_TRANSFORMER,
    ),
    "full": Part(
        "all 2,023,391 tokens of sotu, scores times 4",
        heads=_scaled(*_BRIEF),
        corpora=("sotu",),
        in_features=(16,),
        seeds=_AGAIN_SEEDS[:1],
        settings=MappingProxyType({"max_train_tokens": None}),
    ),
}


def narrowed(part: Part, **given: Any) -> Part:
    """The part with what the flags give in place of its own.

    Raises:
        LabError: a value that the part does not have.
    """
    for name in ("heads", "corpora", "in_features"):
        has = tuple(getattr(part, name))
        unknown = [value for value in given.get(name) or () if value not in has]
        if unknown:
            raise LabError(f"{name.replace('_', '-')}: this part has {has}, got {unknown[0]!r}")
    fields = {name: value for name, value in given.items() if value}
    if "heads" in fields:
        fields["heads"] = {label: part.heads[label] for label in fields["heads"]}
    if "seeds" in fields:
        fields["seeds"] = part.seeds[: fields["seeds"]]
    return dataclasses.replace(part, **fields)
