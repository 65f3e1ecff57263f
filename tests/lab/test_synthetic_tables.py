"""Tables of the synthetic experiment, against numbers counted by hand."""

import math

import pytest

from uncork.heads import HEAD_NAMES, build_head
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import tables

FITTING = {"learning_rate": 0.1, "function_scale": 0.1, "first_round": 250, "rounds": 5, "tolerance": 0.01,
           "optimizer": "adam"}  # fmt: skip


def outcome(head="softmax", seed=0, kl=1.0, mode=50.0, *, target="dirichlet:0.01", n=50, m=100, d=5, **other):
    row = {
        "target": target, "num_contexts": n, "num_words": m, "in_features": d, "head": head, "seed": seed,
        "entropy": 0.5, "cross_entropy": 0.5 + kl, "kl": kl, "mode_matching": mode, "largest_score": 12.3456789,
        "converged": True, "steps": 750, "last_gain": 1e-3, "parameters": 750, "width": d, "seconds": 1.5, **FITTING,
        **other,
    }  # fmt: skip
    return {"cell": {}, "row": row, "function": None}


def summarised(*outcomes):
    return tables.summary(tables.rows_frame(outcomes))


def line(frame, head, **where):
    chosen = frame[frame["head"] == head]
    for name, value in where.items():
        chosen = chosen[chosen[name] == value]
    assert len(chosen) == 1
    return chosen.iloc[0]


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("softmax", "softmax"),
        ("softmax:bias=true", "softmax, bias"),
        ("softmax:bias=false", "softmax"),
        ("plif", "PLIF, 100 pieces"),
        ("plif:num_pieces=100000", "PLIF, 100,000 pieces"),
        ("plif:num_pieces=50,init=random", "PLIF, 50 pieces, init random"),
        ("plif-frozen:num_pieces=10", "frozen PLIF, 10 pieces"),
        ("monotone:num_units=1000", "monotone, 1,000 units"),
        ("softcap", "softcap 30"),
        ("softcap:cap=15", "softcap 15"),
        ("gss", "GSS"),
        ("mos", "MoS-4, tanh"),
        ("mos:num_components=8,latent_activation=null", "MoS-8"),
        ("mos:latent_activation=null,equal_parameters=true", "MoS-4, no more parameters"),
        ("moc:latent_activation=null", "MoC-4"),
        ("mop:latent_activation=null", "MoP-4, 100 pieces"),
    ],
)
def test_head_names(label, name):
    assert tables.head_name(label) == name


def test_names_say_the_library_s_defaults():
    assert f"{build_head('plif', 2, 3).logit_function.num_pieces} pieces" in tables.head_name("plif")
    assert f"{build_head('plif-frozen', 2, 3).logit_function.num_pieces} pieces" in tables.head_name("plif-frozen")
    assert f"{build_head('mop', 2, 3).logit_function.num_pieces} pieces" in tables.head_name("mop")
    assert f"{build_head('monotone', 2, 3).logit_function.num_units} units" in tables.head_name("monotone")
    assert f"softcap {build_head('softcap', 2, 3).logit_function.cap:g}" == tables.head_name("softcap")
    assert f"MoS-{build_head('mos', 2, 3).num_components}, tanh" == tables.head_name("mos")


def test_every_head_has_its_own_name():
    assert len({tables.head_name(name) for name in HEAD_NAMES}) == len(HEAD_NAMES)


def test_heads_and_targets_sort_by_their_numbers():
    heads = ["mos", "plif-frozen", "plif:num_pieces=1000", "plif", "plif:num_pieces=20", "softmax", "temperature"]
    assert sorted(heads, key=tables.head_key) == [
        "softmax", "temperature", "plif:num_pieces=20", "plif", "plif:num_pieces=1000", "plif-frozen", "mos",
    ]  # fmt: skip
    targets = ["sotu", "dirichlet:1.0", "planted:plif:10", "dirichlet:0.05", "planted:plif:9"]
    assert sorted(targets, key=tables.target_key) == [
        "dirichlet:0.05", "dirichlet:1.0", "planted:plif:9", "planted:plif:10", "sotu",
    ]  # fmt: skip


def test_rows_are_sorted_rounded_and_once():
    frame = tables.rows_frame(
        [
            outcome("plif", seed=1, kl=0.123456789),
            outcome("plif", seed=0, last_gain=None),
            outcome("softmax", m=20),
            outcome("plif", seed=1, kl=0.123456789, seconds=9.0),
        ]
    )
    assert list(zip(frame["num_words"], frame["head"], frame["seed"], strict=True)) == [
        (20, "softmax", 0), (100, "plif", 0), (100, "plif", 1),
    ]  # fmt: skip
    assert frame["kl"].tolist() == [1.0, 1.0, 0.123457]
    assert frame["largest_score"].tolist() == [12.346] * 3
    assert math.isnan(frame["last_gain"][1])
    with pytest.raises(LabError, match="at least one cell"):
        tables.rows_frame([])


