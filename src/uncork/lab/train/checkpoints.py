"""Model, optimiser and random generators to and from the checkpoints of a run, and a trained model from its folder.

A run keeps two kinds of checkpoint: "last", everything that training needs to go on to the same bits, and "best", the
weights that did best in validation. Either holds in its header what the model is, so that it can be rebuilt.

    model.KEY           the state_dict, tied weights once          optimizer.INDEX.KEY   the optimiser's tensors
    average.KEY         the mean weights of averaged SGD           hidden.INDEX          the recurrent state
    rng.cpu, rng.cuda   a row for each process
"""

import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

import uncork
from uncork.heads.state import KEY as HEAD_SPEC
from uncork.lab.data.corpora import Corpus
from uncork.lab.data.tokenization import Tokenizer
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel, build_model
from uncork.lab.run import key as run_key
from uncork.lab.run.files import plain, read_json, write_json
from uncork.lab.run.names import require_settings
from uncork.lab.run.store import Checkpoint, Run
from uncork.lab.train.config import TrainConfig

FORMAT = 1
LAST, BEST = "last", "best"
TOKENIZER_FILE = "tokenizer.json"


@dataclass
class TrainState:
    """Where training stands: the part of a checkpoint that is JSON."""

    step: int = 0
    epoch: int = 0
    """Whole passes over the text so far."""
    segment: int = 0
    """Batches of the present pass so far."""
    tokens: int = 0
    """Tokens that all processes trained on."""
    seconds: float = 0.0
    """Spent in training steps, over all the sessions of the run."""
    row_tokens: int = 0
    """Tokens of this process since the last row of the metrics."""
    row_steps: int = 0
    row_seconds: float = 0.0
    row_totals: list[float] = dataclasses.field(default_factory=list)
    """Sums since the last row: of nats, and of each group's gradient norm."""
    validated_step: int = 0
    history: list[float] = dataclasses.field(default_factory=list)
    """Cross-entropy of every validation."""
    best_step: int = 0
    averaged: int | None = None
    """Steps in the mean of averaged SGD; None while there is no mean."""
    stopped: bool = False
    """Whether `patience` ended training early."""

    @property
    def best(self) -> float | None:
        """The least cross-entropy in validation."""
        return min(self.history, default=None)

    @property
    def checks_since_best(self) -> int:
        """Validations after the first that reached the best cross-entropy."""
        return len(self.history) - 1 - self.history.index(min(self.history)) if self.history else 0


def build_untrained(config: TrainConfig, corpus: Corpus) -> LanguageModel:
    """The model that training starts from. The backbone's weights depend on the seed alone, not on the head.

    Raises LabError for a head option that does not exist or does not fit.
    """
    prior = {"bias_init": corpus.counts} if config.bias_prior else {}
    torch.manual_seed(derived_seed(config.seed, "head"))
    head = config.build_head(corpus.vocab_size, **prior)
    torch.manual_seed(derived_seed(config.seed, "backbone"))
    return build_model(config.model, head, corpus.vocab_size)


def check_head(config: TrainConfig) -> None:
    """Raise LabError for a head option that does not exist or does not fit, or a prior of a bias that is not there; to
    be called before a run is made or trained."""
    config.head_record()


def derived_seed(seed: int, purpose: str) -> int:
    """A separate seed for each purpose, so that drawing more numbers for one changes no other."""
    return random.Random(f"{seed} {purpose}").getrandbits(63)


def describe(config: TrainConfig, model: LanguageModel, corpus: Corpus) -> dict[str, Any]:
    """What a model is and how it is trained, as plain JSON, from which `load_trained` rebuilds it."""
    head: Any = model.head
    description = {
        "format": FORMAT,
        "config": config.to_dict(),
        "head": head.spec(),
        "vocab_size": corpus.vocab_size,
        "fingerprint": corpus.fingerprint,
    }
    return dict(plain(description))


