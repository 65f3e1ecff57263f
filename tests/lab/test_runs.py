"""The run store: settings, locks, metrics and results come back, and damage is met with one clear line."""

import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pytest

from uncork.lab.errors import LabError
from uncork.lab.run.store import Run, RunStore, atomic_write_bytes, atomic_write_text, read_json, write_json

CONFIG = {"head": "plif", "lr": 0.1, "seed": 3}


@pytest.fixture
def run(tmp_path):
    return RunStore(tmp_path / "out").run("plif-3", CONFIG)


def leftovers(folder):
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


# ---------------------------------------------------------------- the store


def test_a_run_is_created_once_and_found_again(tmp_path):
    store = RunStore(tmp_path / "deep" / "out")
    run = store.run("softmax-0", CONFIG)
    assert (run.name, run.config, run.path) == ("softmax-0", CONFIG, tmp_path / "deep" / "out" / "softmax-0")
    assert read_json(run.path / "config.json") == CONFIG
    again = store.run("softmax-0", dict(reversed(CONFIG.items())))
    assert again.config == Run.open(run.path).config == CONFIG


def test_runs_are_listed_by_name_and_other_folders_are_not_runs(tmp_path):
    store = RunStore(tmp_path)
    for name in ("b", "a", "c-1.5_x"):
        store.run(name, CONFIG)
    (tmp_path / "figures").mkdir()
    (tmp_path / "report.html").write_text("")
    assert [run.name for run in store.runs()] == ["a", "b", "c-1.5_x"]


def test_config_goes_through_json(tmp_path):
    @dataclass(frozen=True)
    class Settings:
        corpus: Path = Path("data") / "ptb"
        betas: tuple[float, float] = (0.9, 0.999)
        clip: float = math.inf
        seed: np.int64 = np.int64(3)  # noqa: RUF009

    store = RunStore(tmp_path)
    run = store.run("a", asdict(Settings()))
    assert run.config == {"corpus": str(Path("data/ptb")), "betas": [0.9, 0.999], "clip": math.inf, "seed": 3}
    assert store.run("a", asdict(Settings())).config == run.config


def test_a_whole_float_is_the_same_setting_as_the_integer_but_true_is_not_one(tmp_path):
    store = RunStore(tmp_path)
    store.run("a", {"lr": 20, "betas": [1, 0.5], "nan": math.nan, "flag": True})
    store.run("a", {"lr": 20.0, "betas": (1.0, 0.5), "nan": math.nan, "flag": True})
    with pytest.raises(LabError, match="flag was true, is 1"):
        store.run("a", {"lr": 20, "betas": [1, 0.5], "nan": math.nan, "flag": 1})


def test_another_config_is_refused_with_all_that_differs(tmp_path):
    store = RunStore(tmp_path)
    store.run("a", {"lr": 0.1, "model": {"layers": 2, "width": 8}, "old": "x", "same": 1})
    with pytest.raises(LabError) as caught:
        store.run("a", {"lr": 0.2, "model": {"layers": 3, "width": 8}, "new": None, "same": 1})
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: this run was made with other settings: lr was 0.1, is 0.2; "
        'model.layers was 2, is 3; old was "x", is absent; new was absent, is null. '
        "Use another --out-dir, or remove this folder to start afresh"
    )
    assert Run.open(tmp_path / "a").config["lr"] == 0.1


def recorded(fields, text="aa"):
    """A config with a record, as `TrainConfig.stored` makes it."""
    asked = {"corpus": "books"}
    return {**fields, "record": {"rules": 1, "settings": {"lr": 0.1}, "text": {"sha256": text}, "asked": asked}}


def test_a_run_is_known_by_its_record(tmp_path):
    store = RunStore(tmp_path)
    run = store.run("a", recorded({"preset": "old", "lr": 0.1}))
    with pytest.raises(LabError, match=r"other settings: the text behind --corpus has changed\. Use another --out-dir"):
        store.run("a", recorded({"preset": "old", "lr": 0.1}, text="bb"))
    assert Run.open(run.path).config["preset"] == "old"
    # Other names for the same values become the run's, so that tables call all of a comparison's runs alike.
    store.run("a", recorded({"preset": "new", "lr": 0.1}))
    assert Run.open(run.path).config["preset"] == "new"


