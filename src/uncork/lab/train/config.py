"""What is trained, on what, and how: every setting of a run, resolved and checked."""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator

import uncork
from uncork.heads import HeadSpec
from uncork.lab.data.corpora import Corpus, load_corpus
from uncork.lab.errors import LabError
from uncork.lab.models import LookupConfig, ModelConfig, TransformerConfig
from uncork.lab.run.key import RECORD
from uncork.lab.train.presets import get_preset
from uncork.lab.validated import NonNegative, Positive, Seed, Share, Size, Switch, Validated, expects, require
from uncork.messages import close_to

RULES = 1
"""The version of the rules of training and evaluation: increased when the same settings give other results than before,
beyond rounding. A run made under earlier rules is then refused, with that reason, and not mixed with later ones.

1: version 0.1.0 and after.
"""


class Text(Validated):
    """The text of a run."""

    corpus: str = "sotu"
    """The text: sotu, ptb, wikitext-2, or the path of a text file or of a folder of .txt files."""
    tokenization: Literal["word", "bpe"] = "word"
    """Words, or subwords trained on the corpus."""
    vocab_size: Size | None = None
    """At most so many ids. None: every word, or 8,192 subwords."""
    min_count: Size = 1
    """Words rarer than this in the training split become <unk>. `uncork train` and `uncork compare` take 2, but 1 for
    ptb and wikitext-2, whose rare words are <unk> already."""
    max_train_tokens: Size | None = None
    """Train on the first so many tokens alone. None: on all."""


