"""The code of the page that new users start from runs as it stands."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import uncork

PAGE = Path(__file__).parents[1] / "docs" / "start.md"


def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def test_the_code_of_the_first_page_runs():
    torch.manual_seed(0)
    body = nn.Linear(8, 8)
    h, targets = body(torch.randn(2, 5, 8)), torch.randint(50, (2, 5))
    names = {
        "self": SimpleNamespace(output=nn.Linear(8, 50)), "h": h, "targets": targets, "d": 8, "V": 50, "torch": torch,
        "F": F, "uncork": uncork, "model": nn.ModuleDict({"body": body, "head": uncork.build_head("plif", 8, 50)}),
    }  # fmt: skip
    losses = []
    own = [block for block in blocks() if "uncork.hf" not in block]
    for block in own:
        exec(block, names)
        losses.append(names["loss"].item())
    assert len(own) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)  # before and after
    assert losses[2] != pytest.approx(losses[0], rel=1e-5)  # with a function
    assert names["logits"].shape == (2, 5, 50)
    assert torch.equal(names["best"], names["logits"].argmax(-1))
    assert len(names["optimizer"].param_groups) > 1


def test_the_code_for_transformers_runs(capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    (block,) = [block for block in blocks() if "uncork.hf" in block]
    exec(block, {"model": transformers.LlamaForCausalLM(config).eval()})
    assert "verified: every path uses this function" in capsys.readouterr().out
