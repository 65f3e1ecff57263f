"""The settings of one training run, in JSON's types, and what they resolve to."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

import uncork
from uncork.lab.data.corpora import Corpus, load_corpus
from uncork.lab.errors import LabError
from uncork.lab.models.language_model import require_bool, require_non_negative, require_size
from uncork.lab.run.key import RECORD
from uncork.lab.train.presets import Preset, TrainingPreset, get_preset

RULES = 1
"""The version of the rules of training and evaluation: raised when the same settings come to give other numbers, beyond
rounding. Runs of before are then refused by name, and not taken for those of now.

1: version 0.1.0 and after.
"""
_OWN_TRAINING = ("lr", "batch_size", "bptt", "weight_decay", "bias_prior", "output_lr_scale")
"""Fields of TrainConfig that replace those of the same name in the preset's training, as clip and epochs do, whose
values differ."""
_DECIDED_ELSEWHERE = frozenset({
    "corpus", "tokenization", "vocab_size", "min_count", "max_train_tokens",  # the text
    "preset", "in_features", "model_options", "clip", "training_options", *_OWN_TRAINING,  # model and training
    "head", "head_options",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """What is trained, on what, and how; a field that is None takes the preset's value.

    >>> config = TrainConfig(head="plif", in_features=8, lr=0.01).resolved()
    >>> config.in_features, config.lr, config.bptt, config.epochs
    (8, 0.01, 48, 4.0)
    >>> TrainConfig.from_dict(config.to_dict()) == config
    True

    Raises:
        LabError: a bad value, an unknown preset, head or option; the message names the field.
    """

    corpus: str = "sotu"
    """The text: sotu, ptb, wikitext-2, or the path of a text file or of a folder of .txt files."""
    tokenization: str = "word"
    """word or bpe."""
    vocab_size: int | None = None
    """At most so many ids. None: every word, or 8,192 subwords."""
    min_count: int = 1
    """Words rarer than this in the training split become <unk>."""
    max_train_tokens: int | None = None
    """Train on the first so many tokens alone. None: on all."""
    preset: str = "lstm-laptop"
    """The backbone and how it is trained; see `uncork.lab.train.presets`."""
    in_features: int | None = None
    """Features d that the output layer receives: the width of the bottleneck."""
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the backbone that replace the preset's, as {"hidden_sizes": [512]}."""
    head: str = "softmax"
    """The output layer, one of `uncork.HEAD_NAMES`."""
    head_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its own options, as {"num_pieces": 50}."""
    bias_prior: bool | None = None
    """Start the bias of the output layer at the log unigram of the training text. None: as the preset says."""
    seed: int = 0
    """Of the initial weights, the dropouts and the variable lengths."""
    epochs: float | None = None
    """Passes over the training text; a fraction ends within one."""
    max_steps: int | None = None
    """Stop after so many steps, if that is earlier. The schedule fits what is really done."""
    lr: float | None = None
    """Learning rate at its highest."""
    batch_size: int | None = None
    """Parallel streams of the text, over all processes."""
    bptt: int | None = None
    """Tokens of each stream in a batch."""
    clip: float | None = None
    """Largest norm of the gradient of everything but the functions. 0: no clipping."""
    weight_decay: float | None = None
    """Weight decay of everything but the functions, or of the matrices alone (training_options.decay)."""
    training_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of `TrainingPreset` that replace the preset's, as {"asgd": "trigger"}."""
    function_lr_scale: float = 1.0
    """Factor on the learning rate for the parameters of the logit function."""
    output_lr_scale: float | None = None
    """Factor on the learning rate for weight and bias of the output layer. None: the preset's."""
    function_clip: float | None = None
    """Largest norm of the gradient of the functions' parameters, clipped apart. 0: no clipping. None: as clip."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training: none, or bfloat16. Validation always computes in float32."""
    eval_every: int | None = None
    """Steps between validations. None: at the end of each epoch. There is always one at the end of training."""
    log_every: int = 20
    """Steps between rows of metrics.jsonl."""
    patience: int | None = None
    """Stop early after so many validations in a row that are no better than the best. None: never."""
    checkpoint_every: float = 60.0
    """Seconds between checkpoints, at the least."""

    HARMLESS: ClassVar[frozenset[str]] = frozenset({"checkpoint_every"})
    """Fields that may change when a run goes on, since no number depends on them."""
    ADDED: ClassVar[dict[str, Any]] = {"output_lr_scale": 1.0}
    """Fields that files of earlier versions may lack, and what these versions did."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_train_tokens", "in_features", "max_steps", "batch_size", "bptt", "eval_every",
                     "patience"):  # fmt: skip
            if getattr(self, name) is not None:
                require_size(name, getattr(self, name))
        for name in ("min_count", "log_every"):
            require_size(name, getattr(self, name))
        for name in ("epochs", "lr", "clip", "weight_decay", "function_clip", "output_lr_scale"):
            if getattr(self, name) is not None:
                require_non_negative(name, getattr(self, name))
        for name in ("function_lr_scale", "checkpoint_every"):
            require_non_negative(name, getattr(self, name))
        for name in ("epochs", "lr"):
            if getattr(self, name) == 0:
                raise LabError(f"{name} must be above 0, got 0")
        if self.bias_prior is not None:
            require_bool("bias_prior", self.bias_prior)
        self._check_choices()
        self.resolved_preset()

    def _check_choices(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise LabError(f"seed must be an integer from 0 to 2^63 - 1, got {self.seed!r}")
        if self.precision not in ("no", "bf16"):
            raise LabError(f"precision must be 'no' or 'bf16', got {self.precision!r}")
        if self.head not in uncork.HEAD_NAMES:
            raise LabError(f"head must be one of {', '.join(uncork.HEAD_NAMES)}, got {self.head!r}")
        for name in ("model_options", "head_options", "training_options"):
            if not isinstance(getattr(self, name), dict):
                raise LabError(f"{name} must be a dictionary, got {getattr(self, name)!r}")
        for options, fields in (
            ("model_options", {"kind": "preset", "out_features": "in_features"}),
            ("training_options", {name: name for name in (*_OWN_TRAINING, "clip", "epochs")}),
        ):
            for option, field in fields.items():
                if option in getattr(self, options):
                    raise LabError(f"{options}: give {option} by the field {field}")

    def resolved_preset(self) -> Preset:
        """The preset with this config's values in it; its `training.epochs` rounds `epochs` up."""
        preset = get_preset(self.preset)
        model = type(preset.model).from_dict({**preset.model.to_dict(), **self.model_options})
        if self.in_features is not None and self.in_features != model.feature_size:
            # Where the body ends in so many features by itself, it gets no linear map to as many.
            model = type(model).from_dict({**model.to_dict(), "out_features": self.in_features})
        own = {name: getattr(self, name) for name in _OWN_TRAINING}
        own |= {"epochs": None if self.epochs is None else math.ceil(self.epochs)}
        own = {name: value for name, value in own.items() if value is not None}
        if self.clip is not None:
            own["clip"] = self.clip or None
        training = TrainingPreset.from_dict({**preset.training.to_dict(), **self.training_options, **own})
        return Preset(preset.description, model, training)

    def resolved(self) -> "TrainConfig":
        """The same settings with the preset's values written out, as a run's config.json holds them."""
        preset = self.resolved_preset()
        training = preset.training
        clip = training.clip or 0.0
        return dataclasses.replace(
            self,
            in_features=preset.model.feature_size,
            epochs=float(training.epochs) if self.epochs is None else self.epochs,
            lr=training.lr,
            batch_size=training.batch_size,
            bptt=training.bptt,
            clip=clip,
            weight_decay=training.weight_decay,
            bias_prior=training.bias_prior,
            output_lr_scale=training.output_lr_scale,
            function_clip=clip if self.function_clip is None else self.function_clip,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON's types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The config that `to_dict` wrote, of an earlier version too. Raises LabError for an unknown field or a bad
        value."""
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise LabError(f"unknown setting: {', '.join(unknown)}")
        return cls(**{**cls.ADDED, **values})

    def asked(self) -> dict[str, Any]:
        """Text, preset and head, and all else that was given, in JSON's types: what differs from TrainConfig's own.

        >>> TrainConfig(head="plif", lr=0.01).asked()
        {'corpus': 'sotu', 'preset': 'lstm-laptop', 'head': 'plif', 'lr': 0.01}
        """
        own = dataclasses.asdict(TrainConfig())
        always = ("corpus", "preset", "head")
        return {name: value for name, value in self.to_dict().items() if name in always or value != own[name]}

    def record(self, text: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything that decides the numbers of this run; see `uncork.lab.run.key`.

        Args:
            text: what `text_record` says of the corpus. None: a record without it, to compare runs on one text.
        """
        preset, resolved = self.resolved_preset(), self.resolved().to_dict()
        training = preset.training.to_dict()
        del training["epochs"]  # rounded up; the settings have the number itself
        record = {
            "rules": RULES,
            "settings": {
                k: v for k, v in resolved.items() if k not in _DECIDED_ELSEWHERE and k not in TrainConfig.HARMLESS
            },
            "model": preset.model.to_dict(),
            "training": training,
            "head": self.head_record(),
            "asked": self.asked(),
        }
        return record if text is None else {**record, "text": text}

    def head_record(self) -> dict[str, Any]:
        """The output layer with every option of its own resolved; body and text decide on its features and words.

        Raises LabError for a head option that does not exist or does not fit.
        """
        with torch.random.fork_rng(devices=[]):
            spec = self.build_head(4).spec()
        options = {k: v for k, v in spec["options"].items() if k not in ("in_features", "vocab_size")}
        return {**spec, "options": options}

    def build_head(self, vocab_size: int, **prior: Any) -> Any:
        """The output layer at its start. Raises LabError for a head option that does not exist or does not fit."""
        features = self.resolved_preset().model.feature_size
        try:
            return uncork.build_head(self.head, features, vocab_size, **prior, **self.head_options)
        except (TypeError, ValueError) as error:
            raise LabError(f"head {self.head}: {error}") from error

    def stored(self, text: dict[str, Any]) -> dict[str, Any]:
        """What a run's config.json holds: every setting, resolved, and the record of what decides its numbers."""
        return {**self.resolved().to_dict(), RECORD: self.record(text)}

    def load_corpus(self, *, data_dir: Path | None = None, cache_dir: Path | None = None) -> Corpus:
        """The corpus that the config names. Raises LabError as `uncork.lab.data.corpora.load_corpus` does."""
        return load_corpus(
            self.corpus,
            tokenization=self.tokenization,
            vocab_size=self.vocab_size,
            min_count=self.min_count,
            max_train_tokens=self.max_train_tokens,
            data_dir=data_dir,
            cache_dir=cache_dir,
        )


def text_record(corpus: Corpus) -> dict[str, Any]:
    """What a run knows its text by: a digest of all that numbers depend on, and its counts for a person to read.

    The digest is of the words (or subwords) and of every split's ids, words and bytes: what is predicted, and what
    perplexity per word and bits per byte are counted in. Where the text lies and how it was read do not count.
    """
    counts = {
        "vocab_size": corpus.vocab_size,
        "tokens": {name: len(ids) for name, ids in corpus.splits.items()},
        "words": corpus.words,
        "bytes": corpus.bytes,
    }
    digest = hashlib.sha256(json.dumps([corpus.tokenizer.tokens(), counts], sort_keys=True).encode())
    for name in sorted(corpus.splits):
        for part in corpus.splits[name].split(2**20):  # the ids may be larger than memory
            digest.update(part.numpy().astype("<i4").tobytes())
    return {"sha256": digest.hexdigest(), **counts}
