"""Training: rows, results, divergence, early stop, averaging, TensorBoard."""

import dataclasses
import itertools
import math

import pytest
import torch

from uncork.diagnose.output_layer import SLOPE_GRID
from uncork.lab.errors import LabError
from uncork.lab.run.progress import Progress
from uncork.lab.run.store import RunStore
from uncork.lab.train.checkpoints import load_trained
from uncork.lab.train.config import text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.result import epochs_told
from uncork.lab.train.services import build_accelerator
from uncork.lab.train.trainer import TrainingDiverged, train

SGD = {"optimizer": "sgd", "schedule": "constant", "variable_bptt": True, "warmup": 0.0}


def new_run(folder, config, corpus, name="run"):
    return RunStore(folder).run(name, config.stored(text_record(corpus)))


def test_metrics_and_result_hold_what_the_report_reads(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(head="plif", head_options={"num_pieces": 9}, clip=0.05)
    run = new_run(tmp_path, config, tiny_corpus)
    seen: list[Progress] = []
    result = train(config, tiny_corpus, run, on_progress=seen.append)
    assert result == run.result
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    valid = [row for row in run.metrics() if row["kind"] == "valid"]
    assert [row["step"] for row in rows] == [*range(3, 43, 3)]
    assert [(row["step"], row["epoch"], row["tokens"]) for row in valid] == [(21, 1.0, 1672), (42, 2.0, 3344)]
    assert set(rows[0]) == {"kind", "step", "epoch", "tokens", "cross_entropy", "lr", "grad_norm",
                            "function_grad_norm", "tokens_per_second", "seconds"}  # fmt: skip
    assert rows[0]["epoch"] == pytest.approx(30 / 209)
    assert result["valid"]["cross_entropy"] == min(row["cross_entropy"] for row in valid)
    assert result["valid"]["perplexity"] == pytest.approx(math.exp(result["valid"]["cross_entropy"]))
    assert result["test"]["bits_per_byte"] > 0
    assert (result["head"], result["in_features"], result["vocab_size"]) == ("plif", 4, 50)
    assert result["head_parameters"] == 50 * 4 + 50 + 9
    assert result["parameters"] == sum(p.numel() for p in load_trained(run.path).model.parameters())
    assert (result["steps"], result["tokens"], result["epochs"], result["stopped"]) == (42, 3344, 2.0, "finished")
    assert result["peak_memory_bytes"] > 10**7
    assert [p.step for p in seen] == [row["step"] for row in rows]
    assert seen[0].valid_perplexity is None
    assert seen[-1].valid_perplexity == valid[0]["perplexity"]
    assert seen[0].seconds_left == pytest.approx(39 * rows[0]["seconds"] / 3)
    assert seen[0].seconds_left > 0 == seen[-1].seconds_left
    assert all(p.steps_total == 42 and p.tokens_per_second > 0 for p in seen)


@pytest.mark.parametrize(("start", "learns"), [(0.5, True), (0.95, False)])
def test_a_function_waits_for_its_share_of_the_steps(tmp_path, tiny_corpus, tiny_config, start, learns):
    config = tiny_config(head="plif", head_options={"num_pieces": 9}, function_start=start, max_steps=10)
    run = new_run(tmp_path, config, tiny_corpus)
    train(config, tiny_corpus, run)
    assert load_trained(run.path).model.head.logit_function.raw_slopes.any().item() == learns


def test_training_learns(tmp_path, tiny_corpus, tiny_config):
    """The words of the text have 4 successors each: a bigram's worth must be learned, not just the unigram."""
    options = {"input_dropout": 0.0, "weight_drop": 0.0, "output_dropout": 0.0, "hidden_sizes": [32]}
    config = tiny_config(in_features=8, epochs=20, lr=0.02, model_options=options)
    assert train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))["test"]["perplexity"] < 15


def test_the_row_is_the_mean_over_its_tokens(tmp_path, tiny_corpus, tiny_config):
    """Rows of 1 step and rows of many steps tell of the same losses."""
    options = {"variable_bptt": True, "optimizer": "sgd"}
    runs = []
    for every in (1, 100):
        config = tiny_config(epochs=1, log_every=every, training_options=options)
        run = new_run(tmp_path, config, tiny_corpus, f"every{every}")
        train(config, tiny_corpus, run)
        runs.append([row for row in run.metrics() if row["kind"] == "train"])
    single, (whole,) = runs
    tokens = [row["tokens"] for row in single]
    shares = [b - a for a, b in itertools.pairwise([0, *tokens])]
    assert len(set(shares)) > 2
    mean = sum(row["cross_entropy"] * n for row, n in zip(single, shares, strict=True)) / tokens[-1]
    assert whole["cross_entropy"] == pytest.approx(mean, rel=1e-12)


def test_a_finished_run_returns_at_once(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config, tiny_corpus)
    result = train(config, tiny_corpus, run)
    assert train(config, tiny_corpus, run) == result


