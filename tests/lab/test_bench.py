"""The benchmark measures what it says, and refuses to time wrong numbers."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import uncork
from uncork import cli
from uncork.heads import HeadSpec
from uncork.lab.errors import LabError
from uncork.lab.experiments.bench import gate, instructions, memory, timing
from uncork.lab.experiments.bench.contenders import Inputs, Step, Unavailable, build_step, is_ours
from uncork.lab.experiments.bench.naive import naive_mixture_loss, naive_plif
from uncork.lab.experiments.bench.run import _measured, plan_of
from uncork.lab.experiments.bench.settings import CONTENDERS, Bench, Setup, Shape
from uncork.lab.experiments.bench.tables import (
    display_table,
    median_ratios,
    memory_frame,
    narrow_table,
    time_rows,
)
from uncork.lab.report.publish import publish
from uncork.lab.report.tables import terminal_table
from uncork.lab.run.provenance import provenance

TINY = Setup(Shape(10, 4, 50), threads=1)
RUNNABLE = [name for name in CONTENDERS if name not in ("compile", "torch-best")] + ["torch-4", "naive-mos-2", "mos-3"]
HAS_TORCHS_OWN = hasattr(torch.nn, "LinearCrossEntropyOptions")  # since torch 2.13
RUNNABLE = [name for name in RUNNABLE if HAS_TORCHS_OWN or not name.startswith("torch-")]
needs_peak = pytest.mark.skipif(not memory.measurable(), reason="needs Linux's /proc/self/clear_refs")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", RUNNABLE)
def test_each_contender_gives_a_loss_and_all_its_gradients(name, dtype):
    step = build_step(name, Inputs(dataclasses.replace(TINY, dtype=dtype)))
    assert step.run().isfinite()
    gradients = [leaf.grad for leaf in step.leaves.values()]
    assert all((g is None) == name.endswith("-forward") for g in gradients)
    step.clear()
    assert all(leaf.grad is None for leaf in step.leaves.values())


def test_products_are_the_gradients_of_half_the_sum_of_squares():
    inputs = Inputs(TINY)
    x, w = inputs.input.detach().clone().requires_grad_(), inputs.linear_weight.detach().clone().requires_grad_()
    ((x @ w.T).square().sum() / 2).backward()
    made = []
    real = torch.mm

    def mm(a, b, *, out):
        made.append(real(a, b, out=out))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "mm", mm)
        build_step("G", inputs).run()
    torch.testing.assert_close(made[1], x.grad)
    torch.testing.assert_close(made[2], w.grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
@pytest.mark.parametrize(
    "name",
    ["torch-auto", "torch-4", "softmax", "softmax-forward", pytest.param("compile", marks=pytest.mark.slow)],
)
def test_plain_softmaxes_agree(name):
    if name == "compile" and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    if name.startswith("torch-") and not HAS_TORCHS_OWN:
        pytest.skip("torch has no linear_cross_entropy of its own")
    expected = build_step("eager", Inputs(TINY)).run()
    torch.testing.assert_close(build_step(name, Inputs(TINY)).run(), expected)


def test_torchs_own_op_is_left_out_where_torch_has_none(monkeypatch):
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    with pytest.raises(Unavailable, match=r"torch has F\.linear_cross_entropy since 2\.13, this is 2\."):
        build_step("torch-auto", Inputs(TINY))


def test_naive_plif_is_plif_up_to_a_constant():
    f = uncork.PLIF(8, 2.0, init="random").double()
    scores = torch.randn(100, dtype=torch.float64)
    shift = f(scores) - naive_plif(scores, f.slopes(), f.knots(torch.float64), f.bound)
    torch.testing.assert_close(shift, shift[0].expand(100))


def test_naive_mixture_is_the_mixture():
    latent, prior = Inputs(TINY).mixture(3)
    weight, target = Inputs(TINY).linear_weight, Inputs(TINY).target
    fused = uncork.mixture_cross_entropy(latent, weight, prior, target)
    torch.testing.assert_close(naive_mixture_loss(latent, weight, prior, target), fused, atol=1e-4, rtol=1e-4)


def test_every_head_of_one_softmax_is_a_contender():
    named = {name.partition("-1")[0] if name.startswith("plif-1") else name for name in CONTENDERS}
    assert {name for name in uncork.HEAD_NAMES if not HeadSpec(name).is_mixture} <= named


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in CONTENDERS if is_ours(name)])
def test_ours_pass_the_gate(name, dtype):
    setup = Setup(Shape(100, 8, 400), threads=1, dtype=dtype)
    assert gate.check(name, setup) <= 1


@pytest.mark.parametrize(("wrong", "what"), [("loss", "the loss"), ("gradient", "the gradient of input")])
def test_the_gate_stops_wrong_numbers(wrong, what, monkeypatch):
    right = uncork.linear_cross_entropy

    def off(*arguments, **options):
        loss = right(*arguments, **options)
        return loss * 1.0001 if wrong == "loss" else loss + 1e-3 * (loss - loss.detach())

    monkeypatch.setattr(uncork, "linear_cross_entropy", off)
    with pytest.raises(LabError, match=f"correctness: plif-16 at .*{what} is off by"):
        gate.check("plif-16", TINY)


def test_the_gate_lets_nan_not_pass(monkeypatch):
    monkeypatch.setattr(uncork, "linear_cross_entropy", lambda x, w, y, **_: (x.sum() + w.sum()) * torch.nan)
    with pytest.raises(LabError, match="nan"):
        gate.check("softmax", TINY)


class Clock:
    """Steps that take as long as they say, and who ran when."""

    def __init__(self, monkeypatch, durations):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        self.steps = {name: Step(partial(self.run, name, durations[name])) for name in durations}

    def run(self, name, duration):
        self.log.append(name)
        self.now += duration
        return torch.zeros(())


def test_everyone_has_a_turn_in_each_round_and_the_order_changes(monkeypatch):
    clock = Clock(monkeypatch, {"a": 1.0, "b": 2.0, "c": 3.0})
    times, notes = timing.interleave(clock.steps, 8, seed=1)
    assert times == {name: dict.fromkeys(range(8), duration) for name, duration in (("a", 1), ("b", 2), ("c", 3))}
    assert notes == {}
    rounds = [tuple(clock.log[i : i + 3]) for i in range(3, 27, 3)]
    assert {frozenset(order) for order in rounds} == {frozenset("abc")}
    assert len(set(rounds)) > 1


def test_the_slow_are_in_every_third_round_and_the_too_slow_in_none(monkeypatch):
    clock = Clock(monkeypatch, {"G": 1.0, "quick": 3.9, "slow": 4.1, "endless": 50.0})
    times, notes = timing.interleave(clock.steps, 5, unit="G", max_seconds=20.0)
    assert {name: list(own) for name, own in times.items()} == {
        "G": [0, 1, 2, 3, 4], "quick": [0, 1, 2, 3, 4], "slow": [0, 3], "endless": [],
    }  # fmt: skip
    assert notes == {
        "slow": "slow: in every 3rd round",
        "endless": "left out: one call took 50 s, the limit is 20 s",
    }


def test_a_quick_first_call_is_not_what_counts(monkeypatch):
    clock = Clock(monkeypatch, {"G": 0.001, "a": 0.002})
    timing.interleave(clock.steps, 1)
    assert clock.log == ["G", "G", "a", "a", *clock.log[4:]]
    assert len(clock.log) == 6


OUTCOMES = [
    {"times": {"G": {"0": 1.0, "1": 2.0}, "eager": {"0": 2.0, "1": 2.0}, "plif-1000": {"0": 1.5}, "naive-plif": {}},
     "notes": {"plif-1000": "slow: in every 3rd round", "naive-plif": "left out: too big"}},
    {"times": {"G": {"0": 1.0, "1": 1.0}, "eager": {"0": 2.0, "1": 2.0}, "plif-1000": {"0": 1.1}, "naive-plif": {}},
     "notes": {"plif-1000": "slow: in every 3rd round", "naive-plif": "left out: too big"}},
]  # fmt: skip


@pytest.fixture
def tables():
    memory_rows = [
        {"contender": name, "tokens": 10, "in_features": 4, "vocab_size": 50, "extra_mib": extra, "gradients_mib": 1.0,
         "note": "" if extra else "left out: too big"}
        for name, extra in (("eager", 816.3), ("plif-1000", 40.0), ("naive-plif", None))
    ]  # fmt: skip
    times = pd.DataFrame(time_rows(Shape(10, 4, 50), OUTCOMES))
    frame = memory_frame(memory_rows)
    return {"times": times, "memory": frame, "table": display_table(times, frame)}


def test_ratios_are_of_the_same_round_and_keep_the_spread_of_processes(tables):
    rows = tables["times"].set_index(["contender", "quantity"])
    assert rows.loc[("eager", "ratio to G"), ["min", "q1", "median", "q3", "max"]].tolist() == [
        1.0,
        1.75,
        2.0,
        2.0,
        2.0,
    ]
    assert rows.loc[("plif-1000", "ratio to G"), ["median", "process_low", "process_high"]].tolist() == [1.3, 1.1, 1.5]
    assert rows.loc[("plif-1000", "ratio to eager"), ["median", "samples", "processes"]].tolist() == [0.65, 2, 2]
    assert rows.loc[("plif-1000", "milliseconds"), "median"] == 1300
    assert rows.loc[("naive-plif", "milliseconds"), "samples"] == 0
    assert rows.loc[("naive-plif", "milliseconds"), "note"] == "left out: too big"


def test_the_table_says_both_ratios_memory_and_who_was_left_out(tables):
    table = tables["table"].set_index("contender")
    assert table.columns.tolist() == ["10, 4, 50: time", "10, 4, 50: extra memory, MiB"]
    assert table.loc["plif-1000"].tolist() == ["1.30 (1.20 to 1.40) G, 0.65 (0.60 to 0.70) eager", "40"]
    assert table.loc["naive-plif"].tolist() == ["left out", "left out"]
    assert table.loc["G"].tolist() == ["1.00 (1.00 to 1.00) G, 0.50 (0.50 to 0.62) eager", "–"]
    shown = terminal_table(narrow_table(tables), blocks="N, D, V", width=140)
    assert "left out: too big" in shown
    assert "nan" not in shown
    assert median_ratios(tables["times"]) == {"10, 4, 50": {"G": 1.0, "eager": 2.0, "plif-1000": 1.3}}


def script(folder, name):
    """A script outside the package, as a module."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_readme_can_show_what_is_written(tables, tmp_path, monkeypatch):
    publish(tmp_path / "results" / "bench", tables, provenance("python x.py", 1))
    build = script("docs", "build")
    monkeypatch.setattr(build, "ROOT", tmp_path)
    shown = build.block("bench")
    assert shown.startswith(build.block("bench", "table").strip())
    assert "| plif-1000 | 1.30 (1.20 to 1.40) G, 0.65 (0.60 to 0.70) eager | 40 |" in shown
    assert "python x.py" in shown
    assert {"times.csv", "memory.csv", "table.csv"} <= {p.name for p in (tmp_path / "results" / "bench").iterdir()}


