"""The numbers of a comparison, by hand and against scipy, and the sentences made from them."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from uncork.lab.errors import LabError
from uncork.lab.report import tables
from uncork.lab.report.findings import caveats, control_sentence, headline, rank_sentence, verdict
from uncork.lab.report.records import read_records
from uncork.lab.report.statistics import baseline, paired
from uncork.lab.report.tables import DEVIATION, SPARE, display, heads_of, markdown, misleading_rank, terminal_table
from uncork.lab.run.store import RunStore


def runs_table(runs):
    return tables.runs_table(read_records(runs))


def summarise(runs):
    return tables.summarise(runs_table(runs))


def run_labels(runs):
    return [record.label for record in read_records(runs)]


SOFTMAX = [100.0, 102.0, 101.0, 99.0, 103.0]
PLIF = [95.0, 96.5, 97.0, 93.0, 98.0]


@pytest.fixture
def make(tmp_path):
    store = RunStore(tmp_path / "runs")

    def make_run(head, seed, test, *, config=None, **result):
        settings = {"head": head, "seed": seed, "corpus": "sotu", "in_features": 8, **(config or {})}
        run = store.run(f"{head}-{seed}-{len(store.runs())}", settings)
        if test is not None:
            scored = {"cross_entropy": 1.0, "perplexity": test, "bits_per_byte": None, "tokens": 10}
            run.finish(
                {"valid": {**scored, "perplexity": test + 1}, "test": scored, "parameters": 1000, "head_parameters": 90,
                 "tokens_per_second": 500.0, "peak_memory_bytes": 2**20, "epochs": 40, "steps": 100, "best_step": 90,
                 "train_seconds": 60.0, "tokens": 4000, "stopped": "finished", **result}
            )  # fmt: skip
        return run

    return make_run


@pytest.fixture
def runs(make):
    return [make("softmax", s, v) for s, v in enumerate(SOFTMAX)] + [make("plif", s, v) for s, v in enumerate(PLIF)]


def row_of(frame, head):
    (row,) = [row for _, row in frame.iterrows() if row["head"] == head]
    return row


def test_means_and_spread_by_hand(runs):
    frame = summarise(runs)
    row = row_of(frame, "softmax")
    assert (row["seeds"], row["unfinished"], row["not_finite"]) == (5, 0, 0)
    assert row["test_perplexity"] == 101.0
    assert row["valid_perplexity"] == 102.0
    assert row["test_perplexity_std"] == pytest.approx(math.sqrt(2.5))
    assert (row["test_perplexity_min"], row["test_perplexity_max"]) == (99.0, 103.0)
    assert math.isnan(row["difference"])
    plif = row_of(frame, "plif")
    assert plif["difference"] == pytest.approx(np.mean([-5, -5.5, -4, -6, -5]))
    assert plif["difference_std"] == pytest.approx(np.std([-5, -5.5, -4, -6, -5], ddof=1))
    assert (plif["pairs"], plif["wins"], plif["losses"]) == (5, 5, 0)


def test_the_test_is_paired_and_on_log_perplexity(runs):
    row = row_of(summarise(runs), "plif")
    expected = stats.ttest_rel(np.log(PLIF), np.log(SOFTMAX)).pvalue
    one_sample = stats.ttest_1samp(np.log(PLIF) - np.log(SOFTMAX), 0).pvalue
    assert row["p_value"] == pytest.approx(expected, rel=1e-9)
    assert row["p_value"] == pytest.approx(one_sample, rel=1e-9)
    assert row["p_holm"] == row["p_value"]  # the only head tested


def test_the_order_of_the_runs_does_not_matter(runs):
    first, second = summarise(runs), summarise(list(reversed(runs)))
    assert first["head"].tolist() == second["head"].tolist() == ["softmax", "plif"]
    assert row_of(first, "plif")["p_value"] == row_of(second, "plif")["p_value"]


def test_holm_by_hand(make, runs):
    runs += [make("gss", s, v + d) for s, (v, d) in enumerate(zip(SOFTMAX, [1, -1, 0.5, -0.2, 0.3], strict=True))]
    runs += [make("mos", s, v + d) for s, (v, d) in enumerate(zip(SOFTMAX, [-1, -2, -1, -2.5, -0.4], strict=True))]
    frame = summarise(runs)
    rows = sorted((row_of(frame, head) for head in ("plif", "gss", "mos")), key=lambda row: row["p_value"])
    raw = [row["p_value"] for row in rows]
    adjusted = np.maximum.accumulate(np.minimum(np.array(raw) * [3, 2, 1], 1))
    assert [row["p_holm"] for row in rows] == pytest.approx(list(adjusted))
    assert [row["head"] for row in rows] == ["plif", "mos", "gss"]


def test_no_test_below_five_seeds(runs):
    row = row_of(summarise(runs[:4] + runs[5:]), "plif")
    assert row["pairs"] == 4
    assert math.isnan(row["p_value"])
    assert math.isnan(row["p_holm"])


def test_pairs_by_hand():
    mine, theirs = pd.Series({3: 8.0, 1: 2.0, 2: 9.0}), pd.Series({0: 1.0, 1: 4.0, 2: 9.0, 3: 4.0})
    both = paired(mine, theirs)
    assert (both.pairs, both.lower, both.higher) == (3, 1, 1)
    assert both.difference == pytest.approx(2 / 3)
    assert both.difference_std == pytest.approx(np.std([4, -2, 0], ddof=1))
    assert both.change_percent == pytest.approx(0, abs=1e-12)  # twice as much, half as much, the same
    assert both.ratio() == pytest.approx((3.5 / 3, np.std([2, 0.5, 1], ddof=1)))
    mean, deviation = both.ratio(4.0)
    assert mean == 1.0
    assert math.isnan(deviation)
    assert math.isnan(both.p_value)
    none = paired(mine, pd.Series({7: 1.0}))
    assert (none.pairs, none.lower, none.higher) == (0, 0, 0)
    assert all(map(math.isnan, (none.difference, none.difference_std, none.change_percent, *none.ratio())))


def test_a_pair_that_is_not_finite_makes_every_number_nan():
    mine = pd.Series([*PLIF[:4], math.inf])
    both = paired(mine, pd.Series(SOFTMAX))
    assert (both.pairs, both.lower, both.higher) == (5, 0, 0)
    assert all(map(math.isnan, (both.difference, both.difference_std, both.change_percent, both.p_value)))


def test_the_interval_is_that_of_the_paired_test():
    mine, theirs = pd.Series(PLIF), pd.Series(SOFTMAX)
    both = paired(mine, theirs)
    wanted = stats.ttest_rel(np.log(mine), np.log(theirs)).confidence_interval(0.95)
    assert both.interval_percent == pytest.approx([100 * math.expm1(end) for end in wanted])
    few, endless = paired(mine[:4], theirs), paired(pd.Series([*PLIF[:4], math.inf]), theirs)
    assert all(map(math.isnan, (*few.interval_percent, *endless.interval_percent)))


def test_only_shared_seeds_are_paired(make):
    runs = [make("softmax", s, v) for s, v in zip((0, 1, 2), (100.0, 110.0, 120.0), strict=True)]
    runs += [make("plif", s, v) for s, v in zip((1, 2, 7), (109.0, 122.0, 1.0), strict=True)]
    row = row_of(summarise(runs), "plif")
    assert (row["pairs"], row["wins"], row["losses"]) == (2, 1, 1)
    assert row["difference"] == pytest.approx(0.5)


def test_without_a_shared_seed_the_means_are_compared(make):
    frame = summarise([make("softmax", 0, 100.0), make("plif", 1, 97.0)])
    row = row_of(frame, "plif")
    assert (row["pairs"], row["difference"]) == (0, pytest.approx(-3.0))
    assert "−3.00 (unpaired)" in markdown(display(frame))
    assert "none shared with the softmax" in headline(frame)


def test_equal_runs_and_constant_differences_do_not_break_the_test(make):
    runs = [make("softmax", s, v) for s, v in enumerate(SOFTMAX)]
    runs += [make("temperature", s, v) for s, v in enumerate(SOFTMAX)]
    runs += [make("plif", s, v / 2) for s, v in enumerate(SOFTMAX)]
    frame = summarise(runs)
    assert row_of(frame, "temperature")["p_value"] == 1.0
    assert row_of(frame, "plif")["p_value"] < 1e-12


def test_unfinished_runs_are_counted_apart(make, runs):
    frame = summarise([*runs, make("plif", 9, None), make("mos", 0, None)])
    assert (row_of(frame, "plif")["seeds"], row_of(frame, "plif")["unfinished"]) == (5, 1)
    assert row_of(frame, "plif")["test_perplexity"] == pytest.approx(np.mean(PLIF))
    assert (row_of(frame, "mos")["seeds"], row_of(frame, "mos")["unfinished"]) == (0, 1)
    assert "mos" not in headline(frame)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_perplexity_that_is_not_finite_is_not_left_out_in_silence(make, runs, bad):
    frame = summarise([*runs[:9], make("plif", 4, bad)])
    row = row_of(frame, "plif")
    assert math.isnan(row["test_perplexity"])
    assert math.isnan(row["p_value"])
    assert row["not_finite"] == 1
    assert (row["test_perplexity_min"], row["test_perplexity_max"]) == (93.0, 97.0)
    assert "plif has no finite mean" in headline(frame)


def test_speed_is_the_median_and_memory_the_largest(make):
    speeds, memory = (100.0, 900.0, 110.0), (3, 5, 4)
    numbers = list(enumerate(zip(speeds, memory, strict=True)))
    frame = summarise([make("plif", i, 9.0, tokens_per_second=s, peak_memory_bytes=m) for i, (s, m) in numbers])
    assert (frame["tokens_per_second"][0], frame["peak_memory_bytes"][0]) == (110.0, 5)


def test_analysis_comes_from_the_result_or_its_own_file(make):
    analysis = {"rank": {"numerical": 40, "linear_rank": 10, "effective": {"1e-4": 6}, "tail_energy": 0.25}}
    inside, beside = make("plif", 0, 9.0, analysis=analysis), make("plif", 1, 9.0)
    analysis["rank"]["numerical"] = 42
    (beside.path / "analysis.json").write_text(
        '{"rank": {"numerical": 42, "linear_rank": 10, "effective": {"1e-4": 6}, "tail_energy": 0.25}}'
    )
    row = row_of(summarise([inside, beside]), "plif")
    assert (row["numerical_rank"], row["effective_rank"], row["tail_energy"]) == (41, 6, 0.25)


def test_one_row_a_run(make, runs):
    table = runs_table([*runs, make("plif", 9, None), make("gss", 0, 50.0, stopped="early")])
    assert table["head"].tolist() == ["softmax"] * 5 + ["gss"] + ["plif"] * 6
    assert table["seed"].tolist() == [0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 9]
    assert table["state"].tolist()[-1] == "not finished"
    assert table["state"].tolist()[5] == "stopped early"
    assert math.isnan(table["test_perplexity"].iloc[-1])


def test_settings_other_than_the_seed_are_not_averaged_over(make):
    runs = [make("plif", 0, 9.0, config={"head_options": {"num_pieces": n}}) for n in (10, 20)]
    assert run_labels(runs) == ["plif (num_pieces=10)", "plif (num_pieces=20)"]
    assert len(summarise(runs)) == 2


def test_the_softmax_with_the_others_settings_is_the_baseline(make):
    runs = [make("softmax", 0, 9.0, config={"in_features": d}) for d in (10, 8)] + [make("plif", 0, 8.5)]
    assert run_labels(runs) == ["softmax (in_features=10)", "softmax", "plif"]
    frame = summarise(runs)
    assert frame["head"].tolist() == ["softmax", "softmax (in_features=10)", "plif"]
    assert row_of(frame, "plif")["difference"] == pytest.approx(-0.5)
    assert math.isnan(row_of(frame, "softmax")["difference"])


def test_the_baseline_is_the_softmax_without_settings_of_its_own_wherever_it_stands(make):
    heads = {"softmax (scale=1)": "softmax", "plif": "plif", "softmax": "softmax"}
    assert baseline(heads) == baseline(dict(reversed(heads.items()))) == "softmax"
    assert baseline({"plif": "plif", "softmax (lr=0.2)": "softmax", "softmax (lr=0.1)": "softmax"}) == (
        "softmax (lr=0.2)"
    )
    assert baseline({"plif": "plif", "softmaxes (5)": "mos"}) is None
    runs = [make("softmax", 0, 104.9), make("softmax", 0, 94.15, config={"head_options": {"scale": 4}})]
    runs += [make(head, 0, 93.0, config={"head_options": {"scale": 4}}) for head in ("plif", "mos")]
    frame = summarise(runs)
    assert frame["head"].tolist() == ["softmax", "softmax (scale=1)", "plif", "mos"]
    assert frame["baseline"].tolist() == [True, False, False, False]
    assert row_of(frame, "softmax (scale=1)")["difference"] == pytest.approx(104.9 - 94.15)
    assert headline(frame).startswith("Against the softmax's test perplexity of 94.15 ")


def test_where_every_softmax_has_settings_of_its_own_the_first_that_was_named_is_the_baseline(make):
    for rates in ((0.2, 0.1), (0.1, 0.2)):
        runs = [make("softmax", len(str(rates)), 9.0, config={"lr": rate}) for rate in rates]
        runs.append(make("plif", len(str(rates)), 8.0, config={"lr": 0.3}))
        table = runs_table(runs)
        assert baseline(heads_of(table)) == f"softmax (lr={rates[0]})"
        assert f"Against softmax (lr={rates[0]}) with" in headline(summarise(runs))


def test_a_baseline_that_has_not_finished_is_no_reason_to_take_another(make):
    four = {"head_options": {"scale": 4}}
    runs = [make("softmax", 0, None, config=four), make("softmax", 0, 9.0), make("plif", 0, 8.0, config=four)]
    runs.append(make("mos", 0, None, config=four))
    frame = summarise(runs)
    assert frame["difference"].isna().all()
    assert headline(frame) == (
        "Test perplexity before softmax has finished to compare with: plif 8.00, softmax (scale=1) 9.00."
    )


def test_labels_say_what_differs_from_the_usual_and_nothing_else(make):
    usual = {"bias_prior": True, "output_lr_scale": 8.0, "epochs": 4.0}
    record = {"resolved": {"body": {"kind": "lstm", "sizes": [3]}, "optimiser": {"betas": [0.9, 0.99]}}}
    runs = [
        make("softmax", 0, 9.0, config=usual | record),
        # What earlier runs did not write had the value 1; JSON has 4 for 4.0.
        make("softmax", 0, 9.0, config={"bias_prior": False, "epochs": 4, "resolved": {"body": {"kind": "new"}}}),
        make("plif", 0, 9.0, config=usual | {"head_options": {"num_pieces": 50, "bound": 20, "scale": 1.0}}),
        make("plif", 0, 9.0, config=usual),
        make("plif-frozen", 0, 9.0, config=usual | {"lr": 0.01, "checkpoint_every": 5.0}),
        make("mos", 0, 9.0, config=usual | {"head_options": {"latent_activation": None}}),
    ]
    assert run_labels(runs) == [
        "softmax", "softmax (bias_prior=false, output_lr_scale=1)", "plif (num_pieces=50)", "plif",
        "plif-frozen (lr=0.01)", "mos (latent_activation=null)",
    ]  # fmt: skip


def test_what_is_usual_is_counted_by_heads_not_by_runs(make):
    runs = [make("softmax", seed, 9.0, config={"epochs": 1.0}) for seed in range(5)]
    runs += [make(head, 0, 9.0, config={"epochs": 4.0}) for head in ("softmax", "plif", "mos")]
    assert run_labels(runs)[4:] == ["softmax (epochs=1)", "softmax", "plif", "mos"]


def test_heads_without_a_softmax(make):
    assert headline(summarise([make("plif", 0, 9.0), make("mos", 0, 8.0)])) == (
        "Test perplexity without a softmax to compare with: mos 8.00, plif 9.00."
    )


def test_the_same_run_twice_is_an_error(make):
    with pytest.raises(LabError, match="are all of plif with seed 0"):
        runs_table([make("plif", 0, 9.0), make("plif", 0, 8.0)])


def test_no_runs_at_all():
    frame = summarise([])
    assert frame.empty
    assert headline(frame) == "No run has finished, so there is nothing to compare yet."
    assert control_sentence(frame, runs_table([])) is None
    assert caveats(frame, runs_table([])) == []


def test_markdown(runs):
    lines = markdown(display(summarise(runs))).splitlines()
    assert lines[0].startswith(
        "| head | seeds | test perplexity | valid perplexity | vs softmax (lower in) | p (Holm) |"
    )
    assert lines[2].startswith("| softmax | 5 | 101.0 ± 1.6 | 102.0 ± 1.6 | – | – | 1,000 | 90 | 500 | 1 |")
    assert lines[3].startswith("| plif | 5 | 95.90 ± 1.95 | 96.90 ± 1.95 | −5.10 (5/5) | <0.001 |")
    assert {line.count("|") for line in lines} == {lines[0].count("|")}


def test_the_terminal_s_table_drops_columns_until_it_fits(runs):
    text = display(summarise(runs))
    shown = {width: terminal_table(text, title=DEVIATION, spare=SPARE, width=width) for width in (70, 90, 130, 200)}
    for width, table in shown.items():
        lines = table.splitlines()
        assert lines[0] == DEVIATION
        assert "95.90 ± 1.95" in table
        assert max(map(len, lines)) <= width
    names = {width: table.splitlines()[1] for width, table in shown.items()}
    assert [("peak MiB" in names[w], "tokens/s" in names[w], "p (Holm)" in names[w]) for w in (70, 90, 130, 200)] == [
        (False, False, True), (False, True, True), (True, True, True), (True, True, True),
    ]  # fmt: skip
    assert names[200].split() == " ".join(text.columns).split()


def test_the_terminal_s_table_has_a_line_above_each_block():
    text = pd.DataFrame(
        {"point": ["M = 1", "M = 1", "M = 2"], "head": ["softmax", "[plif]", "mos"], "KL": [1, 22, 333]}
    )
    assert terminal_table(text, blocks="point", width=80).splitlines() == [
        "head       KL", "─────────────", "", "M = 1", "softmax     1", "[plif]     22", "", "M = 2", "mos       333",
    ]  # fmt: skip


def verdict_of(runs):
    return verdict(summarise(runs), runs_table(runs))


def test_the_verdict_of_five_seeds(make, runs):
    change = 100 * math.expm1(np.mean(np.log(PLIF) - np.log(SOFTMAX)))
    assert verdict_of(runs) == f"plif ends lower than softmax in 5 of 5 seeds, p <0.001, −{-change:.1f} %."
    runs += [make("gss", s, v + d) for s, (v, d) in enumerate(zip(SOFTMAX, [1, -1, 0.5, -0.2, 0.3], strict=True))]
    runs += [make("mos", s, v + 5 + 0.1 * s) for s, v in enumerate(SOFTMAX)]
    runs += [make("sigsoftmax", s, 120.0) for s in (0, 1)]
    assert verdict_of(runs).split(". ")[1:] == [
        "gss is not told apart from softmax: higher in 3 of 5 seeds, p = 0.74, +0.1 %",
        "mos ends higher than softmax in 5 of 5 seeds, p <0.001, +5.1 %",
        "No verdict on sigsoftmax: 2 seeds, and a test takes 5.",
    ]


def test_the_verdict_leaves_the_controls_to_their_own_sentence(make, runs):
    controls = [make("temperature", s, v - 1) for s, v in enumerate(SOFTMAX)]
    assert "temperature" not in verdict_of([*runs, *controls])
    assert verdict_of([*runs[:5], *controls]).startswith("temperature ends lower than softmax in 5 of 5 seeds")


def test_there_is_no_verdict_without_a_test_and_the_reason_is_said(make):
    softmax, plif = make("softmax", 0, 9.0), make("plif", 0, 8.0)
    assert verdict_of([]) == verdict_of([make("plif", 5, None)]) == "No verdict: no run has finished."
    assert verdict_of([plif]) == "No verdict: there is no softmax to compare with."
    assert verdict_of([make("softmax", 6, None), plif]) == "No verdict: softmax has not finished."
    assert verdict_of([softmax]) == "No verdict: no other head has finished."
    assert verdict_of([softmax, plif]) == "No verdict: one seed."
    assert verdict_of([softmax, plif, make("softmax", 1, 9.0), make("plif", 1, 8.0)]) == (
        "No verdict: 2 seeds, and a test takes 5."
    )
    assert verdict_of([softmax, make("plif", 4, 8.0)]) == "No verdict: no seed is shared with softmax."
    assert verdict_of([softmax, plif, make("mos", 0, math.inf)]) == (
        "No verdict on plif: one seed. No verdict on mos: a test perplexity is not a finite number."
    )


def ranked(make, ranks):
    """One run a head, {head: (numerical rank, ε-rank)}."""
    return [
        make(head, 0, 9.0, analysis={"rank": {"numerical": numerical, "effective": {"1e-4": effective}}})
        for head, (numerical, effective) in ranks.items()
    ]


def test_the_numerical_rank_is_left_out_where_the_rank_by_size_says_otherwise(make):
    frame = summarise(ranked(make, {"softmax": (18, 15), "softcap": (1000, 15), "plif": (1000, 16), "mos": (18, 15)}))
    assert misleading_rank(frame) == ["softcap"]
    assert "rank" not in display(frame).columns
    assert "ε-rank" in display(frame).columns
    assert rank_sentence(frame).endswith("Rank (ε-rank): softmax 18 (15), softcap 1,000 (15).")
    lower = summarise(ranked(make, {"softmax": (18, 15), "gss": (9, 30)}))
    assert misleading_rank(lower) == ["gss"]


def test_the_numerical_rank_is_shown_where_both_ranks_agree_or_one_is_not_known(make):
    frame = summarise(ranked(make, {"softmax": (18, 15), "mos": (1000, 40), "gss": (9, 3), "temperature": (18, 40)}))
    assert misleading_rank(frame) == []
    assert rank_sentence(frame) is None
    assert display(frame)["rank"].tolist() == ["18", "18", "9", "1,000"]
    assert misleading_rank(summarise([make("softmax", 3, 9.0), make("plif", 3, 8.0)])) == []
    assert misleading_rank(summarise(ranked(make, {"plif": (1000, 15), "mos": (18, 15)}))) == []


def test_headline_without_a_test_says_so(runs):
    assert headline(summarise(runs[:3] + runs[5:8])) == (
        "Against the softmax's test perplexity of 101.0 ± 1.0 (3 seeds): plif 96.17 ± 1.04 (lower in 3 of 3 seeds); "
        "no test was made, since that takes 5 seeds."
    )


def test_headline_with_a_test(make, runs):
    runs += [make("gss", s, v + d) for s, (v, d) in enumerate(zip(SOFTMAX, [1, -1, 0.5, -0.2, 0.3], strict=True))]
    runs += [make("mos", s, v + 5 + 0.1 * s) for s, v in enumerate(SOFTMAX)]
    sentence = headline(summarise(runs))
    assert sentence.startswith(
        "Against the softmax's test perplexity of 101.0 ± 1.6 (5 seeds): plif 95.90 ± 1.95 (p <0.001) is lower; "
    )
    assert "mos 106.2 ± 1.6 (p <0.001) is higher; " in sentence
    assert "gss 101.1 ± 1.6 (p = 0.74) is not told apart from it" in sentence


def test_controls_are_named_and_a_vain_gain_is_called_so(make, runs):
    frozen = [make("plif-frozen", s, v - 0.5) for s, v in enumerate(PLIF)]
    frame, table = summarise([*runs, *frozen]), runs_table([*runs, *frozen])
    sentence = control_sentence(frame, table)
    assert sentence.startswith("Controls: the frozen random PLIF 95.40 ± 1.95 (p ")
    assert sentence.endswith(
        "plif is below the frozen random one in 0 of 5 seeds, and not below it in the mean: these runs do not show "
        "that learning the function helps."
    )
    assert "plif-frozen" not in headline(frame)


def test_controls_alone_are_the_result(make):
    runs = [make("softmax", 0, 10.0), make("temperature", 0, 9.0)]
    frame = summarise(runs)
    assert "temperature 9.00 (lower in 1 of 1 seed)" in headline(frame)
    assert control_sentence(frame, runs_table(runs)) is None


def test_caveats_name_what_stands_against_the_result(make):
    runs = [make("softmax", s, 10.0, epochs=3, best_step=100) for s in (0, 1)]
    runs += [make("plif", 0, 9.0, parameters=1100, stopped="early"), make("plif", 1, None)]
    text = " ".join(caveats(summarise(runs), runs_table(runs)))
    for words in ("In 2 of 3 runs validation was best at the very last step", "1 of 3 runs stopped before",
                  "With one seed it is", "between 1 and 2 finished seeds", "left out of every number here: plif-1",
                  "Not run: temperature, softcap, plif-frozen", "plif +10%"):  # fmt: skip
        assert words in text, words


def test_long_training_with_every_control_has_no_caveat(make):
    heads = ("softmax", "temperature", "softcap", "plif", "plif-frozen")
    runs = [make(head, seed, 10.0) for head in heads for seed in (0, 1)]
    assert caveats(summarise(runs), runs_table(runs)) == []
