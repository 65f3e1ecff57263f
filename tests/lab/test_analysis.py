"""The analysis of tiny models under every kind of head, against direct computation."""

import json
import math

import pytest
import torch

from uncork import HEAD_NAMES, build_head
from uncork.diagnose.output_layer import describe_head, frequency_deciles, loss_by_frequency
from uncork.lab.data.batching import evaluation_batches
from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, TransformerConfig, build_model
from uncork.lab.train.analysis import analyse

V, D = 90, 5
CONFIGS = {
    "lstm": AWDLSTMConfig(embedding_size=12, hidden_sizes=(12,), out_features=D, output_dropout=0.5),
    "transformer": TransformerConfig(width=12, depth=1, num_heads=2, max_length=16, out_features=D, dropout=0.5),
}
SETTINGS = {"batch_size": 4, "bptt": 16}


def model_of(name, kind="lstm", **options):
    """A model whose features and scores are large enough for a function to bend."""
    torch.manual_seed(0)
    model = build_model(CONFIGS[kind], build_head(name, D, V, **options), V)
    with torch.no_grad():
        model.head.weight.mul_(12)
        function = model.head.logit_function
        for parameter in function.parameters() if function is not None else ():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture(scope="module")
def tokens():
    generator = torch.Generator().manual_seed(1)
    return (V * torch.rand(900, generator=generator) ** 2).long()


@pytest.fixture(scope="module")
def counts(tokens):
    return torch.bincount(tokens, minlength=V)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["softmax", "temperature", "moc"])
def test_linear_heads_have_exactly_the_rank_of_theory(name, bias, tokens, counts):
    rank = analyse(model_of(name, bias=bias), tokens, counts, **SETTINGS)["rank"]
    assert rank["numerical"] == rank["linear_rank"] == D + 1 + bias
    assert rank["tail_energy"] < 1e-25


@pytest.mark.parametrize("name", sorted(set(HEAD_NAMES) - {"softmax", "temperature", "moc"}))
def test_other_heads_have_more(name, tokens, counts):
    options = {"num_pieces": 20, "bound": 3.0} if "plif" in name or name == "mop" else {}
    result = analyse(model_of(name, **options), tokens, counts, **SETTINGS)
    rank = result["rank"]
    assert rank["linear_rank"] == D + 2 < rank["numerical"] <= V
    assert rank["tail_energy"] > 1e-16
    assert (result["function"] is None) == (name == "mos")
    json.dumps(result, allow_nan=False)


