"""Evaluation: every target once, the state carried, perplexity per word, bits per byte."""

import dataclasses
import itertools
import math

import pytest
import torch

import uncork
from uncork.lab.data.tokenization import BPETokenizer, WordTokenizer
from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, TransformerConfig, build_model
from uncork.lab.run.store import RunStore
from uncork.lab.train.config import text_record
from uncork.lab.train.evaluation import Evaluation, evaluate, evaluate_run, unknown_share
from uncork.lab.train.trainer import train

V, D = 50, 4
LSTM = AWDLSTMConfig(embedding_size=6, hidden_sizes=(8,), out_features=D, output_dropout=0.5)


def make_model(head="plif", config=LSTM, **options):
    torch.manual_seed(0)
    model = build_model(config, uncork.build_head(head, D, V, **options), V)
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    return model


def text(length=103):
    return torch.randint(V, (length,), generator=torch.Generator().manual_seed(1))


def naive_nll(model, tokens):
    """Nats of each token but the first, from the whole matrix of log-probabilities."""
    model.eval()
    with torch.no_grad():
        log_prob = model.head(model.features(tokens[None, :-1])[0])[0].double().log_softmax(-1)
    return -log_prob[torch.arange(len(tokens) - 1), tokens[1:]]


@pytest.mark.parametrize("head", ["softmax", "plif", "mos"])
def test_one_stream_is_the_definition(head):
    model, tokens = make_model(head), text()
    expected = naive_nll(model, tokens)
    found = evaluate(model, tokens, batch_size=1, bptt=7, keep_nll=True)
    assert found.tokens == 102
    assert found.cross_entropy == pytest.approx(expected.mean().item(), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.cross_entropy), rel=1e-12)
    assert found.bits_per_byte is None
    torch.testing.assert_close(found.nll, expected.float(), rtol=1e-4, atol=1e-5)


def test_streams_read_each_token_once_and_nll_is_in_the_texts_order():
    model, tokens = make_model(), text()
    found = evaluate(model, tokens, batch_size=4, bptt=7, keep_nll=True)
    # 102 targets in 4 streams: 26, 26, 25, 25; each starts with the initial state.
    starts = [0, 26, 52, 77, 102]
    parts = [naive_nll(model, tokens[a : b + 1]) for a, b in itertools.pairwise(starts)]
    torch.testing.assert_close(found.nll, torch.cat(parts).float(), rtol=1e-4, atol=1e-5)
    assert found.cross_entropy == pytest.approx(torch.cat(parts).mean().item(), rel=1e-6)
    assert evaluate(model, tokens, batch_size=4, bptt=7).nll is None


def test_bptt_does_not_matter_to_an_lstm_and_windows_do_to_a_transformer():
    lstm, tokens = make_model(), text()
    assert evaluate(lstm, tokens, batch_size=3, bptt=5).cross_entropy == pytest.approx(
        evaluate(lstm, tokens, batch_size=3, bptt=34).cross_entropy, rel=1e-6
    )
    transformer = make_model(config=TransformerConfig(width=8, depth=1, num_heads=2, out_features=D))
    found = evaluate(transformer, tokens, batch_size=1, bptt=51, keep_nll=True)
    expected = torch.cat([naive_nll(transformer, tokens[:52]), naive_nll(transformer, tokens[51:])])
    torch.testing.assert_close(found.nll, expected.float(), rtol=1e-4, atol=1e-5)


def test_dropout_is_off_and_the_mode_comes_back():
    model = make_model().train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    numbers = {evaluate(model, text(), batch_size=2, bptt=9).cross_entropy for _ in range(2)}
    assert len(numbers) == 1
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_perplexity_is_per_word_and_bits_are_per_byte():
    model, tokens = make_model(), text()
    found = evaluate(model, tokens, batch_size=2, bptt=9, words=50, bytes=412)
    nats = found.cross_entropy
    assert found.perplexity == pytest.approx(math.exp(nats * 103 / 50))
    assert found.bits_per_byte == pytest.approx(nats * 103 / 412 / math.log(2))
    assert set(found.to_dict()) == {"cross_entropy", "perplexity", "bits_per_byte", "tokens", "unknown"}
    assert Evaluation.of(1e6, 10).perplexity == math.inf
    assert math.isnan(Evaluation.of(math.nan, 10).cross_entropy)