class TrainingOptions(Validated):
    """The training settings that are seldom changed: `--set training_options.NAME`."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam (with decoupled weight decay) or plain SGD."""
    eval_batch_size: Size = 32
    """Parallel streams into which an evaluated text is cut."""
    variable_bptt: Switch = False
    """Draw each batch's length around bptt and scale its learning rate by length / bptt, as AWD-LSTM does."""
    asgd: Annotated[Literal["never", "trigger"] | Size, expects("'never', 'trigger' or an epoch (from 1)")] = "never"
    """When SGD starts to average its iterates: never, when validation stops improving, or at this epoch (from 1)."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """The learning rate after the warm-up: constant, or down to 0 along half a cosine."""
    warmup: Share = 0.0
    """Share of all steps, in [0, 1), over which the learning rate rises linearly."""
    decay: Literal["all", "matrices"] = "all"
    """What weight decay applies to: all parameters but the functions', or only the matrices among them (no biases,
    norms, embeddings); see `uncork.parameter_groups`."""

    @model_validator(mode="after")
    def _require_sgd(self) -> Self:
        if self.asgd != "never" and self.optimizer != "sgd":
            raise LabError(f"asgd averages SGD's iterates; the optimizer is {self.optimizer!r}")
        return self


class Training(TrainingOptions):
    """The training settings that do not depend on head and text.

    >>> Training(optimizer="sgd", lr=20.0, asgd=200).asgd
    200
    """

    lr: Positive = 3e-3
    """Peak learning rate."""
    batch_size: Size = 32
    """Parallel streams of the training text, over all processes."""
    bptt: Size = 64
    """Tokens of each stream in a batch: how far gradients reach back."""
    clip: NonNegative = 1.0
    """Largest norm of the gradient of everything but the functions. 0: no clipping."""
    weight_decay: NonNegative = 0.0
    """Weight decay of the parameters that `decay` selects; with SGD it is an L2 penalty."""
    bias_prior: Switch = False
    """Start the bias of the output layer at the log unigram of the training text."""
    output_lr_scale: NonNegative = 1.0
    """Factor on the learning rate for weight and bias of the output layer."""


class TrainConfig(Training, Text):
    """All settings of a run, with defaults resolved. A preset gives the values that `of` starts from.

    >>> config = TrainConfig.of("lstm-laptop", head="plif", in_features=8, lr=0.01)
    >>> config.in_features, config.lr, config.bptt, config.epochs
    (8, 0.01, 48, 4.0)
    >>> TrainConfig.from_dict(config.to_dict()) == config
    True

    Raises:
        LabError: a bad value, an unknown preset, head or option; the message names the field.
    """

    preset: str
    """The preset that the values start from; see `uncork.lab.train.presets`."""
    model: ModelConfig
    """The backbone."""
    head: str = "softmax"
    """The output layer, one of `uncork.HEAD_NAMES`."""
    head_options: dict[str, Any] = Field(default_factory=dict)
    """The head's own options, such as {"num_pieces": 50}."""
    seed: Seed = 0
    """Random seed of the initial weights, the dropouts and the variable lengths."""
    epochs: Annotated[float, Field(gt=0, le=1e6), expects("a number above 0 and at most 1,000,000")] = 10.0
    """Passes over the training text; a fraction ends within one."""
    max_steps: Size | None = None
    """Stop after so many steps, if that is earlier. The learning-rate schedule then ends with them."""
    function_lr_scale: NonNegative = 1.0
    """Factor on the learning rate for the parameters of the logit function."""
    function_start: Share = 0.0
    """Share of all steps, in [0, 1), before the parameters of the logit function are trained; until then their rate is
    0, and then what schedule and function_lr_scale make it."""
    function_clip: NonNegative = Field(default_factory=lambda settings: settings["clip"])
    """Largest norm of the gradient of the functions' parameters, which is clipped separately. Not given: the same as
    clip. 0: no clipping."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training: none, or bfloat16. Validation always computes in float32."""
    eval_every: Size | None = None
    """Steps between validations. None: at the end of each epoch. There is always one at the end of training."""
    log_every: Size = 20
    """Steps between rows of metrics.jsonl."""
    patience: Size | None = None
    """Stop early after so many validations in a row that are no better than the best. None: never."""
    checkpoint_every: NonNegative = Field(60.0, exclude=True)
    """Least number of seconds between checkpoints. No result depends on it, so it is not stored."""

    @field_validator("head")
    @classmethod
    def _require_name(cls, name: str) -> str:
        if name not in uncork.HEAD_NAMES:
            near = close_to(name, uncork.HEAD_NAMES)
            raise LabError(f"head must be one of {', '.join(uncork.HEAD_NAMES)}, got {name!r}{near}")
        return name

    @model_validator(mode="after")
    def _require_length(self) -> Self:
        if isinstance(self.model, TransformerConfig):
            if self.variable_bptt:
                raise LabError("variable_bptt draws lengths without a limit, and a transformer has one: switch it off")
            if self.bptt > self.model.max_length:
                raise LabError(
                    f"bptt must be at most the transformer's max_length = {self.model.max_length}, got {self.bptt}"
                )
        if isinstance(self.model, LookupConfig) and (self.batch_size != 1 or self.variable_bptt):
            raise LabError(
                "a lookup table takes every step on the whole text: batch_size must be 1 and variable_bptt off, got "
                f"{self.batch_size} and {'on' if self.variable_bptt else 'off'}"
            )
        return self

    @classmethod
    def of(cls, preset: str = "lstm-laptop", **values: Any) -> Self:
        """The settings of a preset with these values in place of its own; see `updated`."""
        return cls(preset=preset, **get_preset(preset).values).updated(**values)

    def updated(self, **values: Any) -> Self:
        """These settings with some values replaced.

        Args:
            values: by field, or as the command line calls them: `in_features`, and the dictionaries `model_options`
                and `training_options`.
        """
        model, training = (values.pop(name, {}) for name in ("model_options", "training_options"))
        require("model_options", dict[str, Any], model)
        require("training_options", dict[str, Any], training)
        body, features = self.model.updated(**model), values.pop("in_features", None)
        if features is not None:
            require("in_features", Size, features)
            # A body whose last layer already has so many features gets no linear map.
            body = body if features == body.feature_size else body.updated(out_features=features)
        if "clip" in values and self.function_clip == self.clip:
            values.setdefault("function_clip", values["clip"])
        return super().updated(**{"model": body, **training, **values})

    @property
    def in_features(self) -> int:
        """Features d that the output layer receives: the width of the bottleneck."""
        return self.model.feature_size

    def to_dict(self) -> dict[str, Any]:
        """Every setting that results depend on, in JSON's types, by its name on the command line."""
        values = self.model_dump(mode="json")
        model = values.pop("model")
        return {
            "corpus": values.pop("corpus"),
            "preset": values.pop("preset"),
            "in_features": self.in_features,
            "head": values.pop("head"),
            "training_options": {name: values.pop(name) for name in TrainingOptions.model_fields},
            "model_options": {name: value for name, value in model.items() if name not in ("kind", "out_features")},
            **values,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The settings that `to_dict` wrote, here or in an earlier version, where None stood for the preset's value.

        Raises LabError for an unknown setting or a bad value.
        """
        return cls.of(**{name: value for name, value in values.items() if value is not None})

    def asked(self) -> dict[str, Any]:
        """Text, preset and head, and all else that differs from the preset, in JSON's types.

        >>> TrainConfig.of("lstm-laptop", head="plif", lr=0.01).asked()
        {'corpus': 'sotu', 'preset': 'lstm-laptop', 'head': 'plif', 'lr': 0.01}
        """
        preset = {**TrainConfig.of(self.preset).to_dict(), "function_clip": self.clip}
        asked: dict[str, Any] = {}
        for name, value in self.to_dict().items():
            if name in ("model_options", "training_options"):
                own = {option: v for option, v in value.items() if preset[name].get(option) != v}
                asked |= {name: own} if own else {}
            elif name in ("corpus", "preset", "head") or value != preset[name]:
                asked[name] = value
        return asked

    def record(self, text: dict[str, Any] | None = None) -> dict[str, Any]:
        """Everything that decides the numbers of this run; see `uncork.lab.run.key`.

        Args:
            text: what `text_record` says of the corpus. None: a record without it, to compare runs on one text.
        """
        training = self.model_dump(mode="json", include=set(Training.model_fields))
        elsewhere = {"preset", "model", "head", "head_options", *Training.model_fields, *Text.model_fields}
        record = {
            "rules": RULES,
            "settings": self.model_dump(mode="json", exclude=elsewhere),
            "model": self.model.model_dump(mode="json"),
            "training": {**training, "clip": self.clip or None},
            "head": self.head_record(),
            "asked": self.asked(),
        }
        return record if text is None else {**record, "text": text}

    def head_record(self) -> dict[str, Any]:
        """The output layer's spec with every option resolved, but without in_features and vocab_size.

        Raises LabError for a head option that does not exist or does not fit.
        """
        with torch.device("meta"):  # takes no memory, whatever the sizes
            spec = self.build_head(4).spec()
        options = {k: v for k, v in spec["options"].items() if k not in ("in_features", "vocab_size")}
        return {**spec, "options": options}

    def build_head(self, vocab_size: int, **prior: Any) -> Any:
        """The output layer at its start.

        Raises LabError for a head option that does not exist or does not fit, or a `bias_prior` that the head cannot
        start from.
        """
        try:
            head = uncork.build_head(self.head, self.in_features, vocab_size, **prior, **self.head_options)
            if self.bias_prior and head.bias is None:  # said before a run is made, where there are no counts yet
                raise ValueError("bias_init: expected a head with a bias, got bias=False")
        except (TypeError, ValueError) as error:
            said = str(error)
            if said.startswith("bias_init: "):
                text = str(HeadSpec(self.head, self.head_options))
                without = f"{text}{',' if ':' in text else ':'}bias_prior=false"
                said = f"{said.replace('bias_init', 'bias_prior')}; {without} starts without the log unigram"
            raise LabError(f"head {self.head}: {said}") from error
        return head

    def stored(self, text: dict[str, Any]) -> dict[str, Any]:
        """What a run's config.json holds: every setting, and the record of what decides its numbers."""
        return {**self.to_dict(), RECORD: self.record(text)}

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


class Setting(NamedTuple):
    """One setting of a preset: the value that it has there, and what it means."""

    value: Any
    about: str


def known_settings(preset: str) -> dict[str, Setting]:
    """The settings that `--set` accepts with this preset, by key.

    >>> known_settings("lstm-laptop")["model_options.input_dropout"].value
    0.2

    Raises LabError for an unknown preset.
    """
    config = TrainConfig.of(preset)
    options = TrainingOptions.model_fields
    flags_alone = {"preset", "corpus", "tokenization", "head", "head_options", "seed", "model"}
    found = {"in_features": Setting(config.in_features, str(TrainConfig.in_features.__doc__))}
    for prefix, part, left_out in (
        ("", config, flags_alone | options.keys()),
        ("model_options.", config.model, {"kind", "out_features"}),
        ("training_options.", config, TrainConfig.model_fields.keys() - options.keys()),
    ):
        for name, about in part.explanations().items():
            if name not in left_out:
                found[prefix + name] = Setting(getattr(part, name), about)
    return found


def text_record(corpus: Corpus) -> dict[str, Any]:
    """What identifies a run's text: a digest of all that its results depend on, and counts for people to read.

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
