"""The code of the page that new users start from, and of the guides, runs as it stands and prints what they say."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import uncork
from uncork.loss.tile_native import missing

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


def blocks(page=DOCS / "start.md"):
    """The Python of a page, but for blocks under a line `<!-- not run: why -->`."""
    found = re.findall(r"(<!-- not run: .+ -->\n)?```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [code for skipped, code in found if not skipped]


def printed(code):
    """What the comments behind the prints of a block say that they print: on the same line, or on the next."""
    return re.findall(r"^ *print\(.*\)(?:  |\n *)# (.+)$", code, re.MULTILINE)


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


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_the_code_of_a_guide_runs_and_prints_what_it_says(page, capsys):
    names: dict[str, object] = {}
    checked = 0
    for code in blocks(page):
        if "from transformers" in code:
            pytest.importorskip("transformers")
        if 'impl="native"' in code and missing:
            continue
        exec(code, names)
        out = capsys.readouterr().out
        if said := printed(code):
            assert out.splitlines() == said
            checked += len(said)
    assert checked  # every guide states a number or a fact that its code prints