def test_the_rank_is_that_of_the_model_s_log_probabilities(tokens, counts):
    model = model_of("plif", bound=3.0)
    rank = analyse(model, tokens, counts, contexts=50, **SETTINGS)["rank"]
    model.eval()
    state, rows = (), []
    with torch.no_grad():
        for batch, target in evaluation_batches(tokens, 4, 16):
            features, state = model.features(batch, state)
            rows.append(features[target != -100])
        chosen = torch.cat(rows)[torch.arange(50) * 899 // 50].double()
        scores = chosen @ model.head.weight.double().T + model.head.bias.double()
        values = torch.linalg.svdvals(model.head.logit_function(scores).log_softmax(-1))
    assert rank["contexts"] == len(rank["singular_values"]) == 50
    found = torch.tensor(rank["singular_values"], dtype=torch.float64)
    torch.testing.assert_close(found, values, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["lstm", "transformer"])
@pytest.mark.parametrize("name", ["plif", "mos"])
def test_means_are_those_of_the_whole_text(kind, name, tokens, counts):
    model = model_of(name, kind).train()
    result = analyse(model, tokens, counts, contexts=20, **SETTINGS)
    assert model.training
    model.eval()
    state, losses, entropies = (), [], []
    with torch.no_grad():
        for batch, target in evaluation_batches(tokens, 4, 16):
            features, state = model.features(batch, state)
            log_prob = model.head.log_prob(features)[target != -100].double()
            losses.append(-log_prob.gather(-1, target[target != -100][:, None]).squeeze(-1))
            entropies.append(-(log_prob.exp() * log_prob).sum(-1))
    loss, entropy = torch.cat(losses), torch.cat(entropies)
    assert result["cross_entropy"] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert result["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert -result["target_log_prob_quantiles"]["0"] == pytest.approx(loss.max().item(), rel=1e-5)
    deciles = result["deciles"]
    assert sum(row["tokens"] for row in deciles) == 899
    assert sum(row["words"] for row in deciles) == V
    total = sum(row["tokens"] * row["cross_entropy"] for row in deciles if row["tokens"])
    assert total == pytest.approx(loss.sum().item(), rel=1e-5)


def test_the_function_is_shown_up_to_its_constant(tokens, counts):
    model = model_of("sigsoftmax")
    result = analyse(model, tokens, counts, **SETTINGS)
    function, edges = result["function"], result["histogram"]["edges"]
    x = torch.tensor(function["x"], dtype=torch.float64)
    expected = x + torch.nn.functional.logsigmoid(x) + math.log(2)
    torch.testing.assert_close(torch.tensor(function["y"], dtype=torch.float64), expected)
    torch.testing.assert_close(torch.tensor(function["slope"], dtype=torch.float64), 1 + torch.sigmoid(-x))
    assert (function["x"][0], function["x"][-1]) == (edges[0], edges[-1])


@pytest.mark.parametrize(("name", "components"), [("softmax", 1), ("mos", 4)])
def test_the_histogram_counts_every_score(name, components, tokens, counts):
    histogram = analyse(model_of(name), tokens, counts, **SETTINGS)["histogram"]
    assert histogram["contexts"] == 200
    assert sum(histogram["counts"]) == 200 * components * V
    assert histogram["quantiles"]["0"] == pytest.approx(histogram["edges"][0])
    assert histogram["quantiles"]["1"] == pytest.approx(histogram["edges"][-1])
    inside = histogram["target_quantiles"]
    assert histogram["edges"][0] <= inside["0"] <= inside["0.5"] <= inside["1"] <= histogram["edges"][-1] + 1e-5


def test_a_short_text_and_one_context(counts):
    model = model_of("plif").train()
    model.head.eval()
    modes = [module.training for module in model.modules()]
    assert analyse(model, torch.arange(4), counts, **SETTINGS)["rank"]["contexts"] == 3
    assert [module.training for module in model.modules()] == modes
    assert analyse(model_of("plif"), torch.arange(2), counts, **SETTINGS)["rank"]["numerical"] == 1


def test_scores_that_are_all_the_same(tokens, counts):
    model = model_of("softmax", bias=False)
    with torch.no_grad():
        model.head.weight.zero_()
    result = analyse(model, tokens, counts, **SETTINGS)
    assert result["rank"]["effective"]["1e-6"] == 1
    assert result["entropy"] == pytest.approx(math.log(V), rel=1e-6)
    assert sum(result["histogram"]["counts"]) == 200 * V


def test_deciles_hold_equal_shares_of_the_training_tokens():
    counts = (1e6 / torch.arange(1, 20001)).long()
    counts[-5:] = 0
    decile = frequency_deciles(counts[torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))])
    mass = torch.bincount(frequency_deciles(counts), weights=counts.double(), minlength=10) / counts.sum()
    assert (mass - 0.1).abs().max() < 0.03
    assert torch.bincount(decile).tolist() == torch.bincount(frequency_deciles(counts)).tolist()
    assert (frequency_deciles(counts).diff() >= 0).all()
    assert (frequency_deciles(counts)[-5:] == 9).all()


def test_deciles_by_hand():
    assert frequency_deciles(torch.tensor([1, 1, 1, 1, 1, 1, 1, 1, 1, 1])).tolist() == list(range(10))
    assert frequency_deciles(torch.tensor([0, 5, 0])).tolist() == [9, 5, 9]