def test_too_short_a_text():
    with pytest.raises(LabError, match="at least two"):
        evaluate(make_model(), torch.zeros(1, dtype=torch.int64), batch_size=1, bptt=3)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_corpus, tiny_folder):
    from uncork.lab.train.config import TrainConfig

    options = {"embedding_size": 6, "hidden_sizes": [8]}
    config = TrainConfig.of(
        corpus=str(tiny_folder), model_options=options, in_features=4, epochs=1, batch_size=8, bptt=10, log_every=5
    )
    run = RunStore(tmp_path_factory.mktemp("runs")).run("one", config.stored(text_record(tiny_corpus)))
    return run, train(config, tiny_corpus, run)


def test_evaluate_run_gives_the_numbers_of_the_result(finished, tiny_cache):
    run, result = finished
    for split in ("valid", "test"):
        assert evaluate_run(run.path, split, cache_dir=tiny_cache).to_dict() == result[split]
    assert evaluate_run(run.path, "train", cache_dir=tiny_cache).tokens == 1673


def test_evaluate_run_on_a_text_file(finished, tiny_folder, tiny_cache, tmp_path):
    run, result = finished
    same = evaluate_run(run.path, text=tiny_folder / "test.txt")
    assert same.to_dict() == result["test"]
    one = tmp_path / "one.txt"
    one.write_text("waa unheard\n")
    assert evaluate_run(run.path, text=one, keep_nll=True).nll.shape == (2,)


@pytest.mark.parametrize(("data", "message"), [(b"", "empty"), (b"\xff\xfe\x00a", "UTF-8"), (b"\n", "tokens")])
def test_evaluate_run_on_bad_text(finished, tmp_path, data, message):
    path = tmp_path / "text.txt"
    path.write_bytes(data)
    with pytest.raises(LabError, match=message):
        evaluate_run(finished[0].path, text=path)


def test_evaluate_run_mistakes(finished, tmp_path, tiny_cache):
    run, _ = finished
    with pytest.raises(LabError, match="split must be one of train, valid, test, got 'dev'"):
        evaluate_run(run.path, "dev")
    with pytest.raises(LabError, match=r"missing\.txt: cannot be read"):
        evaluate_run(run.path, text=tmp_path / "missing.txt")
    with pytest.raises(LabError, match="no such folder"):
        evaluate_run(tmp_path / "nothing")


def test_evaluate_run_on_a_corpus_that_changed(finished, tiny_cache):
    from uncork.lab.train.checkpoints import load_trained

    run, _ = finished
    other = dataclasses.replace(load_trained(run.path), fingerprint="another")
    with pytest.raises(
        LabError, match=r"is not the text that this run was trained on: bring that back, or .* --text FILE"
    ):
        evaluate_run(run.path, trained=other, cache_dir=tiny_cache)
    moved = dataclasses.replace(other, config=other.config.model_copy(update={"corpus": "/moved/away.txt"}))
    with pytest.raises(
        LabError, match=r"its text cannot be read: corpus: '/moved/away\.txt' is none of .* --text FILE"
    ):
        evaluate_run(run.path, trained=moved, cache_dir=tiny_cache)


def test_a_text_of_unknown_words_is_not_evaluated(finished, tiny_folder, tmp_path):
    """It has a low "perplexity per word": the model finds it easy to say that it does not know them."""
    run, _ = finished
    text = tmp_path / "text.txt"
    text.write_text("völlig andere wörter\n" * 9)
    with pytest.raises(LabError, match=r"text\.txt: 100 % of its words are unknown to this model \(at most 50 %"):
        evaluate_run(run.path, text=text)
    text.write_text("waa wörter wab wac\n" * 9)
    found = evaluate_run(run.path, text=text)
    assert found.unknown == found.to_dict()["unknown"] == 0.25
    test = evaluate_run(run.path, text=tiny_folder / "test.txt")
    assert test.unknown == finished[1]["test"]["unknown"] == 0.0


def test_the_share_of_unknown_words():
    word = WordTokenizer(["<unk>", "<eos>", "the", "war"], "raw")
    assert unknown_share(torch.tensor([1, 1]), word) == 0.0
    assert unknown_share(torch.tensor([0, 1, 0, 1]), word) == 1.0
    bytes_known = BPETokenizer.train(["low lower lowest"] * 9, "raw", vocab_size=260)
    assert unknown_share(torch.tensor([0, 1]), bytes_known) is None


def test_a_variable_that_changes_numbers_is_refused_in_evaluation_too(finished, tiny_folder, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    with pytest.raises(LabError, match="ONEDNN_DEFAULT_FPMATH_MODE=BF16"):
        evaluate_run(finished[0].path, text=tiny_folder / "test.txt")
