"""Training: rows, results, divergence, early stop, averaging, TensorBoard."""

import itertools
import math

import pytest
import torch

from uncork.lab.analysis import SLOPE_GRID
from uncork.lab.checkpoints import load_trained
from uncork.lab.errors import LabError
from uncork.lab.evaluation import evaluate
from uncork.lab.runs import RunStore
from uncork.lab.training import Progress, TrainingDiverged, train

SGD = {"optimizer": "sgd", "schedule": "constant", "variable_bptt": True, "warmup": 0.0}


def new_run(folder, config, name="run"):
    return RunStore(folder).run(name, config.resolved().to_dict())


def test_metrics_and_result_hold_what_the_report_reads(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(head="plif", head_options={"num_pieces": 9}, clip=0.05)
    run = new_run(tmp_path, config)
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
    assert seen[0].seconds_left > 0 == seen[-1].seconds_left
    assert all(p.steps_total == 42 and p.tokens_per_second > 0 for p in seen)


def test_training_learns(tmp_path, tiny_corpus, tiny_config):
    """The words of the text have 4 successors each: a bigram's worth must be learned, not just the unigram."""
    options = {"input_dropout": 0.0, "weight_drop": 0.0, "output_dropout": 0.0, "hidden_sizes": [32]}
    config = tiny_config(in_features=8, epochs=20, lr=0.02, model_options=options)
    assert train(config, tiny_corpus, new_run(tmp_path, config))["test"]["perplexity"] < 15


def test_the_row_is_the_mean_over_its_tokens(tmp_path, tiny_corpus, tiny_config):
    """Rows of 1 step and rows of many steps tell of the same losses."""
    options = {"variable_bptt": True, "optimizer": "sgd"}
    runs = []
    for every in (1, 100):
        config = tiny_config(epochs=1, log_every=every, training_options=options)
        run = new_run(tmp_path, config, f"every{every}")
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
    run = new_run(tmp_path, config)
    result = train(config, tiny_corpus, run)
    assert train(config, None, run) == result


@pytest.mark.parametrize("fields", [{}, {"eval_every": 1}, {"head": "plif", "log_every": 1, "checkpoint_every": 0.0}])
def test_divergence_is_told_and_nothing_bad_is_saved(tmp_path, tiny_corpus, tiny_config, fields):
    config = tiny_config(lr=1e25, training_options=SGD, clip=0, epochs=3, **fields)
    run = new_run(tmp_path, config)
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
    run = new_run(tmp_path, config)
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
        run = new_run(tmp_path / head, config)
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
        run = new_run(tmp_path, config, f"run-{scale}-{steps}")
        train(config, tiny_corpus, run)
        heads.append(load_trained(run.path).model.head.state_dict())
    one, still, moved = heads
    for name in ("weight", "bias"):
        assert torch.equal(one[name], still[name])
        assert not torch.equal(one[name], moved[name])
    assert not torch.equal(one["logit_function.raw_slopes"], still["logit_function.raw_slopes"])


def test_averaged_weights_are_what_is_validated(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(lr=5.0, epochs=3, training_options={**SGD, "asgd": 1})
    run = new_run(tmp_path, config)
    train(config, tiny_corpus, run)
    best, last = run.load_checkpoint("best"), run.load_checkpoint("last")
    assert last.state["state"]["averaged"] == last.step
    assert best.step == last.step
    weight = "model.head.weight"
    assert torch.equal(best.tensors[weight], last.tensors["average.head.weight"])
    assert not torch.equal(best.tensors[weight], last.tensors[weight])


def test_one_training_at_a_time(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    run = new_run(tmp_path, config)
    with run.lock(), pytest.raises(LabError, match="another process"):
        train(config, tiny_corpus, run)


def test_training_leaves_the_callers_random_numbers_and_threads_alone(tmp_path, tiny_corpus, tiny_config):
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    config = tiny_config(max_steps=3)
    train(config, tiny_corpus, new_run(tmp_path, config))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads


def test_tensorboard_on_request(tmp_path, tiny_corpus, tiny_config, interrupt_at):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(max_steps=12, eval_every=6)
    run = new_run(tmp_path, config)
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
    quiet = new_run(tmp_path, other, "quiet")
    train(other, tiny_corpus, quiet)
    assert not (quiet.path / "tensorboard").exists()


def test_too_small_a_text(tmp_path, tiny_corpus, tiny_config):
    config = tiny_config(batch_size=5000)
    with pytest.raises(LabError, match="too few for 5000 streams"):
        train(config, tiny_corpus, new_run(tmp_path, config))