def test_a_run_without_a_record_says_which_version_made_it(tmp_path):
    store = RunStore(tmp_path)
    run = store.run("a", CONFIG)
    with pytest.raises(LabError, match="was made by an earlier version of uncork, which did not keep all that decides"):
        store.run("a", recorded(CONFIG))
    run.finish({"versions": {"uncork": "0.1.0"}})
    with pytest.raises(LabError, match=r"was made by uncork 0\.1\.0, which did not keep"):
        store.run("a", recorded(CONFIG))


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "café", "a\\b", "a:b"])
def test_bad_names_are_refused(tmp_path, run, name):
    with pytest.raises(LabError, match="only letters, digits"):
        RunStore(tmp_path).run(name, CONFIG)
    with pytest.raises(LabError, match="only letters, digits"):
        run.save_checkpoint(1, {}, {}, name=name)


def test_what_json_cannot_hold_is_a_type_error_that_says_where(tmp_path, run):
    with pytest.raises(TypeError, match=r"model\.sizes\[1\] must be JSON .* got object"):
        RunStore(tmp_path).run("a", {"model": {"sizes": [1, object()]}})
    assert not (tmp_path / "a").exists()
    with pytest.raises(TypeError, match="key 0 of optimizer must be a string"):
        run.save_checkpoint(1, {}, {"optimizer": {0: 1.0}})


def test_many_threads_create_one_run_and_agree_on_its_config(tmp_path):
    store, barrier, opened, refused = RunStore(tmp_path), threading.Barrier(8), [], []

    def create(seed):
        barrier.wait()
        try:
            opened.append(store.run("a", {"seed": seed}).config["seed"])
        except LabError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=create, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert opened == [Run.open(tmp_path / "a").config["seed"]]
    assert [f"seed was {opened[0]}, is " in message for message in refused] == [True] * 7
    assert leftovers(tmp_path) == []


def test_a_root_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LabError, match="cannot be used as output folder"):
            RunStore(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LabError, match="cannot be used as output folder"):
        RunStore(tmp_path)


