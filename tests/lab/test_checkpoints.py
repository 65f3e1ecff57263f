"""Checkpoints: what goes in comes out to the bit, and a trained model is rebuilt from its folder alone."""

import dataclasses
import json
import shutil

import pytest
import torch

import uncork
from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, build_model
from uncork.lab.run.store import RunStore
from uncork.lab.settings import Compare
from uncork.lab.train import checkpoints as ckpt
from uncork.lab.train.checkpoints import build_untrained, check_head, load_trained
from uncork.lab.train.config import Training, text_record
from uncork.lab.train.evaluation import evaluate
from uncork.lab.train.head import parse_head
from uncork.lab.train.optimisation import build_optimizer
from uncork.lab.train.trainer import train

V, D = 50, 6
TIED = AWDLSTMConfig(embedding_size=D, hidden_sizes=(D,), tie_weights=True)
LSTM = AWDLSTMConfig(embedding_size=5, hidden_sizes=(D,))


def make_model(head="plif", config=LSTM, seed=0, **options):
    torch.manual_seed(seed)
    return build_model(config, uncork.build_head(head, D, V, **options), V)


def stored(tmp_path, tensors, state=None):
    run = RunStore(tmp_path / "runs").run("one", {})
    run.save_checkpoint(1, tensors, state or {})
    return run.load_checkpoint()


def take_steps(model, optimizer, count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        tokens = torch.randint(V, (2, 7), generator=generator)
        optimizer.zero_grad()
        model(tokens, tokens.roll(-1, 1)).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("head", ["softmax", "plif", "plif-frozen", "mos"])
def test_a_model_comes_back_to_the_bit(tmp_path, head):
    model, other = make_model(head), make_model(head, seed=1)
    ckpt.load_model(other, stored(tmp_path, ckpt.model_tensors(model)))
    assert model.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model, other = make_model(config=TIED), make_model(config=TIED, seed=1)
    checkpoint = stored(tmp_path, ckpt.model_tensors(model))
    assert "model.head.weight" not in checkpoint.tensors
    ckpt.load_model(other, checkpoint)
    assert other.head.weight is other.backbone.embedding.weight
    assert torch.equal(other.head.weight, model.head.weight)


def test_weights_of_another_model_are_refused(tmp_path):
    checkpoint = stored(tmp_path, ckpt.model_tensors(make_model("plif")))
    with pytest.raises(LabError, match=r"another model or head, only one of the two has head\.logit_function"):
        ckpt.load_model(make_model("softmax"), checkpoint)
    with pytest.raises(LabError, match=r"another model or head, .* there, .* here"):
        ckpt.load_model(make_model("plif", num_pieces=7), checkpoint)


@pytest.mark.parametrize("options", [{"head": "plif", "num_pieces": 9}, {"head": "softcap", "cap": 15.0}])
def test_runs_of_0_1_0_load_as_the_head_that_they_describe(tmp_path, options):
    """They hold the tensors alone; which function these are of stands in the description."""
    model, other = make_model(**options), make_model(**options, seed=1)
    tensors = ckpt.model_tensors(model)
    assert tensors.pop("model.head.head_spec") is not None
    checkpoint = stored(tmp_path, tensors, {"description": {"head": model.head.spec()}})
    ckpt.load_model(other, checkpoint)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())
    with pytest.raises(LabError, match=r"another model or head: .*(num_pieces=9|cap=15\.0)"):
        ckpt.load_model(make_model(**{**options, "cap" if "cap" in options else "bound": 7.0}), checkpoint)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_an_optimiser_goes_on_to_the_bit(tmp_path, kind):
    training = Training(optimizer=kind, lr=0.1, weight_decay=0.01)
    model, other = make_model(), make_model(seed=1)
    optimizer, fresh = build_optimizer(model, training), build_optimizer(other, training)
    take_steps(model, optimizer, 3)
    tensors, rest = ckpt.optimizer_state(optimizer)
    checkpoint = stored(tmp_path, {**tensors, **ckpt.model_tensors(model)}, {"optimizer": rest})
    ckpt.load_model(other, checkpoint)
    ckpt.load_optimizer(fresh, checkpoint.tensors, checkpoint.state["optimizer"])
    for each, its in ((model, optimizer), (other, fresh)):
        take_steps(each, its, 3, seed=6)
    assert all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_random_numbers_go_on(tmp_path):
    cpu = torch.device("cpu")
    torch.manual_seed(3)
    tensors = stored(tmp_path, ckpt.rng_tensors(cpu)).tensors
    expected = torch.rand(5)
    torch.manual_seed(4)
    ckpt.load_rng(tensors, cpu, rank=0)
    assert torch.equal(torch.rand(5), expected)


def test_the_start_depends_on_the_seed_and_the_backbone_not_on_the_head(tiny_corpus, tiny_config):
    def start(**fields):
        return build_untrained(tiny_config(**fields), tiny_corpus)

    softmax = start()
    for head in ("plif", "mos"):
        other = start(head=head).backbone.state_dict()
        assert all(torch.equal(tensor, other[key]) for key, tensor in softmax.backbone.state_dict().items())
    assert torch.equal(softmax.head.weight, start(head="plif").head.weight)
    assert torch.equal(softmax.head.weight, start().head.weight)
    assert not torch.equal(softmax.head.weight, start(seed=1).head.weight)
    prior = start(bias_prior=True).head.bias
    unigram = tiny_corpus.counts.clamp(min=0.5).log()
    torch.testing.assert_close(prior - prior[1], unigram - unigram[1])
    with pytest.raises(LabError, match=r"head plif: .*cap"):
        start(head="plif", head_options={"cap": 3})
    with pytest.raises(LabError, match=r"head mos: .*num_components"):
        start(head="mos", head_options={"num_components": 0})
    with pytest.raises(
        LabError, match=r"^head softcap: bias_prior: expected counts .*; softcap:cap=0\.01,bias_prior=fal"
    ):
        start(head="softcap", head_options={"cap": 0.01}, bias_prior=True)
    with pytest.raises(
        LabError, match=r"^head softmax: bias_prior: .* bias=False; softmax:bias=false,bias_prior=false"
    ):
        check_head(tiny_config(head_options={"bias": False}, bias_prior=True))


