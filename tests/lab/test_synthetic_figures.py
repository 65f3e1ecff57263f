"""Pictures of the synthetic experiment: what stands in them."""

import math

import pytest

from uncork.heads import HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import figures
from uncork.lab.experiments.synthetic.tables import rows_frame, summary
from uncork.lab.report.style import to_png

FITTING = {"learning_rate": 0.1, "function_scale": 0.1, "first_round": 250, "rounds": 5, "tolerance": 0.01,
           "optimizer": "adam"}  # fmt: skip


def outcome(head, seed=0, kl=1.0, mode=50.0, *, target="dirichlet:0.01", m=100, d=5, function=None, **other):
    row = {
        "target": target, "num_contexts": 1000, "num_words": m, "in_features": d, "head": head, "seed": seed,
        "entropy": 0.5, "cross_entropy": 0.5 + kl, "kl": kl, "mode_matching": mode, "largest_score": 12.0,
        "converged": True, "steps": 750, "last_gain": None, "parameters": 750, "width": d, "seconds": 1.5, **FITTING,
        **other,
    }  # fmt: skip
    return {"cell": {}, "row": row, "function": function}


def curve(slope, points=21):
    x = [-10 + 20 * place / (points - 1) for place in range(points)]
    return {"x": x, "f": [slope * value + 7 for value in x], "slope": [slope] * points, "scores": x}


