"""The notebook runs, what its text claims is what it finds, and it is kept without outputs."""

import json
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "bottleneck.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]


def executed(**sizes):
    """The names that its cells leave behind, with these sizes in place of its own."""
    matplotlib = pytest.importorskip("matplotlib")
    names: dict[str, object] = {}
    with matplotlib.rc_context({"backend": "agg"}), torch.random.fork_rng():
        for cell in CODE:
            exec("".join(cell["source"]), names)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert set(sizes) <= set(names)
                names |= sizes
        names["plt"].close("all")
    return names


def check_what_it_says(found):
    from uncork.diagnose.rank import numerical_rank

    d, words, log_prob, kl = found["features"], found["words"], found["log_prob"], found["divergence"]
    wider = f"softmax, {d + 2} features"
    assert set(kl) == {"softmax", wider, "softcap", "plif", "mos"}
    ranks = {name: numerical_rank(matrix) for name, matrix in log_prob.items()}
    assert ranks == {"softmax": d + 1, wider: d + 3, "softcap": words, "plif": words, "mos": words}
    assert numerical_rank(found["target"].double().log()) == words
    assert 0 < kl["mos"] < kl["plif"] < kl["softmax"]
    assert kl[wider] < kl["softmax"]
    assert found["right"]["plif"] > found["right"]["softmax"]
    for name, matrix in log_prob.items():  # what is drawn is what was learned
        assert torch.allclose(matrix.exp().sum(1), torch.ones(len(matrix), dtype=torch.float64))
        wanted = found["target"].double()
        divergence = (wanted * (wanted.log() - matrix)).sum(1).mean().item()
        assert kl[name] == pytest.approx(divergence, abs=2e-3)  # curves end one step before
    return kl


def test_what_it_says_holds_at_a_small_size():
    found = executed(contexts=120, words=40, features=3, steps=300)
    check_what_it_says(found)


@pytest.mark.slow
def test_what_it_says_holds_at_its_own_size():
    kl = check_what_it_says(executed())
    assert kl["plif"] == pytest.approx(kl["softmax, 7 features"], rel=0.05)  # "does what two more features do"
    share = (kl["softmax"] - kl["softcap"]) / (kl["softmax"] - kl["plif"])
    assert share == pytest.approx(2 / 3, abs=0.1)  # "two thirds of what the learned function gains"


def test_it_is_kept_without_outputs_and_its_ids_say_what_a_cell_is():
    assert [cell["id"] for cell in CODE if cell["outputs"] or cell["execution_count"] is not None] == []
    ids = [cell["id"] for cell in CELLS]
    assert len(set(ids)) == len(ids)
    assert all(re.fullmatch("[a-z-]+", name) for name in ids)