def test_every_head_of_a_comparison_starts_near_the_unigram(tiny_corpus, tiny_config):
    """Else what a head gains were in part that it learns the unigram sooner."""
    tokens = tiny_corpus.splits["test"]
    prior = tiny_corpus.counts.double().clamp(min=0.5)
    unigram = -(prior / prior.sum()).log()[tokens[1:]].mean().item()
    heads = {field.name: field.default for field in dataclasses.fields(Compare)}["heads"]
    starts = {}
    for text in heads:
        name, options, settings = parse_head(text)
        model = build_untrained(tiny_config(head=name, head_options=options, **settings), tiny_corpus)
        starts[text] = evaluate(model, tokens, batch_size=8, bptt=10).cross_entropy
    without = starts.pop("softmax:bias_prior=false,output_lr_scale=1")
    assert all(start == pytest.approx(unigram, abs=0.08) for start in starts.values()), (unigram, starts)
    assert without > unigram + 0.1


def trained_run(folder, corpus, config, name="one"):
    run = RunStore(folder).run(name, config.stored(text_record(corpus)))
    train(config, corpus, run)
    return run


@pytest.fixture
def copied(tmp_path, finished):
    """A copy of a finished run that a test may damage."""
    shutil.copytree(finished.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_corpus, tiny_folder):
    from uncork.lab.train.config import TrainConfig

    config = TrainConfig.of(
        corpus=str(tiny_folder), head="mop", head_options={"num_pieces": 9}, in_features=4, max_steps=6, batch_size=8,
        bptt=10, model_options={"embedding_size": 6, "hidden_sizes": [8]},
    )  # fmt: skip
    return trained_run(tmp_path_factory.mktemp("runs"), tiny_corpus, config)


def test_a_trained_model_is_rebuilt_from_its_folder_alone(finished, tiny_corpus, copied):
    before = torch.get_rng_state()
    trained = load_trained(copied)
    assert torch.equal(torch.get_rng_state(), before)
    assert (trained.config.head, trained.config.in_features, trained.step) == ("mop", 4, 6)
    assert trained.model.head.logit_function.num_pieces == 9
    assert trained.tokenizer.spec() == tiny_corpus.tokenizer.spec()
    assert trained.fingerprint == tiny_corpus.fingerprint
    assert trained.config.bptt == 10
    assert trained.result == finished.result
    assert not trained.model.training


def test_a_folder_without_a_trained_model(tmp_path):
    with pytest.raises(LabError, match="no such folder"):
        load_trained(tmp_path / "nothing")
    run = RunStore(tmp_path).run("empty", {"head": "softmax"})
    with pytest.raises(LabError, match="holds no trained model yet"):
        load_trained(run.path)


def test_damaged_files_are_named(copied):
    (best,) = (copied / "checkpoints").glob("best-*")
    whole = best.read_bytes()
    best.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LabError, match=r"no intact checkpoint, damaged are best-00000006"):
        load_trained(copied)
    best.write_bytes(whole)
    tokenizer = copied / "tokenizer.json"
    spec = json.loads(tokenizer.read_text())
    tokenizer.write_text("{")
    with pytest.raises(LabError, match=r"tokenizer\.json: is damaged"):
        load_trained(copied)
    tokenizer.write_text(json.dumps({**spec, "version": 99}))
    with pytest.raises(LabError, match=r"tokenizer\.json: tokenizer spec: version"):
        load_trained(copied)
    tokenizer.write_text(json.dumps({**spec, "tokens": [*spec["tokens"], "more"]}))
    with pytest.raises(LabError, match=r"tokenizer\.json: has 51 ids, but the model predicts 50"):
        load_trained(copied)
    tokenizer.unlink()
    with pytest.raises(LabError, match=r"tokenizer\.json: is missing"):
        load_trained(copied)


def test_a_checkpoint_of_another_head(tmp_path, copied, tiny_corpus, tiny_config):
    config = tiny_config(max_steps=3)
    other = trained_run(tmp_path / "others", tiny_corpus, config)
    for path in (copied / "checkpoints").iterdir():
        path.unlink()
    for path in (other.path / "checkpoints").iterdir():
        shutil.copy(path, copied / "checkpoints" / path.name)
    with pytest.raises(LabError, match="has the head softmax, but the run is of mop"):
        load_trained(copied)


def test_a_checkpoint_of_something_else(tmp_path):
    run = RunStore(tmp_path).run("one", {"head": "softmax"})
    ckpt.save_tokenizer(run, uncork_tokenizer())
    for description in ({}, {"description": {"config": {"head": "unheard"}}}):
        run.save_checkpoint(1, {"model.x": torch.zeros(1)}, description, name="best", keep=1)
        with pytest.raises(LabError, match="does not describe a model of this version"):
            load_trained(run.path)


def uncork_tokenizer():
    from uncork.lab.data.tokenization import WordTokenizer

    return WordTokenizer(["<unk>", "<eos>", "a", "b"], "raw")
