"""Fits to known optima, and the rule by which training ends."""

import math
from dataclasses import replace

import pytest
import torch

from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import fitting, targets
from uncork.lab.experiments.synthetic.fitting import Fitting, fit, measure, start

LONG = Fitting(first_round=500, rounds=5, tolerance=1e-4)
SHORTER = replace(LONG, first_round=100)  # enough for a softmax


def fitted(head, found, in_features, settings=LONG, seed=0, **options):
    return fit(found, *start(head, found, in_features, seed, options), settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "concentration"),
    [("softmax", 1.0), ("temperature", 1.0), ("sigsoftmax", 1.0), ("plif", 1.0), ("mos", 1.0), ("softmax", 0.1)],
)
def test_enough_features_reach_every_distribution(head, concentration):
    """d = M - 1: the least KL divergence is 0, for every head."""
    found = targets.dirichlet(20, 6, concentration, seed=1)
    options = {"latent_activation": None} if head == "mos" else {}
    settings = replace(LONG, learning_rate=0.03) if head == "mos" else LONG
    outcome = fitted(head, found, 5, settings, **options)
    assert 0 <= outcome.measures.kl < 1e-4
    assert outcome.measures.mode_matching == 100


def test_for_given_words_the_best_contexts_match_the_mean_word():
    """Fixed W: E_Q[w] = E_P[w], and the cross-entropy is that of Newton's method in float64, to 1e-4 nats."""
    found = targets.dirichlet(30, 12, 1.0, seed=2)
    head, contexts = start("softmax", found, 3, 0, {})
    words = head.weight.detach().clone()
    outcome = fit(found, head, contexts, SHORTER, fixed=(head.weight,))
    assert torch.equal(head.weight, words)
    q = head.double()(outcome.contexts.double()).softmax(-1)
    wide = words.double()
    assert (q @ wide - found.probabilities @ wide).abs().max() < 1e-3
    best = newton(wide, found.probabilities)
    assert abs(outcome.measures.cross_entropy - best) < 1e-4
    assert best > found.entropy + 0.05  # three features are too few: the bottleneck is seen


def newton(words, probabilities):
    """The least mean cross-entropy over contexts for given words: convex in each context."""
    mean, contexts = probabilities @ words, torch.zeros(len(probabilities), words.shape[1], dtype=torch.float64)

    def losses(h):
        return torch.logsumexp(h @ words.T, -1) - (h * mean).sum(-1)

    for _ in range(100):
        q = (contexts @ words.T).softmax(-1)
        gradient = q @ words - mean
        hessian = torch.einsum("nv,vi,vj->nij", q, words, words) - torch.einsum("ni,nj->nij", q @ words, q @ words)
        step = torch.linalg.solve(hessian, gradient)
        length = torch.ones(len(contexts), 1, dtype=torch.float64)
        for _ in range(40):
            worse = losses(contexts - length * step) > losses(contexts)
            length = torch.where(worse[:, None], length / 2, length)
        contexts = contexts - length * step
    assert gradient.abs().max() < 1e-9
    return float(losses(contexts).mean())


def test_a_linear_softmax_reaches_targets_of_its_rank_and_no_higher():
    found = targets.known_rank(60, 30, 6, seed=0)  # 5 features
    assert fitted("softmax", found, 5, SHORTER).measures.kl < 1e-4
    assert fitted("softmax", found, 3, SHORTER).measures.kl > 0.1


def test_the_measures_of_a_head_that_is_the_truth():
    head, contexts = targets.planted_head("plif", 50, 20, 4, seed=0)
    found = targets.planted("plif", 50, 20, 4, seed=0)
    measures = measure(head, contexts, found)
    assert measures.kl == pytest.approx(0, abs=1e-12)
    assert measures.mode_matching == 100
    assert measures.cross_entropy == pytest.approx(found.entropy)
    assert measures.largest_score == pytest.approx(head.scores(contexts).abs().max().item())


def test_the_measures_of_a_uniform_head():
    found = targets.dirichlet(40, 16, 0.5, seed=0)
    head, contexts = start("softmax", found, 2, 0, {})
    measures = measure(head, torch.zeros_like(contexts), found)
    assert measures.cross_entropy == pytest.approx(math.log(16))
    assert measures.kl == pytest.approx(math.log(16) - found.entropy)


def scripted(monkeypatch, losses):
    """Rounds that end at the given losses, and move the contexts by one each."""
    left = iter(losses)

    def one_round(head, contexts, *rest):
        contexts.data += 1
        return next(left)

    monkeypatch.setattr(fitting, "_adam_round", one_round)


