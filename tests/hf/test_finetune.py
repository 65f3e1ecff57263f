"""The fine-tuning experiment trains on kept hidden states what a user trains in the model, and chooses by its rules."""

import copy
import importlib.util
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from uncork.hf import attach_head

pytest.importorskip("pandas")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "finetune.py"


@pytest.fixture(scope="module")
def finetune():
    spec = importlib.util.spec_from_file_location("finetune", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def untied(model):
    model = copy.deepcopy(model)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.base_model.requires_grad_(False)
    return model


@pytest.mark.parametrize("arm", ["softmax", "temperature", "softcap-60", "softcap-30", "plif", "mos-2", "mos-1"])
def test_training_on_kept_states_is_training_in_the_model(finetune, model, arm):
    blocks = torch.randint(50, (4, 13))
    states = finetune.hidden_states(model, blocks)
    head = finetune.head_on(model.lm_head.weight.detach(), finetune.ARMS[arm])
    kept = finetune.fit(
        finetune.optimizer_of(head, 1e-2), (head.loss(x, y) for x, y in zip(*states, strict=True)), len(blocks)
    )
    whole = untied(model)
    torch.manual_seed(0)
    attach_head(whole, finetune.ARMS[arm].head, **finetune.ARMS[arm].options)
    trained = whole.get_output_embeddings()
    embedding = whole.get_input_embeddings().weight.clone()
    through = finetune.fit(
        finetune.optimizer_of(trained, 1e-2),
        (whole(input_ids=b[None], labels=b[None]).loss for b in blocks),
        len(blocks),
    )
    assert kept == pytest.approx(through, rel=1e-5)
    assert torch.equal(whole.get_input_embeddings().weight, embedding)
    of_model = dict(trained.named_parameters())
    assert of_model.keys() == dict(head.named_parameters()).keys()
    start = dict(finetune.head_on(model.lm_head.weight.detach(), finetune.ARMS[arm]).named_parameters())
    for name, parameter in head.named_parameters():
        assert torch.allclose(parameter, of_model[name], rtol=0, atol=2e-4), name
        alone = (arm, name) == ("mos-1", "prior.weight")  # the weights of one component are 1 whatever this is
        assert torch.equal(parameter, start[name]) == alone, name
    assert finetune.nats(head, states) == pytest.approx(
        torch.stack([whole(input_ids=b[None], labels=b[None]).loss for b in blocks]).mean().item(), rel=1e-5
    )


def test_blocks_are_spread_over_the_text_and_predict_no_token_twice(finetune):
    tokens = torch.arange(1280 * finetune.TOKENS + 7)
    blocks = finetune.spread_blocks(tokens, 64)
    predicted = blocks[:, 1:].flatten()
    assert len(predicted.unique()) == len(predicted) == 64 * finetune.TOKENS
    assert (blocks[1:, 0] - blocks[:-1, 0]).unique().tolist() == [20 * finetune.TOKENS]


def rows_of(finetune, best):
    """All rows of a plan; the validation loss of a rate is its distance in powers of ten to the arm's best."""
    rows = pd.DataFrame(columns=[*finetune.Run._fields, "valid_before", "valid_after", "test_before", "test_after"])
    order = []
    while (run := finetune.next_run(rows)) is not None:
        tuned = run.stage == "tune"
        row = {**run._asdict(), "train_before": 4.0, "train_after": 3.0}
        if tuned:
            row |= {"valid_before": 4.0, "valid_after": float(abs(torch.tensor(run.lr / best[run.arm]).log10()))}
        else:
            shift = {"softmax": 0.0, "temperature": -0.02}.get(run.arm, -0.03)
            row |= {
                "test_before": 4.0,
                "test_after": 3.0 + 0.1 * run.seed + shift + 1e-4 * (run.seed % 2) * (shift < 0),
            }
        rows = pd.DataFrame([*rows.to_dict("records"), row])
        order.append(run)
    return rows, order


def test_a_rate_at_the_end_of_the_grid_is_followed_one_step_further(finetune):
    best = dict.fromkeys(finetune.ARMS, 3e-5) | {"softmax": 1e-6, "plif": 1.0}
    rows, order = rows_of(finetune, best)
    tuned = rows[rows["stage"] == "tune"].groupby("arm")["lr"].apply(sorted).to_dict()
    assert tuned["temperature"] == [1e-5, 3e-5, 1e-4, 3e-4]
    assert tuned["softmax"] == [3e-6, 1e-5, 3e-5, 1e-4, 3e-4]
    assert tuned["plif"] == [1e-5, 3e-5, 1e-4, 3e-4, 1e-3]
    tested = {run.arm: run.lr for run in order if run.stage == "test"}
    assert tested == dict.fromkeys(finetune.ARMS, 3e-5) | {"softmax": 3e-6, "plif": 1e-3}
    assert len(order) == len(set(order)) == 30 + 35
    assert not {run.seed for run in order if run.stage == "tune"} & {run.seed for run in order if run.stage == "test"}


def test_the_tables_compare_seed_by_seed(finetune):
    rows, _ = rows_of(finetune, dict.fromkeys(finetune.ARMS, 3e-5))
    made = finetune.comparisons(rows).set_index(["arm", "control"])
    assert len(made) == 12
    assert made.loc[("temperature", "softmax"), "difference"] == pytest.approx(-0.02 + 0.6e-4)
    assert made.loc[("plif", "temperature"), "difference"] == pytest.approx(-0.01)
    assert (made["p_holm"] >= made["p_value"]).all()
    assert (made["pairs"] == 5).all()
    table = finetune.test_table(rows).set_index("head")
    assert table.loc["softmax", "against softmax"] == ""
    assert table.loc["PLIF", "against temperature"].startswith("−0.0100 ± 0.0000 (p <0.001)")
    assert finetune.tune_table(rows).set_index("head").loc["PLIF", "3e-5"] == "**0.0000**"
