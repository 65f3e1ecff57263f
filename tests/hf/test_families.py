"""Every causal language model of transformers, fused and compared with itself; and those whose logits have a function.

The fields that the configurations are given here are not known to the library, which reads what the forward does.
"""

from collections import Counter

import pytest
import torch

from tests.hf import walk
from tests.hf.small import NEWEST, VOCAB, batch, build, class_names
from tests.hf.walk import Finding, described, examine
from uncork import Compose, Scale, Softcap
from uncork.hf import NotRecordable, fuse_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")  # of transformers' models

# (class, fields of its configuration, the function of its logits)
CAP, MULTIPLY, DIVIDE = "final_logit_softcapping", "logit_scale", "logits_scaling"
FAMILIES = [
    ("Gemma2ForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("Gemma2ForCausalLM", {CAP: None}, None),
    ("Gemma3ForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("Gemma3ForCausalLM", {CAP: None}, None),
    ("Gemma3nForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("Gemma4ForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("VaultGemmaForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("PaliGemmaForConditionalGeneration", {}, None),
    ("NanoChatForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("RecurrentGemmaForCausalLM", {"logits_soft_cap": 11.0}, Softcap(11.0)),
    ("xLSTMForCausalLM", {"output_logit_soft_cap": 11.0}, Softcap(11.0)),
    ("BeamForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("BeamForCausalLM", {CAP: None}, None),
    ("Inkling2ForCausalLM", {CAP: 11.0}, Softcap(11.0)),
    ("MistralLarge4ForConditionalGeneration", {CAP: 11.0}, Softcap(11.0)),
    (
        "MuseGlimmerForConditionalGeneration",
        {"output_multiplier": 0.25, CAP: 11.0},
        Compose(Scale(0.25), Softcap(11.0)),
    ),
    ("MuseGlimmerForConditionalGeneration", {"output_multiplier": 1.0, CAP: 11.0}, Softcap(11.0)),
    ("MuseSparkForConditionalGeneration", {"output_multiplier": 0.25, CAP: 11.0}, Compose(Scale(0.25), Softcap(11.0))),
    ("CohereForCausalLM", {MULTIPLY: 0.3}, Scale(0.3)),
    ("Cohere2ForCausalLM", {MULTIPLY: 0.3}, Scale(0.3)),
    ("Cohere2MoeForCausalLM", {MULTIPLY: 0.3}, Scale(0.3)),
    ("CohereCompassForCausalLM", {MULTIPLY: 0.3}, Scale(0.3)),
    ("CohereCompassForCausalLM", {MULTIPLY: None}, None),
    ("GraniteForCausalLM", {DIVIDE: 4.0}, Scale(0.25)),
    ("GraniteForCausalLM", {DIVIDE: 1.0}, None),
    ("GraniteMoeForCausalLM", {DIVIDE: 4.0}, Scale(0.25)),
    ("GraniteMoeSharedForCausalLM", {DIVIDE: 4.0}, Scale(0.25)),
    ("GraniteMoeHybridForCausalLM", {DIVIDE: 4.0}, Scale(0.25)),
    ("GraniteSWAForCausalLM", {DIVIDE: 4.0}, Scale(0.25)),
    ("HyperCLOVAXForCausalLM", {DIVIDE: 0.3}, Scale(0.3)),
    ("FalconH1ForCausalLM", {"lm_head_multiplier": 0.3}, Scale(0.3)),
    ("MiniCPM3ForCausalLM", {"dim_model_base": 8}, None),
    ("InklingForCausalLM", {"unpadded_vocab_size": VOCAB - 3}, None),
    ("InklingForCausalLM", {"unpadded_vocab_size": None}, None),
    ("MambaForCausalLM", {}, None),
    ("Mamba2ForCausalLM", {}, None),
    ("FalconMambaForCausalLM", {}, None),
    ("NemotronHForCausalLM", {}, None),
]
CHANGED = [case for case in FAMILIES if case[2] is not None]
OUT_OF_SCOPE = {
    "DoryForCausalLM": "expected an nn.Linear itself, got .*DoryLMHead",
    **dict.fromkeys(["T5GemmaForConditionalGeneration", "MBartForConditionalGeneration"], "an encoder-decoder"),
    **dict.fromkeys(
        ["BartForCausalLM", "MBartForCausalLM", "MarianForCausalLM", "PegasusForCausalLM"], "cross_entropy"
    ),
}


def named(case) -> str:
    return f"{case[0]}-{described(case[2])}" if isinstance(case, tuple) else case


@NEWEST
@pytest.mark.parametrize(("class_name", "config", "function"), FAMILIES, ids=map(named, FAMILIES))
def test_the_function_is_read_from_the_models_own_forward(class_name, config, function):
    assert examine(class_name, **config) == Finding(class_name, "recorded", described(function))


@NEWEST
@pytest.mark.parametrize(("class_name", "config", "function"), CHANGED, ids=map(named, CHANGED))
def test_a_function_that_is_left_out_is_seen(class_name, config, function, monkeypatch):
    """So the comparison above sees one that is wrong."""
    monkeypatch.setattr("uncork.hf.fusion.function_of", lambda steps: None)
    found = examine(class_name, **config)
    assert found.outcome == "wrong"
    assert found.reason.startswith("the loss is")


def test_words_that_are_padding_have_no_share():
    model = fuse_loss(build("InklingForCausalLM", unpadded_vocab_size=VOCAB - 3))
    outputs = model(**batch())
    outputs.loss.backward()
    assert outputs.logits.shape[-1] == VOCAB - 3
    assert bool((model.lm_head.weight.grad[-3:] == 0).all())
    assert bool((model.lm_head.weight.grad[:-3] != 0).any(-1).all())


@NEWEST
@pytest.mark.parametrize("class_name", OUT_OF_SCOPE)
def test_what_is_out_of_scope_is_refused(class_name):
    with pytest.raises((TypeError, NotRecordable), match=OUT_OF_SCOPE[class_name]):
        fuse_loss(build(class_name))


def test_no_class_of_the_registry_is_wrong():
    """The table that `python -m tests.hf.walk` writes."""
    names = class_names()
    findings = walk.walk(names)
    assert [f.class_name for f in findings] == names
    assert [f for f in findings if f.outcome == "wrong"] == []
    outcomes = Counter(f.outcome for f in findings)
    assert outcomes["recorded"] >= 60, outcomes
    assert outcomes["skipped"] <= 0.15 * len(names), [f for f in findings if f.outcome == "skipped"]
    assert all(f.reason for f in findings if f.outcome != "recorded")
    assert len({f.function for f in findings if f.outcome == "recorded"}) > 3
    assert torch.is_grad_enabled()
