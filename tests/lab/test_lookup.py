"""Lookup tables: the counted text is the text, and contexts are those of the last words."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from uncork import build_head
from uncork.lab.errors import LabError
from uncork.lab.models import LookupConfig, build_model
from uncork.lab.run.store import RunStore
from uncork.lab.train import trainer as trainer_module
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.counted import CountedText
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.trainer import train

V = 11
SHAPES = [(1, None), (1, 4), (2, 10_000), (2, 7)]
TABLES = [LookupConfig(order=order, rows=rows, out_features=3) for order, rows in SHAPES]


def make_model(config, head="plif"):
    torch.manual_seed(0)
    return build_model(config, build_head(head, config.feature_size, V), V).double()


def make_text(length=400):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(V, (length,), generator=generator).square().remainder(V)


@pytest.mark.parametrize("head", ["plif", "mos"])
@pytest.mark.parametrize("config", TABLES)
def test_the_loss_of_the_counts_is_that_of_the_tokens(config, head):
    model, text = make_model(config, head), make_text()
    counted = CountedText(text, model.backbone)
    context, target = counted.batch(0, 1)
    by_counts = model(context, target.double()).loss
    tokens = copy.deepcopy(model)
    features, _ = tokens.features(text[None, :-1])
    by_tokens = F.cross_entropy(tokens.head(features)[0, config.order - 1 :], text[config.order :])
    torch.testing.assert_close(by_counts, by_tokens)
    assert counted.size(1) == len(text) - config.order
    by_counts.backward()
    by_tokens.backward()
    for p, q in zip(model.parameters(), tokens.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("head", ["plif", "mos"])
@pytest.mark.parametrize("config", TABLES)
def test_an_evaluation_by_counts_is_that_by_tokens(config, head):
    model, text = make_model(config, head).float(), make_text()
    by_counts = evaluate(model, text, batch_size=1, bptt=5)
    by_tokens = evaluate(model, text, batch_size=1, bptt=5, keep_nll=True)
    assert by_counts.cross_entropy == pytest.approx(by_tokens.cross_entropy, rel=1e-6)
    assert by_counts.tokens == by_tokens.tokens == len(by_tokens.nll)


def test_contexts_that_share_a_row_are_one():
    shared, apart = (make_model(config).backbone for config in TABLES[2:][::-1])
    text = make_text()
    assert len(CountedText(text, shared).batch(0, 1)[0]) == 7
    pairs = torch.stack([text[:-2], text[1:-1]], -1)
    distinct = len(pairs.unique(dim=0))
    assert len(CountedText(text, apart).batch(0, 1)[0]) == len(apart.rows(pairs).unique()) > 0.98 * distinct
    context, _ = CountedText(text, shared).batch(0, 1)
    assert shared.rows(context).tolist() == list(range(7))  # one stands for all, in the order of the rows


def test_large_numbers_of_words_have_rows_of_the_table():
    table = LookupConfig(order=2, rows=1000).build(2**20)
    rows = table.rows(torch.tensor([[2**20 - 1, 2**20 - 1], [0, 0], [2**20 - 1, 0]]))
    assert rows.min() >= 0
    assert rows.max() < 1000


def test_both_words_choose_the_row_whatever_the_sizes():
    words = torch.arange(64)
    for rows in (64, 60):
        table = LookupConfig(order=2, rows=rows).build(64)
        found = table.rows(torch.cartesian_prod(words, words)).view(64, 64)
        assert all(len(line.unique()) > 20 for line in (*found, *found.T))
        assert torch.bincount(found.flatten(), minlength=rows).min() > 32  # 64 or 68 in the mean


def test_the_state_carries_the_last_word():
    model, text = make_model(TABLES[2]), make_text(24).view(2, 12)
    whole, _ = model.features(text)
    state, parts = (), []
    for start in (0, 1, 5):
        part, state = model.features(text[:, start : {0: 1, 1: 5, 5: 12}[start]], state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)


def test_training_approaches_the_distribution_of_the_counts(tmp_path, tiny_corpus, tiny_config):
    """With as many features as words a table can hold every bigram's probability: what is left is their entropy."""
    options = {"order": 1, "rows": None}
    config = tiny_config("lookup", head="softmax", in_features=60, epochs=200, eval_every=200, model_options=options)
    run = RunStore(tmp_path).run("run", config.stored(text_record(tiny_corpus)))
    result = train(config, tiny_corpus, run)
    rows = [row for row in run.metrics() if row["kind"] == "train"]
    text = tiny_corpus.splits["train"].long()
    counts = torch.zeros(tiny_corpus.vocab_size, tiny_corpus.vocab_size, dtype=torch.float64)
    counts.index_put_((text[:-1], text[1:]), torch.ones(len(text) - 1, dtype=torch.float64), accumulate=True)
    entropy = (
        torch.special.entr(counts / counts.sum(1, keepdim=True).clamp(min=1)).sum(1) @ counts.sum(1) / counts.sum()
    )
    assert rows[-1]["cross_entropy"] == pytest.approx(float(entropy), abs=0.02)
    assert rows[0]["cross_entropy"] > float(entropy) + 0.5
    assert result["epochs"] == result["steps"] == 200
    assert rows[-1]["tokens"] == 200 * (len(text) - 1)


@pytest.mark.parametrize("values", [{"batch_size": 2}, {"training_options": {"variable_bptt": True}}])
def test_settings_without_an_effect_are_refused(values):
    with pytest.raises(LabError, match="takes every step on the whole text: batch_size must be 1"):
        TrainConfig.of("lookup", **values)


def test_what_cannot_be_counted_is_said(monkeypatch):
    table = make_model(TABLES[2]).backbone
    with pytest.raises(LabError, match="the text has 2 tokens, too few for contexts of 2"):
        CountedText(make_text(2), table)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(LabError, match=r"contexts with 11 words each need 0\.0 GiB.* lower rows or vocab_size"):
        CountedText(make_text(), table)


def test_several_processes_are_refused(tmp_path, tiny_corpus, tiny_config, monkeypatch):
    config = tiny_config("lookup", epochs=1)
    run = RunStore(tmp_path).run("run", config.stored(text_record(tiny_corpus)))
    real = trainer_module.build_accelerator

    def two(*args):
        accelerator = real(*args)
        monkeypatch.setattr(type(accelerator), "num_processes", 2)
        return accelerator

    monkeypatch.setattr(trainer_module, "build_accelerator", two)
    with pytest.raises(
        LabError, match="a lookup table is trained in one process, on the whole text at once; there are 2"
    ):
        train(config, tiny_corpus, run)
