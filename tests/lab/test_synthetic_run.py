"""Cells, parts and the command: what is asked for is run once, kept, and said."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest
import torch

from uncork import cli
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import cells as cells_module
from uncork.lab.experiments.synthetic import run as run_module
from uncork.lab.experiments.synthetic.cells import Cell, run_cell
from uncork.lab.experiments.synthetic.experiment import cells_of, part_of
from uncork.lab.experiments.synthetic.fitting import Fitting
from uncork.lab.experiments.synthetic.parts import PARTS
from uncork.lab.experiments.synthetic.run import estimate, run_cells
from uncork.lab.experiments.synthetic.settings import PartName, Synthetic
from uncork.lab.run.key import differences, key_of
from uncork.lab.run.rows import RowStore

SHORT = Fitting(first_round=5, rounds=2)
CELL = Cell("dirichlet:0.1", 30, 12, 3, "plif:num_pieces=20", 0, SHORT)
TINY = ["--num-words", "12", "--in-features", "2", "3", "--num-contexts", "30", "--seeds", "2", "--first-round", "5",
        "--rounds", "2", "--workers", "1"]  # fmt: skip


def test_a_cell_leaves_its_row_and_its_function():
    outcome = json.loads(json.dumps(run_cell(CELL)))
    row, curve = outcome["row"], outcome["function"]
    assert row["head"] == "plif:num_pieces=20"
    assert row["num_words"] == 12
    assert row["steps"] == 15
    assert row["kl"] == pytest.approx(row["cross_entropy"] - row["entropy"])
    assert row["kl"] > 0
    assert row["parameters"] == 30 * 3 + 12 * 3 + 20
    assert curve["x"][:2] == [curve["scores"][0], curve["scores"][10]]
    assert curve["x"][-1] == curve["scores"][-1]
    assert curve["f"] == sorted(curve["f"])
    assert min(curve["slope"]) > 0
    assert run_cell(replace(CELL, head="softmax"))["function"] is None


@pytest.mark.parametrize(
    "target", ["dirichlet:0.1", "sharpened:0.1:8", "known-rank:4", "planted:plif:2", "planted:mos:2", "modes:2"]
)
def test_every_kind_of_target(target):
    cell = replace(CELL, target=target)
    assert cell.make_targets().probabilities.shape == (30, 12)
    assert run_cell(cell)["row"]["target"] == target


def test_heads_of_one_seed_see_the_same_targets():
    a, b = CELL.make_targets(), replace(CELL, head="softmax", in_features=5).make_targets()
    assert torch.equal(a.probabilities, b.probabilities)
    assert not torch.equal(a.probabilities, replace(CELL, seed=1).make_targets().probabilities)


def test_every_setting_makes_another_key():
    others = [
        replace(CELL, **{name: value})
        for name, value in {
            "target": "dirichlet:0.2", "num_contexts": 31, "num_words": 13, "in_features": 4, "head": "plif",
            "seed": 1, "fitting": replace(SHORT, tolerance=0.5),
        }.items()
    ]  # fmt: skip
    cells = [CELL, *others]
    assert len({cell.key for cell in cells}) == len(cells)
    assert len(cells) == 1 + len(dataclasses.fields(Cell))


@pytest.mark.parametrize(("features", "words"), [(5, 100), (20, 1000), (50, 2000)])
def test_equal_parameters_narrows_a_mixture_to_the_softmax(features, words):
    softmax = Cell("dirichlet:0.1", 1000, words, features, "softmax", 0, SHORT)
    mixture = replace(softmax, head="mos:latent_activation=null,equal_parameters=true")

    def count(cell, width):
        options = {"latent_activation": None} if "mos" in cell.head else {}
        return cell._parameters(cell.head.split(":")[0], width, options)

    width = mixture.resolved[2]
    assert count(mixture, width) <= count(softmax, features) < count(mixture, width + 1)
    assert replace(softmax, head="mos:latent_activation=null").resolved[2] == features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "dirichlet:0"}, "targets: expected a number above 0 in dirichlet, got 'dirichlet:0'"),
        ({"target": "dirichlet:-1"}, "number above 0"),
        ({"target": "dirichlet:nan"}, "number above 0"),
        ({"target": "dirichlet:x"}, "number above 0"),
        ({"target": "dirichlet"}, "targets: expected dirichlet:BETA"),
        ({"target": "sharpened:0.01"}, "targets: expected dirichlet:BETA, sharpened:BETA:POWER"),
        ({"target": "sharpened:0.01:-2"}, "number above 0"),
        ({"target": "gauss:1"}, "targets: expected dirichlet:BETA"),
        ({"target": "known-rank:2.5"}, "number above 0"),
        ({"num_contexts": 0}, "num-contexts: expected at least 1, got 0"),
        ({"num_words": 0}, "num-words: expected at least 1, got 0"),
        ({"in_features": 0}, "in-features: expected at least 1, got 0"),
        ({"head": "soft"}, "heads: expected some of softmax, "),
        ({"head": "plif:pieces=3"}, "heads: plif:pieces=3: plif has no option pieces"),
        ({"head": "plif:num_pieces=0"}, "heads: plif:num_pieces=0: num_pieces"),
        ({"head": "plif:lr=0.1"}, "heads: lr belongs to training on text"),
        ({"head": "mos:equal_parameters=no"}, "heads: expected equal_parameters=true or false"),
        ({"head": "plif:num_pieces=1000,equal_parameters=true"}, "more parameters than a softmax even with one"),
        ({"target": "known-rank:13"}, "targets: expected at most 12 in known-rank with these sizes"),
        ({"target": "modes:13"}, "targets: expected at most 12 in modes"),
        ({"target": "planted:soft:3"}, "targets: expected one of softmax, "),
        ({"target": "planted:plif-frozen:3"}, "targets: expected one of softmax, "),
        ({"num_words": 10**12, "in_features": 10**11}, "heads: plif:num_pieces=20: "),
    ],
)
def test_bad_cells(change, message):
    with pytest.raises(LabError, match=message.replace("(", r"\(")):
        replace(CELL, **change)


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch):
    store = RowStore(tmp_path)
    cells = [replace(CELL, seed=seed) for seed in range(3)]
    first = run_cells(cells[:2], store, workers=1)
    ran = []

    def counted(cell):
        ran.append(cell)
        return run_cell(cell)

    monkeypatch.setattr(run_module, "run_cell", counted)
    again = run_cells(cells, store, workers=1)
    assert ran == cells[2:]
    assert again[:2] == first


def test_a_cell_by_other_rules_is_run_again_and_said_once(tmp_path, monkeypatch, capsys):
    """A default of a head, or a text, that changed made no difference to the names of the files."""
    cells = [replace(CELL, seed=seed) for seed in range(2)]
    run_cells(cells, RowStore(tmp_path), workers=1)

    def said():
        run_cells(cells, RowStore(tmp_path), workers=1)
        return [line for line in capsys.readouterr().out.splitlines() if "do not count" in line]

    assert said() == []
    monkeypatch.setattr(cells_module, "RULES", 2)
    cells = [replace(cell) for cell in cells]  # a cell has its key once
    assert said() == ["2 kept runs do not count: the version of the rules was 1, is 2"]
    assert said() == []
    rows = RowStore(tmp_path).rows().values()
    RowStore(tmp_path).path.unlink()
    for row in rows:
        row["record"]["head"]["logit_function"]["options"]["bound"] = 10.0
        RowStore(tmp_path).add({**row, "key": key_of(row["record"])})
    assert said() == ["2 kept runs do not count: head plif:num_pieces=20: logit_function.PLIF.bound was 10, is 20"]


def test_cells_of_real_text_are_known_by_it(monkeypatch):
    cell = replace(CELL, target="sotu")
    monkeypatch.setattr(cells_module, "_sotu_digest", lambda: "aa")
    was = cell.record()
    monkeypatch.setattr(cells_module, "_sotu_digest", lambda: "bb")
    assert differences(was, cell.record()) == ["the text behind the targets has changed"]
    assert "text" not in CELL.record()


def test_a_variable_that_changes_numbers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(LabError, match="ONEDNN_DEFAULT_FPMATH_MODE=BF16"):
        run_cells([CELL], RowStore(tmp_path), workers=1)


def test_a_damaged_row_is_named_and_nothing_is_run(tmp_path):
    store = RowStore(tmp_path)
    run_cells([CELL], store, workers=1)
    store.path.write_text("{\n" + store.path.read_text())
    with pytest.raises(LabError, match=r"rows\.jsonl: line 1 is damaged"):
        run_cells([replace(CELL, seed=1)], store, workers=1)


def test_workers_do_not_change_a_number(tmp_path):
    cells = [replace(CELL, seed=seed) for seed in range(2)]
    alone, together = (run_cells(cells, RowStore(tmp_path / str(n)), workers=n) for n in (1, 2))
    for a, b in zip(alone, together, strict=True):
        assert a["function"] == b["function"]
        assert {**a["row"], "seconds": 0} == {**b["row"], "seconds": 0}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_cell_that_fails_is_named_and_the_others_are_kept(tmp_path, workers):
    bad = replace(CELL, fitting=replace(SHORT, learning_rate=1e30))
    cells = [bad, CELL, replace(CELL, seed=1)]
    message = (
        "1 of 3 cells failed, the others are kept; the first: dirichlet:0.1 M=12 d=3 seed 0 plif:num_pieces=20: the"
    )
    with pytest.raises(LabError, match=message):
        run_cells(cells, RowStore(tmp_path), workers)
    assert RowStore(tmp_path).rows().keys() == {cell.key for cell in cells[1:]}


def test_the_same_cell_twice_is_run_once(tmp_path, capsys):
    assert len(run_cells([CELL, CELL], RowStore(tmp_path), workers=1)) == 1
    assert "1 of 1 cells to run, 0 done before" in capsys.readouterr().out


def test_more_memory_than_there_is(tmp_path):
    with pytest.raises(LabError, match=r"100000000 x 1000000 with plif:num_pieces=20 on 1 worker\(s\) need about"):
        run_cells([replace(CELL, num_contexts=10**8, num_words=10**6)], RowStore(tmp_path), workers=2)


def test_the_estimate_grows_with_the_work():
    large = replace(CELL, num_contexts=1000, num_words=4000)
    longer = replace(CELL, fitting=replace(SHORT, rounds=6))
    found = estimate([CELL, large, longer])
    assert found[large] > found[CELL] > 0
    assert found[longer] == pytest.approx(found[CELL] * 63 / 3)


def test_many_components_need_memory_too():
    assert replace(CELL, head="mos:num_components=8").memory > replace(CELL, head="mos").memory > CELL.memory


def test_every_part_is_of_good_cells():
    assert get_args(PartName) == tuple(PARTS)
    for name, part in PARTS.items():
        cells = part.cells(Fitting(), {})
        assert len(set(cells)) == len(cells) > 0, name
        assert all(cell.in_features < cell.num_words for cell in cells)


def test_the_default_part():
    _, _, cells = cells_of(Synthetic())
    assert len(cells) == 13 * 4 * 3
    assert {c.num_contexts for c in cells} == {1000}
    assert {c.target for c in cells} == {"dirichlet:0.01"}
    assert (10, 2) in {(c.num_words, c.in_features) for c in cells}


def test_mixtures_have_a_learning_rate_of_their_own_unless_it_is_given():
    settings = Synthetic(heads=("softmax", "mos"), num_words=(20,), in_features=(2,), seeds=1)
    assert [c.fitting.learning_rate for c in cells_of(settings)[2]] == [0.1, 0.03]
    given = replace(settings, learning_rate=0.2, tolerance=0.5)
    assert {(c.fitting.learning_rate, c.fitting.tolerance) for c in cells_of(given)[2]} == {(0.2, 0.5)}


def test_flags_replace_what_the_part_says():
    settings = Synthetic(part="heads", beta=(0.5, 1.0), num_words=(50,), in_features=(3, 60), num_contexts=70, seeds=2)
    _, _, cells = cells_of(settings)
    assert {(c.target, c.num_contexts, c.num_words, c.in_features, c.seed) for c in cells} == {
        (target, 70, 50, 3, seed) for target in ("dirichlet:0.5", "dirichlet:1.0") for seed in (0, 1)
    }
    assert len(cells) == 4 * len(PARTS["heads"].heads)
    assert part_of(Synthetic(quick=True))[0] == "quick"


def run(*arguments):
    return cli.main(["synthetic", *map(str, arguments)])


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--out-dir", out, *TINY) == 0
    said = capsys.readouterr().out
    assert "16 of 16 cells to run" in said
    assert "at most" in said
    assert "left" in said
    last = json.loads(said.strip().splitlines()[-1])
    assert last["part"] == "default"
    assert last["cells"] == 16
    names = {path.name for path in (out / "default").iterdir()}
    assert {"rows.csv", "summary.csv", "provenance.json", "heat-maps-plif.png"} <= names
    before = (out / "cells.jsonl").read_bytes()
    assert run("--out-dir", out, *TINY) == 0
    assert "cells to run" not in capsys.readouterr().out
    assert before == (out / "cells.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "--beta: expected finite numbers above 0, got 0"),
        (["--beta", "-0.5"], "--beta: expected finite numbers above 0, got -0.5"),
        (["--num-words", "0", "--in-features", "0"], "--num-words: expected at least 2, got 0"),
        (["--num-words", "5", "--in-features", "0"], "in-features: expected at least 1, got 0"),
        (["--num-words", "5", "--in-features", "5"], "in-features: expected some below num-words"),
        (["--num-contexts", "0"], "num-contexts: expected at least 1, got 0"),
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--workers", "0"], "workers: expected at least 1 and at most 1024, got 0"),
        (["--learning-rate", "0"], "learning-rate: expected a number above 0, 1e+30 at most, got 0.0"),
        (["--heads", "soft"], "heads: expected some of"),
        (["--quick", "--part", "heads"], "quick: is a part of its own"),
        (["--beta", "1", "--targets", "sotu"], "beta: write it as --targets dirichlet:BETA"),
        (["--num-contexts", "1000000000"], "--num-contexts and --num-words"),
        (["--seeds", "1000000000"], "seeds: expected at most 100,000 cells in all"),
        (["--rounds", "21"], "rounds: expected 1 to 20, got 21"),
        (["--part", "known", "--num-words", "10"], "targets: expected at most 10 in known-rank"),
    ],
)
def test_bad_flags_give_one_line(tmp_path, capsys, flags, message):
    assert run("--out-dir", tmp_path / "out", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("uncork: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize(("part", "heads"), [("beta", ["plif"]), ("beta", ["softmax"]), ("pieces", ["temperature"])])
def test_heads_that_leave_nothing_to_compare_give_tables_alone(tmp_path, part, heads):
    out = tmp_path / "out"
    assert run("--out-dir", out, "--part", part, "--heads", *heads, *TINY) == 0
    assert (out / part / "table.csv").exists()


def test_another_run_leaves_no_figure_of_the_one_before(tmp_path):
    out = tmp_path / "out"
    for heads, left in ((["softmax", "sigsoftmax"], "sigsoftmax"), (["softmax", "gss:center=-1.5"], "gss")):
        assert run("--out-dir", out, "--heads", *heads, *TINY) == 0
        assert [left in path.name for path in (out / "default").glob("*.png")] == [True, True]


def test_the_file_of_cells_is_a_folder(tmp_path, capsys):
    (tmp_path / "cells.jsonl").mkdir()
    assert run("--out-dir", tmp_path, *TINY) == 2
    assert "cells.jsonl: cannot be read" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run("--out-dir", tmp_path / "file", *TINY) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_ends_at_once_and_the_same_command_goes_on(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "uncork.cli", "synthetic", "--out-dir", str(out), *TINY[:-6], "--first-round",
               "400", "--rounds", "1", "--workers", "2"]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        for line in process.stdout:
            if line.startswith("[2/"):
                break
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    again = shlex.join(["uncork", *command[3:]])
    assert error.strip() == f"uncork: interrupted; to go on from what is kept: {again}"
    done = len(RowStore(out, "cells.jsonl").rows())
    assert 2 <= done < 16
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"{16 - done} of 16 cells to run, {done} done before" in again.stdout