def test_bars_are_judged_where_they_were_measured():
    loss = script("benchmarks", "loss")

    def outcome(**seconds):
        return {"times": {name.replace("_", "-"): {"0": value} for name, value in seconds.items()}, "notes": {}}

    times = time_rows(loss.WIDE, [outcome(G=1.0, eager=1.5, plif_1000=1.1, plif_16=1.4, torch_best=1.2, softmax=1.15)])
    shape = dict(zip(("tokens", "in_features", "vocab_size"), dataclasses.astuple(loss.WIDE), strict=True))
    rows = [{"contender": n, **shape, "extra_mib": m, "note": ""} for n, m in (("eager", 800.0), ("plif-1000", 120.0))]
    tables = {"times": pd.DataFrame(times), "memory": memory_frame(rows)}
    found = loss.bars(tables).set_index("bar")
    shown = loss.short_table(tables).set_index("contender")
    assert shown.loc["plif-1000"].tolist() == ["1.10 (1.10 to 1.10) G, 0.73 (0.73 to 0.73) eager", "120"]
    brief = loss.brief_table(tables).set_index("loss")
    assert brief.loc["PLIF of 1,000 pieces, uncork"].tolist() == ["–", "0.73", "–", "–", "120"]
    assert brief.loc["softmax, the same under torch.compile"].tolist() == ["–"] * 5
    assert found["measured"].round(2).to_dict() == {
        "time: plif-1000 / G": 1.1, "time: plif-1000 / eager": 0.73, "time: softmax / torch-best": 0.96,
        "time: plif-16 / plif-1000": 1.27, "memory: plif-1000 / eager": 0.15,
    }  # fmt: skip
    assert found.index[~found["met"]].tolist() == ["time: plif-16 / plif-1000", "memory: plif-1000 / eager"]


