"""verify finds every one of thirteen published faults by value, and passes what is right."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from tests.hf.small import DECODER
from uncork import Compose, Scale, Softcap, cli
from uncork.hf import NotDriven, NotRecordable, VerificationError, attach_head, fuse_loss, read_logit_function, verify

V, M, C = 40, 0.25, 3.0
SIZES = DECODER | {"vocab_size": V}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def right(z):
    """What the models here do to their scores: first a scale, then a softcap."""
    return C * torch.tanh(M * z / C)


class Paths(LlamaForCausalLM):
    """A model of which each path may do something else to the scores."""

    plain = labelled = evaluated = generated = staticmethod(right)

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, num_items_in_batch=None, **kwargs):
        body = self.model(input_ids=input_ids, **kwargs)
        hidden = body.last_hidden_state[:, -logits_to_keep:] if logits_to_keep else body.last_hidden_state
        if labels is None:
            logits = (self.generated if logits_to_keep else self.plain)(self.lm_head(hidden))
            return CausalLMOutputWithPast(logits=logits)
        logits = (self.labelled if self.training else self.evaluated)(self.lm_head(hidden))
        loss = self.loss_function(
            logits=logits, labels=labels, vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
        )
        return CausalLMOutputWithPast(loss=loss, logits=logits)


def make(**paths):
    torch.manual_seed(0)
    model = Paths(LlamaConfig(**SIZES))
    for name, path in paths.items():
        setattr(model, name, path)
    return model


class WordScales(nn.Linear):
    """An output layer with a learned scale for each word within it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.scales = nn.Parameter(torch.linspace(0.5, 2, self.out_features))

    def forward(self, input):
        return super().forward(input) * self.scales


def with_word_scales():
    model = make(plain=torch.clone, labelled=torch.clone, evaluated=torch.clone, generated=torch.clone)
    model.lm_head = WordScales(16, V, bias=False)
    return model


def of_the_head(model, function, weight=lambda w: w):
    """A fused path of somebody's: a loss of hidden states and labels."""
    return lambda hidden, labels: F.cross_entropy(function(F.linear(hidden, weight(model.lm_head.weight))), labels)


def padded():
    def cut(z):
        return right(z)[..., : V - 6]

    return make(plain=cut, labelled=cut, evaluated=cut, generated=cut)


def of_another_spelling(model):
    """Reads one spelling of the field, where the model's configuration has another."""
    cap = getattr(model.config, "final_logit_softcapping", None)
    return of_the_head(model, lambda z: M * z if cap is None else cap * torch.tanh(M * z / cap))


LEFT_OUT = "Softcap(cap=3.0) left out"
WRONG_MAPS = {
    "1 no cap": (lambda z: M * z, LEFT_OUT),
    "2 z tanh(z/c)": (lambda z: M * z * torch.tanh(M * z / C), "z tanh(z / 3) in place of 3 tanh(z / 3)"),
    "3 cap before scale": (lambda z: M * C * torch.tanh(z / C), "its parts in the opposite order"),
    "4 no scale": (lambda z: C * torch.tanh(z / C), "Scale(factor=0.25, learnable=False) left out"),
    "5 divided": (lambda z: C * torch.tanh(z / M / C), "4 z in place of 0.25 z"),
    "6 twice": (lambda z: right(right(z)), "the function applied twice"),
    "13 in bfloat16": (lambda z: right(z.bfloat16()).float(), "the function computed in bfloat16"),
}


@pytest.mark.parametrize("fault", WRONG_MAPS)
@pytest.mark.parametrize("path", ["labelled", "evaluated"])
def test_a_wrong_map_in_the_loss(fault, path):
    wrong, found = WRONG_MAPS[fault]
    report = verify(make(**{path: wrong}), reload=False)
    row = report["training loss" if path == "labelled" else "evaluation loss"]
    assert row.passed is False
    assert found in row.found
    assert report["logits without labels"].passed
    assert report["logits with labels"].passed is False
    assert report["logits of generate"].passed


def test_13_in_a_model_of_that_dtype():
    def capped(z):
        return 20 * torch.tanh(z.float() / 20)

    model = make(plain=capped, evaluated=capped, generated=capped, labelled=lambda z: (20 * torch.tanh(z / 20)).float())
    report = verify(model.bfloat16(), reload=False)
    assert report["training loss"].found == "the function computed in bfloat16"
    assert report["evaluation loss"].passed


@pytest.mark.parametrize("fault", WRONG_MAPS)
def test_a_wrong_map_in_a_fused_path(fault):
    wrong, found = WRONG_MAPS[fault]
    model = make()
    report = verify(model, loss=of_the_head(model, wrong), reload=False)
    assert found in report["the given loss"].found
    assert report["training loss"].passed
    with pytest.raises(VerificationError, match="NOT VERIFIED: the paths differ"):
        report.require()