@pytest.mark.parametrize("fields", [{}, {"eval_every": 1}, {"head": "plif", "log_every": 1, "checkpoint_every": 0.0}])
def test_divergence_is_told_and_nothing_bad_is_saved(tmp_path, tiny_corpus, tiny_config, fields):
    config = tiny_config(lr=1e25, training_options=SGD, clip=0, epochs=3, **fields)
    run = new_run(tmp_path, config, tiny_corpus)
    with pytest.raises(
        TrainingDiverged, match=r"diverged: .* not finite at step \d+ \(epoch 0\.\d+\).*lower lr"
    ) as told:
        train(config, tiny_corpus, run)
    assert told.value.step < 9
    assert told.value.last_loss is None or math.isfinite(told.value.last_loss)
    assert run.result is None
    for name in ("last", "best"):
        checkpoint = run.load_checkpoint(name)
        tensors = {} if checkpoint is None else checkpoint.tensors
        assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_patience_stops_early_and_the_best_weights_count(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(lr=0.5, epochs=30, eval_every=3, patience=3)
    run = new_run(tmp_path, config, tiny_corpus)
    result = train(config, tiny_corpus, run)
    valid = [row for row in run.metrics() if row["kind"] == "valid"]
    best = min(valid, key=lambda row: row["cross_entropy"])
    assert result["stopped"] == "early"
    assert result["best_step"] == best["step"] == load_trained(run.path).step
    assert result["steps"] == best["step"] + 9 < 600
    assert result["valid"]["cross_entropy"] == best["cross_entropy"]
    model = load_trained(run.path).model
    found = evaluate(model, tiny_corpus.splits["valid"], batch_size=32, bptt=10)
    assert found.cross_entropy == best["cross_entropy"]


def test_validation_tells_the_slopes_of_a_function_that_is_trained(tmp_path, tiny_corpus, tiny_config):
    for head in ("plif", "softcap", "plif-frozen", "temperature"):
        config = tiny_config(head=head, epochs=1, lr=0.05)
        run = new_run(tmp_path / head, config, tiny_corpus)
        train(config, tiny_corpus, run)
        valid = [row for row in run.metrics() if row["kind"] == "valid"]
        if head in ("softcap", "plif-frozen"):
            assert all("slopes" not in row for row in valid)
            continue
        function = load_trained(run.path).model.head.logit_function
        expected = function.derivative(torch.tensor(SLOPE_GRID, dtype=torch.float32)).tolist()
        assert valid[-1]["slopes"] == pytest.approx(expected)
        assert valid[-1]["slopes"] != [1.0] * len(SLOPE_GRID)


def test_the_output_layer_has_its_own_rate(tmp_path, tiny_corpus, tiny_config):
    heads = []
    for scale, steps in ((0.0, 1), (0.0, 9), (1.0, 9)):
        config = tiny_config(head="plif", output_lr_scale=scale, max_steps=steps)
        run = new_run(tmp_path, config, tiny_corpus, f"run-{scale}-{steps}")
        train(config, tiny_corpus, run)
        heads.append(load_trained(run.path).model.head.state_dict())
    one, still, moved = heads
    for name in ("weight", "bias"):
        assert torch.equal(one[name], still[name])
        assert not torch.equal(one[name], moved[name])
    assert not torch.equal(one["logit_function.raw_slopes"], still["logit_function.raw_slopes"])


def test_averaged_weights_are_what_is_validated(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(bias_prior=False, lr=5.0, output_lr_scale=1.0, epochs=3, training_options={**SGD, "asgd": 1})
    run = new_run(tmp_path, config, tiny_corpus)
    train(config, tiny_corpus, run)
    best, last = run.load_checkpoint("best"), run.load_checkpoint("last")
    assert last.state["state"]["averaged"] == last.step
    assert best.step == last.step
    weight = "model.head.weight"
    assert torch.equal(best.tensors[weight], last.tensors["average.head.weight"])
    assert not torch.equal(best.tensors[weight], last.tensors[weight])


def test_one_training_at_a_time(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config, tiny_corpus)
    with run.lock(), pytest.raises(LabError, match="another process"):
        train(config, tiny_corpus, run)


def test_training_leaves_the_callers_random_numbers_and_threads_alone(tmp_path, tiny_corpus, tiny_config):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = tiny_config(max_steps=3)
    train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_tensorboard_on_request(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(max_steps=12, eval_every=6)
    run = new_run(tmp_path, config, tiny_corpus)
    interrupt_at({7})
    with pytest.raises(KeyboardInterrupt):
        train(config, tiny_corpus, run, tensorboard=True)
    train(config, tiny_corpus, run, tensorboard=True)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    for kind in ("train", "valid"):
        rows = [row for row in run.metrics() if row["kind"] == kind]
        scalars = events.Scalars(f"{kind}/cross_entropy")
        assert [event.step for event in scalars] == [row["step"] for row in rows]
        assert [event.value for event in scalars] == pytest.approx([row["cross_entropy"] for row in rows], rel=1e-6)
    other = tiny_config(max_steps=3)
    quiet = new_run(tmp_path, other, tiny_corpus, "quiet")
    train(other, tiny_corpus, quiet)
    assert not (quiet.path / "tensorboard").exists()


def test_too_small_a_text(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(batch_size=5000)
    with pytest.raises(LabError, match="too few for 5000 streams"):
        train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))


def test_a_finished_run_on_another_text_is_not_returned(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config, tiny_corpus)
    result = train(config, tiny_corpus, run)
    assert train(config, tiny_corpus, run) == result
    ids = tiny_corpus.splits["valid"].clone()
    ids[3] = (ids[3] + 1) % tiny_corpus.vocab_size
    changed = dataclasses.replace(tiny_corpus, splits={**tiny_corpus.splits, "valid": ids})
    with pytest.raises(LabError, match="the text behind --corpus has changed"):
        train(config, changed, run)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_CPU", "true"),
        ("ACCELERATE_MIXED_PRECISION", "no"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_DYNAMO_MODE", "reduce-overhead"),
        ("ACCELERATE_LOG_LEVEL", "debug"),
        ("FSDP_OFFLOAD_PARAMS", "true"),
        ("NVIDIA_TF32_OVERRIDE", "0"),
    ],
)
def test_a_variable_that_is_let_through_changes_no_bit(tmp_path, tiny_corpus, tiny_config, monkeypatch, name, value):
    config = tiny_config(head="plif", max_steps=4, log_every=1)
    results = []
    for folder in ("without", "with"):
        run = new_run(tmp_path, config, tiny_corpus, folder)
        result = train(config, tiny_corpus, run)
        losses = [(row["cross_entropy"], row.get("grad_norm")) for row in run.metrics()]
        results.append((result["valid"], result["test"], losses))
        monkeypatch.setenv(name, value)
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"),
        ("ACCELERATE_USE_FSDP", "true"),
        ("ACCELERATE_USE_DEEPSPEED", "true"),
        ("ACCELERATE_USE_MEGATRON_LM", "true"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true"),
        ("ACCELERATE_TORCH_DEVICE", "meta"),
        ("ACCELERATE_DOWNCAST_BF16", "1"),
        ("NVIDIA_TF32_OVERRIDE", "1"),
        ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("DNNL_DEFAULT_FPMATH_MODE", "ANY"),
    ],
)
def test_a_variable_that_would_change_numbers_is_refused_by_name(
    tmp_path, tiny_corpus, tiny_config, monkeypatch, name, value
):
    config = tiny_config(max_steps=2)
    monkeypatch.setenv(name, value)
    with pytest.raises(LabError, match=f"environment variable {name}={value}") as caught:
        train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))
    assert "\n" not in str(caught.value)