def described_config(description: dict[str, Any]) -> TrainConfig:
    """The settings in a description. Earlier versions kept what came from the preset in `model` and `training`."""
    values = dict(description["config"])
    for name, kept in (("model_options", description.get("model")), ("training_options", description.get("training"))):
        if kept is not None:
            values[name] = {key: kept[key] for key in TrainConfig.of(values["preset"]).to_dict()[name] if key in kept}
    return TrainConfig.from_dict(values)


def check_description(checkpoint: Checkpoint, expected: dict[str, Any]) -> None:
    """Raise a LabError that lists the differences unless the checkpoint belongs to the same training."""
    stored = checkpoint.state.get("description")
    if not isinstance(stored, dict) or stored.get("format") != FORMAT:
        raise LabError(f"{checkpoint.path}: was not written by this version of uncork's training")
    written = {**stored, "config": described_config(stored).to_dict()}
    ours, theirs = (
        run_key.flat({k: of[k] for k in of if k not in ("model", "training")}) for of in (expected, written)
    )
    different = [k for k in {**theirs, **ours} if ours.get(k) != theirs.get(k)]
    if different:
        shown = [f"{name} was {theirs.get(name, 'absent')}, is {ours.get(name, 'absent')}" for name in different]
        raise LabError(f"{checkpoint.path}: is of another training: {run_key.told(shown)}")


def model_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The model's state, each tied tensor once."""
    tied = model.tied_keys()
    return {f"model.{key}": tensor for key, tensor in model.state_dict().items() if key not in tied}


def average_tensors(average: AveragedModel) -> dict[str, Tensor]:
    """The means that averaged SGD keeps of the trained weights."""
    named = average.module.named_parameters()
    return {f"average.{name}": parameter.detach() for name, parameter in named if parameter.requires_grad}


def load_model(model: LanguageModel, checkpoint: Checkpoint) -> None:
    """Load the checkpoint's weights into the model. Raises LabError if they are of another model or head."""
    prefix = "model."
    given = {key.removeprefix(prefix): t for key, t in checkpoint.tensors.items() if key.startswith(prefix)}
    tied = model.tied_keys()
    wanted = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    spec_key = f"head.{HEAD_SPEC}"
    if spec_key not in given and isinstance(model.head, uncork.heads.Head):
        # Written by 0.1.0, where the description alone tells which head the weights belong to.
        described = checkpoint.state.get("description", {}).get("head")
        with torch.device("meta"):
            head = model.head if described is None else uncork.head_from_spec(described)
        given = uncork.heads.convert_state_0_1(given, head, "head.")
    wrong = sorted((wanted.keys() ^ given.keys()) - {spec_key})
    if wrong:
        raise LabError(
            f"{checkpoint.path}: is of another model or head, only one of the two has {', '.join(wrong[:3])}"
        )
    for key, tensor in wanted.items():
        if tensor.shape != given[key].shape and key != spec_key:
            raise LabError(
                f"{checkpoint.path}: is of another model or head, {key} is {tuple(given[key].shape)} there, "
                f"{tuple(tensor.shape)} here"
            )
    try:
        model.load_state_dict({**given, **{key: given[source] for key, source in tied.items()}})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise LabError(f"{checkpoint.path}: is of another model or head: {reason}") from error


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, the rest as JSON) of an optimiser. Learning rates are left out: they follow from the step."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            (tensors if isinstance(value, Tensor) else rest)[f"optimizer.{index}.{key}"] = value
    return tensors, rest


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], rest: dict[str, Any]) -> None:
    """Restore what `optimizer_state` returned for an optimiser of the same parameters."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **rest}.items():
        kind, _, inner = name.partition(".")
        if kind == "optimizer":
            index, _, key = inner.partition(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def rng_tensors(device: torch.device) -> dict[str, Tensor]:
    """The states of torch's generators, (1, bytes) uint8 each; training draws from no other generator."""
    states = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng.cuda"] = torch.cuda.get_rng_state(device)
    return {key: state.unsqueeze(0) for key, state in states.items()}


