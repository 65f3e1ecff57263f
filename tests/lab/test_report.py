"""The report: one self-contained, valid page whose words and numbers are those of the runs."""

import json
import math
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest

from uncork.heads import HEAD_NAMES, HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.report import figures, records
from uncork.lab.report.page import write_report
from uncork.lab.report.records import read_records
from uncork.lab.report.style import (
    INK,
    LONGEST,
    MUTED,
    changes_by_decile,
    label_ends,
    new_axes,
    set_apart,
    shortened,
    strokes,
)
from uncork.lab.report.tables import runs_table, summarise
from uncork.lab.run import files
from uncork.lab.run import store as store_module
from uncork.lab.run.store import Run, RunStore

LEVELS = {
    "softmax": 130.1,
    "temperature": 129.9,
    "sigsoftmax": 131.5,
    "plif": 123.6,
    "plif-frozen": 129.3,
    "mos": 127.0,
}
FUNCTIONS = {
    "temperature": (lambda x: 1.15 * x, lambda x: 1.15 + 0 * x),
    "sigsoftmax": (
        lambda x: x - np.logaddexp(0, -x) + math.log(2),
        lambda x: 1 + 1 / (1 + np.exp(x)),
    ),
    "plif": (lambda x: 0.75 * x + 0.022 * (x + 4) ** 2 - 0.352, lambda x: 0.75 + 0.044 * (x + 4)),
    "plif-frozen": (lambda x: 1.1 * x + 0.1 * np.sin(4 * x), lambda x: 1.1 + 0.4 * np.cos(4 * x)),
}
LINEAR = ("softmax", "temperature")


def synthetic_analysis(head, d, rng):
    values = 4e3 * np.exp(-0.9 * np.arange(1000) ** 0.35)
    if head in LINEAR:
        values = np.concatenate([values[: d + 2], rng.uniform(1e-13, 1e-12, 1000 - d - 2)])
    else:
        values[d + 2 :] *= 0.01 * np.exp(-np.arange(1000 - d - 2) * 0.02)
    edges = np.linspace(-14, 17, 81)
    middle = (edges[1:] + edges[:-1]) / 2
    counts = 2e5 * np.exp(-((middle + 2.5) ** 2) / 8) + 300 * np.exp(-((middle - 8) ** 2) / 6)
    function = None
    if head in FUNCTIONS:
        f, slope = FUNCTIONS[head]
        x = np.linspace(-14, 17, 201)
        function = {"x": x.tolist(), "y": (f(x) - f(np.zeros(1))).tolist(), "slope": slope(x).tolist()}
    numerical = d + 2 if head in LINEAR else int((values > 1e-9).sum())
    deciles = [
        {"decile": k, "words": 2 * 4 ** (k - 1) // 60 + 1, "min_count": 1, "max_count": 9, "tokens": 4000 + k,
         "cross_entropy": 1.4 + 0.75 * k + math.log(LEVELS.get(head, 130) / 130) * (2 - 0.2 * k)}
        for k in range(1, 11)
    ]  # fmt: skip
    deciles[2] |= {"tokens": 0, "cross_entropy": None}
    return {
        "rank": {"contexts": 1000, "in_features": d, "vocab_size": 9000, "linear_rank": d + 2, "numerical": numerical,
                 "effective": {"1e-2": 1, "1e-4": d // 2 + 1 if head in LINEAR else 30, "1e-6": 60},
                 "tail_energy": 1e-29 if head in LINEAR else 3e-5, "singular_values": values.tolist()},
        "function": function,
        "histogram": {"contexts": 200, "edges": edges.tolist(), "counts": np.rint(counts).astype(int).tolist(),
                      "quantiles": {"0": -14.0, "0.5": -2.5, "1": 17.0},
                      "target_quantiles": {"0.05": -1.0, "0.5": 6.0, "0.95": 12.0}},
        "deciles": deciles,
        "cross_entropy": 4.86, "entropy": 4.8,
        "target_log_prob_quantiles": {"0.5": -4.2},
    }  # fmt: skip


def make_run(store, head, seed, *, perplexity=None, finished=True, d=16, name=None, analysis=True, **settings):
    """A run as the trainer and `analyse` leave it, with a perplexity near the head's level."""
    rng = np.random.default_rng([seed, sum(map(ord, head))])
    level = LEVELS.get(head, 130.0)
    if perplexity is None:
        perplexity = level + 0.9 * math.sin(7 * seed) + 0.3 * rng.normal()
    config = {"head": head, "seed": seed, "corpus": "sotu", "in_features": d, "preset": "lstm-laptop",
              "head_options": {"num_pieces": 100} if "plif" in head else {},
              "lr": 3e-3, "epochs": 4.0, "bptt": 48, **settings}  # fmt: skip
    run = store.run(name or f"{head}-seed{seed}", config)
    speed = 21_000.0 if head != "mos" else 6_200.0
    for step in range(0, 2001, 100):
        tokens = step * 1536
        progress = 1 - math.exp(-step / 450)
        cross_entropy = math.log(9000) + (math.log(perplexity) - math.log(9000)) * progress**0.6
        run.append_metrics({"kind": "train", "step": step, "epoch": step // 500, "tokens": tokens, "lr": 3e-3,
                            "cross_entropy": cross_entropy, "grad_norm": 0.5, "tokens_per_second": speed,
                            "seconds": tokens / speed})  # fmt: skip
        if step:
            run.append_metrics({"kind": "valid", "step": step, "epoch": step // 500, "tokens": tokens,
                                "cross_entropy": cross_entropy, "perplexity": math.exp(cross_entropy)})  # fmt: skip
    if finished:
        scored = {"cross_entropy": math.log(perplexity) if perplexity > 0 else math.nan, "perplexity": perplexity,
                  "bits_per_byte": None, "tokens": 100_000}  # fmt: skip
        extra = {"softmax": 0, "temperature": 1, "plif": 100, "plif-frozen": 100, "mos": 18_000}.get(head, 0)
        run.finish({
            "head": head, "seed": seed, "corpus": "sotu", "in_features": d, "vocab_size": 9000,
            "parameters": 2_890_000 + extra, "head_parameters": 153_000 + extra, "steps": 2000, "tokens": 3_072_000,
            "epochs": 4, "best_step": 2000, "train_seconds": 3_072_000 / speed, "tokens_per_second": speed,
            "peak_memory_bytes": 700 * 2**20, "valid": scored, "test": scored, "stopped": "finished",
            "versions": {"torch": "2.13.0", "uncork": "0.1.0", "python": "3.11.2"}, "machine": "2 CPU cores",
            "threads": 2, **({"analysis": synthetic_analysis(head, d, rng)} if analysis else {}),
        })  # fmt: skip
    return run


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "runs")


