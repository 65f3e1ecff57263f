"""The settings of one training run, in JSON's types, and what they resolve to."""

import dataclasses
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import uncork
from uncork.lab.corpora import Corpus, load_corpus
from uncork.lab.errors import LabError
from uncork.lab.models.language_model import require_bool, require_non_negative, require_size
from uncork.lab.presets import Preset, TrainingPreset, get_preset


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
    """The backbone and how it is trained; see `uncork.lab.presets`."""
    in_features: int | None = None
    """Features d that the output layer receives: the width of the bottleneck."""
    model_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the backbone that replace the preset's, as {"hidden_sizes": [512]}."""
    head: str = "softmax"
    """The output layer, one of `uncork.HEAD_NAMES`."""
    head_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its own options, as {"num_pieces": 50}."""
    bias_prior: bool = False
    """Start the bias of the output layer at the log unigram of the training text."""
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
    """Weight decay of everything but the functions."""
    training_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of `TrainingPreset` that replace the preset's, as {"asgd": "trigger"}."""
    function_lr_scale: float = 1.0
    """Factor on the learning rate for the parameters of the logit function."""
    output_lr_scale: float = 1.0
    """Factor on the learning rate for weight and bias of the output layer."""
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
    """Fields that earlier versions did not have, and what these did: their runs and rows keep their names."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "max_train_tokens", "in_features", "max_steps", "batch_size", "bptt", "eval_every",
                     "patience"):  # fmt: skip
            if getattr(self, name) is not None:
                require_size(name, getattr(self, name))
        for name in ("min_count", "log_every"):
            require_size(name, getattr(self, name))
        for name in ("epochs", "lr", "clip", "weight_decay", "function_clip"):
            if getattr(self, name) is not None:
                require_non_negative(name, getattr(self, name))
        for name in ("function_lr_scale", "output_lr_scale", "checkpoint_every"):
            require_non_negative(name, getattr(self, name))
        for name in ("epochs", "lr"):
            if getattr(self, name) == 0:
                raise LabError(f"{name} must be above 0, got 0")
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
            (
                "training_options",
                {name: name for name in ("lr", "batch_size", "bptt", "clip", "weight_decay", "epochs")},
            ),
        ):
            for option, field in fields.items():
                if option in getattr(self, options):
                    raise LabError(f"{options}: give {option} by the field {field}")

    def resolved_preset(self) -> Preset:
        """The preset with this config's values in it; its `training.epochs` rounds `epochs` up."""
        preset = get_preset(self.preset)
        features = {} if self.in_features is None else {"out_features": self.in_features}
        model = type(preset.model).from_dict({**preset.model.to_dict(), **self.model_options, **features})
        own = {name: getattr(self, name) for name in ("lr", "batch_size", "bptt", "weight_decay")}
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
            function_clip=clip if self.function_clip is None else self.function_clip,
        )

    def to_dict(self) -> dict[str, Any]:
        """Every field, in JSON's types; one of `ADDED` only where it differs from what was done before."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in self.ADDED or v != self.ADDED[k]}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """The config that `to_dict` wrote. Raises LabError for an unknown field or a bad value."""
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise LabError(f"unknown setting: {', '.join(unknown)}")
        return cls(**values)

    def load_corpus(self, *, data_dir: Path | None = None, cache_dir: Path | None = None) -> Corpus:
        """The corpus that the config names. Raises LabError as `uncork.lab.corpora.load_corpus` does."""
        return load_corpus(
            self.corpus,
            tokenization=self.tokenization,
            vocab_size=self.vocab_size,
            min_count=self.min_count,
            max_train_tokens=self.max_train_tokens,
            data_dir=data_dir,
            cache_dir=cache_dir,
        )