def load_rng(tensors: dict[str, Tensor], device: torch.device, rank: int) -> None:
    """Set the generators of the process `rank` back to where `rng_tensors` found them."""
    # Cloned: torch crashes on a state that is a view into the middle of its storage.
    torch.set_rng_state(tensors["rng.cpu"][rank].clone())
    if device.type == "cuda" and "rng.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng.cuda"][rank].clone(), device)


def numbered(name: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The tensors NAME.0, NAME.1 ... in order."""
    count = sum(key.startswith(f"{name}.") for key in tensors)
    return tuple(tensors[f"{name}.{index}"] for index in range(count))


def save_best(run: Run, step: int, model: LanguageModel, description: dict[str, Any]) -> None:
    """Keep the model's present weights as the run's best."""
    run.save_checkpoint(step, model_tensors(model), {"description": description}, keep=1, name=BEST)


def save_tokenizer(run: Run, tokenizer: Tokenizer) -> None:
    """Save the tokenizer in the run's folder, so that other text can be tokenised with it."""
    write_json(run.path / TOKENIZER_FILE, tokenizer.spec())


@dataclass(frozen=True)
class Trained:
    """A trained model and all that is needed to use it."""

    model: LanguageModel
    """With the best weights, in evaluation mode."""
    tokenizer: Tokenizer
    config: TrainConfig
    """How it was trained; `bptt` and `eval_batch_size` are how it is evaluated."""
    step: int
    """The training step after which the model had these weights."""
    fingerprint: str
    """Of the corpus; see `Corpus.fingerprint`."""
    run: Run

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's result.json; None while it still trains. Raises LabError when it is damaged."""
        return self.run.result


def load_trained(run_path: Path | str, *, device: torch.device | str = "cpu") -> Trained:
    """The model with the best validation, rebuilt from a run's folder alone.

    Raises:
        LabError: no such run, no validation yet, a damaged file, or a checkpoint of another head than the run's.
    """
    run = Run.open(run_path)
    checkpoint = run.load_checkpoint(BEST)
    if checkpoint is None and run.is_validated():
        raise LabError(
            f"{run.path / 'checkpoints'}: holds no file {BEST}-*.safetensors, although the run was validated: the file "
            "was removed; restore it, or remove the run's folder and train again"
        )
    if checkpoint is None:
        raise LabError(
            f"{run.path}: holds no trained model yet; it has one after the first validation of `uncork train`"
        )
    require_settings(run.path / "config.json", run.config)
    tokenizer_path = run.path / TOKENIZER_FILE
    again = "the command that made the run writes it again"
    if not tokenizer_path.exists():
        raise LabError(f"{tokenizer_path}: is missing; {again}")
    spec = read_json(tokenizer_path, f"; remove it, and {again}")
    try:
        tokenizer = Tokenizer.from_spec(spec)
    except LabError as error:
        raise LabError(f"{tokenizer_path}: {error}; remove it, and {again}") from error
    try:
        description = checkpoint.state["description"]
        config = described_config(description)
        with torch.random.fork_rng(devices=[]):
            head = uncork.head_from_spec(description["head"])
            model = build_model(config.model, head, description["vocab_size"])
        fingerprint = str(description["fingerprint"])
    except (KeyError, TypeError, ValueError, LabError) as error:
        raise LabError(f"{checkpoint.path}: does not describe a model of this version of uncork ({error})") from error
    if run.config["head"] != config.head:
        raise LabError(f"{checkpoint.path}: has the head {config.head}, but the run is of {run.config['head']}")
    if tokenizer.vocab_size != description["vocab_size"]:
        raise LabError(
            f"{tokenizer_path}: has {tokenizer.vocab_size} ids, but the model predicts {description['vocab_size']}"
        )
    load_model(model, checkpoint)
    model.to(device).eval()
    return Trained(model, tokenizer, config, checkpoint.step, fingerprint, run)