def test_a_folder_of_something_else_is_not_made_a_run(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("mine")
    with pytest.raises(LabError, match="a: the run cannot be created"):
        RunStore(tmp_path).run("a", CONFIG)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["thesis.tex"]
    assert leftovers(tmp_path) == []


def test_open_says_what_is_wrong(tmp_path):
    store = RunStore(tmp_path / "out")
    for name in ("b", "a"):
        store.run(name, CONFIG)
    with pytest.raises(LabError, match="no such folder"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(LabError, match=r"has no config\.json; the runs in it are: \S+/a \S+/b$"):
        Run.open(tmp_path / "out")
    with pytest.raises(LabError, match="is not a folder"):
        Run.open(tmp_path / "out" / "a" / "config.json")


@pytest.mark.parametrize("damage", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[1]", b"null", b"\0" * 20])
def test_a_damaged_config_or_result_names_the_file(tmp_path, damage):
    store = RunStore(tmp_path)
    run = store.run("a", CONFIG)
    run.finish({"ppl": 1.0})
    (run.path / "result.json").write_bytes(damage)
    with pytest.raises(LabError, match=r"result\.json: is damaged"):
        _ = run.result
    (run.path / "config.json").write_bytes(damage)
    for action in (store.runs, lambda: Run.open(run.path), lambda: store.run("a", CONFIG)):
        with pytest.raises(LabError, match=r"config\.json: is damaged"):
            action()


def test_a_run_is_done_when_it_has_a_result(run):
    assert run.result is None
    run.finish({"perplexity": 123.4, "table": (1, 2)})
    assert run.result == Run.open(run.path).result == {"perplexity": 123.4, "table": [1, 2]}


# ---------------------------------------------------------------- the lock


def test_a_lock_keeps_others_out_and_is_given_back(run):
    with run.lock(), pytest.raises(LabError, match=f"another process .id {os.getpid()}. is training this run"):
        Run.open(run.path).lock().__enter__()
    with pytest.raises(ZeroDivisionError), run.lock():
        _ = 1 / 0
    with run.lock():
        pass


def test_a_killed_process_gives_its_lock_back(run):
    code = (
        "import sys, time; from uncork.lab.run.store import Run\n"
        "with Run.open(sys.argv[1]).lock(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, run.path], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(LabError, match=f"id {process.pid}"):
            run.lock().__enter__()
        process.kill()
    (run.path / ".metrics.jsonl.0123.tmp").write_text("left by the killed process")
    with run.lock():
        assert leftovers(run.path) == []


def test_a_platform_without_flock_is_told(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    with pytest.raises(LabError, match="this platform"):
        run.lock().__enter__()


# ---------------------------------------------------------------- metrics


def test_metrics_come_back(run):
    assert run.metrics() == []
    rows = [{"step": 0, "loss": 0.1 + 0.2}, {"step": 1, "loss": -math.inf, "word": "é\n\u2028"}]
    for row in rows:
        run.append_metrics(row)
        assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")
    run.append_metrics({"loss": math.nan})
    assert run.metrics()[:2] == rows
    assert math.isnan(run.metrics()[2]["loss"])


@pytest.mark.parametrize("torn", [b"{", b'{"step": 2, "lo', b"\0\0\0\0", b"12", b"\xc3"])
def test_a_torn_last_line_is_dropped_and_the_next_row_is_whole(run, torn):
    path = run.path / "metrics.jsonl"
    path.write_bytes(torn)
    assert run.metrics() == []
    path.write_bytes(b'{"step": 1}\n' + torn)
    assert run.metrics() == [{"step": 1}]
    run.append_metrics({"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_whole_last_line_without_its_newline_is_kept(run):
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
    assert run.metrics() == [{"step": 1}, {"step": 2}]
    run.append_metrics({"step": 3})
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]


@pytest.mark.parametrize("line", [b"", b"{", b"[1]", b"7", b"\xff"])
def test_damage_elsewhere_is_an_error_with_its_line(run, line):
    (run.path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(LabError, match=r"metrics\.jsonl: line 2 is damaged"):
        run.metrics()


def test_truncate_keeps_the_rows_asked_for(run):
    run.truncate_metrics(lambda row: True)
    assert not (run.path / "metrics.jsonl").exists()
    for step in range(5):
        run.append_metrics({"step": step, "loss": 1 / 3})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "l')
    run.truncate_metrics(lambda row: row["step"] <= 2)
    assert run.metrics() == [{"step": step, "loss": 1 / 3} for step in range(3)]
    assert (run.path / "metrics.jsonl").read_bytes().endswith(b"\n")


# ---------------------------------------------------------------- single files


def test_atomic_files_and_json(tmp_path):
    path = tmp_path / "a.txt"
    atomic_write_text(path, "é\r\n")
    assert path.read_bytes() == "é\r\n".encode()
    atomic_write_bytes(str(path), b"\0")
    assert path.read_bytes() == b"\0"
    write_json(path, {"a": (1, 0.1, None), "p": Path("x")})
    assert read_json(str(path)) == {"a": [1, 0.1, None], "p": "x"}
    assert json.loads(path.read_text()) == read_json(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]
    os.umask(mask := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_that_is_missing_or_damaged_names_the_file(tmp_path):
    with pytest.raises(LabError, match=r"x\.json: cannot be read \(No such file or directory\)"):
        read_json(tmp_path / "x.json")
    with pytest.raises(LabError, match=r"cannot be written \(No such file or directory\)"):
        write_json(tmp_path / "no" / "x.json", {})
    (tmp_path / "x.json").write_text("{'a': 1}")
    with pytest.raises(LabError, match=r"x\.json: is damaged, not JSON"):
        read_json(tmp_path / "x.json")