def test_accelerate_is_told_what_its_variables_say_otherwise(monkeypatch, tiny_config):
    """What is passed explicitly holds, also for a variable that `refuse_variables` does not know."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    accelerator = build_accelerator(tiny_config(), cpu=True)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.state.dynamo_plugin.backend == "NO"


def test_a_divergence_says_only_what_is_kept(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(lr=1e25, training_options=SGD, clip=0)
    with pytest.raises(TrainingDiverged, match=r"No checkpoint was written before\."):
        train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))
    config = tiny_config(lr=50.0, training_options=SGD, clip=0, epochs=60, checkpoint_every=0.0, log_every=1)
    run = new_run(tmp_path, config, tiny_corpus, "kept")
    with pytest.raises(TrainingDiverged) as caught:
        train(config, tiny_corpus, run)
    assert f"The checkpoint of step {run.load_checkpoint().step} is kept" in str(caught.value)


def test_the_epochs_that_were_asked_for_are_kept_beside_those_that_were_trained(tmp_path, tiny_corpus, tiny_config):
    """A fraction of an epoch ends after whole steps: of 21 of 10 tokens, 0.3 epochs are 6."""
    config = tiny_config(epochs=0.3)
    result = train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus))
    assert (result["epochs_asked"], result["steps"]) == (0.3, 6)
    assert result["epochs"] == pytest.approx(60 / 209)
    assert epochs_told(result, config) == (
        "0.287 epochs were trained, 0.3 were asked for: a step takes 10 tokens of each stream, so training ends after "
        "a whole number of them, 6 steps"
    )
    config = tiny_config(epochs=2, max_steps=7)
    cut = train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus, "cut"))
    assert epochs_told(cut, config).endswith("2 were asked for: max_steps ended it after 7 steps")
    config = tiny_config(epochs=1)
    whole = train(config, tiny_corpus, new_run(tmp_path, config, tiny_corpus, "whole"))
    assert epochs_told(whole, config) is None
    assert "out of patience" in epochs_told({**whole, "epochs": 0.5, "stopped": "early"}, config)
