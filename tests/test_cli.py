"""The command line as a stranger uses it, wrong input included."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from uncork import build_head, cli
from uncork.lab.errors import LabError
from uncork.lab.experiments import base as experiments_base
from uncork.lab.experiments import compare
from uncork.lab.experiments.compare import make_cells
from uncork.lab.run.pool import run_jobs
from uncork.lab.train import trainer
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.head import parse_head

LINES = ["the cat sat on the mat", "a dog sat on a log", "the dog saw the cat", "a cat saw a dog on the mat"]
SMALL = [
    "--in-features", "4", "--epochs", "1", "--batch-size", "4", "--bptt", "8", "--threads", "1", "--min-count", "1",
    "--set", "model_options.embedding_size=6", "model_options.hidden_sizes=[8]", "log_every=2",
]  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A text file of 400 lines, and a cache of its own."""
    monkeypatch.setenv("UNCORK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(LINES[i * i % 4] for i in range(400)) + "\n")
    return path


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs of a comparison are trained here: to start a process for each takes far longer than to train so little."""
    here = partial(run_jobs, workers=1, fresh=False)
    monkeypatch.setattr(experiments_base, "run_jobs", lambda jobs, *, workers, fresh, **given: here(jobs, **given))


def run(*arguments):
    return cli.main([str(a) for a in arguments])


def last_json(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_train_evaluate_generate(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out-dir", out, "--head", "plif:num_pieces=20", *SMALL) == 0
    trained = last_json(capsys)
    assert (out / "report.html").exists()
    assert json.loads((out / "config.json").read_text())["head_options"] == {"num_pieces": 20}
    assert run("evaluate", out) == 0
    tested = last_json(capsys)
    assert tested["perplexity"] == pytest.approx(trained["test"]["perplexity"], rel=1e-6)
    assert run("evaluate", out, "--split", "valid") == 0
    assert last_json(capsys)["perplexity"] == pytest.approx(trained["valid"]["perplexity"], rel=1e-6)
    (tmp_path / "other.txt").write_text("the dog sat on a cat\n")
    assert run("evaluate", out, "--text", tmp_path / "other.txt") == 0
    assert last_json(capsys)["tokens"] == 6
    assert run("generate", out, "--prompt", "the cat", "--max-tokens", "5") == 0
    first = last_json(capsys)["text"]
    assert first.startswith("the cat")
    run("generate", out, "--prompt", "the cat", "--max-tokens", "5")
    assert last_json(capsys)["text"] == first


@pytest.mark.parametrize("command", ["train", "compare"])
def test_a_trial_that_evaluates_more_than_it_trains_on_says_what_saves_time(
    command, text, tmp_path, capsys, monkeypatch
):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train_all", stop)
    monkeypatch.setattr(trainer, "train", stop)
    given = ["--corpus", text, *(["--heads", "softmax"] if command == "compare" else []), *SMALL]
    assert run(command, "--out-dir", tmp_path / "whole", *given) == 130
    assert "note:" not in capsys.readouterr().out
    assert run(command, "--out-dir", tmp_path / "part", "--max-train-tokens", "100", *given) == 130
    [note] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert re.match(r"note: 100 tokens are trained on, but \d+ of validation and test are evaluated", note)
    assert "a smaller --vocab-size" in note


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_files_of_a_folder_that_were_read_are_said(command, text, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "texts"
    for name in ("a.txt", "B.TXT", ".hidden.txt", "notes.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text.read_text())

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "train_all", stop)
    monkeypatch.setattr(trainer, "train", stop)
    heads = ["--heads", "softmax"] if command == "compare" else []
    assert run(command, "--corpus", folder, "--out-dir", tmp_path / "out", *heads, *SMALL) == 130
    said = capsys.readouterr().out
    assert re.search(
        r"^texts \(2 files of [\d,]+ bytes; .*hidden.*\): [\d,]+ tokens to train on, V = \d+; d = ", said, re.M
    )


def test_compare_reports_and_does_not_run_rows_twice(text, tmp_path, capsys):
    out = tmp_path / "compared"
    command = ["compare", "--corpus", text, "--out-dir", out, "--heads", "softmax", "plif:lr=0.01", "--seeds", "1",
               "--contexts", "20", *SMALL]  # fmt: skip
    assert run(*command) == 0
    outcome = last_json(capsys)
    assert outcome["runs"] == 2
    assert outcome["failed"] == {}
    for name in ("report.html", "table.csv", "runs.csv", "config.json", "figures/perplexity.png"):
        assert (out / name).exists(), name
    stamps = {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/result.json")}
    assert run(*command, "--workers", "2") == 0
    assert f"Computed by the {build_head('plif', 4, 9).implementation()} loss." in capsys.readouterr().out
    assert stamps == {p: p.stat().st_mtime_ns for p in (out / "runs").glob("*/result.json")}
    assert json.loads((out / "runs/plif_lr_0.01-seed0/config.json").read_text())["lr"] == 0.01


def test_a_comparison_whose_files_are_damaged_reports_what_is_intact_and_how_to_mend_the_rest(
    text, tmp_path, capsys, in_this_process
):
    out = tmp_path / "compared"
    command = ["compare", "--corpus", text, "--out-dir", out, "--heads", "softmax", "plif", "sigsoftmax",
               "--seeds", "1", "--contexts", "20", *SMALL]  # fmt: skip
    assert run(*command) == 0
    softmax, plif, sigsoftmax = (out / f"runs/{name}-seed0" for name in ("softmax", "plif", "sigsoftmax"))
    for path in (softmax / "tokenizer.json", out / "report.html"):
        path.unlink()
    (plif / "result.json").write_text("")
    (sigsoftmax / "metrics.jsonl").write_text("{\n")
    capsys.readouterr()
    assert run(*command) == 2
    said = capsys.readouterr()
    assert "softmax-seed0: done before" not in said.out.replace("sigsoftmax", "")
    assert (softmax / "tokenizer.json").exists()  # the text is the same, so it could be made again
    *lines, last = said.out.splitlines()
    for damaged in (
        "plif-seed0/result.json: is damaged, not JSON",
        "sigsoftmax-seed0/metrics.jsonl: line 1 is damaged",
    ):
        assert sum(damaged in line for line in lines) == 1, lines
    assert (json.loads(last)["runs"], sorted(json.loads(last)["failed"])) == (1, ["plif-seed0", "sigsoftmax-seed0"])
    assert "remove it, and the command that made the run" in json.loads(last)["failed"]["plif-seed0"]
    assert (out / "report.html").exists()
    (plif / "result.json").unlink()  # as the message says
    (sigsoftmax / "metrics.jsonl").write_text("")
    assert run(*command) == 0
    assert last_json(capsys)["runs"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--corpus", "nosuch.txt", "--out-dir", "run"], "nosuch.txt"),
        (["train", "--head", "nosuch", "--out-dir", "run"], "head must be one of softmax"),
        (["train", "--head", "plif:num_pieces=0", "--out-dir", "run", "--corpus", "TEXT"], "num_pieces"),
        (["train", "--head", "plif:bound=-1", "--out-dir", "run", "--corpus", "TEXT"], "bound"),
        (["train", "--head", "mos:num_components=0", "--out-dir", "run", "--corpus", "TEXT"], "num_components"),
        (["train", "--head", "plif:num_peices=3", "--out-dir", "run", "--corpus", "TEXT"], "num_peices"),
        (["train", "--head", "plif:num_pieces", "--out-dir", "run"], "name:key=value"),
        (["train", "--in-features", "0", "--out-dir", "run"], "--in-features"),
        (["train", "--set", "nosuch=1", "--out-dir", "run"], "--set nosuch: lstm-laptop has no such setting"),
        (["train", "--preset", "nosuch", "--out-dir", "run"], "preset must be one of"),
        (["train", "--vocab-size", "1", "--out-dir", "run", "--corpus", "TEXT"], "--vocab-size"),
        (["train", "--corpus", "EMPTY", "--out-dir", "run"], "empty"),
        (["train", "--corpus", "BINARY", "--out-dir", "run"], "UTF-8"),
        (["train", "--corpus", "TEXT", "--out-dir", "EMPTY/run"], "EMPTY"),
        (["compare", "--heads", "softmax", "softmax", "--out-dir", "run"], "named once"),
        (["compare", "--seeds", "0", "--out-dir", "run"], "seeds"),
        (["compare", "--workers", "0", "--out-dir", "run"], "workers"),
        (["compare", "--heads", "softmax", "mos:num_components=0", "--out-dir", "run"], "num_components"),
        (["compare", "--threads", "-1", "--out-dir", "run"], "threads"),
        (["train", "--threads", "-1", "--out-dir", "run", "--corpus", "TEXT"], "threads"),
        (["train", "--threads", "0", "--out-dir", "run", "--corpus", "TEXT"], "threads"),
        (["train", "--set", "head=softmax", "--out-dir", "run"], "flags of their own"),
        (["train", "--set", "head_options.num_pieces=3", "--out-dir", "run"], "flags of their own"),
        (["train", "--set", "seed=3", "--out-dir", "run"], "flags of their own"),
        (["evaluate", "nosuch"], "nosuch"),
        (["generate", "nosuch"], "nosuch"),
    ],
)
def test_a_mistake_is_one_clear_line_and_exit_code_2(arguments, said, text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BINARY").write_bytes(bytes(range(256)) * 10)
    assert run(*[text if a == "TEXT" else a for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(("uncork: ", f"uncork {arguments[0]}: "))
    assert error.count("\n") == 1
    assert said in error
    assert not (tmp_path / "run" / "config.json").exists()  # so that the corrected command can use the folder


def test_a_comparison_refuses_other_settings_and_keeps_its_files(text, tmp_path, capsys, in_this_process):
    out = tmp_path / "compared"
    command = ["compare", "--corpus", text, "--out-dir", out, "--heads", "softmax", "--seeds", "1", "--contexts", "20"]
    assert run(*command, *SMALL) == 0
    before = {p: p.read_bytes() for p in (out / "config.json", out / "report.html")}
    assert run(*command, "--lr", "0.1", *SMALL) == 2
    assert "other settings: lr" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in before}
    for name, folder in (("evaluate", out), ("generate", out), ("generate", out / "runs")):
        assert run(name, folder) == 2
        pasted = shlex.split(capsys.readouterr().err.rpartition(": ")[2])
        assert pasted == [str(out / "runs" / "softmax-seed0")]


def test_a_reader_of_the_output_that_ends_early_interrupts_and_a_checkpoint_is_saved(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "uncork.cli", "train", "--corpus", text, "--out-dir", out, *SMALL]
    quiet = os.environ | {"PYTHONWARNINGS": "ignore::UserWarning"}  # that the native tile is missing, where it is
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=quiet) as process:
        while " step " not in process.stdout.readline():
            assert process.poll() is None
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 141
    assert error == ""
    assert list((out / "checkpoints").glob("last-*"))


def test_output_that_cannot_be_encoded_does_not_stop_the_command(text, tmp_path):
    out = tmp_path / "réseau"
    command = [sys.executable, "-m", "uncork.cli", "evaluate", out]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert b"r?seau" in done.stdout
    assert b"Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_on_a_full_disk_is_one_clear_line(tmp_path):
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "uncork.cli", "evaluate", tmp_path], stdout=full, stderr=subprocess.PIPE
        )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"uncork: ")


def test_a_run_on_a_relative_path_is_evaluated_from_another_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("train", "--corpus", text.name, "--out-dir", "run", *SMALL) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("evaluate", "../run") == 0


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_reaches_the_workers_once(text, tmp_path):
    out = tmp_path / "compared"
    small = [*SMALL]
    small[small.index("--epochs") + 1] = "5000"
    command = [sys.executable, "-m", "uncork.cli", "compare", "--corpus", text, "--out-dir", out, "--workers", "2",
               "--heads", "softmax", "plif", "--seeds", "1", *small]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        names = set[str]()
        while len(names) < 2:
            line = process.stdout.readline()
            assert line
            names |= {name for name in ("softmax", "plif") if line.startswith(f"{name}-seed0")}
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    again = shlex.join(["uncork", *map(str, command[3:])])
    assert error.strip() == f"uncork: interrupted; to go on from what is kept: {again}"
    for name in names:
        assert list((out / "runs" / f"{name}-seed0" / "checkpoints").glob("last-*"))
    for _ in range(50):  # Python's own helper process ends a moment after the others
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("a process of the comparison is left")


def test_an_unfinished_run_is_not_overwritten_and_resume_ends_it(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = ["train", "--corpus", text, "--out-dir", out, *SMALL]

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("uncork.lab.run.progress.progress_line", interrupt)
        assert run(*command) == 130
    assert "--resume" in capsys.readouterr().err
    if not list((out / "checkpoints").glob("last-*")):
        pytest.fail("Ctrl-C left no checkpoint")
    assert run(*command) == 2
    assert "--resume goes on with it" in capsys.readouterr().err
    assert run(*command, "--resume") == 0
    assert run(*[*command[:-1], "log_every=3"], "--resume") == 2  # another configuration
    assert "log_every" in capsys.readouterr().err


def test_resume_of_nothing_is_an_error(text, tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    command = ["train", "--corpus", text, "--out-dir", out, *SMALL]
    assert run(*command, "--resume") == 2
    assert "holds no run, so there is nothing to resume" in capsys.readouterr().err
    assert not out.exists()
    with monkeypatch.context() as patched:  # before the first checkpoint
        patched.setattr("uncork.lab.train.trainer.train", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(*command) == 130
    assert "no checkpoint was written yet" in capsys.readouterr().err
    assert run(*command, "--resume") == 0
    assert "holds no checkpoint: training starts at the beginning" in capsys.readouterr().out
    assert run(*command) == 0
    assert "was trained before, with the same settings on the same text: nothing is trained" in capsys.readouterr().out
    text.write_text(text.read_text().replace("mat", "hat"))
    assert run(*command) == 2
    assert "the text behind --corpus has changed" in capsys.readouterr().err


def test_other_epochs_than_were_asked_for_are_said(text, tmp_path, capsys):
    small = [*SMALL]
    small[small.index("--epochs") + 1] = "0.3"
    assert run("train", "--corpus", text, "--out-dir", tmp_path / "run", *small) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "epochs were trained, 0.3 were asked for" in line]
    assert len(said) == 1


def test_unknown_words_are_said_and_refused(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out-dir", out, *SMALL) == 0
    capsys.readouterr()
    assert run("evaluate", out) == 0
    assert "% of the words are unknown to the model" in capsys.readouterr().out
    other = tmp_path / "other.txt"
    other.write_text("völlig andere wörter\n" * 5)
    assert run("evaluate", out, "--text", other) == 2
    assert "100 % of its words are unknown to this model" in capsys.readouterr().err


def test_a_loss_of_nan_is_reported(text, tmp_path, capsys, in_this_process):
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out-dir", out, "--lr", "1e30", "--head", "softmax", *SMALL) == 2
    error = capsys.readouterr().err.splitlines()[-1].lower()
    assert "not finite" in error
    both = tmp_path / "both"
    heads = ["--heads", "softmax", "temperature:lr=1e30", "--seeds", "1", "--contexts", "20"]
    assert run("compare", "--corpus", text, "--out-dir", both, *heads, *SMALL) == 2
    outcome = last_json(capsys)
    assert outcome["runs"] == 1
    assert list(outcome["failed"]) == ["temperature_lr_1e30-seed0"]
    assert "did not finish" in (both / "report.html").read_text()


def test_every_flag_is_explained_and_there_are_few():
    for kind in (cli.Compare, cli.Train, cli.Evaluate, cli.Generate):
        assert len(dataclasses.fields(kind)) <= 25
    for name in ("compare", "train", "evaluate", "generate"):
        shown = subprocess.run(
            [sys.executable, "-m", "uncork.cli", name, "--help"], capture_output=True, text=True, check=True
        ).stdout
        assert "--help" in shown
        assert "not documented" not in shown


def test_heads_as_the_command_line_writes_them():
    assert parse_head("softcap:cap=15") == ("softcap", {"cap": 15}, {})
    assert parse_head("plif:init=random,lr=0.1") == ("plif", {"init": "random"}, {"lr": 0.1})
    for bad in ("plif:", "plif:=3", "plif:lr"):
        if bad == "plif:":
            assert parse_head(bad) == ("plif", {}, {})
        else:
            with pytest.raises(LabError, match="name:key=value"):
                parse_head(bad)


def test_cells_go_seed_by_seed():
    cells = make_cells(["softmax", "softcap:cap=15"], [0, 1], TrainConfig.of())
    assert [t.name for t in cells] == ["softmax-seed0", "softcap_cap_15-seed0", "softmax-seed1", "softcap_cap_15-seed1"]
    assert cells[3].config.head_options == {"cap": 15}
    assert cells[3].config.seed == 1


def test_the_completion_for_bash_knows_the_commands(capsys, tmp_path):
    scripts = []
    for arguments, read in (
        (["--tyro-print-completion", "bash"], lambda: capsys.readouterr().out),
        (["--tyro-write-completion", "bash", str(tmp_path / "uncork")], (tmp_path / "uncork").read_text),
    ):
        assert cli.main(arguments) == 0
        script = read()
        scripts.append(script.strip())
        assert "complete" in script
        assert all(kind.__name__.lower() in script for kind in cli._COMMANDS)
        assert "--function-lr-scale" in script
    assert scripts[0] == scripts[1]


def test_a_refused_run_leaves_its_folder_to_the_corrected_command(text, tmp_path, capsys):
    out = tmp_path / "run"
    train = ["train", "--corpus", text, "--out-dir", out, *SMALL]
    assert run(*train, "--batch-size", "1000000") == 2
    assert "too few for 1000000 streams" in capsys.readouterr().err
    assert not out.exists()
    assert run(*train) == 0


def test_a_comparison_does_not_write_over_a_run(text, tmp_path, capsys):
    out = tmp_path / "run"
    assert run("train", "--corpus", text, "--out-dir", out, *SMALL) == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run("compare", "--corpus", text, "--out-dir", out, "--seeds", "1", *SMALL) == 2
    assert "was made by `uncork train`: choose another folder for `uncork compare`" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    for path in out.iterdir():  # what an interruption before the first checkpoint leaves
        if path.name != "config.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run("compare", "--corpus", text, "--out-dir", out, "--seeds", "1", *SMALL) == 2
    assert (out / "config.json").read_bytes() == before[out / "config.json"]


def test_a_run_does_not_take_the_place_of_a_comparison(text, tmp_path, capsys, in_this_process):
    out = tmp_path / "out"
    assert run("compare", "--corpus", text, "--out-dir", out, "--seeds", "1", "--heads", "softmax",
               "--contexts", "20", *SMALL) == 0  # fmt: skip
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert run("train", "--corpus", text, "--out-dir", out, *SMALL) == 2
    assert "choose another folder for `uncork train`" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_next_command_after_a_comparison_names_one_of_its_runs(text, tmp_path, capsys, in_this_process):
    for head in ("softmax", "plif"):
        command = ["compare", "--corpus", text, "--out-dir", tmp_path / "out", "--heads", head, "--seeds", "1"]
        assert run(*command, "--contexts", "20", *SMALL) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next:")]
        assert Path(line.split()[-1]).name.startswith(head)


def test_the_next_command_is_one_that_is_understood_and_stands_before_the_json(text, tmp_path, capsys):
    out = tmp_path / "with a space" / "run"
    assert run("train", "--corpus", text, "--out-dir", out, *SMALL) == 0
    *_, first, second, outcome = capsys.readouterr().out.splitlines()
    assert json.loads(outcome)["command"] == "train"
    assert first.startswith("Next: uncork generate ")
    for line in (first, second):
        words = shlex.split(line.partition("uncork ")[2])
        assert words[1] == str(out)
        assert run(*words) == 0
