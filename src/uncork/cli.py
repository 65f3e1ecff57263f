"""The command line.

A command is one frozen dataclass: its fields are the flags, their docstrings the help. Every command prints what it
resolved, ends with one JSON line, and turns a mistake into one clear line and a non-zero exit code.
"""

import dataclasses
import json
import platform
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError, in_one_line
from uncork.lab.machine import cores
from uncork.lab.run.interrupts import Interrupted, handled, interrupt
from uncork.lab.run.names import as_arguments, check_folder, require_settings
from uncork.lab.run.progress import Meter, announce, listening, tell_terminal
from uncork.lab.terminal import NobodyReads, complain, ready_streams, say

try:
    from uncork.lab.command_line import flag, parse, with_flags
    from uncork.lab.experiments.bench.settings import Bench
    from uncork.lab.experiments.study.settings import Study
    from uncork.lab.experiments.synthetic.settings import Synthetic
    from uncork.lab.settings import Compare, Evaluate, Generate, Presets, Train, TrainingFlags, Verify
except ModuleNotFoundError as error:
    complain(f"uncork: the command line {in_one_line(error)}")
    raise SystemExit(2) from None


def _announce(command: Any) -> None:
    say(f"uncork {type(command).__name__.lower()}")
    for field in dataclasses.fields(command):
        value = getattr(command, field.name)
        if value not in (None, (), ""):
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
            say(f"  {field.name.replace('_', '-'):18} {shown}")


def _announce_preset(command: TrainingFlags, config: Any) -> None:
    """Prints the values that the preset gives to flags that were left out."""
    names = ("min_count", "in_features", "epochs", "lr", "batch_size", "bptt")
    shown = [f"{name.replace('_', '-')} {getattr(config, name)}" for name in names if getattr(command, name) is None]
    if shown:
        say(f"  {'resolved':18} {', '.join(shown)}")


def _announce_corpus(corpus: Any, config: Any, more: str = "") -> None:
    """Prints which text was read, from which of a user's files, how tight the bottleneck is, and what takes the time
    where that is not the training."""
    features = config.in_features
    origin = f" ({corpus.origin})" * bool(corpus.origin)
    say(
        f"\n{corpus.name}{origin}: {len(corpus.splits['train']):,} tokens to train on, V = {corpus.vocab_size:,}; "
        f"d = {features}, V / d = {corpus.vocab_size // features}{more}\n"
    )
    trained = config.epochs * len(corpus.splits["train"])
    evaluated = len(corpus.splits["valid"]) + len(corpus.splits["test"])
    if trained < evaluated:
        say(
            f"note: {trained:,.0f} tokens are trained on, but {evaluated:,} of validation and test are evaluated, as "
            f"always, with V = {corpus.vocab_size:,}: a trial is quicker with a smaller --vocab-size\n"
        )


def _command_line() -> str:
    return shlex.join(["uncork", *sys.argv[1:]])


_MOST = {"seeds": 100, "workers": 1024, "threads": 1024, "contexts": 10**9, "max_tokens": 10**6}


def _require_counts(command: Any, *names: str) -> None:
    for name in names:
        value = getattr(command, name)
        if value is not None and not 1 <= value <= _MOST[name]:
            raise LabError(f"{flag(name)}: expected at least 1 and at most {_MOST[name]}, got {value}")


def _say_next(*commands: list[Any]) -> None:
    """Prints the commands that a person is likely to want after this one."""
    for number, words in enumerate(commands):
        say(f"{'' if number else 'Next:'}".ljust(6) + shlex.join(["uncork", *map(str, words)]))