VOID = {"meta", "link", "br", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are balanced; keeps ids, references, visible text and tags."""

    def __init__(self, path):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.words: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            elif name in ("href", "src") or "url(" in (value or ""):
                self.references.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def write(tmp_path, runs, **options):
    options = {"title": "Output layers on sotu", "command": "uncork compare --seeds 3", **options}
    return Page(write_report(tmp_path / "report", read_records(runs), **options))


def summary_of(runs):
    return summarise(runs_table(read_records(runs)))


def pictures(runs):
    read = read_records(runs)
    return figures.pictures(read, runs_table(read), summary_of(runs))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    """Runs of six heads with two seeds, the page of their report, and its folder; written once, only read."""
    folder = tmp_path_factory.mktemp("comparison")
    store = RunStore(folder / "runs")
    runs = [make_run(store, head, seed) for head in LEVELS for seed in range(2)]
    return runs, write(folder, runs, notes=["Made on a Sunday."]), folder / "report"


def test_the_page_is_valid_and_needs_nothing_but_itself(comparison):
    _, page, _ = comparison
    assert len(page.ids) == len(set(page.ids)) > 50
    assert "http://" not in page.source
    assert "https://" not in page.source
    assert "//" not in "".join(reference for reference in page.references if reference)
    assert "script" not in page.tags
    local = {match for reference in page.references for match in re.findall(r"#([^)\"]+)", reference)}
    assert local <= set(page.ids)
    assert page.source.startswith("<!doctype html>")
    assert page.tags.count("figure") == page.tags.count("figcaption") == page.tags.count("svg") == 9
    assert page.source.count('role="img" aria-label="') == 9
    assert not re.search(r"\{\{|\{%|&amp;lt;|Undefined", page.source)


def test_figures_follow_the_page_s_colours(comparison):
    source = comparison[1].source
    body = source[source.index("</style>") :]
    assert "currentColor" in body
    assert "var(--muted)" in body
    assert not re.search("#1b1f24|#6a7280|#d8dce2|<rect[^>]*fill: #fff", body, re.IGNORECASE)


def test_everything_is_written(comparison):
    made, _, out = comparison
    table, runs = pd.read_csv(out / "table.csv"), pd.read_csv(out / "runs.csv")
    assert list(table["head"]) == ["softmax", "temperature", "sigsoftmax", "plif", "plif-frozen", "mos"]
    assert len(runs) == 12
    mean = np.mean([run.result["test"]["perplexity"] for run in made[:2]])
    assert table["test_perplexity"][0] == pytest.approx(mean, rel=1e-12)
    pictures = sorted(path.name for path in (out / "figures").iterdir())
    assert len(pictures) == 9
    assert {"perplexity.png", "curves-tokens.png", "function-3-plif.png", "deciles.png"} <= set(pictures)
    assert all((out / "figures" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)


def test_the_words_say_what_was_run_and_how(comparison):
    for words in ("no test was made", "Controls: a learned temperature", "Training was short (4 epochs)",
                  "Not run: softcap", "uncork compare --seeds 3", "2.13.0", "2 CPU cores", "lstm-laptop",
                  "head_options.num_pieces = 100", "bptt", "1,000 held-out contexts", "Made on a Sunday.",
                  "plif-seed1"):  # fmt: skip
        assert words in comparison[1].text, words


def test_figures_of_an_earlier_report_are_gone(tmp_path, store):
    old = tmp_path / "report" / "figures" / "function-3-plif.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"")
    write(tmp_path, [make_run(store, "softmax", 0)])
    assert not old.exists()


def test_every_file_of_a_run_is_read_once(tmp_path, store, monkeypatch):
    runs = [make_run(store, head, seed) for head in LEVELS for seed in range(2)]
    beside = make_run(store, "mos", 5, analysis=False)
    (beside.path / "analysis.json").write_text(json.dumps(runs[0].result["analysis"]))
    reads: Counter[str] = Counter()

    def counted(path, *mend):
        reads[str(path.relative_to(store.root))] += 1
        return files.read_json(path, *mend)

    monkeypatch.setattr(store_module, "read_json", counted)
    monkeypatch.setattr(records, "read_json", counted)
    write(tmp_path, [*runs, beside])
    assert reads == dict.fromkeys(
        [*(f"{run.name}/result.json" for run in [*runs, beside]), "mos-seed5/analysis.json"], 1
    )


@pytest.mark.parametrize(("seeds", "shaded"), [((2, 2), 1), ((1, 1), 0), ((2, 1), 0), ((2, 0), 1)])
def test_the_lowest_row_is_shaded_where_no_head_has_but_one_seed(tmp_path, store, seeds, shaded):
    runs = [make_run(store, head, seed, finished=seed < count, analysis=False)
            for head, count in zip(("softmax", "plif"), seeds, strict=True) for seed in range(2)]  # fmt: skip
    page = write(tmp_path, runs)
    assert page.source.count('<tr class="best">') == shaded
    assert ("is shaded" in page.text) == bool(shaded)


def test_the_page_opens_with_the_verdict(tmp_path, store):
    runs = [make_run(store, head, 0, analysis=False) for head in ("softmax", "plif")]
    assert '<p class="verdict">No verdict: one seed.</p>' in write(tmp_path, runs).source
    runs = [make_run(store, head, seed, perplexity=level + seed, name=f"{head}{seed}", analysis=False)
            for head, level in (("softmax", 100.0), ("plif", 97.0)) for seed in range(5)]  # fmt: skip
    page = write(tmp_path, runs)
    assert '<p class="verdict">plif ends lower than softmax in 5 of 5 seeds, p &lt;0.001, −2.9 %.</p>' in page.source


def test_functions_that_are_lines_are_said_and_not_drawn(comparison, tmp_path, store):
    _, page, out = comparison
    assert "temperature is a straight line (slope 1.15), and not drawn." in page.text
    assert not list((out / "figures").glob("*temperature*"))
    assert len(list((out / "figures").glob("function-*"))) == 3
    run = make_run(store, "plif", 0)
    function = {"x": [-1.0, 1.0], "y": [-1.0, 1.0], "slope": [0.99, 1.02]}
    run.finish({**run.result, "analysis": {**run.result["analysis"], "function": function}})
    page = write(tmp_path, [run, make_run(store, "softmax", 0)])
    assert "plif is nearly the identity (slope from 0.99 to 1.02), and not drawn." in page.text
    assert "Above, f(z) for each seed" not in page.text


def test_a_rank_that_misleads_has_no_column_and_no_figure(tmp_path, store):
    runs = [make_run(store, head, 0) for head in ("softmax", "plif")]
    page = write(tmp_path, runs)
    assert any("singular-values" in name for name in page.ids)
    assert '<th scope="col">rank</th>' in page.source
    analysis = runs[1].result["analysis"]
    small = {**analysis, "rank": {**analysis["rank"], "effective": {"1e-4": 9}}}
    runs[1].finish({**runs[1].result, "analysis": small})
    page = write(tmp_path, runs)
    assert not any("singular-values" in name for name in page.ids)
    assert '<th scope="col">rank</th>' not in page.source
    assert "left out, since it counts what is too small to matter. Rank (ε-rank): softmax 18 (9), plif" in page.text
    assert pd.read_csv(tmp_path / "report" / "table.csv")["numerical_rank"].notna().all()


@pytest.mark.parametrize("head", ["softmax", "plif"])
def test_one_run(tmp_path, store, head):
    page = write(tmp_path, [make_run(store, head, 0, perplexity=50.0)])
    assert "50.00" in page.text
    assert "With one seed it is unknown how far another seed would move a head's result" in page.text
    expected = (
        "no other head has finished"
        if head == "softmax"
        else "plif reaches a test perplexity of 50.00 on 1 seed; there is no softmax"
    )
    assert expected in page.text


def test_runs_without_an_analysis_and_without_metrics(tmp_path, store):
    run = make_run(store, "softmax", 0, analysis=False)
    (run.path / "metrics.jsonl").unlink()
    page = write(tmp_path, [run, make_run(store, "plif", 0, analysis=False)])
    assert page.tags.count("figure") == 3  # perplexity, and the curves of plif alone


def test_runs_that_are_not_finished_are_listed_and_not_counted(tmp_path, store):
    runs = [make_run(store, "softmax", 0, perplexity=60.0), make_run(store, "plif", 0, finished=False)]
    page = write(tmp_path, runs)
    assert "Not finished, and left out of every number here: plif-seed0." in page.text
    assert "plif-seed0 plif 0 not finished" in page.text
    assert pd.read_csv(tmp_path / "report" / "table.csv")["seeds"].tolist() == [1, 0]


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_finished(tmp_path, store, count):
    page = write(tmp_path, [make_run(store, "plif", seed, finished=False) for seed in range(count)])
    assert "No run has finished, so there is nothing to compare yet." in page.text
    assert "figure" not in page.tags


def test_a_perplexity_that_is_not_a_number(tmp_path, store):
    runs = [make_run(store, "softmax", seed, perplexity=60.0 + seed) for seed in range(2)]
    runs += [make_run(store, "plif", seed, perplexity=[math.nan, 50.0][seed]) for seed in range(2)]
    page = write(tmp_path, runs)
    assert "plif has no finite mean" in page.text
    assert "plif: 1 of 2 finished runs have a test perplexity that is not a finite number" in page.text


def test_text_is_escaped(tmp_path, store):
    nasty = '<script>alert("x")</script>&amp;${title}'
    run = store.run("nasty", {"head": nasty, "seed": 0, "corpus": nasty, "model_options": {nasty: nasty}})
    other = make_run(store, "plif", 0)
    run.finish({**other.result, "head": nasty, "machine": nasty, "versions": {nasty: nasty}})
    page = write(tmp_path, [run, other], title=nasty, command=nasty, notes=[nasty])
    assert "script" not in page.tags
    assert page.text.count(nasty) > 8


def test_several_settings_of_one_head_are_rows_of_their_own(tmp_path, store):
    runs = [
        make_run(store, "softmax", seed, d=d, name=f"s{seed}-{d}", analysis=False) for seed in (0, 1) for d in (8, 16)
    ]
    page = write(tmp_path, runs)
    assert "Against softmax (in_features=8)" in page.text
    assert "compared with softmax (in_features=8), the first softmax." in page.text
    assert len(pd.read_csv(tmp_path / "report" / "table.csv")) == 2


def test_the_set_up_says_what_a_head_alone_has_null_too(tmp_path, store):
    runs = [make_run(store, "softmax", 0), make_run(store, "mos", 0, head_options={"latent_activation": None})]
    record = {"resolved": {"body": {"hidden": 7}}}
    page = write(tmp_path, [*runs, make_run(store, "plif", 0, **record)])
    assert (
        "mos (latent_activation=null) head_options.num_components = 4, head_options.latent_features = null, "
        "head_options.latent_activation = null"
    ) in page.text
    assert "hidden" not in page.text


def test_an_unwritable_folder_is_a_lab_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match=r"file.*cannot be used as output folder"):
        write_report(tmp_path / "file", [], title="", command="")


def test_the_figure_by_frequency_leaves_out_empty_tenths_and_does_not_follow_a_head_that_is_far_behind():
    changes = {"plif": np.array([-0.02, math.nan, 0.01]), "mos": np.array([1.0, 1.0, 1.0])}
    style = strokes({name: name for name in changes})
    figure = changes_by_decile(changes, style, base="softmax", far=["mos"], size=(4.6, 3.2))
    _, plif, _ = figure.axes[0].get_lines()
    assert plif.get_xdata().tolist() == [1, 3]
    assert plif.get_ydata().tolist() == pytest.approx([100 * math.expm1(-0.02), 100 * math.expm1(0.01)])
    low, high = figure.axes[0].get_ylim()
    assert -3 < low < -2
    assert 1 < high < 2


def test_a_head_that_is_far_behind_does_not_set_the_scale(store):
    levels = {"softmax": 100.0, "plif": 98.0, "mos": 400.0}
    drawn = pictures([make_run(store, head, 0, perplexity=level) for head, level in levels.items()])
    by_name = {picture.name: picture for picture in drawn}
    low, high = by_name["perplexity"].figure.axes[0].get_xlim()
    assert 95 < low < 98 < 100 < high < 105
    assert "Far off, perhaps outside the frame: mos." in by_name["perplexity"].caption
    assert by_name["curves-relative"].figure.axes[0].get_ylim()[1] < 50
    pair = pictures([Run.open(store.root / f"{head}-seed0") for head in ("softmax", "mos")])
    assert pair[0].figure.axes[0].get_xlim()[1] > 400
    assert "Far off" not in pair[0].caption


def test_labels_keep_their_distance():
    heights = set_apart([0.0, 0.01, 0.02, 0.5, 0.99, 1.0], 0.1)
    assert np.all(np.diff(heights) > 0.1 - 1e-9)
    assert min(heights) >= 0
    assert max(heights) <= 1
    assert heights[3] == pytest.approx(0.5)


def test_a_head_has_one_look_and_its_variants_differ():
    alone = strokes({"plif": "plif"})
    among = strokes({"softmax": "softmax", "plif": "plif", "few pieces": "plif", "new": "no head"})
    assert alone["plif"] == among["plif"]
    assert among["few pieces"].color == among["plif"].color == HeadSpec("plif").colour
    assert among["few pieces"].linestyle != among["plif"].linestyle
    assert among["new"].color not in {HeadSpec(name).colour for name in HEAD_NAMES}


def test_the_neutral_colours_of_heads_are_those_that_follow_the_page():
    assert (HeadSpec("softmax").colour, HeadSpec("temperature").colour) == (INK, MUTED)


def test_labels_that_are_cut_stay_apart():
    labels = [f"softmax (bias_prior=false, output_lr_scale={scale})" for scale in (1, 4, 8)]
    labels += ["softmax (bias_prior=false)", "mos", "a" * 40 + "b" + "c" * 40, "a" * 40 + "d" + "c" * 40]
    short = shortened(labels)
    assert len(set(short.values())) == len(labels)
    assert short["mos"] == "mos"
    assert all(len(short[label]) <= LONGEST for label in labels[:5])
    figure, axes = new_axes(4, 3, xlabel="", ylabel="")
    label_ends(figure, axes, [(1.0, 0.1 * index, label, INK) for index, label in enumerate(labels)])
    assert [text.get_text() for text in axes.texts] == [short[label] for label in labels]


# Two softmaxes, of which the one that is not the baseline is better or worse.
TWO = {
    "softmax (scale=1)": ("softmax", 104.94, 1), "plif": ("plif", 93.1, 4), "softmax": ("softmax", 94.15, 4),
    "mos": ("mos", 95.9, 4), "plif-frozen": ("plif-frozen", 94.6, 4),
}  # fmt: skip


@pytest.fixture(params=["worse", "better", "reversed"])
def two(request, store):
    """Runs of two seeds with two softmaxes, the pictures by name, and the summary."""
    levels = TWO | ({"softmax (scale=1)": ("softmax", 90.0, 1)} if request.param == "better" else {})
    runs = [
        make_run(store, head, seed, perplexity=level + seed, name=f"{head}-{scale}-{seed}",
                 head_options={"scale": scale})
        for label, (head, level, scale) in levels.items() for seed in range(2)
    ]  # fmt: skip
    runs = runs[::-1] if request.param == "reversed" else runs
    return runs, {picture.name: picture for picture in pictures(runs)}, summary_of(runs).set_index("head")


def lines(axes):
    """The drawn lines: (x, y, colour)."""
    return [(np.asarray(l.get_xdata(), float), np.asarray(l.get_ydata(), float), l.get_color()) for l in axes.lines]


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_dotted_line_of_the_perplexities_is_the_baseline_of_the_table(two):
    _, drawn, table = two
    axes = drawn["perplexity"].figure.axes[0]
    assert axes.get_xlabel() == "test perplexity"
    (baseline,) = table.index[table["baseline"]]
    assert baseline == "softmax"
    means = table["test_perplexity"].sort_values(ascending=False, kind="stable")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(means.index)
    assert texts(axes) == [f"{mean:.{2 if mean < 100 else 1}f}" for mean in means]
    across = [x for x, y, _ in lines(axes) if y.tolist() == [0, 1]]
    assert len(across) == 1
    assert across[0] == pytest.approx([table["test_perplexity"]["softmax"]] * 2)
    assert "the dotted line that of softmax." in drawn["perplexity"].caption
    drawn_means = [(x[0], y.mean(), colour) for x, y, colour in lines(axes) if y.tolist() != [0, 1]]
    colours = [HeadSpec(TWO[label][0]).colour for label in means.index]
    assert drawn_means == [(mean, row, colours[row]) for row, mean in enumerate(means)]
    for row, (label, dots) in enumerate(zip(means.index, axes.collections, strict=True)):
        x, y = np.asarray(dots.get_offsets()).T
        assert sorted(x) == pytest.approx([table["test_perplexity_min"][label], table["test_perplexity_max"][label]])
        assert y.tolist() == [row] * 2


def test_the_curves_against_the_baseline_end_where_the_table_does(two):
    _, drawn, table = two
    picture = drawn["curves-relative"]
    axes = picture.figure.axes[0]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("million tokens read", "perplexity against softmax")
    assert picture.caption.startswith("Validation perplexity against that of softmax after the same number of tokens")
    zero, *curves = lines(axes)
    assert zero[1].tolist() == [0, 0]
    others = [label for label in table.index if label != "softmax"]
    assert sorted(texts(axes)) == sorted(others)
    logs = {
        label: math.log(table["test_perplexity_min"][label]) + math.log(table["test_perplexity_max"][label])
        for label in table.index
    }
    progress = (1 - math.exp(-2000 / 450)) ** 0.6  # of the fixture's runs at their end
    for label, (x, y, colour) in zip(others, curves, strict=True):
        assert x[-1] == pytest.approx(2000 * 1536 / 1e6)
        assert y[-1] == pytest.approx(100 * math.expm1(progress * (logs[label] - logs["softmax"]) / 2))
        assert colour == HeadSpec(TWO[label][0]).colour


def test_the_curves_are_those_of_the_runs(two):
    _, drawn, table = two
    for name, xlabel, last in (
        ("curves-tokens", "million tokens read", lambda label: 3.072),
        ("curves-time", "minutes of training", lambda label: 3_072_000 / (6200 if label == "mos" else 21_000) / 60),
    ):
        axes = drawn[name].figure.axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == (xlabel, "validation perplexity", "log")
        progress = (1 - math.exp(-2000 / 450)) ** 0.6
        for label, (x, y, _) in zip(table.index, lines(axes), strict=True):
            logs = [math.log(table[f"test_perplexity_{end}"][label]) for end in ("min", "max")]
            expected = math.exp(math.log(9000) * (1 - progress) + progress * sum(logs) / 2)
            assert (x[-1], y[-1]) == (pytest.approx(last(label)), pytest.approx(expected))
        assert sorted(texts(axes)) == sorted(table.index)


def test_the_figure_by_frequency_is_against_the_baseline(two):
    runs, drawn, table = two
    axes = drawn["deciles"].figure.axes[0]
    assert axes.get_ylabel() == "perplexity against softmax"
    assert "Perplexity against that of softmax on held-out words" in drawn["deciles"].caption
    loss = {run.config["head"]: run.result["analysis"]["deciles"][0]["cross_entropy"] for run in runs}
    others = [label for label in table.index if label != "softmax"]
    zero, *changes = lines(axes)
    assert zero[1].tolist() == [0, 0]
    for label, (x, y, colour) in zip(others, changes, strict=True):
        head = TWO[label][0]
        assert x.tolist() == [1, 2, 4, 5, 6, 7, 8, 9, 10]  # the third tenth is empty
        assert y[0] == pytest.approx(100 * math.expm1(loss[head] - loss["softmax"]))
        assert colour == HeadSpec(head).colour


def test_the_functions_and_their_slopes_are_those_of_the_analysis(two):
    _, drawn, _ = two
    (picture,) = [picture for name, picture in drawn.items() if name.endswith("-plif")]
    upper, lower = picture.figure.axes
    assert (upper.get_ylabel(), lower.get_ylabel(), lower.get_xlabel()) == ("f(z)", "slope", "score z")
    f, slope = FUNCTIONS["plif"]
    identity, *seeds = lines(upper)[:3]
    assert identity[0].tolist() == identity[1].tolist() == [-14, 17]
    for x, y, colour in seeds:
        assert y == pytest.approx(f(x) - f(0))
        assert colour == HeadSpec("plif").colour
    for x, y, _ in lines(lower)[1:]:
        assert y == pytest.approx(slope(x))
    assert picture.caption == f"plif: slope from {slope(-14):.2f} to {slope(17):.2f}"


def test_the_singular_values_fall_at_the_line_of_their_linear_rank(store):
    wide = {"perplexity": 99.0, "d": 20, "name": "wide"}
    runs = [make_run(store, "softmax", 0, perplexity=99.0), make_run(store, "softmax", 0, **wide)]
    runs.append(make_run(store, "plif", 0, perplexity=98.0))
    axes = next(picture for picture in pictures(runs) if picture.name == "singular-values").figure.axes[0]
    upright = [x[0] for x, y, _ in lines(axes) if y.tolist() == [0, 1]]
    assert upright == [18, 22]
    assert {" linear: 18", " linear: 22"} <= set(texts(axes))
    softmax, other, plif = ((x, y) for x, y, _ in lines(axes) if len(x) > 2)
    for (x, y), rank in ((softmax, 18), (other, 22)):
        assert y[0] == 1
        assert (y[x <= rank] > 1e-6).all()
        assert (y[x > rank] < 1e-12).all()
    assert (plif[1][:60] > 1e-8).all()


def test_the_page_says_what_the_others_are_compared_with(two, tmp_path):
    runs, _, table = two
    page = write(tmp_path, runs)
    assert "The others are compared with softmax, the softmax without settings of its own." in page.text
    assert f"Against the softmax's test perplexity of {table['test_perplexity']['softmax']:.2f}" in page.text
    assert "head_options.scale = 1" in page.text
    kept = pd.read_csv(tmp_path / "report" / "table.csv").set_index("head")
    assert kept.index[kept["baseline"]].tolist() == ["softmax"]
    assert kept["difference"].round(2).to_dict() == pytest.approx(
        (kept["test_perplexity"] - kept["test_perplexity"]["softmax"]).round(2).where(~kept["baseline"]).to_dict(),
        nan_ok=True,
    )


def test_a_baseline_without_a_finished_run_draws_no_line_and_no_change(store):
    runs = [
        make_run(store, head, 0, name=f"{head}{scale}", finished=(head, scale) != ("softmax", 4),
                 head_options={"scale": scale})
        for head, scale in (("softmax", 4), ("softmax", 1), ("plif", 4), ("mos", 4))
    ]  # fmt: skip
    drawn = {picture.name: picture for picture in pictures(runs)}
    assert not {"curves-relative", "deciles"} & set(drawn)
    assert [x for x, y, _ in lines(drawn["perplexity"].figure.axes[0]) if y.tolist() == [0, 1]] == []
    assert "dotted" not in drawn["perplexity"].caption
