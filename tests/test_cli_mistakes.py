"""Whatever is given to a flag: it is accepted, or one plain line names the flag, and the exit code is 2."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import uncork
from uncork import cli
from uncork.lab.command_line import parse
from uncork.lab.errors import LabError
from uncork.lab.run.store import RunStore
from uncork.lab.settings import TrainingFlags
from uncork.lab.train.config import TrainConfig, known_settings
from uncork.lab.train.head import with_head
from uncork.lab.train.presets import PRESETS

COMMANDS = {kind.__name__.lower(): kind for kind in cli._COMMANDS}
NUMBERS = ("-1", "0", "1", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "9" * 19, "9" * 40)
TEXTS = ("", " ", "x", "-", "=", ":", ",", "é", "a" * 300)
PATHS = ("", "missing/below", "file", "folder", "locked", "a" * 300)
SMALL = ["--set", "model_options.embedding_size=6", "model_options.hidden_sizes=[8]", "max_steps=2"]
STARTS = {
    "train": ["--out-dir", "out", "--corpus", "text.txt", "--in-features", "4", "--batch-size", "4", "--bptt", "8",
              "--epochs", "1", "--threads", "1", *SMALL],
    "compare": ["--out-dir", "out", "--corpus", "text.txt", "--heads", "softmax", "--seeds", "1"],
    "study": ["--out-dir", "out", "--work-dir", "work"],
    "synthetic": ["--out-dir", "out", "--quick"],
}  # fmt: skip
# `compare` reads the flags that it shares with `train` by the same code.
SHARED = {field.name for field in dataclasses.fields(TrainingFlags)}
FLAGS = [
    (name, field.name)
    for name, kind in COMMANDS.items()
    for field in dataclasses.fields(kind)
    if name != "compare" or field.name not in SHARED
]


class WorkBegins(KeyboardInterrupt):
    """What takes long would start here."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a text and a run on it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("the cat sat on the mat\na dog saw a cat\n" * 60)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        patched.setenv("UNCORK_CACHE", str(folder / "cache"))
        assert cli.main(["train", *STARTS["train"]]) == 0
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working folder where nothing that takes long begins."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UNCORK_CACHE", str(trained / "cache"))
    (tmp_path / "text.txt").write_bytes((trained / "text.txt").read_bytes())
    (tmp_path / "file").write_text("a file\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "locked").mkdir(mode=0o500)

    def begin(*args, **options):
        raise WorkBegins

    for name in ("experiments.compare.train_all", "experiments.study.experiment.run_cells", "train.trainer.train",
                 "experiments.synthetic.experiment.run_cells", "experiments.bench.run.run"):  # fmt: skip
        monkeypatch.setattr(f"uncork.lab.{name}", begin)
    return tmp_path


def values_of(hint):
    inner = typing.get_args(hint)
    if hint is bool:
        return ("yes", "0")
    if Path in (hint, *inner):
        return PATHS
    if int in (hint, *inner) or float in (hint, *inner):
        return (*NUMBERS, *TEXTS)
    return (*TEXTS, *NUMBERS)


@pytest.mark.parametrize(
    ("name", "field"),
    [pytest.param(*flag, marks=[pytest.mark.slow] if place % 3 else []) for place, flag in enumerate(FLAGS)],
)
def test_whatever_a_flag_is_given_it_is_one_line(name, field, place, trained, capsys):
    kind = COMMANDS[name]
    hint = typing.get_type_hints(kind)[field]
    positional = "Positional" in str(typing.get_type_hints(kind, include_extras=True)[field])
    run = [str(trained / "out")] if name in ("evaluate", "generate") else []
    for value in values_of(hint):
        given = [value] if positional else [f"{cli.flag(field)}={value}"]
        code = cli.main([name, *([] if positional else run), *STARTS.get(name, []), *given])
        error = capsys.readouterr().err
        assert code in (0, 2, 130), (value, error)
        if code == 2:
            assert error.startswith("uncork"), (value, error)
            assert error.count("\n") == 1, (value, error)
            assert "Traceback" not in error
            assert not re.search(r"\b[a-z]+_[a-z_]*[a-z] must\b", error.replace("--set", "")), error


@pytest.mark.parametrize(
    "given",
    ["--bptt=" + 40 * "9", "--batch-size=" + 40 * "9", "--eval-every=" + 40 * "9", "--lr=1e300", "--epochs=1e-300",
     "--epochs=1e300", "--function-lr-scale=1e308", "--patience=" + 40 * "9", "--max-train-tokens=" + 40 * "9",
     "--in-features=" + 19 * "9", "--head=mos:num_components=1000000000000"],
)  # fmt: skip
def test_a_number_that_only_training_meets_is_one_line(given, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("UNCORK_CACHE", str(trained / "cache"))
    code = cli.main(["train", *STARTS["train"], "--out-dir", str(tmp_path / "run"), given])
    error = capsys.readouterr().err
    assert code in (0, 2)
    assert error.count("\n") == (code == 2), error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "uncork: expected a command (there are compare, train,"),
        (["trai"], "uncork: unrecognized command trai; did you mean train?"),
        (["--lr", "3"], "uncork: unrecognized option --lr"),
        (["train"], "uncork train: --out-dir is required (uncork train --help lists the options)"),
        (["train", "--lrr", "3"], "uncork train: unrecognized option --lrr; did you mean --lr?"),
        (["train", "--out-dir", "x", "--lr", "abc"], "uncork train: --lr: expected a number or None, got 'abc'"),
        (["train", "--out-dir", "x", "--lr"], "uncork train: --lr: expected a number or None, got nothing"),
        (["train", "--out-dir", "x", "--precision", "z"], "--precision: expected one of no, bf16, got 'z'"),
        (["train", "--out-dir", "x", "--resume", "yes"], "uncork train: unexpected argument yes"),
        (["synthetic", "--beta", "1", "q"], "--beta: expected a number, or several, got '1 q'"),
        (["evaluate"], "uncork evaluate: RUN is required"),
        (["evaluate", "a", "b"], "uncork evaluate: unexpected argument b; a value with spaces needs"),
        (["train", "--out-dir", "x", "--in-features", "0"], "uncork: --in-features must be"),
        (["train", "--out-dir", "x", "--seed", "1" + 20 * "0"], "uncork: --seed must be an integer from 0 to 2^63 - 1"),
        (["train", "--out-dir", "a run"], "uncork: --out-dir: its last part must have only letters, digits,"),
        (["train", "--out-dir", "x", "--set", "clip=-1"], "uncork: --set clip: clip must be"),
        (
            ["train", "--out-dir", "x", "--head", "plif:lr=0"],
            "uncork: --head plif:lr=0: lr must be a finite number above 0, got 0",
        ),
        (["train", "--out-dir", "x", "--head", "plif:num_pieces=1e12"], "uncork: "),
        (
            ["train", "--out-dir", "x", "--head", "softmax:bias=false"],
            "--bias-prior: expected a head with a bias, got bias=False; softmax:bias=false,bias_prior=false starts ",
        ),
        (
            ["compare", "--out-dir", "x", "--heads", "plif", "softmax:bias=false"],
            "uncork: --heads softmax: --bias-prior: expected a head with a bias, got bias=False; softmax:bias=false",
        ),
        (["train", "--out-dir", "x", "--head", "plif:frozen=no"], "frozen: expected True or False, got 'no'"),
        (["train", "--out-dir", ""], "uncork train: --out-dir: expected a path, got ''"),
        (["train", "--out-dir=x", "--data-dir="], "uncork train: --data-dir: expected a path, got ''"),
        (["train", "--out-dir", "file"], "uncork train: --out-dir: expected a folder, and "),
        (["compare", "--out-dir", "file/x/y"], "uncork compare: --out-dir: expected a folder, and "),
        (["synthetic", "--out-dir", "file/x"], "uncork synthetic: --out-dir: expected a folder, and "),
        (["bench", "--shapes"], "uncork bench: --shapes: expected at least one value"),
        (["compare", "--out-dir", "x", "--heads"], "uncork compare: --heads: expected at least one value"),
        (["train", "--out-dir", "x", "--corpus", ""], "uncork: --corpus: '' is none of"),
        (["train", "--out-dir", "x", "--corpus", "stou"], "name exists; did you mean sotu?"),
        (["train", "--out-dir", "x", "--head", "plfi"], "got 'plfi'; did you mean plif?"),
        (["compare", "--out-dir", "x", "--heads", "softmx"], "got 'softmx'; did you mean softmax?"),
        (["train", "--out-dir", "x", "--head", "plif:pieces=10"], "; did you mean num_pieces?"),
        (["train", "--out-dir", "x", "--preset", "lstm-smal"], "got 'lstm-smal'; did you mean lstm-small?"),
        (["presets", "lstm-smal"], "got 'lstm-smal'; did you mean lstm-small?"),
        (["train", "--out-dir", "x", "--precision", "bf61"], "got 'bf61'; did you mean bf16?"),
        (["evaluate", "x", "--split", "vald"], "got 'vald'; did you mean valid?"),
        (["synthetic", "--quick", "--heads", "plfi"], "got 'plfi'; did you mean plif?"),
        (["bench", "--only", "sofmax"], "'sofmax' is no contender; did you mean softmax?"),
        (["bench", "--impl", "natve"], "got 'natve'; did you mean native?"),
        (["train", "--out-dir", "x", "--set", "lr=1", "lr=2"], "uncork: --set lr: is given twice"),
        (
            ["train", "--out-dir", "x", "--set", "lr=1", "--set=bptt=8"],
            "uncork train: --set is given twice; write all its values after one --set",
        ),
        (
            ["compare", "--heads", "plif", "--out-dir", "x", "--heads", "mos"],
            "uncork compare: --heads is given twice; write all its values after one --heads",
        ),
        (["train", "--out-dir", "x", "--lr", "1", "--set", "lr=2"], "uncork: --set lr: --lr is given too"),
        (["train", "--out-dir", "."], "holds files, but no run: give one that is new or empty"),
        (["train", "--out-dir", "/dev/null/x"], "uncork train: --out-dir: expected a folder, and"),
        (["train", "--out-dir", "/proc/x", "--corpus", "nosuch"], "uncork: --out-dir: /proc/x cannot be written ("),
        (["compare", "--out-dir", "/proc/x", "--corpus", "nosuch"], "uncork: --out-dir: /proc/x cannot be written ("),
        (["bench", "--out-dir", "/proc/x"], "uncork: --out-dir: /proc/x cannot be written ("),
        (["synthetic", "--out-dir", "/proc/x/y", "--quick"], "uncork: --out-dir: /proc/x/y cannot be written ("),
        (["study", "--part", "p", "--out-dir", "/proc/x"], "uncork: --out-dir: /proc/x cannot be written ("),
        (["study", "--part", "p", "--work-dir", "/proc/x"], "uncork: --work-dir: /proc/x cannot be written ("),
        (["train", "--out-dir", "x", "--bias-prior", "maybe"], "--bias-prior: expected True, False or None, got"),
        (["train", "--out-dir", "x", "--device", "cuda"], "option --device: training takes the GPU where there is one"),
        (
            ["train", "--out-dir", "x", "--corpus", "ptb", "--data-dir", "file"],
            "--data-dir: expected a folder, and file",
        ),
        (["train", "--out-dir", "x", "--corpus", "/dev/null"], "uncork: --corpus: expected a text file or a folder"),
        (["train", "--out-dir", "x", "--epochs", "1e300"], "uncork: --epochs must be a number above 0 and at most 1,0"),
        (["compare", "--out-dir", "x", "--heads", "nosuch"], "uncork: --heads must be one of softmax,"),
        (["compare", "--out-dir", "x", "--heads", "plif:lr=0"], "uncork: --heads plif:lr=0: lr must be"),
        (["synthetic", "--num-words", "1"], "uncork: --num-words: expected at least 2, got 1"),
        (["synthetic", "--in-features", "0"], "uncork: --in-features: expected at least 1, got 0"),
        (["synthetic", "--beta", "-1"], "uncork: --beta: expected finite numbers above 0, got -1"),
        (["synthetic", "--workers", "9999"], "uncork: --workers: expected at least 1 and at most 1024, got 9999"),
        (["study", "--workers", "9999"], "uncork: --workers: expected at least 1 and at most 1024, got 9999"),
        (
            ["bench", "--impl", "nosuch"],
            "uncork: --impl: expected one of native, triton, torch, reference or None, got",
        ),
        (["bench", "--threads", "9999"], "uncork: --threads: expected at least 1 and at most 1024, got 9999"),
        (["bench", "--shapes", "999999999999,400,10"], "uncork: --shapes: 999999999999, 400, 10 needs at least"),
        (
            ["train", "--out-dir", "x", "--set", "model_options.dropout=0.1"],
            "uncork: --set model_options.dropout: lstm-laptop has no such setting; did you mean model_options.input",
        ),
    ],
)
def test_a_mistake_names_what_the_user_wrote(arguments, said, place, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


BAD_RUNS = {
    "config.json   ": (None, "holds checkpoints, metrics.jsonl, result.json of a run, but its config.json is missing"),
    "config.json  ": ("{", "; restore it, or remove the run's folder to start afresh"),
    "tokenizer.json": ("{", "; remove it, and the command that made the run writes it again"),
    "tokenizer.json ": ("{}", "; remove it, and the command that made the run writes it again"),
    "tokenizer.json  ": (None, "tokenizer.json: is missing; the command that made the run writes it again"),
    "config.json": ("{}", "is damaged: expected the settings of a run, its head among them, got {}"),
    "config.json ": ('{"a": 1}', "is damaged: expected the settings of a run, its head among them, got only a"),
    "checkpoints": (None, "holds no file best-*.safetensors, although the run was validated: the file was removed"),
}


@pytest.mark.parametrize("damage", BAD_RUNS)
def test_a_damaged_run_is_refused_with_what_was_expected(damage, trained, tmp_path, capsys):
    content, said = BAD_RUNS[damage]
    run = shutil.copytree(trained / "out", tmp_path / "run")
    if content is None and damage == "checkpoints":
        shutil.rmtree(run / damage)
    elif content is None:
        (run / damage.strip()).unlink()
    else:
        (run / damage.strip()).write_text(content)
    assert cli.main(["evaluate", str(run)]) == 2
    assert said in capsys.readouterr().err


def test_a_run_is_not_verified_and_a_text_that_is_missing_names_its_flag(trained, capsys):
    run = str(trained / "out")
    assert cli.main(["verify", run]) == 2
    assert f"is a run of `uncork train`, and verify is for models of transformers: uncork evaluate {run}" in (
        capsys.readouterr().err
    )
    assert cli.main(["evaluate", run, "--text", "nosuch.txt"]) == 2
    assert "uncork: --text: nosuch.txt: cannot be read (" in capsys.readouterr().err


def test_a_damaged_result_does_not_keep_a_run_from_being_evaluated(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNCORK_CACHE", str(trained / "cache"))
    run = shutil.copytree(trained / "out", tmp_path / "run")
    (run / "result.json").write_text("{bad")
    assert cli.main(["evaluate", str(run)]) == 0, capsys.readouterr().err
    (run / "result.json").write_text("{}")
    monkeypatch.chdir(trained)
    assert cli.main(["train", *STARTS["train"], "--out-dir", str(run)]) == 2
    assert "expected the numbers of a run that is done, got {}; remove it, and the command that made the run" in (
        capsys.readouterr().err
    )
    (run / "result.json").write_text("")
    assert cli.main(["train", *STARTS["train"], "--out-dir", str(run), "--resume"]) == 2
    assert "not JSON" in (said := capsys.readouterr().err)
    assert "; remove it, and the command that made the run (`uncork train`: with --resume) makes it again from" in said
    (run / "result.json").unlink()  # as the message says
    assert cli.main(["train", *STARTS["train"], "--out-dir", str(run), "--resume"]) == 0
    again, before = (json.loads((path / "result.json").read_text()) for path in (run, trained / "out"))
    assert again["test"] == before["test"]


def test_the_only_checkpoint_has_none_before_it(trained, tmp_path, caplog, capsys):
    run = shutil.copytree(trained / "out", tmp_path / "run")
    (best,) = (run / "checkpoints").glob("best-*")
    best.write_bytes(best.read_bytes() + b"x")
    assert cli.main(["evaluate", str(run)]) == 2
    assert "no intact checkpoint" in capsys.readouterr().err
    assert "trying the one before it" not in caplog.text


def test_a_run_that_lost_its_settings_is_told_from_other_files(trained, place, capsys):
    shutil.copytree(trained / "out", place / "out")
    (place / "out/config.json").unlink()
    assert cli.main(["train", *STARTS["train"]]) == 2
    assert "of a run, but its config.json is missing: restore it, or choose another" in capsys.readouterr().err
    with pytest.raises(LabError, match=r"config\.json is missing"):  # as a comparison's
        RunStore(place).run("out", {})


@pytest.mark.parametrize("command", ["bench", "synthetic", "compare", "study"])
def test_no_command_writes_over_a_run(command, trained, place, capsys):
    run = shutil.copytree(trained / "out", place / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    given = [*STARTS.get(command, []), "--out-dir", str(run), *(["--part", "x"] if command == "study" else [])]
    assert cli.main([command, *given]) == 2
    assert f"was made by `uncork train`: choose another folder for `uncork {command}`" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_model_that_memory_cannot_hold_is_refused_before_it_is_made(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.setenv("UNCORK_CACHE", str(trained / "cache"))
    code = cli.main(["train", *STARTS["train"], "--out-dir", str(tmp_path / "run"), "--in-features", "9999999999"])
    assert code == 2
    assert "--in-features 9999999999 with V = " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_the_text_lacks_is_said_with_its_name(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNCORK_CACHE", str(trained / "cache"))
    for name, text in (("blank.txt", " \n\n"), ("one.txt", "a line\n")):
        (tmp_path / name).write_text(text)
    run = str(trained / "out")
    assert cli.main(["evaluate", run, "--text", str(tmp_path / "blank.txt")]) == 2
    assert "blank.txt: holds no words" in capsys.readouterr().err
    assert cli.main(["train", "--out-dir", str(tmp_path / "x"), "--corpus", str(tmp_path / "one.txt")]) == 2
    assert "one.txt has 1 line of text" in capsys.readouterr().err
    assert cli.main(["evaluate", run, "--text", "x", "--split", "valid"]) == 2
    assert "--split and --text: give one of them" in capsys.readouterr().err
    assert cli.main(["generate", run, "--prompt", "the zzz, zzz cat", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().err == "note: the model does not know zzz , and reads <unk> instead\n"


def test_train_does_not_go_on_in_the_folder_of_a_comparison(place, capsys):
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text('{"heads": ["softmax"]}')
    assert cli.main(["train", *STARTS["train"]]) == 2
    assert "out was made by `uncork compare`: choose another folder for `uncork train`" in capsys.readouterr().err


def test_the_help_breaks_lines_at_the_width_alone(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["train", "--help"]) == 0
    assert "transformer-gpu, lookup," in capsys.readouterr().out


def test_the_help_keeps_its_form_without_unicode():
    settings = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "40"}
    command = [sys.executable, "-m", "uncork", "evaluate", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=settings).stdout
    assert re.search(r"^\W*--split", shown, re.M), shown


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_help_fits_the_terminal(name, width, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main([*([name] if name else []), "--help"]) == 0
    lines = capsys.readouterr().out.partition("The default of --")[0].splitlines()
    start = next(number for number, line in enumerate(lines) if not line)  # after the usage
    assert [line for line in lines[start:] if len(line) > width] == []


def test_the_usage_names_what_the_errors_name(capsys):
    assert cli.main(["evaluate", "--help"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "usage: uncork evaluate [-h] [EVALUATE OPTIONS] RUN"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_examples_of_the_help_work(name, place, capsys):
    """key=value and name:option=value in the docstrings are parsed with the default preset."""
    assert cli.main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    text = " ".join(re.sub("[│]", " ", shown).split())
    if issubclass(COMMANDS[name], cli.TrainingFlags):
        settings = re.findall(
            r"(?<![\w:,.=])[a-z_]+(?:\.[a-z_]+)?=[^\s,;:]+", text.partition("Any other setting")[2].partition(" --")[0]
        )
        assert settings
        COMMANDS[name](Path("x"), set=tuple(settings)).base()
    for head in re.findall(rf"\b(?:{'|'.join(uncork.HEAD_NAMES)}):[a-z_]+=[^\s)]*[^\s.,;)]", text):
        with_head(TrainConfig.of(), head, 0)


def test_the_commands_of_readme_and_docs_are_understood():
    root = Path(__file__).parents[1]
    seen = 0
    for page in (root / "README.md", *sorted((root / "docs").rglob("*.md"))):
        for line in re.findall(r"^(uncork [^`\n]*)$", page.read_text(), re.M):
            words = shlex.split(line, comments=True)[1:]
            command = parse(COMMANDS, words, "")
            if isinstance(command, cli.TrainingFlags):
                with_head(command.base(), getattr(command, "head", "softmax"), 0)
            for head in getattr(command, "heads", ()) if isinstance(command, cli.Compare) else ():
                with_head(command.base(), head, 0)
            seen += 1
    assert seen > 20


def test_the_long_default_is_copied_as_it_is(capsys, place):
    assert cli.main(["compare", "--help"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("--heads"))
    assert tuple(line.split()[1:]) == cli.Compare(Path("x")).heads


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_that_is_listed_is_taken(preset, capsys):
    assert cli.main(["presets", preset]) == 0
    lines = capsys.readouterr().out.splitlines()
    given = [line.removeprefix("--set ") for line in lines if line.startswith("--set")]
    assert len(given) > 15
    config = cli.Train(Path("x"), preset=preset, set=tuple(given)).base()
    assert config == TrainConfig.of(preset, min_count=2)
    assert all(setting.about for setting in known_settings(preset).values())


BLOCKED = """
import importlib.abc, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Finder())
from uncork import cli
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("module", ["tyro", "accelerate", "matplotlib", "pandas", "tokenizers"])
def test_without_a_package_of_the_laboratory_it_is_one_line(module, place):
    command = [sys.executable, "-c", BLOCKED, module, "train", *STARTS["train"]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert "needs the laboratory: pip install 'uncork[lab]'" in done.stderr


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("compare --help | head -1", 141),
        ("presets lstm-small | head -1", 141),
        ("presets > /dev/full", 2),
        ("compare --help > /dev/full", 2),
        ("presets >&-", 0),
        ("presets >&- 2>&-", 0),
        ("nosuch 2>&-", 2),
        ("nosuch 2>/dev/full", 2),
        ("--version", 0),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_streams_that_are_closed_or_full(line, code):
    script = f"set -o pipefail; {sys.executable} -m uncork {line}"
    # Ended quickly, `head` is gone before the command prints; so it is started by a shell that waits for nothing.
    script = script.replace("head -1", "true")
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == code, done.stderr
    if line == "--version":
        assert done.stdout.startswith(f"uncork {uncork.__version__} (torch {__import__('torch').__version__}, Python ")