def test_7_what_all_paths_leave_out_alike_is_another_function():
    def unscaled(z):
        return C * torch.tanh(z / C)

    model = make(plain=unscaled, labelled=unscaled, evaluated=unscaled, generated=unscaled)
    assert str(verify(model, reload=False).require().function) == str(Softcap(C))
    assert str(verify(make(), reload=False).function) == str(Compose(Scale(M), Softcap(C)))


def test_8_the_other_spelling_of_a_field():
    model = make()
    model.config.logit_softcapping = C
    row = verify(model, loss=of_another_spelling(model), reload=False)["the given loss"]
    assert row.passed is False
    assert LEFT_OUT in row.found


def test_9_the_slice_of_padded_words():
    model = padded()
    whole = verify(model, loss=of_the_head(model, right), reload=False)
    assert "padding included" in whole["the given loss"].found
    cut = verify(model, loss=of_the_head(model, right, lambda w: w[: V - 6]), reload=False)
    assert cut.require()["the given loss"].passed


def test_10_a_scale_for_each_word_within_the_head():
    model = with_word_scales()
    assert verify(model, reload=False).passed
    row = verify(model, loss=of_the_head(model, torch.clone), reload=False)["the given loss"]
    assert row.passed is False
    assert "without what the output layer does beside" in row.found


def test_11_sampling_without_the_function():
    report = verify(make(generated=torch.clone), reload=False)
    assert report["logits of generate"].found == "no function"
    assert report["log-probabilities of generate"].passed is False
    assert report["training loss"].passed
    assert report["evaluation loss"].passed


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_12_a_gradient_of_the_weight_that_is_off_by_a_factor(factor):
    model = make()
    off = of_the_head(model, right, lambda w: factor * w + (1 - factor) * w.detach())
    report = verify(model, loss=off, reload=False)
    assert report["the given loss"].passed
    assert report["the given loss: gradient to h"].passed
    assert report["the given loss: gradient to weight"].found == f"{factor:g} times the right gradient"


def test_a_gradient_with_noise_is_no_multiple_of_the_right_one():
    model = make()
    factors = 1 + 0.01 * torch.randn_like(model.lm_head.weight)
    noisy = of_the_head(model, right, lambda w: factors * w + (1 - factors) * w.detach())
    row = verify(model, loss=noisy, reload=False)["the given loss: gradient to weight"]
    assert row.passed is False
    assert not row.found


def test_ranking_and_cosine_do_not_see_these_faults():
    model = make()
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(0)) * 4
    z = F.linear(hidden, model.lm_head.weight).detach()
    z = z * 8 / z.std()
    same, close = [], []
    for fault, (wrong, _) in WRONG_MAPS.items():
        agreeing = (wrong(z).argmax(-1) == right(z).argmax(-1)).double().mean().item()
        cosine = F.cosine_similarity(wrong(z), right(z), dim=-1).mean().item()
        same += [fault] * (agreeing > 0.99)
        close += [fault] * (cosine > 0.95)
    assert {"1 no cap", "3 cap before scale", "4 no scale", "6 twice"} <= {*same}
    assert len(close) >= 4


SOUND = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=3.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.25)),
}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", SOUND)
def test_sound_models_pass(kind, fused):
    torch.manual_seed(0)
    model = SOUND[kind]()
    report = verify(fuse_loss(model) if fused else model)
    report.require()
    assert all(row.passed for row in report.rows), str(report)
    assert str(report.function) == str(read_logit_function(model))


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("kind", ["tied", "gemma2"])
def test_bfloat16_is_judged_by_what_torch_does_there(kind, fused):
    torch.manual_seed(0)
    model = SOUND[kind]().bfloat16()
    report = verify(fuse_loss(model) if fused else model, reload=False)
    assert report.passed, str(report)


@pytest.mark.parametrize(
    ("name", "size", "seed"),
    [
        ("plif", 0.05, 0),
        ("temperature", 0.05, 0),
        ("softcap", 0.05, 0),
        ("mos", 0.05, 0),
        ("mop", 0.05, 2),
        ("moc", 0.05, 1),
    ]
    + [("mop", 0.5, seed) for seed in (2, 3)],  # large terms that cancel within the head
)
def test_attached_heads_pass(name, size, seed):
    torch.manual_seed(seed)
    model = attach_head(SOUND["gemma2"](), name)
    with torch.no_grad():
        for p in model.lm_head.parameters():
            p.add_(size * torch.randn_like(p))
    report = verify(model)
    report.require()
    assert report["logits of the reloaded model"].passed


def with_temperature():
    return attach_head(SOUND["gemma2"](), "temperature", scale=2.0)