def test_published_shapes_name_contenders_that_exist():
    loss = script("benchmarks", "loss")
    for plan in (loss.TIMES, loss.MEMORY):
        for names in plan.values():
            assert set(names) <= set(plan_of(Bench(only=names)).times[Shape.parse(Bench().shapes[0])])


@pytest.mark.parametrize("preset", ["lstm-laptop", "transformer-laptop"])
def test_a_training_step_trains_and_is_compared_with_the_softmax(preset):
    train_step = script("benchmarks", "train_step")
    case = train_step.Case(preset, 60, 2, 1.35)
    step, tokens = train_step.build_step(case, "plif", tokens_a_stream=4)
    assert tokens == 8
    losses = [float(step.run()) for _ in range(6)]
    assert min(losses[3:]) < losses[0]
    rows = train_step.measure(case, ("softmax", "plif"), 2, tokens_a_stream=4)
    assert [row["head"] for row in rows] == ["softmax", "plif"]
    assert rows[0]["ratio_median"] == 1
    table = train_step.display_table(pd.DataFrame(rows))
    assert table["preset"].tolist() == [f"{preset} (2 of its streams)"]


def test_the_cost_of_an_epoch_is_that_of_its_steps(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    cost = script("benchmarks", "epoch_cost")
    assert set(cost.EAGER) <= set(cost.HEADS)
    case = script("benchmarks", "train_step").Case("lstm-small", 60, 2, 0.0, 8)
    monkeypatch.setattr(cost, "CASES", {"ptb d=8": case})
    monkeypatch.setattr(cost, "_peak_mib", lambda *_: 1234)
    names = ["softmax", "softmax, eager", "mos"]
    rows = cost.measure("ptb d=8", names, 2, 4)
    assert [row["head"] for row in rows] == ["softmax", "mos", "softmax, eager"]
    for row in rows:
        assert row["tokens"] == 8
        assert row["seconds_per_epoch"] == pytest.approx(row["milliseconds"] / 1e3 * 929_589 / 8, rel=0.1)
    assert rows[0]["ratio_median"] == 1
    table = cost.display_table(pd.DataFrame(rows))
    assert table["ptb d=8: peak MiB"].tolist() == ["1,234"] * 3
    # What was measured stays where a later model fails.
    monkeypatch.setattr(cost, "MODELS", {"published": {"ptb d=8": case, "broken": None}})
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "epoch_cost.py",
            "--quick",
            "--heads",
            "softmax",
            "--out",
            str(tmp_path),
            "--threads",
            str(torch.get_num_threads()),
        ],
    )
    with pytest.raises(KeyError, match="broken"):
        cost.main()
    assert pd.read_csv(tmp_path / "cost.csv")["place"].tolist() == ["ptb d=8"]


