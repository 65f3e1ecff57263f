"""TRL's SFTTrainer with a fused model and with attached heads, and what the callback adds to Trainer's logs."""

import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from tests.hf.small import DECODER
from uncork.hf import LogitFunctionCallback, attach_head, fuse_loss

V = 50
ARGUMENTS = {
    "per_device_train_batch_size": 2,
    "max_steps": 3,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "learning_rate": 1e-2,
    "use_cpu": True,
    "disable_tqdm": True,
    "seed": 0,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def make_model():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**DECODER, final_logit_softcapping=3.0))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    return model


def examples(n=8):
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, V, (6,), generator=generator).tolist() for _ in range(n)]
    return [{"input_ids": row, "labels": [-100, -100, *row[2:]]} for row in rows]


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, V)}}
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def sft(tmp_path):
    """Makes an SFTTrainer of a model, which puts its own fused head on it."""
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def make(model, **options):
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, **ARGUMENTS
        )
        return trl.SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=datasets.Dataset.from_list(examples()),
            processing_class=tokenizer(),
            **options,
        )

    return make


def losses(trainer):
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_sft_trains_a_fused_model_as_its_own(sft):
    expected_trainer = sft(make_model())
    expected = losses(expected_trainer)
    trainer = sft(make_model())
    fuse_loss(trainer.model)
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(trainer.state.log_history[:-1], expected_trainer.state.log_history[:-1], strict=True):
        assert ours["entropy"] == pytest.approx(theirs["entropy"], rel=1e-4)
        assert ours["mean_token_accuracy"] == pytest.approx(theirs["mean_token_accuracy"])
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


def test_sft_trains_an_attached_head_with_its_function(sft):
    trainer = sft(make_model())
    attach_head(trainer.model, "temperature", scale=3.0)
    ids = torch.tensor([row["input_ids"] for row in examples()[:2]])
    labels = torch.tensor([row["labels"] for row in examples()[:2]])
    logits = trainer.model(ids).logits
    found = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True)
    expected = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none")
    torch.testing.assert_close(-found.log_probs, expected)
    assert found.label_mask.tolist() == (labels[:, 1:] != -100).tolist()
    distribution = torch.distributions.Categorical(logits=logits[:, :-1].detach())
    torch.testing.assert_close(found.entropy, distribution.entropy() * found.label_mask)
    assert found.is_top1.tolist() == ((logits[:, :-1].argmax(-1) == labels[:, 1:]) & found.label_mask).tolist()
    torch.testing.assert_close(found.loss, expected.sum() / found.label_mask.sum())
    counted = trainer.model(input_ids=ids, labels=labels, fused_lm_head=True, num_items_in_batch=5)
    torch.testing.assert_close(counted.loss, expected.sum() / 5)
    before = trainer.model.lm_head.logit_function.functions[1].functions[1].log_gain.item()
    losses(trainer)
    assert trainer.model.lm_head.logit_function.functions[1].functions[1].log_gain.item() != before


def test_the_callback_stops_a_trainer_that_leaves_the_function_out(sft):
    trainer = sft(attach_head(make_model(), "plif"), callbacks=[LogitFunctionCallback()])
    with pytest.raises(RuntimeError, match=r"model.forward was replaced since"):
        trainer.train()


def test_the_callback_logs_slopes_and_the_share_beyond_the_bound(tmp_path):
    model = attach_head(make_model(), "plif", bound=0.5, compose="instead")
    callback = LogitFunctionCallback((-1.0, 0.25))
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=examples(),
        callbacks=[callback],
    )
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 3
    assert all({"function_slope/-1", "function_slope/0.25", "function_beyond_bound"} <= row.keys() for row in rows)
    slopes = model.lm_head.logit_function.derivative(torch.tensor([-1.0, 0.25]).double()).tolist()
    assert [rows[-1]["function_slope/-1"], rows[-1]["function_slope/0.25"]] == pytest.approx(slopes, rel=1e-5)
    assert slopes[0] != 1
    shares = [row["function_beyond_bound"] for row in rows]
    assert all(0 < share < 1 for share in shares)
    assert math.isfinite(sum(shares))


def test_the_share_beyond_the_bound_is_that_of_the_scores(tmp_path):
    from uncork.hf.callback import function_numbers
    from uncork.hf.fusion import fusion_of

    model = attach_head(make_model(), "plif", bound=2.0)
    ids = torch.tensor([row["input_ids"] for row in examples()])
    fusion_of(model).sample = torch.empty(0)
    model(ids, labels=ids)
    rows = model.model(ids).last_hidden_state.flatten(0, 1)[: len(fusion_of(model).sample)]
    capped = 3 * torch.tanh(F.linear(rows, model.lm_head.weight) / 3)
    found = function_numbers(fusion_of(model), (0.0,))
    assert found == {
        "function_slope/0": 1.0,
        "function_beyond_bound": pytest.approx((capped.abs() > 2).double().mean().item(), abs=1e-6),
    }


def test_the_callback_needs_a_head(tmp_path):
    trainer = Trainer(
        model=make_model(),
        args=TrainingArguments(output_dir=str(tmp_path), **ARGUMENTS),
        train_dataset=examples(),
        callbacks=[LogitFunctionCallback()],
    )
    with pytest.raises(TypeError, match="expected one with a fused loss or an attached head"):
        trainer.train()