@pytest.mark.parametrize("name", ["softmax", "plif", "mos"])
def test_an_impossible_word_is_an_absent_word(name):
    """A bias of -inf masks word 3: all is as for a head without its row, the target's score of it too."""
    head = model_of(name).head
    absent = build_head(name, D, V - 1)
    kept = torch.arange(V) != 3
    state = {key: x[kept] if x.shape[:1] == (V,) else x for key, x in head.state_dict().items()}
    absent.load_state_dict(state)
    with torch.no_grad():
        head.bias[3] = -torch.inf
    features, target = torch.randn(60, D), torch.randint(0, 3, (60,))
    found, wanted = describe_head(head, features, target), describe_head(absent, features, target)
    values = [torch.tensor(described["rank"].pop("singular_values")) for described in (found, wanted)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    assert found["rank"].pop("vocab_size") == wanted["rank"].pop("vocab_size") + 1
    for part in ("effective", "numerical", "linear_rank"):
        assert found["rank"][part] == wanted["rank"][part]
    assert sum(found["histogram"]["counts"]) == sum(wanted["histogram"]["counts"])
    for part in ("quantiles", "target_quantiles", "edges"):
        assert found["histogram"][part] == pytest.approx(wanted["histogram"][part], rel=1e-6)
    target[:2] = 3
    described, others = describe_head(head, features, target), describe_head(head, features[2:], target[2:])
    assert described["histogram"]["target_quantiles"] == pytest.approx(others["histogram"]["target_quantiles"])
    json.dumps(described, allow_nan=False)
    with pytest.raises(ValueError, match="target: expected some word that is possible, got none"):
        describe_head(head, features, torch.full((60,), 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_by_frequency_takes_what_statistics_give(dtype, counts):
    head = model_of("plif").head.to(dtype)
    target = torch.randint(0, V, (4, 9))
    log_prob = head.statistics(torch.randn(4, 9, D, dtype=dtype), target).log_prob
    rows = loss_by_frequency(counts, target.int(), log_prob)
    decile = frequency_deciles(counts)[target]
    for row in rows:
        own = log_prob[decile == row["decile"] - 1].detach().double()
        assert row["tokens"] == len(own)
        assert row["cross_entropy"] == (pytest.approx(-own.mean().item()) if len(own) else None)


X, Y = torch.zeros(6, D), torch.arange(6)
WRONG = [
    ({"head": torch.nn.Linear(D, V)}, TypeError, "head: expected a Head, got Linear"),
    ({"features": X.tolist()}, TypeError, "features: expected a Tensor of real numbers, got list"),
    ({"features": X[:0], "target": Y[:0]}, ValueError, r"features: expected \(C, 5\) of at least one.*got \(0, 5\)"),
    (
        {"features": X.view(2, 3, D), "target": Y.view(2, 3)},
        ValueError,
        r"features: expected \(C, 5\).*got \(2, 3, 5\)",
    ),
    ({"features": X[:, 1:]}, ValueError, r"features: expected \(C, 5\).*got \(6, 4\)"),
    ({"features": X * torch.nan}, ValueError, "head, features: expected finite log-probabilities.*got inf or nan"),
    ({"target": Y[:3]}, ValueError, r"target: expected shape \(6,\).*got \(3,\)"),
    ({"target": torch.arange(9)}, ValueError, r"target: expected shape \(6,\).*got \(9,\)"),
    ({"target": Y.float()}, TypeError, r"target: expected integers, got torch\.float32"),
    ({"target": Y - 100}, IndexError, "target: expected classes in .*got -100 at position 0"),
]


@pytest.mark.parametrize(("changes", "error", "said"), WRONG)
def test_bad_arguments_of_a_description(changes, error, said):
    given = {"head": model_of("plif").head, "features": X, "target": Y, **changes}
    with pytest.raises(error, match=said):
        describe_head(**given)


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"counts": [1, 2]}, TypeError, "counts: expected a Tensor of real numbers, got list"),
        ({"counts": torch.ones(2, 2)}, ValueError, r"counts: expected shape \(V,\).*got shape \(2, 2\)"),
        ({"counts": torch.tensor([3, -1])}, ValueError, "counts: .*at least 0, got others"),
        ({"counts": torch.tensor([3, math.nan])}, ValueError, "counts: .*at least 0, got others"),
        ({"target": torch.tensor([0, -100])}, IndexError, "target: .*got -100 at position 1"),  # of 200 words
        ({"target": torch.tensor([True, False])}, TypeError, r"target: expected integers, got torch\.bool"),
        ({"log_prob": torch.zeros(3)}, ValueError, r"log_prob: expected shape \(2,\) as target, got \(3,\)"),
    ],
)
def test_bad_arguments_of_the_loss_by_frequency(changes, error, said):
    given = {"counts": torch.arange(200), "target": torch.tensor([0, 1]), "log_prob": torch.zeros(2), **changes}
    with pytest.raises(error, match=said):
        loss_by_frequency(**given)


def test_bad_arguments(tokens, counts):
    model = model_of("softmax")
    with pytest.raises(ValueError, match=r"counts: expected shape \(90,\), got \(3,\)"):
        analyse(model, tokens, torch.ones(3), **SETTINGS)
    with pytest.raises(LabError, match="contexts must be at least 1"):
        analyse(model, tokens, counts, contexts=0, **SETTINGS)
    with pytest.raises(LabError, match="at least two are needed"):
        analyse(model, tokens[:1], counts, **SETTINGS)
    with pytest.raises(ValueError, match="counts: expected some word"):
        analyse(model, tokens, torch.zeros(V), **SETTINGS)
    model.head = torch.nn.Linear(D, V)
    with pytest.raises(TypeError, match=r"model\.head: expected a uncork\.heads\.Head, got Linear"):
        analyse(model, tokens, counts, **SETTINGS)