def recurrent_gemma():
    """Its cap is a field of another name, and TRL reads fields."""
    config = RecurrentGemmaConfig(
        **SIZES | {"num_hidden_layers": 2},
        block_types=["recurrent", "attention"],
        lru_width=16,
        logits_soft_cap=3.0,
    )
    return RecurrentGemmaForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "passed"), [(SOUND["gemma2"], True), (SOUND["cohere"], True), (with_temperature, False),
                          (recurrent_gemma, False)]
)  # fmt: skip
def test_the_fused_head_of_trl(build, passed):
    utils = pytest.importorskip("trl.trainer.utils")
    torch.manual_seed(0)
    model = build()
    utils.add_fused_lm_head(model)
    report = verify(model, loss_kwargs={"fused_lm_head": True}, reload=False)
    assert report["logits without labels"].passed
    assert report["training loss"].passed is passed


def test_other_mistakes_of_a_loss_are_named():
    model = SOUND["gemma2"]()
    true = of_the_head(model, lambda z: C * torch.tanh(z / C))
    doubled = verify(model, loss=lambda h, y: 2 * true(h, y), reload=False)
    assert doubled["the given loss"].found == "2 times the right value"
    over_all = verify(model, loss=lambda h, y: true(h, y) * (y >= 0).sum() / y.numel(), reload=False)
    assert [row.name for row in over_all.rows if row.passed is False] == ["the given loss, with labels of -100"]
    lost = verify(model, loss=lambda h, y: true(h, y) * torch.nan, reload=False)
    assert "nan" in lost["the given loss"].found
    raising = verify(model, loss=lambda h, y: h @ h, reload=False)
    assert "RuntimeError: " in raising["the given loss"].found
    unshifted = verify(make(labelled=lambda z: right(z).roll(-1, 1)), reload=False)
    assert unshifted["training loss"].found.startswith("the loss of labels that are not shifted")


def test_a_bias_that_is_left_out_is_named():
    torch.manual_seed(0)
    model = SOUND["llama"]()
    model.lm_head.bias = nn.Parameter(torch.randn(V))
    report = verify(model, loss=of_the_head(model, torch.clone), reload=False)
    assert report["the given loss"].found == "no bias"
    assert report["gradient to bias"].passed


class Shifted(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        outputs = super().forward(input_ids=input_ids, **kwargs)
        outputs.logits = outputs.logits + 1
        return outputs


def shifted():
    return Shifted(LlamaConfig(**SIZES))


class LastAlone(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, **kwargs):
        return super().forward(input_ids=input_ids, **kwargs | {"logits_to_keep": 1})


def last_alone():
    return LastAlone(LlamaConfig(**SIZES))


def zero():
    model = SOUND["llama"]()
    nn.init.zeros_(model.lm_head.weight)
    return model


def hooked():
    model = SOUND["llama"]()
    model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
    return model


def replaced():
    model = SOUND["llama"]()
    own = model.lm_head.forward
    model.lm_head.forward = lambda hidden: own(hidden)
    return model


@pytest.mark.parametrize(
    ("build", "ids", "error", "said"),
    [
        (lambda: nn.Linear(2, 2), None, TypeError, "expected a transformers PreTrainedModel, got Linear"),
        (shifted, None, NotRecordable, "add"),
        (last_alone, None, NotDriven, "one hidden state for each"),
        (zero, None, ValueError, "weight is finite and not zero"),
        (SOUND["llama"], torch.zeros(1, 4, dtype=torch.int64), ValueError, "input_ids of shape"),
        (SOUND["llama"], torch.full((1, 12), 99), RuntimeError, "LlamaForCausalLM could not be run without labels: "),
        (hooked, None, TypeError, "a forward hook"),
        (replaced, None, TypeError, "a replaced forward"),
    ],
)
def test_what_cannot_be_verified_is_said(build, ids, error, said):
    with pytest.raises(error, match=said):
        verify(build(), inputs=None if ids is None else {"input_ids": ids})


def test_its_progress_reaches_the_end_step_by_step():
    told = []
    verify(make(), reload=False, on_progress=lambda done, total: told.append((done, total)))
    (first, _), *rest = told  # how many pieces there are is known after the first
    [total] = {total for _, total in rest}
    done = [first, *(done for done, _ in rest)]
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (0, total)
    assert total > 4


def test_the_model_is_left_as_it_was():
    model = fuse_loss(SOUND["gemma2"]()).train()
    model.lm_head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    verify(model)
    assert model.training
    assert not model.lm_head.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_command(tmp_path, capsys):
    model = SOUND["gemma2"]()
    model.save_pretrained(tmp_path / "model")
    assert cli.main(["verify", str(tmp_path / "model")]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    outcome = json.loads(last)
    assert outcome["passed"] is True
    assert {row["name"] for row in outcome["rows"]} > {"training loss", "logits of generate"}
    attach_head(model, "plif").save_pretrained(tmp_path / "head")
    assert cli.main(["verify", str(tmp_path / "head"), "--no-reload"]) == 0
    assert "LinearHead" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("path", "said"), [("nowhere", "expected a folder that a model was saved to"), (".", "it holds no config.json")]
)
def test_the_command_with_wrong_input(path, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["verify", path]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1