def compare(command: Compare) -> dict[str, Any]:
    """Runs the comparison; returns the content of the last line."""
    from uncork.lab.experiments.compare import Texts, check_stored, make_cells, started_runs, train_all
    from uncork.lab.report.findings import caveats, headline, verdict
    from uncork.lab.report.page import write_report
    from uncork.lab.report.records import read_records
    from uncork.lab.report.tables import DEVIATION, SPARE, display, runs_table, summarise, terminal_table
    from uncork.lab.run.files import write_json
    from uncork.lab.run.store import RunStore

    _require_counts(command, "seeds", "workers", "contexts", "threads")
    base = command.base()
    _announce_preset(command, base)
    cells = make_cells(command.heads, range(command.seeds), base)
    _require_free(command.out_dir, command)
    store, texts = RunStore(command.out_dir / "runs"), Texts(command.data_dir)
    check_stored(store.root, cells, texts)
    write_json(command.out_dir / "config.json", {**dataclasses.asdict(command), "command": _command_line()})
    corpus = cells[0].config.load_corpus(data_dir=command.data_dir)
    features = cells[0].config.in_features
    _announce_corpus(corpus, cells[0].config, f"; {len(cells)} runs")
    failed = train_all(
        store.root,
        cells,
        texts,
        contexts=command.contexts,
        workers=command.workers,
        threads=command.threads or max(1, cores() // command.workers),
    )
    runs_there, damaged = started_runs(store.root, cells)
    for name in damaged.keys() - failed.keys():
        say(f"{name}: {damaged[name]}")
    failed = damaged | failed
    records = read_records(runs_there)
    if all(record.result is None for record in records):
        raise LabError(f"no run finished: {next(iter(failed.values()), 'nothing was run')}")
    title = f"Output layers on {corpus.name}, d = {features}, V = {corpus.vocab_size:,}"
    announce("writing the report")
    notes = [f"{name} did not finish: {message}" for name, message in failed.items()]
    report = write_report(command.out_dir, records, title=title, command=_command_line(), notes=notes)
    runs = runs_table(records)
    summary = summarise(runs)
    say(f"\n{terminal_table(display(summary), title=DEVIATION, spare=SPARE)}")
    for sentence in (verdict(summary, runs), headline(summary), *caveats(summary, runs)):
        say(f"- {sentence}")
    kinds = sorted({str(record.result.get("loss")) for record in records if record.result})
    say(f"- Computed by the {', '.join(kinds)} loss.")
    say(f"\nThe report: {report}")
    say("The same command with more --seeds or --heads adds rows to it.")
    _say_next(["generate", next(record.run.path for record in records if record.result is not None)])
    return {
        "command": "compare",
        "report": str(report),
        "runs": sum(record.result is not None for record in records),
        "failed": failed,
    }


def train(command: Train) -> dict[str, Any]:
    """Trains one run; returns its result."""
    check_folder(command.out_dir.absolute())
    _require_free(command.out_dir, command)
    import torch

    from uncork.lab.report.page import write_report
    from uncork.lab.report.records import read_records
    from uncork.lab.run.progress import progress_line
    from uncork.lab.run.store import RunStore
    from uncork.lab.train.config import text_record
    from uncork.lab.train.head import with_head
    from uncork.lab.train.result import epochs_told
    from uncork.lab.train.trainer import train as train_run

    _require_counts(command, "threads")
    config = with_head(command.base(), command.head, command.seed)
    _announce_preset(command, config)
    out_dir = command.out_dir.absolute()
    if command.resume and not (out_dir / "config.json").exists():
        raise LabError(f"resume: {out_dir} holds no run, so there is nothing to resume: leave --resume out")
    corpus = config.load_corpus(data_dir=command.data_dir)
    _announce_corpus(corpus, config)
    run = RunStore(out_dir.parent).run(out_dir.name, config.stored(text_record(corpus)))
    if run.result is not None:
        say(f"{out_dir} was trained before, with the same settings on the same text: nothing is trained")
    elif command.resume and run.last_step() is None:
        say(f"{out_dir} holds no checkpoint: training starts at the beginning")
    elif command.resume:
        say(f"going on after step {run.last_step()} of {out_dir}")
    elif run.last_step() is not None:
        raise LabError(f"{out_dir} holds an unfinished run: --resume goes on with it; or choose another --out-dir")
    torch.set_num_threads(command.threads or cores())
    announce("preparing the training")
    result = train_run(
        config,
        corpus,
        run,
        resume=command.resume,
        on_progress=lambda p: say(progress_line(out_dir.name, p, p.seconds_left)),
        tensorboard=command.tensorboard,
    )
    announce("writing the report")
    report = write_report(
        out_dir, read_records([run]), title=f"{config.head} on {corpus.name}", command=_command_line(), notes=[]
    )
    test = result["test"]
    if epochs := epochs_told(result, config):
        say(epochs)
    say(f"\ntest perplexity {test['perplexity']:.2f} per word, by the {result['loss']} loss. The report: {report}")
    _say_next(["generate", out_dir, "--prompt", "the"], ["evaluate", out_dir, "--split", "valid"])
    return {"command": "train", "run": str(out_dir), "report": str(report), "valid": result["valid"], "test": test}


def presets(command: Presets) -> dict[str, Any]:
    """Prints the presets, or the settings of one; returns them."""
    from uncork.lab.train.config import known_settings
    from uncork.lab.train.presets import PRESETS

    if not command.name:
        for name, preset in PRESETS.items():
            say(f"  {name:18} {preset.description}")
        return {"command": "presets", "presets": list(PRESETS)}
    flags = {field.name for field in dataclasses.fields(Train)}
    settings = known_settings(command.name)
    for key, setting in settings.items():
        value = setting.value if isinstance(setting.value, str) else json.dumps(setting.value, separators=(",", ":"))
        say(f"{flag(key)} {setting.value}" if key in flags else f"--set {key}={value}")
        say(f"    {setting.about}")
    return {"command": "presets", "name": command.name, "settings": {k: s.value for k, s in settings.items()}}


def _require_free(path: Path, command: Any) -> None:
    """Raise LabError if this folder cannot be written, or another command made it, whose files would be overwritten."""
    from uncork.lab.run.files import read_json, require_writable

    require_writable(path.absolute(), "out_dir")
    if not (path / "config.json").exists():
        return
    config, own = (
        read_json(path / "config.json", "; restore it, or choose another folder"),
        type(command).__name__.lower(),
    )
    made_by = "synthetic" if "targets" in config else "compare" if "heads" in config else "train"
    if made_by == "train":
        require_settings(path / "config.json", config)
    if made_by != own:
        raise LabError(f"--out-dir: {path} was made by `uncork {made_by}`: choose another folder for `uncork {own}`")


def _require_run(path: Path) -> None:
    """Raise LabError if the path is the folder of a comparison instead of one of its runs."""
    inside = [config.parent for config in path.glob("runs/[!.]*/config.json")]
    if inside:
        raise LabError(f"{path}: is a comparison; give one of its runs: {as_arguments(inside)}")


def evaluate(command: Evaluate) -> dict[str, Any]:
    """Evaluates a run; returns the numbers."""
    from uncork.lab.train.evaluation import evaluate_run

    _require_run(command.run)
    if command.split is not None and command.text is not None:
        raise LabError("split and text: give one of them")
    split = command.split or "test"
    found = evaluate_run(command.run, split, text=command.text, data_dir=command.data_dir)
    unknown = "" if found.unknown is None else f"; {100 * found.unknown:.1f} % of the words are unknown to the model"
    say(f"perplexity {found.perplexity:.2f} per word, {found.cross_entropy:.4f} nats per token{unknown}")
    _say_next(["generate", command.run])
    where = split if command.text is None else str(command.text)
    return {"command": "evaluate", "run": str(command.run), "on": where, **found.to_dict()}


def generate(command: Generate) -> dict[str, Any]:
    """Prints text sampled from the model; returns it."""
    from uncork.lab.train.checkpoints import load_trained
    from uncork.lab.train.generation import generate as sample
    from uncork.lab.train.generation import unknown_words

    _require_counts(command, "max_tokens")
    _require_run(command.run)
    trained = load_trained(command.run)
    if unknown := unknown_words(trained.tokenizer, command.prompt):
        complain(f"note: the model does not know {' '.join(unknown)} and reads <unk> instead")
    text = sample(
        trained.model,
        trained.tokenizer,
        command.prompt,
        max_tokens=command.max_tokens,
        temperature=command.temperature,
        top_k=command.top_k,
        top_p=command.top_p,
        seed=command.seed,
        window=trained.config.bptt,
    )
    say(text)
    return {"command": "generate", "run": str(command.run), "prompt": command.prompt, "text": text}


def bench(command: Bench) -> dict[str, Any]:
    """Measures the loss; returns the median ratios to G."""
    from uncork.lab.experiments.bench.run import plan_of, run
    from uncork.lab.experiments.bench.tables import median_ratios, narrow_table
    from uncork.lab.report.tables import terminal_table

    _require_counts(command, "threads")
    plan = plan_of(command)
    if command.out_dir is not None:
        _require_free(command.out_dir, command)
    tables = run(command, plan, _command_line())
    say(f"\n{terminal_table(narrow_table(tables), blocks='N, D, V')}\n")
    if command.out_dir is None:
        _say_next(["bench", "--out-dir", "bench"])
    return {"command": "bench", "out_dir": command.out_dir, "ratio_to_G": median_ratios(tables["times"])}


def synthetic(command: Synthetic) -> dict[str, Any]:
    """Fits heads to given distributions; returns where the tables are."""
    from uncork.lab.experiments.synthetic import experiment

    _require_counts(command, "workers")
    for folder in (command.out_dir, command.out_dir / ("quick" if command.quick else command.part)):
        _require_free(folder, command)
    outcome = experiment.run(command, _command_line())
    if outcome["part"] == "quick":
        _say_next(["synthetic", "--part", "default", "--out-dir", command.out_dir])
    return outcome


def study(command: Study) -> dict[str, Any]:
    """Trains a part of the language-model study; returns where the tables are."""
    from uncork.lab.experiments.study import experiment
    from uncork.lab.run.files import require_writable

    _require_counts(command, "workers")
    if command.part:  # without one the parts are listed, and nothing is written
        _require_free(command.out_dir, command)
        if not command.report_only:
            require_writable(command.work_dir.absolute(), "work_dir")
    outcome = experiment.run(command)
    if parts := outcome.get("parts"):
        plan = [] if command.plan == Study.plan else ["--plan", command.plan]
        _say_next(["study", *plan, "--part", parts[0]])
    return outcome


def verify(command: Verify) -> dict[str, Any]:
    """Prints the checks of a transformers model; returns them."""
    if (Path(command.path) / "metrics.jsonl").exists():
        raise LabError(
            f"{command.path}: is a run of `uncork train`, and verify is for models of transformers: "
            f"{shlex.join(['uncork', 'evaluate', command.path])} evaluates it"
        )
    try:
        from uncork.hf.load import load_cached
        from uncork.hf.proof.verify import verify as verified
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("transformers", "safetensors"):
            raise
        raise LabError(f"verify needs transformers: pip install 'uncork[hf]' (no module named {error.name})") from None
    if not 0 <= command.seed < 2**63:
        raise LabError(f"seed: expected a whole number from 0 to 2^63 - 1, got {command.seed}")
    announce("loading the model")
    model = load_cached(command.path, command.dtype)
    meter = Meter("verifying")
    try:
        found = verified(model, reload=command.reload, seed=command.seed, on_progress=meter)
    except (TypeError, ValueError, RuntimeError) as error:  # what `verify` says that it raises
        raise LabError(f"{command.path}: {' '.join(str(error).split())}") from None
    say(f"\n{found}\n")
    if not found.passed and command.dtype != "float32":
        _say_next(["verify", command.path, "--dtype", "float32"])
    return {"command": "verify", "path": command.path, **found.to_dict()}


_ABOUT = (
    "Output layers that break the softmax bottleneck, compared on real text. `uncork --version` prints the versions, "
    "`uncork --tyro-write-completion bash FILE` (or zsh, tcsh) writes completions for the shell to a file."
)
_COMMANDS: dict[type, Callable[[Any], dict[str, Any]]] = {
    Compare: compare,
    Train: train,
    Evaluate: evaluate,
    Generate: generate,
    Bench: bench,
    Synthetic: synthetic,
    Study: study,
    Presets: presets,
    Verify: verify,
}


def version() -> str:
    """The versions that a bug report should state."""
    import torch

    import uncork

    return f"uncork {uncork.__version__} (torch {torch.__version__}, Python {platform.python_version()})"


def main(arguments: list[str] | None = None) -> int:
    """Parses, runs, and returns the exit code.

    0; 1 for a model that is not verified; 2 for a mistake, a damaged file or a loss of nan; 130 for Ctrl-C, 143 for
    SIGTERM, 129 for a terminal that was closed; 141 when the reader of the output's pipe has ended.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    ready_streams()
    command: Any = None
    try:
        with handled(interrupt), listening(tell_terminal):
            if arguments == ["--version"]:
                say(version())
                return 0
            command = parse({kind.__name__.lower(): kind for kind in _COMMANDS}, arguments, _ABOUT)
            if command is None:
                return 0
            _announce(command)
            if "torch" not in sys.modules:
                announce("loading PyTorch")
            outcome = _COMMANDS[type(command)](command)
            say(json.dumps(outcome, default=str))
            return 2 if outcome.get("failed") else 1 if outcome.get("passed") is False else 0
    except NobodyReads:
        return 141
    except KeyboardInterrupt as error:
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        complain(f"\nuncork: {_stopped(command, signum, arguments)}")
        return 128 + signum
    except Exception as error:
        said = in_one_line(error)
        if said is None:
            raise
        if command is None:  # the arguments could not be parsed; the message begins with a command that is known
            complain(f"uncork {said}" if arguments and said.startswith(f"{arguments[0]}:") else f"uncork: {said}")
        else:
            complain(f"uncork: {with_flags(said, command)}")
        return 2


def _stopped(command: Any, signum: int, arguments: list[str]) -> str:
    """How the command ended, and the command that goes on; for `train`, only if it has written a checkpoint."""
    how = "interrupted" if signum == signal.SIGINT else f"ended by {signal.Signals(signum).name}"
    more: list[str] = []
    if isinstance(command, Train):
        if not list((command.out_dir / "checkpoints").glob("last-*")):
            return f"{how}; no checkpoint was written yet: the same command begins again"
        more = [] if command.resume else ["--resume"]
    elif not isinstance(command, TrainingFlags | Synthetic | Study):
        return how
    return f"{how}; to go on from what is kept: {shlex.join(['uncork', *arguments, *more])}"


if __name__ == "__main__":
    sys.exit(main())
