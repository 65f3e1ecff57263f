"""A fused model under transformers' Trainer and trl's."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import uncork
from tests.hf.small import NEWEST, VOCAB, build
from tests.hf.test_fuse import fused_calls
from uncork.hf import LazyLogits, LogitFunctionCallback, attach_head, detach_head, fuse_loss

pytest.importorskip("accelerate")
from transformers import Trainer, TrainingArguments

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning"),
]


def rows(count: int = 12) -> list[dict[str, Any]]:
    """Texts of unequal lengths, some with a prompt that has no labels, and a column that no model knows."""
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, VOCAB, (4 + i % 5,), generator=generator) for i in range(count)]
    labels = [torch.where(torch.arange(len(text)) < i % 3, -100, text) for i, text in enumerate(texts)]
    return [{"input_ids": text, "labels": label, "unknown": "x"} for text, label in zip(texts, labels, strict=True)]


def padded(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    def column(name: str, value: int) -> torch.Tensor:
        return pad_sequence([row[name] for row in batch], batch_first=True, padding_value=value)

    assert all("unknown" not in row for row in batch)
    ids = column("input_ids", 0)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": column("labels", -100)}


def trainer(model, folder, *, metrics=None, preprocess=None, **options) -> Trainer:
    settings = {
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": 3, "logging_steps": 1, "learning_rate": 0.05, "save_strategy": "no", "report_to": [],
        "use_cpu": True, "disable_tqdm": True, "optim": "sgd",
    }  # fmt: skip
    args = TrainingArguments(str(folder), **(settings | options))
    return Trainer(model, args, data_collator=padded, train_dataset=rows(), eval_dataset=rows(6),
                   compute_metrics=metrics, preprocess_logits_for_metrics=preprocess)  # fmt: skip


def pair():
    """A model whose logits are capped, and the same fused."""
    model = build("Gemma2ForCausalLM")
    return model, fuse_loss(copy.deepcopy(model))


def history(each: Trainer) -> list[tuple[float, float]]:
    each.train()
    return [(log["loss"], log["grad_norm"]) for log in each.state.log_history if "loss" in log]


@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({}, 6),
        ({"label_smoothing_factor": 0.1}, 0),
        pytest.param({"activation_checkpointing": True}, 6, marks=NEWEST),
        ({"max_grad_norm": 0.5}, 6),
    ],
    ids=["plain", "label smoothing", "checkpointing", "clipping"],
)
def test_training_goes_the_same_way(options, calls, tmp_path, monkeypatch):
    """With accumulation, padding, and as many labels in one micro-batch as not in another."""
    model, fused = pair()
    counted = fused_calls(monkeypatch)
    found, own = (history(trainer(each, tmp_path, **options)) for each in (fused, model))
    assert len(found) == 3
    torch.testing.assert_close(torch.tensor(found), torch.tensor(own), rtol=1e-4, atol=1e-5)
    assert found[2] < found[0]
    assert len(counted) == calls  # label smoothing asks for the logits themselves
    for p, q in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_training_in_bfloat16(tmp_path):
    model, fused = pair()
    truth = copy.deepcopy(model)
    found, own, exact = (
        torch.tensor(history(trainer(each, tmp_path, bf16=each is not truth))) for each in (fused, model, truth)
    )
    assert ((found - exact).abs() <= 2 * (own - exact).abs() + 0.01 * exact.abs()).all()


def test_a_head_trained_in_bfloat16_is_logged_and_taken_off(tmp_path):
    """accelerate's mixed precision has replaced the model's forward when the training begins."""
    model, _ = pair()
    attach_head(model, "plif")
    each = trainer(model, tmp_path, bf16=True)
    each.add_callback(LogitFunctionCallback())
    each.train()
    assert "function_slope/0" in each.state.log_history[0]
    with pytest.raises(RuntimeError, match=r"accelerate's mixed precision .*unwrap_model\(model, keep_fp32_wrapper=Fa"):
        detach_head(model)
    before = evaluated(model)
    each.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(evaluated(model), before, rtol=0.02, atol=0.02)
    assert type(detach_head(model).lm_head) is nn.Linear
    assert evaluated(model).isfinite()


def evaluated(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**padded([{k: row[k] for k in ("input_ids", "labels")} for row in rows(2)])).loss


def test_the_trainer_knows_the_models_arguments(tmp_path):
    model, fused = pair()
    found, own = (trainer(each, tmp_path) for each in (fused, model))
    columns: list[Any] = []
    for each in (found, own):
        each.get_train_dataloader()
        columns.append(each._signature_columns)
    assert columns[0] == columns[1]
    assert {"input_ids", "labels", "attention_mask"} <= set(columns[0])
    assert found.model_accepts_loss_kwargs is own.model_accepts_loss_kwargs is True
    assert found.label_names == own.label_names == ["labels"]


def scores(prediction) -> dict[str, float]:
    labels = prediction.label_ids
    kept = labels[:, 1:] != -100
    logits = prediction.predictions
    best = (logits if logits.ndim == 2 else logits.argmax(-1))[:, :-1]
    return {"accuracy": float((best == labels[:, 1:])[kept].mean()), "sum": float(logits[logits > -99].sum())}


def measured(evaluation: dict[str, float], *names: str) -> list[float]:
    return [evaluation[f"eval_{name}"] for name in names]


ALL = ("loss", "accuracy", "sum")


def test_evaluation_with_all_logits(tmp_path):
    model, fused = pair()
    found, own = (trainer(each, tmp_path, metrics=scores).evaluate() for each in (fused, model))
    assert measured(found, *ALL) == pytest.approx(measured(own, *ALL), rel=1e-4)


def test_evaluation_with_the_likeliest_words_computes_no_logits(tmp_path):
    model, fused = pair()
    seen: list[Any] = []

    def best(logits, labels):
        seen.append(logits)
        return logits.argmax(dim=-1)

    found, own = (trainer(each, tmp_path, metrics=scores, preprocess=best).evaluate() for each in (fused, model))
    assert measured(found, *ALL) == pytest.approx(measured(own, *ALL), rel=1e-4)
    assert [type(logits) for logits in seen] == 2 * [LazyLogits] + 2 * [torch.Tensor]
    assert all(logits._computed is None for logits in seen[:2])


@pytest.mark.parametrize("logits", ["lazy", "none"])
def test_evaluation_of_the_loss_alone(logits, tmp_path, monkeypatch):
    model, _ = pair()
    fused = fuse_loss(copy.deepcopy(model), logits=logits)
    monkeypatch.setattr("uncork.hf.fusion.Fusion.logits", None)  # nobody asks for them
    options = {"prediction_loss_only": True}
    found, own = (trainer(each, tmp_path, **options).evaluate() for each in (fused, model))
    assert measured(found, "loss") == pytest.approx(measured(own, "loss"), rel=1e-4)


def test_evaluation_and_checkpoints_between_steps(tmp_path):
    """The logits of one evaluation are read before the next step changes the weights."""
    model, fused = pair()
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 3}
    histories = []
    for name, each in (("fused", fused), ("own", model)):
        training = trainer(each, tmp_path / name, metrics=scores, **options)
        training.train()
        histories.append([log for log in training.state.log_history if "eval_loss" in log])
    assert len(histories[0]) == 3
    for found, own in zip(*histories, strict=True):
        assert measured(found, *ALL) == pytest.approx(measured(own, *ALL), rel=1e-4)
    loaded = type(model).from_pretrained(tmp_path / "fused" / "checkpoint-3")
    torch.testing.assert_close(loaded.lm_head.weight, model.lm_head.weight, rtol=1e-4, atol=1e-5)


class WithoutDecay(Trainer):
    def get_decay_parameter_names(self, model):
        return [name for name in super().get_decay_parameter_names(model) if "logit_function" not in name]


@pytest.mark.parametrize("recipe", ["groups", "method", "none"])
def test_decay_of_a_learned_function(recipe, tmp_path):
    """What docs/huggingface.md says of weight_decay: without one of the two recipes it reaches the slopes."""
    model = attach_head(build("LlamaForCausalLM"), "plif")
    slopes = model.lm_head.logit_function.raw_slopes
    args = TrainingArguments(
        str(tmp_path), weight_decay=0.1, learning_rate=0.05, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    options = {"data_collator": padded, "train_dataset": rows()}
    if recipe == "groups":
        groups = uncork.parameter_groups(model, lr=args.learning_rate, weight_decay=args.weight_decay)
        training = Trainer(model, args, optimizers=(torch.optim.AdamW(groups), None), **options)
    else:
        training = (WithoutDecay if recipe == "method" else Trainer)(model, args, **options)
    before = slopes.detach().clone()
    training.train()
    assert not torch.equal(slopes, before)
    decay = {id(p): group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]}
    assert decay[id(slopes)] == (0.1 if recipe == "none" else 0.0)
    assert decay[id(model.model.layers[0].self_attn.q_proj.weight)] == 0.1
    assert decay.keys() == {id(p) for p in model.parameters()}


@pytest.mark.filterwarnings("ignore")  # trl's own
def test_trls_trainer_has_a_loss_of_its_own(tmp_path, monkeypatch):
    """It calls the body, and computes the loss from the head's weight and fields of the configuration."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), eos_token="w2", pad_token="w0", unk_token="w3"
    )
    data = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
    model, fused = pair()
    calls, logs = fused_calls(monkeypatch), []
    for each in (fused, model):
        args = trl.SFTConfig(
            str(tmp_path), per_device_train_batch_size=2, max_steps=1, logging_steps=1, learning_rate=0.05,
            save_strategy="no", report_to=[], use_cpu=True, bf16=False, disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        training = trl.SFTTrainer(each, args, train_dataset=data, processing_class=tokenizer)
        training.train()
        logs.append(training.state.log_history[0])
    for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-3), name
    assert calls == []
