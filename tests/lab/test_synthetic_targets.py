"""The targets of the synthetic experiment: each family is what it says, and depends on its arguments alone."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import digamma

import uncork
from uncork.diagnose.rank import numerical_rank, singular_values, tail_energy
from uncork.lab.errors import LabError
from uncork.lab.experiments.synthetic import targets as module
from uncork.lab.experiments.synthetic.targets import (
    PLANTED_OPTIONS,
    dirichlet,
    known_rank,
    language,
    planted,
    planted_head,
    several_modes,
    several_modes_head,
    sharpened,
    sotu_targets,
)

FAMILIES = {
    "dirichlet": lambda seed: dirichlet(50, 40, 0.05, seed),
    "sharpened": lambda seed: sharpened(dirichlet(50, 40, 0.01, seed), 8),
    "known_rank": lambda seed: known_rank(50, 40, 7, seed),
    "planted": lambda seed: planted("mop", 50, 40, 3, seed),
    "several_modes": lambda seed: several_modes(50, 40, 3, seed),
}


def kl(truth, log_prob):
    return (torch.xlogy(truth, truth) - truth * log_prob).sum(1).max().item()


def planted_function(head_name, seed=0):
    return planted_head(head_name, 4, 5, 2, seed)[0].logit_function


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_distributions(family):
    made = FAMILIES[family](0)
    assert made.probabilities.dtype == torch.float64
    assert (made.num_contexts, made.num_words) == tuple(made.probabilities.shape) == (50, 40)
    assert (made.probabilities >= 0).all()
    assert (made.probabilities.sum(1) - 1).abs().max() < 1e-12
    expected = torch.special.entr(made.probabilities).sum(1).mean().item()
    assert made.entropy == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_arguments_give_the_same_bits_on_any_number_of_threads(family):
    first, threads = FAMILIES[family](3).probabilities, torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            torch.manual_seed(number)
            assert torch.equal(FAMILIES[family](3).probabilities, first)
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(FAMILIES[family](4).probabilities, first)


@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_generator_is_left_alone(family):
    before = torch.get_rng_state()
    FAMILIES[family](0)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_problems_share_their_draws():
    # With a generator seeded by the seed alone, the first rows and words of all of these would be equal.
    smaller, wider = known_rank(30, 20, 5, 0), known_rank(40, 20, 5, 0)
    assert not torch.isclose(smaller.probabilities, wider.probabilities[:30]).any()
    steps = [module._generator(*a).random() for a in [("a", 1, 2), ("a", 12), ("a", 1, 2.0), ("b", 1, 2), ("a", 2, 1)]]
    assert len(set(steps)) == 5


# --- Dirichlet --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("concentration", "words"), [(0.01, 50), (0.01, 500), (1.0, 50), (30.0, 20)])
def test_dirichlet_moments(concentration, words):
    made = dirichlet(4000, words, concentration, seed=1)
    share = made.probabilities.numpy()[:, 0]  # Beta(b, (M - 1) b)
    law = stats.beta(concentration, (words - 1) * concentration)
    variance, kurtosis = law.var(), float(law.stats("k"))
    assert share.mean() == pytest.approx(1 / words, abs=5 * math.sqrt(variance / 4000))
    spread = math.sqrt((kurtosis + 2) / 4000) * variance  # of the sample variance
    assert share.var() == pytest.approx((words - 1) / (words**2 * (words * concentration + 1)), abs=5 * spread)
    assert stats.kstest(share, law.cdf).pvalue > 1e-3
    entropy = torch.special.entr(made.probabilities).sum(1)
    exact = digamma(words * concentration + 1) - digamma(concentration + 1)
    assert entropy.mean().item() == pytest.approx(exact, abs=5 * entropy.std().item() / math.sqrt(4000))


@pytest.mark.parametrize("concentration", [5e-324, 1e-300, 1e-4, 1e-3])
def test_a_tiny_concentration_gives_one_word_and_no_nan(concentration):
    probabilities = dirichlet(3000, 20, concentration, seed=0).probabilities
    assert probabilities.isfinite().all()
    assert (probabilities.max(1).values > 0.99).double().mean() > 0.9
    counts = torch.bincount(probabilities.argmax(1), minlength=20)
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("concentration", [1e12, 1e300])
def test_a_huge_concentration_gives_even_rows(concentration):
    torch.testing.assert_close(
        dirichlet(10, 4, concentration, seed=0).probabilities,
        torch.full((10, 4), 0.25, dtype=torch.float64),
        rtol=0,
        atol=1e-5,
    )


# --- known rank -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("contexts", "words"), [(60, 200), (200, 60), (80, 80), (2, 2), (1, 5)])
@pytest.mark.parametrize("rank", [1, 2, 3, 11, 59, 60])
def test_rank_is_exact(contexts, words, rank):
    rank = min(rank, contexts, words)
    made = known_rank(contexts, words, rank, seed=rank)
    assert numerical_rank(made.probabilities.log()) == rank
    assert (made.probabilities > 0).all()


def test_rank_one_has_equal_rows_that_are_not_uniform():
    probabilities = known_rank(30, 50, 1, seed=0).probabilities
    assert torch.equal(probabilities, probabilities[:1].expand(30, 50))
    assert probabilities[0].max() > 5 * probabilities[0].min()


@pytest.mark.parametrize("rank", [2, 6, 101])
def test_scores_have_the_spread_asked_for(rank):
    entropies = [known_rank(500, 1000, rank, 0, scale).entropy for scale in (0.01, 3.0, 30.0)]
    assert math.log(1000) - 0.01 < entropies[0] < math.log(1000)
    assert 2.5 < entropies[1] < 5.5
    assert entropies[2] < 1.5
    # Rows of an lse and of scores around 0: the spread of log P within rows is that of the scores.
    log_prob = known_rank(500, 1000, rank, 0).probabilities.log()
    spread = log_prob.std(1).square().mean().sqrt().item()
    assert spread == pytest.approx(3.0, rel=0.1)


def test_a_scale_that_underflows_is_an_error():
    with pytest.raises(LabError, match="scale: expected scores whose probabilities float64 can hold, got 1000"):
        known_rank(50, 50, 5, 0, scale=1000.0)


# --- planted ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_name", PLANTED_OPTIONS)
def test_a_planted_head_represents_its_targets(head_name):
    made = planted(head_name, 60, 90, 5, seed=2)
    head, input = planted_head(head_name, 60, 90, 5, seed=2)
    assert input.shape == (60, 5)
    assert head.bias is None
    with torch.no_grad():
        assert kl(made.probabilities, head(input).log_softmax(-1)) < 1e-12
    assert 0.5 < made.entropy < math.log(90)


def test_every_head_can_be_planted_but_the_frozen_one():
    assert set(PLANTED_OPTIONS) == set(uncork.HEAD_NAMES) - {"plif-frozen"}


@pytest.mark.parametrize("head_name", PLANTED_OPTIONS)
def test_a_linear_softmax_represents_the_linear_ones_alone(head_name):
    log_prob = planted(head_name, 300, 200, 5, seed=0).probabilities.log()
    beyond = tail_energy(singular_values(log_prob - log_prob.mean(1, keepdim=True)), 6)
    if head_name in ("softmax", "temperature", "moc"):
        assert numerical_rank(log_prob) == 6
        assert beyond < 1e-25
    else:
        assert numerical_rank(log_prob) == 200
        assert beyond > 5e-3


@pytest.mark.parametrize("seed", range(5))
def test_planted_functions_are_far_from_a_line(seed):
    middle = torch.linspace(-8, 8, 200, dtype=torch.float64)
    for head_name in ("plif", "mop", "monotone"):
        function = planted_function(head_name, seed)
        with torch.no_grad():
            slopes = function.derivative(middle)
        assert slopes[-1] > 2 * slopes[0], head_name


def test_the_default_plif_can_represent_the_planted_one():
    function = planted_function("plif")
    default = uncork.PLIF().double()
    assert (default.num_pieces, default.bound) == (100, 20.0)
    raw = function.raw_slopes.detach()
    with torch.no_grad():  # 25 pieces on either side of [-10, 10], 5 for each piece between
        default.raw_slopes.copy_(torch.cat([raw[:1].expand(25), raw.repeat_interleave(5), raw[-1:].expand(25)]))
        scores = torch.linspace(-40, 40, 4001, dtype=torch.float64)
        torch.testing.assert_close(default(scores), function(scores), rtol=1e-12, atol=1e-12)


# --- several modes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_modes", "latent_features"), [(1, 2), (2, 2), (2, 5), (4, 3), (5, 8)])
def test_a_mixture_represents_several_modes(num_modes, latent_features):
    made = several_modes(70, 120, num_modes, 0, latent_features=latent_features)
    head, input = several_modes_head(70, 120, num_modes, 0, latent_features=latent_features)
    assert (head.in_features, head.num_components) == (num_modes * latent_features, num_modes)
    with torch.no_grad():
        torch.testing.assert_close(head(input).exp(), made.probabilities, rtol=0, atol=1e-9)
        assert kl(made.probabilities, head(input)) < 1e-9


@pytest.mark.parametrize("num_modes", [1, 2, 4])
def test_each_mode_has_its_share_and_the_first_the_most(num_modes):
    made = several_modes(300, 500, num_modes, 1, latent_features=3)
    head, input = several_modes_head(300, 500, num_modes, 1, latent_features=3)
    with torch.no_grad():
        parts = head.scores(input).softmax(-1)  # (N, K, V)
    top = parts.max(-1)
    shares = 1 / 500 + (0.3 - 1 / 500) * (1 - 0.1 * torch.arange(num_modes, dtype=torch.float64) / num_modes)
    torch.testing.assert_close(top.values, shares.expand(300, num_modes), rtol=1e-9, atol=0)
    assert all(len(set(row)) == num_modes for row in top.indices.tolist())
    assert (made.probabilities.argmax(1) == top.indices[:, 0]).double().mean() > 0.99
    effective = torch.special.entr(parts).sum(-1).exp()
    assert 3 < effective.mean() < 30  # a handful of words, not one and not all


def test_modes_are_far_apart():
    input = several_modes_head(1000, 300, 2, 0, latent_features=3)[1]
    first, second = torch.nn.functional.normalize(input.view(1000, 2, 3), dim=-1).unbind(1)
    cosines = (first * second).sum(-1)
    assert cosines.max() < 0.25
    assert cosines.mean() == pytest.approx(-0.5, abs=0.06)


def top_pairs(logits):
    return {tuple(sorted(row)) for row in logits.topk(2, dim=1).indices.tolist()}


def test_two_features_cannot_ask_for_these_pairs():
    """What `several_modes` says of increasing functions: half-planes cut at most 3 M / 2 pairs off, whatever f."""
    words = 40
    angles = torch.linspace(0, 2 * math.pi, 20001, dtype=torch.float64)
    contexts = torch.stack([angles.cos(), angles.sin()], 1)
    function = planted_function("plif")
    for seed in range(5):
        weight = torch.randn(words, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores = contexts @ weight.T
        with torch.no_grad():
            assert top_pairs(function(scores)) == top_pairs(scores)
        assert len(top_pairs(scores)) <= 3 * words // 2
    head, input = several_modes_head(2000, words, 2, 0)
    with torch.no_grad():
        asked = {tuple(sorted(row)) for row in head.scores(input).argmax(-1).tolist()}
    assert len(asked) > words**2 / 5


# --- language ---------------------------------------------------------------------------------------------------------


def test_language_by_hand():
    # Counts of tokens: 7 three times, 2 and 5 twice (the smaller id first), 0 and 9 once.
    made = language([7, 2, 7, 5, 7, 2, 5, 0, 9], num_words=3, num_contexts=4)
    # Words: 7, 2, others. After 7: 2, 5, 2. After 2: 7, 5. After 5: 7, 0. After 0 (as often as nothing else): 9.
    expected = [[0, 2 / 3, 1 / 3], [1 / 2, 0, 1 / 2], [1 / 2, 0, 1 / 2], [0, 0, 1]]
    torch.testing.assert_close(made.probabilities, torch.tensor(expected, dtype=torch.float64))


def test_language_with_longer_contexts():
    tokens = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 0, 2])
    made = language(tokens, num_words=3, num_contexts=3, context_length=2)
    # After 0 1: 2, 2, 0. After 1 2: 0, 0. After 2 0: 1, 1. Words by count: 0 (4), then 1 (3), then the rest: 2.
    expected = [[1 / 3, 0, 2 / 3], [1, 0, 0], [0, 1, 0]]
    torch.testing.assert_close(made.probabilities, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_language_against_a_dictionary(length):
    tokens = np.random.default_rng(length).integers(0, 6, 500).tolist()
    rare = 4
    seen: dict[tuple[int, ...], list[int]] = {}
    for start in range(500 - length):
        context = tuple(tokens[start : start + length])
        if rare not in context:
            seen.setdefault(context, []).append(tokens[start + length])
    commonest = sorted(seen, key=lambda c: (-len(seen[c]), c))[:5]
    kept = sorted({0, 1, 2, 3, 5}, key=lambda w: (-tokens.count(w), w))[:3]
    expected = [[seen[c].count(w) / len(seen[c]) for w in kept] for c in commonest]
    expected = torch.tensor([[*row, 1 - sum(row)] for row in expected], dtype=torch.float64)
    made = language(tokens, 4, 5, length, rare=rare)
    torch.testing.assert_close(made.probabilities, expected, rtol=0, atol=1e-12)


def test_sotu():
    made = sotu_targets(200, 300)
    assert (made.num_contexts, made.num_words) == (200, 300)
    assert made.note.startswith("sotu: ")
    assert (made.probabilities.sum(1) - 1).abs().max() < 1e-12
    assert 1.5 < made.entropy < math.log(300)


# --- mistakes ---------------------------------------------------------------------------------------------------------

WHOLE = "expected a whole number of at least"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dirichlet(0, 5, 0.1, 0), f"num_contexts: {WHOLE} 1, got 0"),
        (lambda: dirichlet(2.5, 5, 0.1, 0), f"num_contexts: {WHOLE} 1, got 2.5"),
        (lambda: dirichlet(True, 5, 0.1, 0), f"num_contexts: {WHOLE} 1, got True"),
        (lambda: dirichlet(5, 1, 0.1, 0), f"num_words: {WHOLE} 2, got 1"),
        (lambda: dirichlet(5, 5, 0.0, 0), "concentration: expected a finite number above 0, got 0.0"),
        (lambda: dirichlet(5, 5, -1, 0), "concentration: expected a finite number above 0, got -1"),
        (lambda: dirichlet(5, 5, math.inf, 0), "concentration: expected a finite number above 0, got inf"),
        (lambda: dirichlet(5, 5, math.nan, 0), "concentration: expected a finite number above 0, got nan"),
        (lambda: dirichlet(5, 5, "1", 0), "concentration: expected a finite number above 0, got '1'"),
        (lambda: dirichlet(5, 5, 1.0, -1), f"seed: {WHOLE} 0, got -1"),
        (lambda: known_rank(5, 7, 0, 0), f"rank: {WHOLE} 1 and at most 5 (min(num_contexts, num_words)), got 0"),
        (lambda: known_rank(5, 7, 6, 0), f"rank: {WHOLE} 1 and at most 5 (min(num_contexts, num_words)), got 6"),
        (lambda: known_rank(5, 7, 2, 0, 0.0), "scale: expected a finite number above 0, got 0.0"),
        (lambda: planted("plif-frozen", 5, 7, 2, 0), "head_name: expected one of softmax, temperature"),
        (lambda: planted("plif", 5, 7, 0, 0), f"in_features: {WHOLE} 1, got 0"),
        (lambda: planted("plif", 5, 0, 2, 0), f"num_words: {WHOLE} 2, got 0"),
        (lambda: several_modes(5, 7, 0, 0), f"num_modes: {WHOLE} 1 and at most 7 (num_words), got 0"),
        (lambda: several_modes(5, 7, 8, 0), f"num_modes: {WHOLE} 1 and at most 7 (num_words), got 8"),
        (lambda: several_modes(5, 7, 2, 0, latent_features=1), f"latent_features: {WHOLE} 2, got 1"),
        (lambda: several_modes(5, 7, 2, 0, peak=1.0), "peak: expected a number above 1 / num_words and below 1, got 1"),
        (lambda: several_modes(5, 2, 2, 0), "peak: expected a number above 1 / num_words and below 1, got 0.3"),
        (lambda: language([0, 1, 2], 4, 1), f"num_words: {WHOLE} 2 and at most 3 (the number of different tokens)"),
        (lambda: language([0, 1, 2], 2, 3), f"num_contexts: {WHOLE} 1 and at most 2 (the number of different context"),
        (lambda: language([0, 1, 2], 2, 0), f"num_contexts: {WHOLE} 1 and at most 2"),
        (lambda: language([0, 1, 2], 2, 1, 3), f"context_length: {WHOLE} 1 and at most 2 (the number of tokens less"),
        (
            lambda: language(torch.tensor([0.5, 1.0]), 2, 1),
            "tokens: expected two or more ids (whole, >= 0), got float32 of shape (2,",
        ),
        (lambda: language([0, -1], 2, 1), "tokens: expected two or more ids (whole, >= 0), got int64 of shape (2,)"),
        (
            lambda: language(torch.tensor([[0, 1]]), 2, 1),
            "tokens: expected two or more ids (whole, >= 0), got int64 of shape (1, 2)",
        ),
        (lambda: language([], 2, 1), "tokens: expected two or more ids"),
    ],
)
def test_mistakes_name_the_argument(make, message):
    with pytest.raises(LabError) as caught:
        make()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sharpened_rows_keep_their_order_and_are_the_power_of_what_they_were():
    plain = dirichlet(50, 40, 0.05, 0)
    made = sharpened(plain, 3).probabilities
    assert torch.equal(made.argmax(1), plain.probabilities.argmax(1))
    expected = plain.probabilities**3 / (plain.probabilities**3).sum(1, keepdim=True)
    torch.testing.assert_close(made, expected, rtol=1e-12, atol=0)
    assert sharpened(plain, 1e6).entropy < 1e-3
    with pytest.raises(LabError, match="power: expected a finite number above 0"):
        sharpened(plain, 0)
