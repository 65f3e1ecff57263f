"""The workers of a comparison: however one ends, the others go on and nothing is lost."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from uncork.lab.errors import LabError
from uncork.lab.experiments import base as base_module
from uncork.lab.experiments.compare import Texts, check_stored, is_done, make_cells, train_all
from uncork.lab.run.files import read_json, write_json
from uncork.lab.run.store import Run, RunStore
from uncork.lab.train.config import TrainConfig
from uncork.lab.train.presets import PRESETS


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A training of some seconds on a text of its own."""
    monkeypatch.setenv("UNCORK_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "text.txt"
    path.write_text("\n".join(f"the {i * i % 7} cat sat on {i % 5} mats" for i in range(300)) + "\n")
    small = {"embedding_size": 6, "hidden_sizes": [8]}
    return TrainConfig.of(
        corpus=str(path), in_features=4, batch_size=4, bptt=8, epochs=100, max_steps=600, log_every=20, eval_every=200,
        model_options=small,
    )  # fmt: skip


def stored_config(cell):
    return cell.config.stored(Texts(None).of(cell.config))


def quick(base):
    return base.updated(max_steps=20)


def run(root, cells, **options):
    return train_all(root, cells, Texts(), contexts=20, workers=1, threads=1, **options)


@pytest.fixture
def on_event(monkeypatch):
    """Calls a function with everything that is heard of the workers."""

    def install(function):
        heard = base_module.run_jobs

        def run_jobs(jobs, *, on_event, **options):
            def both(event):
                function(event)
                on_event(event)

            return heard(jobs, on_event=both, **options)

        monkeypatch.setattr(base_module, "run_jobs", run_jobs)

    return install


@pytest.mark.slow
def test_a_killed_worker_is_reported_and_the_others_go_on(base, tmp_path, on_event):
    victim, other = *make_cells(["softmax"], [0], base), *make_cells(["plif"], [0], quick(base))
    kinds = []

    def kill(event):
        kinds.append((event.name, event.kind))
        if event.name == victim.name and event.progress is not None:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)

    on_event(kill)
    failed = run(tmp_path, [victim, other])
    assert list(failed) == [victim.name]
    assert "killed (SIGKILL)" in failed[victim.name]
    assert kinds[-1] == (other.name, "done")
    assert Run.open(tmp_path / other.name).result is not None


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_the_same_command_gives_the_same_numbers(base, tmp_path, on_event):
    cells = make_cells(["softmax"], [0], base)

    interrupted: list[Any] = []

    def interrupt(event):
        if event.progress is not None and not interrupted:
            interrupted.append(event)
            raise KeyboardInterrupt

    on_event(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "interrupted", cells)
    assert not multiprocessing.active_children()
    name = cells[0].name
    stopped = Run.open(tmp_path / "interrupted" / name)
    assert not (stopped.path / "result.json").exists()
    assert 0 < stopped.load_checkpoint().step < base.max_steps
    assert run(tmp_path / "interrupted", cells) == {}
    assert run(tmp_path / "whole", cells) == {}
    whole = Run.open(tmp_path / "whole" / name)
    assert stopped.result is not None
    assert whole.result is not None
    assert stopped.result["test"] == whole.result["test"]
    assert read_json(stopped.path / "analysis.json") == read_json(whole.path / "analysis.json")


def test_what_is_done_starts_no_process_and_another_number_of_contexts_analyses_again(base, tmp_path, monkeypatch):
    cells = make_cells(["softmax"], [0], quick(base))
    stored = RunStore(tmp_path).run(cells[0].name, stored_config(cells[0]))
    assert not is_done(stored, 20)
    stored.finish({"test": {}})
    assert not is_done(stored, 20)
    for content in ("{", "[]", "{}"):
        (stored.path / "analysis.json").write_text(content)
        assert not is_done(stored, 20)
    write_json(stored.path / "analysis.json", {"rank": {"contexts": 20}})
    stored.save_checkpoint(1, {}, {}, name="best")
    assert not is_done(stored, 20)  # nothing could be generated: it has no tokenizer
    write_json(stored.path / "tokenizer.json", {})
    assert is_done(stored, 20)
    assert not is_done(stored, 30)
    # The text of the test is shorter than what was asked for.
    write_json(stored.path / "analysis.json", {"rank": {"contexts": 20}, "contexts_asked": 1000})
    assert is_done(stored, 1000)
    assert not is_done(stored, 20)
    write_json(stored.path / "analysis.json", {"rank": {"contexts": 20}})
    monkeypatch.setattr("uncork.lab.run.pool._Worker", lambda *_: pytest.fail("a process was started"))
    assert run(tmp_path, cells) == {}


