"""The study: what is run is kept once, tuned heads come from their trials, and the tables are what the rows say."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from uncork import cli
from uncork.heads import HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.experiments.study import experiment, figures, tables
from uncork.lab.experiments.study.plan import Part, Plan
from uncork.lab.experiments.study.run import Cell, run_cells
from uncork.lab.experiments.study.settings import Study
from uncork.lab.experiments.study.store import asked
from uncork.lab.run.key import differences, key_of
from uncork.lab.run.rows import RowStore, outdated, rounded
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.presets import PRESETS

ROOT = Path(__file__).parents[2]
PLAN = Plan.read(ROOT / "experiments/study.toml")
TUNE = PLAN.parts["tune"]


@pytest.fixture
def cells(tiny_config, tiny_corpus):
    """Two heads with two seeds, and a third whose test is not to be read."""
    text = text_record(tiny_corpus)["sha256"]
    made = [
        Cell("tiny d=4", head, tiny_config(head=head, seed=seed, epochs=1, eval_every=10), text=text)
        for seed in (1, 2)
        for head in ("softmax", "plif")
    ]
    return [*made, Cell("tiny d=4", "temperature", tiny_config(head="temperature", epochs=1), False, text)]


def run(cells, folder, **options):
    store = RowStore(folder / "kept")
    failed = run_cells(cells, store, data_dir=None, work_dir=folder / "work", **{"workers": 1, **options})
    return store, failed


@pytest.mark.usefixtures("in_this_process")
def test_a_run_is_kept_as_it_ends_and_not_run_again(cells, tmp_path, capsys):
    store, failed = run(cells, tmp_path)
    assert failed == {}
    rows = store.rows()
    assert list(rows) == [cell.key for cell in cells]
    plif = rows[cells[1].key]
    assert TrainConfig.from_dict(plif["config"]) == cells[1].config
    assert plif["result"]["test"]["perplexity"] > 1
    assert [epoch for epoch, _ in plif["history"]] == pytest.approx([10 / 21, 20 / 21, 1], abs=0.02)
    assert min(loss for _, loss in plif["history"]) == pytest.approx(plif["result"]["valid"]["cross_entropy"], rel=1e-5)
    assert len(plif["slopes"]) == 3
    assert len(plif["analysis"]["function"]["slope"]) == 41
    assert plif["analysis"]["train_cross_entropy"] > 0
    assert rows[cells[0].key]["slopes"] == []
    assert not any((tmp_path / "work").iterdir())
    before = store.path.read_bytes()
    capsys.readouterr()
    assert run(cells, tmp_path)[1] == {}
    assert capsys.readouterr().out == ""
    assert store.path.read_bytes() == before


@pytest.mark.usefixtures("in_this_process")
def test_the_test_split_of_a_trial_is_not_kept(cells, tmp_path):
    store, _ = run(cells[-1:], tmp_path)
    row = store.rows()[cells[-1].key]
    assert "test" not in row["result"]
    assert "analysis" not in row
    assert row["train_cross_entropy"] > 0
    assert row["result"]["valid"]["perplexity"] > 1
    # The same run in a part that reads the test is run again, since its row lacks it.
    again = replace(cells[-1], test=True)
    assert run([again], tmp_path)[0].rows()[again.key]["result"]["test"]["perplexity"] > 1


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others(cells, tmp_path):
    bad = replace(cells[1], config=cells[1].config.updated(lr=1e30))
    store, failed = run([cells[0], bad, cells[2]], tmp_path)
    assert list(store.rows()) == [cells[0].key, cells[2].key]
    (message,) = failed.values()
    assert "diverged" in message


def test_what_a_killed_process_left_is_no_row(tmp_path):
    store = RowStore(tmp_path)
    assert store.rows() == {}
    store.add({"key": "a", "x": 1.23456789})
    store.add({"key": "b"})
    with store.path.open("ab") as file:
        file.write(b'{"key": "c", "x"')
    assert store.rows() == {"a": {"key": "a", "x": 1.23456789}, "b": {"key": "b"}}
    store.add({"key": "d"})
    assert list(store.rows()) == ["a", "b", "d"]
    assert store.path.read_text().count("\n") == 3
    lines = store.path.read_text().splitlines()
    store.path.write_text("\n".join([lines[0], lines[1][:-3], lines[2]]) + "\n")
    with pytest.raises(LabError, match="line 2 is damaged"):
        store.rows()


def test_a_whole_last_line_without_its_end_is_a_row(tmp_path):
    store = RowStore(tmp_path)
    store.add({"key": "a"})
    store.path.write_text(store.path.read_text().rstrip("\n"))
    assert list(store.rows()) == ["a"]
    store.add({"key": "b"})
    assert list(store.rows()) == ["a", "b"]


def test_rounding_keeps_six_digits():
    assert rounded({"a": [1234567.0, {"b": 1e-9 / 3}], "n": 12345678, "s": "x", "none": None}) == {
        "a": [1234570.0, {"b": 3.33333e-10}], "n": 12345678, "s": "x", "none": None
    }  # fmt: skip


def test_rows_that_are_kept_are_found_under_their_keys():
    """A setting that is added without a place in run_key.LATER, or another value of a preset or a head, would run the
    whole study again."""
    rows = RowStore(ROOT / "results/lm").rows()
    assert len(rows) > 200
    assert all(key_of(row["record"]) == key for key, row in rows.items())
    found = {cell.key for part in PLAN.parts.values() for cell in PLAN.tuned_cells(part, rows)} & rows.keys()
    assert len(found) > 200
    for name in ("pilot", "double", "wikitext"):  # which are whole
        assert len(PLAN.kept_cells(PLAN.parts[name], rows)) == PLAN.parts[name].size
    for key in found:  # what was asked for is what is recorded
        row = rows[key]
        assert differences(row["record"], TrainConfig.from_dict(row["config"]).record(row["record"]["text"])) == []


def test_the_kept_parts_keep_what_the_presets_had_then(monkeypatch):
    """New defaults of the presets are not theirs."""
    part = PLAN.parts["again"]
    keys = [cell.key for cell in PLAN.cells(part, {})]
    preset = PRESETS["lstm-small"]
    values = {**preset.values, "bias_prior": True, "output_lr_scale": 8.0, "decay": "matrices"}
    monkeypatch.setitem(PRESETS, "lstm-small", preset._replace(values=values))
    assert [cell.key for cell in PLAN.cells(part, {})] == keys


@pytest.mark.usefixtures("in_this_process")
def test_a_kept_run_of_another_preset_or_text_is_said_and_not_taken(cells, tmp_path, monkeypatch, capsys):
    store, _ = run(cells[:2], tmp_path)
    rows = store.rows()
    given, preset = [cell.config.asked() for cell in cells[:2]], PRESETS["lstm-laptop"]
    monkeypatch.setitem(PRESETS, "lstm-laptop", preset._replace(values={**preset.values, "warmup": 0.5}))
    again = [replace(cell, config=TrainConfig.from_dict(own)) for cell, own in zip(cells, given, strict=False)]
    assert not {cell.key for cell in again} & rows.keys()
    said = "2 kept runs do not count: preset lstm-laptop: training.warmup was 0.02, is 0.5"
    assert outdated([cell.record for cell in again], rows, asked) == [said]
    capsys.readouterr()
    _, failed = run(again, tmp_path)
    assert said in capsys.readouterr().out
    assert failed == {}
    assert store.rows().keys() == {*rows, *(cell.key for cell in again)}  # trained anew, and kept beside the others
    with pytest.raises(LabError, match="is not the one that this study is of"):
        run([replace(cells[0], text="another")], tmp_path)


def trial_config(trial, place):
    return PLAN.config_of(trial, place, TUNE.seeds[0], TUNE.settings)


def row_key(config, text="sotu"):
    return key_of(config.record({"sha256": PLAN.texts[text]["sha256"]}))


def test_all_heads_are_tuned_with_equal_effort_on_another_seed():
    confirm = PLAN.parts["confirm"]
    assert set(PLAN.trials) == set(confirm.tuned)
    assert len({len(trials) for trials in PLAN.trials.values()}) == 1
    assert set(TUNE.labels) == {trial for trials in PLAN.trials.values() for trial in trials}
    for name in ("confirm", "again", "mixture"):
        assert not set(TUNE.seeds) & set(PLAN.parts[name].seeds)
    assert not TUNE.test
    for label, trials in PLAN.trials.items():
        for trial in trials:
            assert trial_config(trial, ("ptb", 16)).head == label


def _tuned(losses):
    """Rows of the trials at every place, with these validation losses in the order of the trials."""
    rows = {}
    for trials in PLAN.trials.values():
        for trial, loss in zip(trials, losses, strict=True):
            for text in TUNE.texts:
                for d in TUNE.in_features:
                    key = row_key(trial_config(trial, (text, d)), text)
                    rows[key] = {"result": {"valid": {"cross_entropy": loss}}}
    return rows


def test_a_tuned_head_is_the_trial_with_the_lowest_validation_loss():
    rows, part = _tuned([5.0, 4.0, 4.5]), PLAN.parts["confirm"]
    for label, trials in PLAN.trials.items():
        assert PLAN.chosen(rows, label, ("ptb", 16)) == trials[1]
    cells = PLAN.cells(part, rows)
    assert len(cells) == len(part.tuned) * len(part.seeds) * 4
    assert {cell.config.seed for cell in cells} == set(part.seeds)
    rate = trial_config(PLAN.trials["softmax"][1], ("ptb", 16)).lr
    assert {cell.config.lr for cell in cells if cell.label == "softmax"} == {rate}
    assert all(cell.test for cell in cells)


def test_what_is_kept_is_reported_where_other_places_are_not_tuned_yet():
    rows, part = _tuned([5.0, 4.0, 4.5]), PLAN.parts["confirm"]
    first = PLAN.cells(part, rows)[0]
    assert first.place == "ptb d=16"
    rows[first.key] = {}
    assert PLAN.kept_cells(part, rows) == []  # a row without the test's numbers is not what this part wants
    rows[first.key] = {"analysis": {}}
    for trial in PLAN.trials["softmax"]:
        del rows[row_key(trial_config(trial, ("sotu", 64)))]
    assert PLAN.kept_cells(part, rows) == [first]
    with pytest.raises(LabError, match="sotu d=64"):
        PLAN.cells(part, rows)
    assert part.size == 120


def study(*flags):
    return cli.main(["study", "--plan", str(ROOT / "experiments/study.toml"), *map(str, flags)])


def test_a_part_that_needs_the_tuning_says_so(tmp_path, capsys):
    assert study("--part", "confirm", "--out-dir", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("uncork: part tune: softmax:")
    assert "run `uncork study --part tune`" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "0"], "seeds: expected at least 1, got 0"),
        (["--workers", "0"], "workers: expected at least 1 and at most 1024, got 0"),
        (["--corpora", "wsj"], "texts: this part has ('ptb', 'sotu'), got 'wsj'"),
        (["--heads", "softmax:lr=0.004", "mlp"], "heads: this part has ('softmax:lr=0.004', "),
        (["--in-features", "17"], "in-features: this part has (16, 64), got 17"),
    ],
)
def test_wrong_flags_say_what_there_is(flags, message, tmp_path, capsys):
    assert study("--part", "tune", "--out-dir", tmp_path, *flags) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*.toml")), ids=lambda file: file.name)
def test_the_heads_of_every_part_can_be_built(file):
    from uncork.lab.train.checkpoints import check_head

    plan, rows = Plan.read(file), _tuned([1.0, 2.0, 3.0])
    for part in plan.parts.values():
        cells = plan.cells(part.narrowed(seeds=1), rows)
        assert cells
        for config in {c.key: c.config for c in cells}.values():
            check_head(config)


def test_without_a_part_the_parts_are_listed(capsys):
    assert study() == 0
    out = capsys.readouterr().out
    assert json.loads(out.strip().splitlines()[-1])["parts"] == list(PLAN.parts)
    assert "again              what was found after `confirm`" in out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('tuned_by = "tune"', 'tuned_by = "tunes"'), "there is no part 'tunes'"),
        (('texts = ["ptb"]', 'texts = ["wsj"]'), "parts.pilot.texts: there is no 'wsj', but ptb, sotu, wikitext-2"),
        (("seeds = [0]", "seeds = [-1]"), "parts.pilot.seeds.0: Input should be greater than or equal to 0"),
        (("in_features = [16]", "features = [16]"), "parts.pilot."),
        (("[base]", "[base"), "Expected"),
        (
            ('about = "variants', 'grid = { lr = [0.1] }\nabout = "variants'),
            "parts.pilot: Value error, grid: expected head beside lr",
        ),
        (("[base]", "[base]\nseed = 3"), "study: base: seed is not set here: each part has its own"),
        (
            ("tuned = [", 'heads = ["plif"]\ntuned = ["plif", '),
            "study: parts.confirm: 'plif' stands in tuned and in heads",
        ),
    ],
)
def test_a_plan_that_is_wrong_is_named(change, said, tmp_path, capsys):
    text = (ROOT / "experiments/study.toml").read_text()
    assert change[0] in text
    (tmp_path / "plan.toml").write_text(text.replace(change[0], change[1], 1))
    assert cli.main(["study", "--plan", str(tmp_path / "plan.toml"), "--part", "pilot"]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'plan.toml'}: is no plan of a study" in error
    assert said in error
    assert cli.main(["study", "--plan", str(tmp_path / "none.toml"), "--part", "pilot"]) == 2
    assert f"--plan: {tmp_path / 'none.toml'}: cannot be read" in capsys.readouterr().err


def test_the_plan_of_the_repository_is_said_to_be_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--part", "pilot"]):
        assert cli.main(["study", *flags]) == 2
        error = capsys.readouterr().err
        assert "--plan: experiments/study.toml is not here: the default is the plan of uncork's repository" in error
        assert "--plan FILE names one of your own" in error


def test_parts_are_narrowed_to_what_they_have():
    part = PLAN.parts["confirm"].narrowed(texts=("sotu",), in_features=(), seeds=2)
    assert (part.texts, part.in_features, part.seeds) == (("sotu",), (16, 64), (1, 2))
    assert part.labels == PLAN.parts["confirm"].tuned
    part = PLAN.parts["again"].narrowed(heads=("plif (unit slope)", "softmax"))
    assert {cell.label for cell in PLAN.cells(part, {})} == {"plif (unit slope)", "softmax"}
    assert part.size == 2 * 2 * 2 * 5


def test_a_grid_is_every_combination_of_its_head_and_options():
    fields = {"about": "tiny", "texts": ("sotu",), "in_features": (4,), "seeds": (1,)}
    part = Part(**fields, heads=["plif"], grid={"head": ("softmax",), "lr": (0.1, 1e-5), "bias_prior": (True, False)})
    named = [f"softmax:lr={lr},bias_prior={bias}" for lr in ("0.1", "1e-05") for bias in ("true", "false")]
    assert part.written == {head: head for head in ["plif", *named]}
    assert part.size == 5
    configs = [cell.config for cell in PLAN.cells(part, {})]
    assert [(c.lr, c.bias_prior) for c in configs[1:]] == [(0.1, True), (0.1, False), (1e-5, True), (1e-5, False)]
    assert part.narrowed(heads=(named[2],)).labels == (named[2],)
    assert Part(**fields, grid={"head": ("softmax", "plif")}).labels == ("softmax", "plif")


def test_the_wide_mixtures_make_as_many_features_as_their_place_has():
    cells = [cell for cell in PLAN.cells(PLAN.parts["width"], {}) if "128 units" in cell.label]
    made = {(cell.d, cell.config.head_options["latent_features"], cell.config.in_features) for cell in cells}
    assert made == {(d, d, 128) for d in (8, 16, 32, 64, 128)}


def _runs(perplexities):
    """A frame of runs as `runs_frame` makes it: {(place, head): one perplexity a seed}."""
    return pd.DataFrame(
        [
            {"place": place, "head": head, "name": head.split(" ")[0], "seed": seed, "test_perplexity": value}
            for (place, head), values in perplexities.items()
            for seed, value in enumerate(values)
        ]
    )


def test_the_tests_are_paired_t_tests_on_log_perplexity():
    numbers = {
        ("a", "softmax"): [100.0, 102.0, 98.0, 101.0, 99.0],
        ("a", "temperature"): [100.5, 101.0, 98.5, 101.5, 99.0],
        ("a", "plif"): [97.0, 99.5, 95.0, 98.0, 96.5],
        ("b", "softmax"): [50.0, 51.0],
        ("b", "plif"): [51.0, 50.0],
    }
    tests = tables.control_tests(_runs(numbers), PLAN.controls)
    rows = tests.to_dict("records")
    assert [(row["place"], row["control"]) for row in rows] == [
        ("a", "softmax"),
        ("a", "temperature"),
        ("b", "softmax"),
    ]
    softmax, temperature, few = rows
    mine, theirs = np.log(numbers["a", "plif"]), np.log(numbers["a", "softmax"])
    assert softmax["p_value"] == pytest.approx(stats.ttest_rel(mine, theirs).pvalue)
    assert softmax["change_percent"] == pytest.approx(100 * math.expm1((mine - theirs).mean()))
    assert (softmax["pairs"], softmax["lower"]) == (5, 5)
    both = sorted(row["p_value"] for row in (softmax, temperature))
    adjusted = sorted(row["p_holm"] for row in (softmax, temperature))
    assert adjusted == pytest.approx([2 * both[0], max(2 * both[0], both[1])])
    assert (few["pairs"], few["lower"]) == (2, 1)
    assert math.isnan(few["p_value"])
    shown = tables.display_tests(tests).set_index("test perplexity of")
    assert shown.loc["plif against softmax", "a"] == "−2.80 %, lower in 5 of 5, p <0.001, Holm <0.001"
    assert shown.loc["plif against softmax", "b"] == "+0.00 %, lower in 1 of 2"
    assert shown.loc["plif against temperature", "b"] == "–"


def test_the_wide_mixture_is_tested_against_the_controls_of_its_own_part():
    heads = PLAN.parts["mixture"].labels
    tests = tables.control_tests(
        _runs({("a", head): [100.0 + place] for place, head in enumerate(heads)}), PLAN.controls
    )
    assert set(tests["learned"]) == {"mos (of all 128 units)"}
    assert set(tests["control"]) == {*heads} - {"mos (of all 128 units)"}


@pytest.mark.usefixtures("in_this_process")
def test_tables_and_figures_of_kept_runs(cells, tmp_path, monkeypatch):
    store, _ = run(cells[:4], tmp_path)
    base = {
        k: v for k, v in cells[0].config.to_dict().items() if k not in ("head", "head_options", "seed", "in_features")
    }
    heads = {"softmax": "softmax", "plif": "plif"}
    part = Part(about="tiny", heads=heads, texts=("tiny",), in_features=(4,), seeds=(1, 2))
    text = {"corpus": base["corpus"], "sha256": cells[0].text}
    given = {"base": base, "texts": {"tiny": text}, "controls": {"plif": ("softmax",)}, "tuned_by": "tiny"}
    tiny = Plan(**given, trials={}, parts={"tiny": part})
    assert [cell.key for cell in tiny.cells(part, {})] == [cell.key for cell in cells[:4]]
    folder = tmp_path / "out"
    told = experiment.report(tiny, "tiny", store, folder, "a command")
    assert (told["runs"], told["of"]) == (4, 4)
    rows = store.rows()
    runs = pd.read_csv(folder / "runs.csv")
    expected = [rows[cell.key]["result"]["test"]["perplexity"] for cell in tiny.cells(part, {})]
    assert sorted(runs["test_perplexity"]) == pytest.approx(sorted(expected), rel=1e-5)
    summary = pd.read_csv(folder / "summary.csv").set_index("head")
    by_head = runs.groupby("head")["test_perplexity"]
    assert summary["test_perplexity"].to_dict() == pytest.approx(by_head.mean().to_dict(), rel=1e-5)
    assert summary["test_perplexity_std"].to_dict() == pytest.approx(by_head.std().to_dict(), rel=1e-3)
    table = pd.read_csv(folder / "table.csv").set_index("head")
    assert list(table.columns) == ["tiny d=4"]
    shown = table["tiny d=4"].to_dict()
    for head, mean in summary["test_perplexity"].to_dict().items():
        assert f"{float(mean):.2f}" in str(shown[head])
    (test,) = pd.read_csv(folder / "tests.csv").to_dict("records")
    assert f"({test['change_percent']:+.1f} %".replace("-", "−") in str(shown["plif"])
    columns = pd.read_csv(folder / "columns.csv", dtype=str).set_index("head")
    for head, mean in summary["test_perplexity"].to_dict().items():
        assert columns.loc[str(head), "test"].startswith(f"{mean:.2f} ± ")
        assert columns.loc[str(head), ["s / epoch", "MiB"]].tolist() == ["–", "–"]
    costs = {("tiny d=4", "plif"): {"milliseconds": 100.0, "tokens": 50, "peak_mib": 7.0}}
    named = runs.assign(name=runs["head"])
    measured = tables.published_columns(summary.reset_index(), named, costs).set_index("head")
    tokens = runs.set_index("head").loc["plif", "tokens"].iloc[0]
    assert measured.loc["plif", ["s / epoch", "MiB"]].tolist() == [f"{0.002 * tokens:.0f}", "7"]
    origin = json.loads((folder / "provenance.json").read_text())
    assert origin["command"] == "a command"
    assert origin["commits_of_runs"]
    drawn = {path.stem for path in folder.glob("*.png")}
    assert drawn == {f"{name}-tiny-d-4" for name in ("changes", "curves", "deciles", "slopes", "moving")}
    _check_pictures(figures.pictures(tiny.cells(part, {}), rows, {}), rows, tiny.cells(part, {}), summary)
    cost = pd.DataFrame(
        {"place": "tiny d=4", "head": ["softmax", "plif"], "milliseconds": 9, "tokens": 50, "peak_mib": 7}
    )
    (tmp_path / "cost-study").mkdir()
    cost.to_csv(tmp_path / "cost-study/cost.csv")
    for another, shown in ((True, "–"), (False, "7")):
        monkeypatch.setattr(Part, "own_model", another)
        experiment.report(tiny, "tiny", store, folder, "a command")
        assert pd.read_csv(folder / "columns.csv", dtype=str)["MiB"].tolist() == [shown] * 2
        assert (folder / "seconds-tiny-d-4.png").exists() == (not another)
    (folder / "old.png").write_bytes(b"")
    part_of_it = tiny.model_copy(update={"parts": {"tiny": part.narrowed(heads=("softmax",))}})
    experiment.report(part_of_it, "tiny", store, folder, "a command")
    assert {path.stem for path in folder.glob("*.png")} == {"curves-tiny-d-4"}


def _check_pictures(drawn, rows, cells, summary):
    """What the figures of two trained heads draw is what their rows and the summary say."""
    changes, curves, deciles, slopes, moving = (
        drawn[f"{name}-tiny-d-4"].axes[0] for name in ("changes", "curves", "deciles", "slopes", "moving")
    )
    bar = [line for line in changes.lines if len(set(line.get_ydata())) == 2 and line.get_ydata()[0] != 0]
    assert [line.get_xdata()[0] for line in bar] == pytest.approx([summary.loc["plif", "change_percent"]], rel=1e-4)
    assert {line.get_color() for line in bar} == {HeadSpec("plif").colour}
    assert changes.get_xlabel() == deciles.get_ylabel().replace("perplexity", "test perplexity", 1)
    by_head = {label: [rows[cell.key] for cell in cells if cell.label == label] for label in ("softmax", "plif")}
    for (label, own), line in zip(by_head.items(), curves.lines, strict=True):
        assert line.get_color() == HeadSpec(label).colour
        expected = [math.exp(np.mean([row["history"][k][1] for row in own])) for k in range(len(own[0]["history"]))]
        assert list(line.get_ydata()) == pytest.approx(expected)
    losses = {
        label: np.mean([[part["cross_entropy"] or math.nan for part in row["analysis"]["deciles"]] for row in own], 0)
        for label, own in by_head.items()
    }
    change = 100 * np.expm1(losses["plif"] - losses["softmax"])
    assert list(deciles.lines[1].get_ydata()) == pytest.approx(change[np.isfinite(change)].tolist())
    assert [text.get_text() for text in deciles.texts] == [text.get_text() for text in slopes.texts] == ["plif"]
    assert moving.get_ylabel() == "slope f'(z) of plif"
    assert moving.lines[1].get_ydata()[0] == 1.0


def test_the_settings_of_a_head_say_all_that_it_trains_with_for_itself(tiny_config):
    own = {"function_lr_scale": 0.3, "output_lr_scale": 8.0, "function_start": 0.5, "weight_decay": 0.01}
    cell = Cell("tiny d=4", "plif", tiny_config(head="plif", head_options={"num_pieces": 10}, **own))
    kept = {"result": {"test": {"perplexity": 10.0}}, "history": [(1.0, 3.0)]}
    (settings,) = tables.runs_frame([cell], {cell.key: kept})["settings"]
    assert settings.split(",") == ["num_pieces=10", *(f"{name}={value}" for name, value in own.items())]


def test_a_place_with_several_softmaxes_is_drawn_against_the_baseline_of_its_table(tiny_config):
    for order in (1, -1):
        labels = {"softmax (scale 1)": 120.0, "softmax": 100.0, "plif (unit slope)": 98.0}
        cells, rows = [], {}
        for label, perplexity in [*labels.items()][::order]:
            for d in (2, 4, 8):
                for seed in (1, 2):
                    config = tiny_config(head=label.split(" ")[0], in_features=d, seed=seed, lr=perplexity / 1000)
                    cells.append(Cell(f"tiny d={d}", label, config))
                    deciles = [{"cross_entropy": math.log(perplexity)}, {"cross_entropy": 1.0}]
                    result = {"test": {"perplexity": perplexity * seed}}
                    rows[cells[-1].key] = {"result": result, "analysis": {"deciles": deciles}}
        one = [cell for cell in cells if cell.d == 2]
        over, by_decile = figures._over_width(cells, rows).axes[0], figures._deciles(one, rows).axes[0]
        changes = figures._changes(one, rows).axes[0]
        expected = {"softmax (scale 1)": 20.0, "plif (unit slope)": -2.0}
        assert [text.get_text() for text in changes.texts] == ["+20 %", "−2 %"]
        assert [label.get_text() for label in changes.get_yticklabels()] == list(expected)
        for axes, name in ((over, "test perplexity"), (by_decile, "perplexity")):
            assert axes.get_ylabel() == f"{name} against softmax"
            found = {line.get_color(): float(np.asarray(line.get_ydata())[0]) for line in axes.lines[1:]}
            assert found == pytest.approx({HeadSpec(k.split(" ")[0]).colour: v for k, v in expected.items()})


def test_the_figure_over_d_shows_the_change_against_the_softmax_of_the_same_seed(tiny_config):
    cells, rows = [], {}
    perplexities = {("softmax", 1): 100.0, ("softmax", 2): 110.0, ("plif", 1): 99.0, ("plif", 2): 104.5}
    for d in (2, 4, 8):
        for (head, seed), perplexity in perplexities.items():
            cell = Cell(f"tiny d={d}", head, tiny_config(head=head, seed=seed, in_features=d))
            cells.append(cell)
            rows[cell.key] = {"result": {"test": {"perplexity": perplexity * d}}}
    axes = figures._over_width(cells, rows).axes[0]
    _, line = axes.get_lines()
    assert list(line.get_xdata()) == [2, 4, 8]
    assert list(line.get_ydata()) == pytest.approx([100 * (math.sqrt(0.99 * 0.95) - 1)] * 3)
    points = np.concatenate([dots.get_offsets() for dots in axes.collections])
    assert sorted(points[:, 1]) == pytest.approx([-5.0] * 3 + [-1.0] * 3)
    assert axes.get_ylim()[0] < -5.0
    one = figures._changes([cell for cell in cells if cell.place == "tiny d=4"], rows).axes[0]
    (dots,) = one.collections
    assert sorted(np.asarray(dots.get_offsets())[:, 0]) == pytest.approx([-5.0, -1.0])
    assert [text.get_text() for text in one.texts] == ["−3 %"]
    assert [tick.get_text() for tick in one.get_yticklabels()] == ["plif"]


def test_the_figure_by_frequency_compares_runs_of_the_same_seed(tiny_config):
    cells, rows = [], {}
    for head, seed, losses in (("softmax", 1, [3.0, 4.0]), ("softmax", 2, [9.0, 9.0]), ("plif", 1, [2.9, 4.1])):
        cells.append(Cell("tiny d=4", head, tiny_config(head=head, seed=seed)))
        rows[cells[-1].key] = {"analysis": {"deciles": [{"cross_entropy": loss} for loss in losses]}}
    _, line = figures._deciles(cells, rows).axes[0].get_lines()
    assert list(line.get_ydata()) == pytest.approx([100 * math.expm1(-0.1), 100 * math.expm1(0.1)])
    assert figures._deciles(cells[1:], rows) is None


def test_a_head_of_wider_features_stands_at_the_d_of_its_place(tiny_config):
    cells, rows = [], {}
    for d in (2, 4, 8):
        wide = tiny_config(head="mos", in_features=32, head_options={"latent_features": d}, seed=1)
        for label, config in {"softmax": tiny_config(in_features=d, seed=1), "mos": wide}.items():
            cells.append(Cell(f"tiny d={d}", label, config))
            rows[cells[-1].key] = {"result": {"test": {"perplexity": 90.0 if label == "mos" else 100.0}}}
    _, line = figures._over_width(cells, rows).axes[0].get_lines()
    assert list(line.get_xdata()) == [2, 4, 8]
    assert list(line.get_ydata()) == pytest.approx([-10.0] * 3)
    assert {cell.d for cell in cells[:4]} == {2, 4}


def test_the_figures_over_cost_take_each_heads_cost_at_the_tokens_it_was_trained_on():
    rows, cells = {}, []
    for label, tokens, perplexity in (
        ("softmax", 1000, 90.0),
        ("softmax (scale 1)", 1500, 85.0),
        ("plif", 1000, 80.0),
    ):
        for seed in (1, 2):
            config = TrainConfig.of(corpus="ptb", preset="lstm-small", head=label.split()[0], seed=seed, epochs=tokens)
            cells.append(Cell("tiny d=4", label, config))
            result = {"tokens": tokens, "test": {"perplexity": perplexity * seed}}
            rows[cells[-1].key] = {"result": result}
    costs = {
        ("tiny d=4", "softmax"): {"milliseconds": 100.0, "tokens": 50, "peak_mib": 7.0},
        ("tiny d=4", "plif"): {"milliseconds": 150.0, "tokens": 50, "peak_mib": 8.0},
    }
    drawn = {name: figures._against_cost(cells, rows, costs, name).axes[0] for name in ("seconds", "bytes")}
    for name, expected in (("seconds", [2.0, 3.0, 3.0]), ("bytes", [7.0, 7.0, 8.0])):
        dots, means = drawn[name].collections[::2], drawn[name].collections[1::2]
        assert [float(np.asarray(of.get_offsets())[0, 0]) for of in means] == expected
        assert [float(np.asarray(of.get_offsets())[0, 1]) for of in means] == pytest.approx(
            [2**0.5 * y for y in (90, 85, 80)]
        )
        assert np.asarray(dots[0].get_offsets())[:, 1].tolist() == [90.0, 180.0]
    assert figures._against_cost(cells, rows, {}, "bytes") is None
    assert [PLAN.part(name).own_model for name in ("again", "wide", "transformer", "baseline-transformer")] == [
        False, True, True, True,
    ]  # fmt: skip


def test_learned_slopes_are_drawn_relative_to_the_heads_fixed_factor(tiny_config):
    config = tiny_config(head="plif", head_options={"scale": 2.0}, seed=1)
    cell = Cell("tiny d=4", "plif", config)
    grid = figures.SLOPE_GRID
    quantiles = {"0.001": -3.0, "0.05": -2.0, "0.95": 2.0, "0.99": 3.0}
    row = {
        "config": {"head_options": {"scale": 2.0}},
        "history": [[1.0, 5.0]],
        "slopes": [[2.0 + z / 100 for z in grid]],  # f' = 1 + z / 200 of the identity's
        "analysis": {
            "function": {"x": [-4.0, -1.0, 1.0, 4.0], "slope": [9.0, 1.0, 3.0, 9.0]},
            "scores": quantiles,
            "target_scores": quantiles,
        },
    }
    slopes = figures._slopes([cell], {cell.key: row}).axes[0].get_lines()
    assert slopes[1].get_xdata().tolist() == [-2.0, 2.0]
    assert slopes[1].get_ydata().tolist() == [0.5, 1.5]
    assert list(slopes[2].get_xdata()) == [-4.0, 4.0]
    moving = figures._moving([cell], {cell.key: row}).axes[0]
    ends = {
        text.get_text(): line.get_ydata()[-1] for text, line in zip(moving.texts, moving.get_lines()[1:], strict=True)
    }
    assert ends == pytest.approx({"z = −8": 0.98, "z = −4": 0.99, "z = 0": 1.0, "z = 4": 1.01, "z = 8": 1.02})


def test_a_damaged_file_of_costs_is_named(tmp_path):
    path = tmp_path / "cost.csv"
    assert experiment._costs(path) == {}
    path.write_text("place,head\nptb,plif\n")
    with pytest.raises(LabError, match=r"cost\.csv: expected the columns place, head, milliseconds"):
        experiment._costs(path)


def test_rows_are_read_where_files_cannot_be_locked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    (tmp_path / "rows.jsonl").write_text('{"key": "a"}\n')
    again = runpy.run_path(str(sys.modules[RowStore.__module__].__file__))
    assert again["RowStore"](tmp_path).rows() == {"a": {"key": "a"}}


def test_a_part_without_a_kept_run_writes_nothing(tmp_path, capsys):
    for part in ("tune", "confirm"):  # the latter can report before it can run
        assert (
            experiment.run(Study(ROOT / "experiments/study.toml", part, report_only=True, out_dir=tmp_path))["runs"]
            == 0
        )
    assert not any(tmp_path.iterdir())