@needs_peak
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    ballast = torch.ones(2**28)  # 1 GiB
    code = "import torch; from uncork.lab.train.result import peak_memory_bytes as p; print(p(torch.device('cpu')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(done.stdout) < ballast.nbytes
    # Logits of a step of `ptb d=16`, kept eagerly: 768 rows of 10,000 floats.
    assert script("benchmarks", "epoch_cost")._peak_mib("ptb d=16", "softmax, eager", None) > 768 * 10_000 * 4 / 2**20


@needs_peak
def test_peak_memory_counts_what_was_allocated_and_freed_and_not_the_gradients():
    leaf = torch.zeros(2**22, requires_grad=True)  # 16 MiB

    def run():
        leaf.grad = torch.ones(2**22)
        return torch.ones(2**24).sum()  # 64 MiB

    found = memory.peak_of(Step(run, {"leaf": leaf}))
    assert found["gradients"] == 2**24
    assert found["extra"] == pytest.approx(2**26, rel=0.1)


@needs_peak
def test_the_eager_softmax_needs_three_times_its_scores():
    ballast = torch.ones(2**26)  # 256 MiB of this process, which are not the other's
    (found,) = _measured({"eager": partial(memory.measure, Setup(Shape(512, 4, 8192), 1), "eager")}, 1, str)
    assert found["note"] == ""
    assert found["extra"] == pytest.approx(3 * 4 * 512 * 8192, rel=0.2)  # logits, log-probabilities, gradient
    assert found["extra"] < ballast.nbytes


def test_a_contender_that_does_not_fit_into_memory_is_left_out(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5_000))
    with pytest.raises(Unavailable, match="needs about"):
        build_step("naive-mos-4", Inputs(TINY))
    found = timing.time_contenders(TINY, {"G": "G", "eager": "eager"}, 1, 1.0, 0, tell=print)
    assert found["notes"]["eager"].startswith("left out: needs about 0.0 GiB")
    assert list(found["times"]) == ["G"]