@pytest.mark.parametrize(
    ("kls", "rounds", "converged"),
    [
        ((1.0, 0.5, 0.4, 0.395), 4, True),  # 0.005 of 0.395 is less than 2 %
        ((1.0, 0.99, 0.98), 3, True),  # the second round may be too early
        ((1.0, 1.1, 0.99), 3, True),  # what is taken back does not count as a gain afterwards
        ((1.0, 0.9, 0.8, 0.7, 0.6), 5, False),
        ((0.01, 0.005, 0.0045), 3, True),  # 0.005 is more than 2 % of 0.05 nats, 0.0005 is less
    ],
)
def test_training_ends_when_a_round_brings_little(monkeypatch, kls, rounds, converged):
    found = targets.dirichlet(10, 5, 1.0, seed=0)
    scripted(monkeypatch, [found.entropy + kl for kl in kls])
    seen = []
    head, contexts = start("softmax", found, 2, 0, {})
    settings = Fitting(first_round=10, rounds=5)
    outcome = fit(found, head, contexts, settings, after_round=lambda steps, loss: seen.append(steps))
    assert seen == [10, 30, 70, 150, 310][:rounds]
    assert (outcome.converged, outcome.steps) == (converged, seen[-1])
    assert settings.most_steps == 310


@pytest.mark.parametrize(("last", "converged"), [(0.505, True), (0.6, False)])
def test_a_round_that_ends_higher_is_taken_back(monkeypatch, last, converged):
    found = targets.dirichlet(10, 5, 1.0, seed=0)
    scripted(monkeypatch, [found.entropy + kl for kl in (1.0, 0.5, last)])
    head, contexts = start("softmax", found, 2, 0, {})
    outcome = fit(found, head, contexts, Fitting(first_round=10, rounds=3))
    assert torch.equal(outcome.contexts, contexts + 1 + 1)
    assert outcome.converged == converged
    assert outcome.steps == 70


def test_each_of_several_likeliest_words_is_right():
    found = targets.Targets(torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.2, 0.4], [0.2, 0.4, 0.4]]).double(), "ties")
    head, contexts = start("softmax", found, 2, 0, {})
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
    wants_the_second_word = torch.tensor([[1.0, 0.0]]).expand_as(contexts)
    assert measure(head, wants_the_second_word, found).mode_matching == pytest.approx(200 / 3)


def test_the_same_seed_gives_the_same_bits_and_another_one_others():
    found = targets.dirichlet(30, 20, 0.1, seed=0)
    short = Fitting(first_round=20, rounds=2)
    first, again, other = (fitted("plif", found, 3, short, seed=seed) for seed in (0, 0, 1))
    assert first.measures == again.measures
    assert torch.equal(first.contexts, again.contexts)
    assert first.measures != other.measures


def test_start_leaves_torchs_generator_alone():
    found = targets.dirichlet(5, 5, 1.0, seed=0)
    before = torch.get_rng_state()
    start("plif-frozen", found, 2, 0, {})
    assert torch.equal(before, torch.get_rng_state())


def test_the_function_has_a_learning_rate_of_its_own():
    found = targets.dirichlet(30, 20, 0.1, seed=0)
    moved = []
    for scale in (1e-6, 1.0):
        head, contexts = start("plif", found, 3, 0, {})
        fit(found, head, contexts, Fitting(first_round=20, rounds=1, function_scale=scale))
        moved.append(max(float(p.detach().abs().max()) for p in head.logit_function.parameters()))
    assert moved[0] < 1e-4 < 0.1 < moved[1]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam-short", "lbfgs"])
def test_the_other_optimisers_end_near_the_first(optimizer):
    found = targets.dirichlet(40, 15, 0.3, seed=0)
    settings = Fitting(first_round=300, rounds=3)
    first = fitted("plif", found, 3, settings).measures.kl
    other = fitted("plif", found, 3, replace(settings, optimizer=optimizer)).measures.kl
    assert other != first
    assert other == pytest.approx(first, rel=0.1)
    if optimizer == "lbfgs":
        assert other < first  # it goes on from there


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"learning_rate": 0.0}, r"learning-rate: expected a number above 0, 1e\+30 at most, got 0.0"),
        ({"learning_rate": math.inf}, "learning-rate"),
        ({"function_scale": -1.0}, "function-scale"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"first_round": 0}, "first-round: expected 1 to 1,000,000,000, got 0"),
        ({"rounds": 0}, "rounds: expected 1 to 20, got 0"),
        ({"rounds": 1100}, "rounds: expected 1 to 20, got 1100"),
    ],
)
def test_bad_settings(bad, message):
    with pytest.raises(LabError, match=message):
        Fitting(**bad)


def test_a_loss_of_nan_is_said():
    found = targets.dirichlet(10, 5, 1.0, seed=0)
    head, contexts = start("softmax", found, 2, 0, {})
    with pytest.raises(LabError, match="cross-entropy became nan"):
        fit(found, head, contexts * math.nan, Fitting(first_round=2, rounds=1))