@pytest.fixture
def drawn(tmp_path):
    """Calls a function of figures, and writes what it returns as a PNG."""

    def draw(make, data, *arguments, **options):
        figure = make(data if make is figures.functions else summary(rows_frame(data)), *arguments, **options)
        to_png(figure, tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        return figure

    return draw


def texts(axes):
    return [text.get_text() for text in axes.texts if text.get_text()]


def lines(axes):
    """The drawn lines by their x and y, markers and deviations aside."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines if len(line.get_xdata())]


def test_heat_maps_write_the_numbers_into_the_cells(drawn):
    data = [
        outcome("softmax", 0, 1.0, 40.0, m=10, d=2), outcome("softmax", 1, 2.0, 50.0, m=10, d=2),
        outcome("plif", 0, 0.5, 60.0, m=10, d=2), outcome("plif", 1, 1.0, 60.0, m=10, d=2),
        outcome("softmax", 0, 0.25, 90.0, m=100, d=20),
    ]  # fmt: skip
    figure = drawn(figures.heat_maps, data, "plif", "dirichlet:0.01")
    softmax, plif, ratio, kl, _, kl_ratio = figure.axes
    heading = "Mode matching, % (higher is better)"
    # M = 10 has nothing at d = 20; M = 100 has no cell at d = 2, and no PLIF at all.
    assert texts(softmax) == ["45.0", "± 7.1", "–", "90.0", heading]
    assert texts(plif) == ["60.0", "± 0.0", "–", "–"]
    assert texts(ratio)[:2] == ["1.35", "± 0.21"]
    assert "1,000 contexts, Dirichlet, β = 0.01" in texts(ratio)
    assert texts(kl)[:2] == ["1.500", "± 0.707"]
    assert texts(kl_ratio)[:2] == ["0.50", "± 0.00"]
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        "softmax", "PLIF, 100 pieces", "PLIF, 100 pieces / softmax",
    ]  # fmt: skip
    assert [label.get_text() for label in softmax.get_yticklabels()] == ["10", "100"]
    assert softmax.images[0].norm.vmin == plif.images[0].norm.vmin == 45.0


def test_heat_maps_of_one_measure_and_of_no_such_target(drawn, tmp_path):
    data = [outcome("softmax"), outcome("plif", kl=0.5)]
    figure = drawn(figures.heat_maps, data, "plif", "dirichlet:0.01", columns=["cross_entropy"])
    assert [texts(axes)[0] for axes in figure.axes] == ["1.500", "1.000", "0.67"]
    with pytest.raises(LabError, match="sotu"):
        figures.heat_maps(summary(rows_frame(data)), "plif", "sotu")


def test_ratios_are_blue_where_the_head_is_better(drawn):
    figure = drawn(
        figures.heat_maps, [outcome("softmax"), outcome("plif", kl=0.5, mode=90.0)], "plif", "dirichlet:0.01"
    )
    for axes in (figure.axes[2], figure.axes[5]):
        image = axes.images[0]
        red, _, blue, _ = image.cmap(image.norm(image.get_array()[0, 0]))
        assert blue > red + 0.1


def test_by_pieces_draws_learned_frozen_and_the_softmax(drawn):
    data = [
        outcome(f"{name}:num_pieces={pieces}", seed, kl=pieces / 1000 + seed, m=m)
        for name in ("plif", "plif-frozen") for pieces in (1000, 10) for seed in (0, 1) for m in (100, 500)
    ]  # fmt: skip
    data += [outcome("softmax", kl=3.0), outcome("mos"), outcome("softmax", kl=8.0, m=7)]
    figure = drawn(figures.by_pieces, data)
    assert [axes.get_title() for axes in figure.axes] == ["M = 100, d = 5", "M = 500, d = 5", "", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["PLIF", "frozen PLIF", "softmax"]
    kl, other = figure.axes[0], figure.axes[1]
    assert lines(kl) == [([10, 1000], [0.51, 1.5])] * 2 + [([0, 1], [3.0, 3.0])]
    assert len(lines(other)) == 2  # the softmax was not run there


def legend(figure):
    """What the legend says, with the colour of each line."""
    (found,) = figure.legends
    return dict(zip([text.get_text() for text in found.get_texts()], [line.get_color() for line in found.get_lines()],
                    strict=True))  # fmt: skip


def test_by_pieces_has_no_legend_entry_for_a_softmax_that_was_not_run(drawn):
    data = [outcome(f"plif:num_pieces={pieces}", kl=pieces / 1000) for pieces in (10, 1000)]
    figure = drawn(figures.by_pieces, data)
    assert legend(figure) == {"PLIF": HeadSpec("plif").colour}
    assert lines(figure.axes[0]) == [([10, 1000], [0.01, 1.0])]


def test_a_softmax_with_options_is_the_baseline_only_where_there_is_no_other(drawn):
    data = [outcome("softmax:bias=true", kl=4.0)]
    data += [outcome(f"plif:num_pieces={pieces}", kl=1.0) for pieces in (10, 1000)]
    figure = drawn(figures.by_pieces, data)
    assert legend(figure) == {"PLIF": HeadSpec("plif").colour, "softmax, bias": HeadSpec("softmax").colour}
    assert lines(figure.axes[0])[-1] == ([0, 1], [4.0, 4.0])
    figure = drawn(figures.by_pieces, [*data, outcome("softmax", kl=2.0)])
    assert list(legend(figure)) == ["PLIF", "softmax"]
    assert lines(figure.axes[0])[-1] == ([0, 1], [2.0, 2.0])
    titles = [
        axes.get_title() for axes in drawn(figures.heat_maps, data, data[1]["row"]["head"], "dirichlet:0.01").axes
    ]
    assert titles[:3] == ["softmax, bias", "PLIF, 10 pieces", "PLIF, 10 pieces / softmax, bias"]
    with pytest.raises(LabError, match="no softmax"):
        drawn(figures.heat_maps, data[1:], "plif:num_pieces=10", "dirichlet:0.01")


def test_by_head_draws_the_numbers_of_the_summary_in_the_heads_colours(drawn):
    levels = {"softmax:bias=true": 3.0, "softmax": 1.0, "plif": 0.5, "mos": 0.25}
    data = [outcome(head, seed, kl=kl + seed / 8, mode=10 * kl) for head, kl in levels.items() for seed in (0, 1)]
    figure = drawn(figures.by_head, data)
    kl, mode = figure.axes
    assert (kl.get_xlabel(), mode.get_xlabel()) == ("KL, nats", "mode matching, %")
    places = dict(zip([label.get_text() for label in kl.get_yticklabels()], kl.get_yticks(), strict=True))
    dots = {
        (line.get_xdata()[0], line.get_ydata()[0]): line.get_color() for line in kl.lines if line.get_marker() == "o"
    }
    names = {
        "softmax:bias=true": "softmax, bias",
        "softmax": "softmax",
        "plif": "PLIF, 100 pieces",
        "mos": "MoS-4, tanh",
    }
    assert dots == {
        (levels[head] + 1 / 16, places[name]): HeadSpec(head.split(":")[0]).colour for head, name in names.items()
    }
    # The dotted line is the softmax without options, in either panel.
    assert [line.get_xdata() for line in kl.lines if line.get_linestyle() != "None"][-1] == [1 + 1 / 16] * 2
    assert [line.get_xdata() for line in mode.lines if line.get_linestyle() != "None"][-1] == [10.0] * 2


def test_by_head_has_the_same_order_in_all_panels_and_mixtures_apart(drawn):
    data = [outcome("softmax", kl=1.0), outcome("mos", kl=0.1), outcome("plif", kl=0.5), outcome("temperature", kl=2.0)]
    data += [outcome("softmax", kl=1.0, m=500), outcome("plif", kl=3.0, m=500)]
    figure = drawn(figures.by_head, data)
    assert len(figure.axes) == 4
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["softmax", "PLIF, 100 pieces", "temperature", "MoS-4, tanh"]
    places = figure.axes[0].get_yticks()
    assert places[3] - places[2] > 1.5 * (places[1] - places[0])
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_xlim()[0] == 0


def test_by_features_keeps_what_reaches_the_floor_in_sight(drawn):
    data = [
        outcome(head, kl=kl, d=d, target=target)
        for target in ("known-rank:4", "sotu", "planted:plif:2", "modes:3")
        for head in ("softmax", "plif") for d, kl in ((2, 1.0), (3, -1e-9))
    ]  # fmt: skip
    figure = drawn(figures.by_features, data)
    titles = ["known rank 4", "3 modes", "planted PLIF of 2 features", "State of the Union"]
    assert [axes.get_title() for axes in figure.axes] == titles
    known, modes, planted, _ = figure.axes
    assert lines(known)[0] == ([2, 3], [1.0, figures.LOWEST])
    assert legend(figure) == {"softmax": HeadSpec("softmax").colour, "PLIF, 100 pieces": HeadSpec("plif").colour}
    assert [line.get_color() for line in known.lines if line.get_marker() == "o"] == list(legend(figure).values())
    assert known.get_ylim()[0] < figures.LOWEST < figures.NO_KL
    assert lines(known)[-1][0] == [3, 3]  # rank 4: three features are enough
    assert lines(planted)[-1][0] == [2, 2]
    assert len(lines(modes)) == 3  # two heads and the line at NO_KL


def test_by_beta_is_against_the_softmax(drawn):
    data = [
        outcome(head, kl=kl, mode=mode, target=f"dirichlet:{beta}")
        for beta in (1.0, 0.01) for head, kl, mode in (("softmax", 2.0, 50.0), ("plif", 0.5, 60.0 + 10 * beta))
    ]  # fmt: skip
    figure = drawn(figures.by_beta, [*data, outcome("plif", target="sotu"), outcome("plif", target="dirichlet:0.1")])
    ratio, gain = figure.axes
    assert lines(ratio)[0] == ([0.01, 1.0], [0.25, 0.25])
    assert lines(gain)[0][1] == pytest.approx([10.1, 20.0])
    assert (ratio.get_ylabel(), gain.get_ylabel()) == ("KL / softmax's KL", "mode gain, points")
    assert [lines(axes)[-1][1] for axes in (ratio, gain)] == [[1, 1], [0, 0]]
    assert list(legend(figure)) == ["PLIF, 100 pieces", "softmax"]
    with pytest.raises(LabError, match="no cell"):
        drawn(figures.by_beta, [outcome("softmax"), outcome("plif", target="sotu")])


def test_functions_draws_a_line_a_seed_over_the_middle_scores(drawn):
    data = [
        outcome("plif", 0, function=curve(0.5)), outcome("plif", 1, function=curve(2.0)),
        outcome("plif", 0, function=curve(9.0), learning_rate=0.03), outcome("softmax"),
        outcome("monotone", 0, m=500, function=curve(1.0)), outcome("temperature", function=curve(3.0)),
    ]  # fmt: skip
    figure = drawn(figures.functions, data)
    assert [axes.get_ylabel() for axes in figure.axes] == ["f(z)", "slope"] * 2  # a head at either point
    assert [axes.get_title() for axes in figure.axes] == ["M = 500, d = 5", "", "M = 100, d = 5", ""]
    plif = next(axes for axes in figure.axes if "PLIF, 100 pieces" in texts(axes))
    seeds = [y for x, y in lines(plif) if len(x) == 21]
    assert len(seeds) == 2
    assert [(y[0], y[10], y[-1]) for y in seeds] == [(-5, 0, 5), (-20, 0, 20)]  # 0 at the median score
    shaded = plif.patches[0].get_extents().transformed(plif.transData.inverted())
    assert (shaded.x0, shaded.x1) == (pytest.approx(-9.8), pytest.approx(9.8))


def test_functions_of_chosen_heads_and_of_none(drawn):
    data = [outcome("temperature", function=curve(3.0)), outcome("softmax")]
    figure = drawn(figures.functions, data, heads=["temperature"])
    assert [axes.get_ylabel() for axes in figure.axes] == ["f(z)", "slope"]
    assert {line.get_color() for axes in figure.axes for line in axes.lines if len(line.get_xdata()) == 21} == {
        HeadSpec("temperature").colour
    }
    with pytest.raises(LabError, match="no cell has a head"):
        drawn(figures.functions, data)


def test_slopes_that_differ_tenfold_are_on_a_logarithmic_scale(drawn):
    steep = curve(1.0)
    steep["slope"] = [10 ** (value / 5) for value in steep["x"]]
    figure = drawn(figures.functions, [outcome("plif", function=steep)])
    assert figure.axes[1].get_yscale() == "log"
    assert drawn(figures.functions, [outcome("plif", function=curve(1.0))]).axes[1].get_yscale() == "linear"
    assert math.isclose(figure.axes[1].get_ylim()[0], 0.01 / 1.3)