def test_summary_counted_by_hand():
    frame = summarised(
        outcome("softmax", 0, 1.0, 50.0), outcome("softmax", 1, 2.0, 40.0), outcome("softmax", 2, 9.0, 10.0),
        outcome("plif", 0, 0.5, 60.0, converged=False, parameters=850), outcome("plif", 1, 0.5, 70.0, parameters=850),
    )  # fmt: skip
    plif, softmax = line(frame, "plif"), line(frame, "softmax")
    assert (softmax["seeds"], softmax["kl"], softmax["mode_ratio"]) == (3, 4.0, 1.0)
    assert (plif["seeds"], plif["pairs"], plif["parameters"], plif["converged"]) == (2, 2, 850, 0.5)
    assert (plif["kl"], plif["kl_std"], plif["cross_entropy"]) == (0.5, 0.0, 1.0)
    assert plif["mode_matching"] == 65
    assert plif["mode_matching_std"] == pytest.approx(math.sqrt(50))
    # Seed 2 of the softmax has no partner, and must not count: gains 10 and 30, ratios 1/2 and 1/4.
    assert (plif["mode_gain"], plif["kl_gain"], plif["kl_ratio"]) == (20, 1.0, 0.375)
    assert plif["mode_gain_std"] == pytest.approx(math.sqrt(200))
    assert plif["kl_ratio_std"] == pytest.approx(math.sqrt(2) / 8)
    assert plif["mode_ratio"] == pytest.approx((60 / 50 + 70 / 40) / 2)
    assert plif["cross_entropy_ratio"] == pytest.approx((1 / 1.5 + 1 / 2.5) / 2)


def test_one_seed_has_no_deviation_and_no_partner_no_gain():
    frame = summarised(outcome("plif", 0, 0.5), outcome("softmax", 1, 1.0))
    plif = line(frame, "plif")
    assert (plif["seeds"], plif["pairs"]) == (1, 0)
    assert all(math.isnan(plif[name]) for name in ("kl_std", "mode_gain", "kl_ratio", "kl_gain_std"))


def test_pairs_need_the_same_settings_but_not_the_function_scale():
    frame = summarised(
        outcome("softmax", 0, 1.0), outcome("softmax", 0, 0.8, learning_rate=0.03),
        outcome("plif", 0, 0.4), outcome("plif", 0, 0.4, learning_rate=0.03), outcome("plif", 0, 0.4, rounds=2),
        outcome("plif", 0, 0.2, function_scale=1.0),
    )  # fmt: skip
    assert line(frame, "plif", learning_rate=0.1, rounds=5, function_scale=0.1)["kl_ratio"] == 0.4
    assert line(frame, "plif", learning_rate=0.03)["kl_ratio"] == 0.5
    assert line(frame, "plif", function_scale=1.0)["kl_ratio"] == 0.2
    assert line(frame, "plif", rounds=2)["pairs"] == 0


def test_a_head_of_another_learning_rate_is_compared_with_the_commonest_softmax():
    frame = summarised(
        outcome("softmax", 0, 1.0), outcome("softmax", 0, 0.7, learning_rate=0.3), outcome("plif", 0, 0.4),
        outcome("mos", 0, 0.3, learning_rate=0.03),
    )  # fmt: skip
    assert line(frame, "mos")["kl_ratio"] == 0.3
    assert line(frame, "softmax", learning_rate=0.3)["kl_ratio"] == 1.0


def test_a_softmax_with_options_is_compared_with_the_one_without():
    frame = summarised(outcome("softmax:bias=true", 0, 4.0), outcome("softmax", 0, 2.0), outcome("plif", 0, 1.0))
    assert tables.baseline_of(frame) == "softmax"
    assert (line(frame, "plif")["kl_ratio"], line(frame, "softmax:bias=true")["kl_ratio"]) == (0.5, 2.0)
    alone = frame[frame["head"] != "softmax"]
    assert tables.baseline_of(alone) == "softmax:bias=true"
    alone = summarised(outcome("softmax:bias=true", 0, 4.0), outcome("plif", 0, 1.0))
    assert line(alone, "plif")["kl_ratio"] == 0.25
    assert "are against softmax, bias of the same seed and budget" in tables.terminal_table(alone)
    assert tables.long_table(alone)["KL / softmax"].tolist() == ["", "0.250"]
    assert tables.baseline_of(frame[frame["head"] == "plif"]) is None
    assert tables.terminal_table(summarised(outcome("plif"))).endswith("± is the standard deviation over seeds.")


def test_no_ratio_to_a_softmax_that_has_no_kl():
    plif = line(summarised(outcome("softmax", 0, 1e-4), outcome("plif", 0, 5e-5)), "plif")
    assert math.isnan(plif["kl_ratio"])
    assert plif["kl_gain"] == pytest.approx(5e-5)