def test_a_bad_head_option_is_found_before_anything_is_trained(base):
    with pytest.raises(LabError, match="head plif: num_pieces"):
        make_cells(["softmax", "plif:num_pieces=0"], [0], base)


def test_two_names_of_the_same_run_are_refused_before_anything_is_trained(base):
    for heads in (
        ["softmax", "softmax:"], ["plif", f"plif:lr={base.lr}"], ["plif", "plif:num_pieces=100,scale=1.0"],
    ):  # fmt: skip
        with pytest.raises(LabError, match="are the same run"):
            make_cells(heads, [0], base)


def test_other_settings_in_the_same_folder_are_refused_before_anything_is_written(base, tmp_path):
    cells = make_cells(["softmax"], [0], base)
    check_stored(tmp_path, cells, Texts())
    assert not list(tmp_path.glob("softmax*"))
    RunStore(tmp_path).run(cells[0].name, stored_config(cells[0]))
    check_stored(tmp_path, cells, Texts())
    with pytest.raises(LabError, match="max_steps was 600, is 20"):
        check_stored(tmp_path, make_cells(["softmax"], [0], quick(base)), Texts())


def test_a_text_that_changed_is_refused_and_no_run_of_before_is_taken_for_one_on_it(base, tmp_path, capsys):
    """One table then compared heads trained on two texts, with exit code 0."""
    cells = make_cells(["softmax"], [0], quick(base))
    assert run(tmp_path / "runs", cells) == {}
    capsys.readouterr()
    assert run(tmp_path / "runs", cells) == {}
    assert capsys.readouterr().out == "softmax-seed0: done before, with the same settings on the same text\n"
    path = Path(base.corpus)
    path.write_text(path.read_text().replace("the 0 cat", "the 0 dog"))
    with pytest.raises(LabError, match=r"softmax-seed0: .*the text behind --corpus has changed"):
        check_stored(tmp_path / "runs", cells, Texts())
    failed = run(tmp_path / "runs", cells)  # where it changes after the check
    assert "the text behind --corpus has changed" in failed["softmax-seed0"]


def test_a_preset_that_changed_is_refused(base, tmp_path, monkeypatch):
    cells = make_cells(["softmax"], [0], quick(base))
    RunStore(tmp_path).run(cells[0].name, stored_config(cells[0]))
    asked, preset = quick(base).asked(), PRESETS["lstm-laptop"]
    monkeypatch.setitem(PRESETS, "lstm-laptop", preset._replace(values={**preset.values, "lr": 0.001}))
    cells = make_cells(["softmax"], [0], TrainConfig.from_dict(asked))
    with pytest.raises(LabError, match=r"preset lstm-laptop: training\.lr was 0\.003, is 0\.001"):
        check_stored(tmp_path, cells, Texts())


def test_a_variable_that_changes_numbers_is_refused_before_a_worker_starts(base, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(LabError, match="ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"):
        run(tmp_path, make_cells(["softmax"], [0], quick(base)))


def test_a_text_that_changes_while_a_comparison_runs_is_not_trained_on(base, tmp_path):
    first, second = make_cells(["softmax", "plif"], [0], quick(base))
    path = Path(base.corpus)

    def edit(run):
        path.write_text(path.read_text().replace("the 0 cat", "the 0 dog"))
        return "done"

    failed = run(tmp_path, [first, second], keep=edit)
    assert list(failed) == [second.name]
    assert "the text behind --corpus has changed" in failed[second.name]
    assert Run.open(tmp_path / first.name).result is not None