def test_a_process_that_fails_is_one_line():
    work = partial(timing.time_contenders, TINY, {"x": "nosuch"}, 1, 1.0, 0)
    with pytest.raises(LabError, match=r"^time: .*no contender"):
        _measured({"time": work}, 1, str)


@pytest.mark.skipif(instructions.missing() is not None, reason="needs valgrind")
def test_instructions_are_those_of_the_library_alone(tmp_path):
    dump = tmp_path / "out.1"
    dump.write_text(
        "version: 1\ncreator: test\npid: 1\ncmd: x\npart: 1\n\ndesc: I1 cache: \n\npositions: line\nevents: Ir\n"
        "summary: 1730\n\n"
        "ob=(1) /some/uncork/loss/_tile.so\nfl=(1) ???\nfn=(1) work\n0 1200\ncob=(2) /lib/libc.so\ncfi=(1)\n"
        "cfn=(2) memset\ncalls=1 0\n0 500\n\nfn=(3) more\n0 30\n\nob=(2)\nfl=(1)\nfn=(2)\n0 500\n\ntotals: 1730\n"
    )
    assert instructions.own_instructions(dump, "/some/uncork/loss/_tile.so") == 1230


@pytest.mark.slow
@pytest.mark.skipif(instructions.missing() is not None, reason="needs valgrind")
def test_instructions_are_counted_or_refused():
    try:
        rows = instructions.count(functions=("softmax", "plif-100000"))
    except LabError as error:
        pytest.skip(str(error))
    counts = {row["contender"]: row["instructions_per_element"] for row in rows}
    assert 1 < counts["softmax"] < counts["plif-100000"] < 200


def run(*arguments):
    return cli.main(["bench", *map(str, arguments)])


def test_the_command_measures_writes_and_ends_with_json(tmp_path, capsys):
    out = tmp_path / "out"
    small = ("--shapes", "20,4,60", "--rounds", 2, "--processes", 1, "--threads", 1, "--no-memory", "--out-dir", out)
    assert run(*small, "--only", "plif-7", "softcap-forward") == 0
    printed = capsys.readouterr().out
    outcome = json.loads(printed.strip().splitlines()[-1])
    assert list(outcome["ratio_to_G"]) == ["20, 4, 60"]
    assert set(outcome["ratio_to_G"]["20, 4, 60"]) == {"G", "eager", "plif-7", "softcap-forward"}
    assert "correct: 2 checks against float64" in printed
    times = pd.read_csv(out / "times.csv")
    assert (times["samples"] == 2).any()
    assert not (out / "memory.csv").exists()
    assert json.loads((out / "provenance.json").read_text())["threads"] == 1


@pytest.mark.slow
def test_the_command_with_everything(tmp_path):
    out = tmp_path / "out"
    assert run("--shapes", "64,8,500", "32,4,100", "--rounds", 2, "--threads", 1, "--out-dir", out) == 0
    times, used = pd.read_csv(out / "times.csv"), pd.read_csv(out / "memory.csv")
    assert set(times["contender"]) == set(CONTENDERS)
    assert set(used["contender"]) == set(CONTENDERS) - {"G", "G-forward"}
    assert len(pd.read_csv(out / "table.csv")) == len(CONTENDERS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shapes", "20,4"], "shapes: expected N,D,V"),
        (["--shapes", "20,0,60"], "of at least 1"),
        (["--only", "nosuch"], "'nosuch' is no contender"),
        (["--only", "plif-0"], "'plif-0' is no contender"),
        (["--rounds", "0"], "rounds: expected at least 1"),
        (["--processes", "0"], "processes: expected at least 1"),
        (["--threads", "0"], "threads: expected at least 1"),
        (["--out-dir", "FILE", "--shapes", "20,4,60"], "FILE"),
        (["--max-seconds", "0"], "max-seconds: expected above 0"),
        (["--impl", "nosuch", "--shapes", "20,4,60", "--only", "softmax", "--threads", "1"], "impl"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("FILE").write_text("")
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(("uncork: ", "uncork bench: "))
    assert error.count("\n") == 1
    assert said in error


def test_every_flag_is_explained():
    assert len(dataclasses.fields(cli.Bench)) <= 25
    shown = subprocess.run(
        [sys.executable, "-m", "uncork.cli", "bench", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "torch-best" in shown
    assert "not documented" not in shown