def test_usual_settings_keep_a_row_a_head_and_point():
    frame = summarised(
        outcome("softmax"), outcome("plif"), outcome("plif", learning_rate=0.03), outcome("plif", m=20, rounds=1)
    )
    usual = tables.usual_settings(frame)
    assert list(zip(usual["num_words"], usual["head"], usual["learning_rate"], usual["rounds"], strict=True)) == [
        (20, "plif", 0.1, 1), (100, "softmax", 0.1, 5), (100, "plif", 0.1, 5),
    ]  # fmt: skip


def test_grid_spans_all_sizes_of_the_target():
    frame = summarised(
        outcome("softmax", m=10, d=2, kl=0.1), outcome("softmax", m=100, d=5, kl=0.2), outcome("plif", d=2, kl=0.3),
        outcome("softmax", m=7, target="sotu"),
    )  # fmt: skip
    table = tables.grid(frame, "dirichlet:0.01", "softmax", "kl")
    assert [*table.index, *table.columns] == [10, 100, 2, 5]
    assert (table.loc[10, 2], table.loc[100, 5]) == (0.1, 0.2)
    assert table.isna().sum().sum() == 2
    with pytest.raises(LabError, match="no cell"):
        tables.grid(frame, "modes:3", "softmax", "kl")
    with pytest.raises(LabError, match="got 50, 60"):
        tables.grid(summarised(outcome(), outcome(n=60)), "dirichlet:0.01", "softmax", "kl")


def test_numbers_as_text():
    assert tables.nats(1.0, 0.5) == "1.000 ± 0.500"
    assert tables.nats(-1e-9) == "0.00000"
    assert tables.plus_minus(-2.04, 1.0, 1, "+") == "−2.0 ± 1.0"


def test_terminal_table_has_a_block_a_point_and_fits():
    long = "mop:num_pieces=100000,latent_activation=null,equal_parameters=true"
    frame = summarised(
        *(outcome(head, seed, kl, mode + seed) for head, kl, mode in (("softmax", 1.0, 50.0), (long, 0.5, 60.0))
          for seed in (0, 1)),
        outcome("softmax", learning_rate=0.03),
    )  # fmt: skip
    text = tables.terminal_table(frame)
    assert max(map(len, text.splitlines())) <= 120
    head, other, block, note = text.split("\n\n")
    assert (
        " ".join(head.splitlines()[0].split()) == "head converged mode matching, % KL, nats gain, points KL / softmax"
    )
    assert other.startswith("Dirichlet, β = 0.01, N = 50, M = 100, d = 5; learning rate 0.03\nsoftmax")
    title, softmax, mixture = (" ".join(line.split()) for line in block.splitlines())
    assert title.endswith("learning rate 0.1")
    assert softmax == "softmax 2/2 50.5 ± 0.7 1.000 ± 0.000"
    name = "MoP-4, 100,000 pieces, no more parameters"
    assert mixture == f"{name} 2/2 60.5 ± 0.7 0.500 ± 0.000 +10.0 ± 0.0 0.500 ± 0.000"
    assert note.startswith("± is the standard deviation over seeds")


def test_the_long_table_leaves_out_what_never_changes():
    frame = summarised(outcome(), outcome("plif", kl=0.5, mode=60.0), outcome(m=20, kl=0.05))
    table = tables.long_table(frame)
    assert list(table.columns) == [
        "M", "head", "parameters", "seeds", "converged", "mode matching, %", "KL, nats", "gain, points", "KL / softmax"
    ]  # fmt: skip
    assert table.to_numpy().tolist() == [
        ["20", "softmax", "750", "1", "1/1", "50.0", "0.0500", "", ""],
        ["100", "softmax", "750", "1", "1/1", "50.0", "1.000", "", ""],
        ["100", "PLIF, 100 pieces", "750", "1", "1/1", "60.0", "0.500", "+10.0", "0.500"],
    ]


def test_the_long_table_says_which_settings_differ():
    table = tables.long_table(summarised(outcome(), outcome(learning_rate=0.03)))
    assert sorted(table["settings"]) == ["learning rate 0.03", "learning rate 0.1"]


def test_the_table_by_point_has_two_columns_a_point():
    frame = summarised(outcome(), outcome("plif", kl=0.5, mode=60.0), outcome(m=20, kl=0.05))
    assert tables.table_by_point(frame).to_dict("list") == {
        "head": ["softmax", "PLIF, 100 pieces"],
        "M = 20, d = 5: mode matching, %": ["50.0", "–"],
        "M = 20, d = 5: KL, nats": ["0.0500", "–"],
        "M = 100, d = 5: mode matching, %": ["50.0", "60.0"],
        "M = 100, d = 5: KL, nats": ["1.000", "0.500"],
    }
