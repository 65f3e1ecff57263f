"""Which words can be the likeliest: linear programs against brute force, and theorem 4 of docs/theory.md."""

import math

import pytest
import torch
from scipy.spatial import ConvexHull

from uncork import AsymmetricSoftcap, GeneralizedSigsoftmax, functional
from uncork.diagnose.reachability import MARGIN, reachable_words, winning_margin

F64 = torch.float64


def circle(count):
    angle = torch.arange(count, dtype=F64) * (2 * math.pi / count)
    return torch.stack([angle.cos(), angle.sin()], -1)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("d", [2, 3, 4])
def test_the_reachable_words_are_the_corners_of_the_hull(seed, d):
    torch.manual_seed(seed)
    words = torch.randn(60, d, dtype=F64)
    corners = torch.zeros(60, dtype=torch.bool)
    corners[torch.from_numpy(ConvexHull(words.numpy()).vertices)] = True
    assert torch.equal(reachable_words(words), corners)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_trying_many_contexts(seed, biased):
    torch.manual_seed(seed)
    words = torch.randn(12, 2, dtype=F64)
    bias = torch.randn(12, dtype=F64) if biased else None
    lengths = torch.logspace(-2, 2, 80, dtype=F64)
    scores = (lengths[:, None, None] * circle(2000)).flatten(0, 1) @ words.T + (0 if bias is None else bias)
    tried = torch.zeros(12, dtype=torch.bool)
    tried[scores.argmax(-1).unique()] = True
    assert torch.equal(reachable_words(words, bias), tried)
    assert 2 < tried.sum() < 12


@pytest.mark.parametrize("seed", range(3))
def test_no_shortcut_changes_the_answer(seed):
    torch.manual_seed(seed)
    words, bias = torch.randn(80, 4, dtype=F64), torch.randn(80, dtype=F64)
    for own in (None, bias):
        margins = torch.tensor([winning_margin(words, v, own) for v in range(80)])
        assert torch.equal(reachable_words(words, own, seed=seed), margins > MARGIN)


def test_two_words_of_a_line_are_reachable():
    torch.manual_seed(0)
    words = torch.randn(50, 1, dtype=F64)
    assert reachable_words(words).nonzero().flatten().tolist() == sorted([int(words.argmin()), int(words.argmax())])


@pytest.mark.parametrize("count", [3, 100, 10_000])
def test_all_words_on_a_circle_are_reachable(count):
    words = circle(count)
    probed = range(0, count, max(1, count // 20))
    assert all(winning_margin(words, v) > MARGIN for v in probed)
    if count <= 100:
        assert bool(reachable_words(words + 100).all())  # a common offset changes nothing


@pytest.mark.parametrize("extra", [0, 5])
def test_all_words_in_general_position_are_reachable_from_v_minus_1_features(extra):
    torch.manual_seed(extra)
    assert bool(reachable_words(torch.randn(30, 29 + extra, dtype=F64)).all())
    # One feature less, and the mean of the others can be put inside.
    words = torch.randn(30, 28, dtype=F64)
    words[0] = words[1:].mean(0)
    assert not reachable_words(words)[0]


def test_equal_words_tie_and_a_single_word_wins():
    words = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.3]])
    assert reachable_words(words).tolist() == [False, False, True]
    assert reachable_words(words, torch.tensor([0.0, 0.1, 0.0])).tolist() == [False, True, True]
    assert reachable_words(torch.zeros(1, 3)).tolist() == [True]
    assert reachable_words(torch.zeros(3, 2), torch.tensor([0.0, 2.0, 1.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_words_does_not_matter(scale):
    torch.manual_seed(1)
    words = torch.randn(60, 3, dtype=F64)
    assert torch.equal(reachable_words(scale * words), reachable_words(words))


def test_a_mixture_of_softmaxes_reaches_no_other_word():
    torch.manual_seed(0)
    words, bias = torch.randn(40, 3, dtype=F64), torch.randn(40, dtype=F64) / 2
    for own in (None, bias):
        reachable = reachable_words(words, own)
        assert 4 < reachable.sum() < 36
        for scale in (1.0, 4.0, 16.0):
            latent, prior = scale * torch.randn(5000, 4, 3, dtype=F64), 2 * torch.randn(5000, 4, dtype=F64)
            scores = latent @ words.T + (0 if own is None else own)
            for logits in (scores, GeneralizedSigsoftmax(0.5, 3.0)(scores)):
                winners = functional.mixture_log_softmax(logits, prior).argmax(-1)
                assert bool(reachable[winners].all())


def test_a_mixture_of_another_function_can_reach_a_word_inside_the_hull():
    words = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)
    assert reachable_words(words).tolist() == [True, False, True]
    scores = torch.tensor([[4.0], [-4.0]], dtype=F64) @ words.T  # one token, two components
    logits = AsymmetricSoftcap(5.0, 0.5).double()(scores)  # concave at 0: far more is lost below than won above
    log_prob = functional.mixture_log_softmax(logits.unsqueeze(0), torch.zeros(1, 2, dtype=F64))
    assert log_prob.argmax(-1).item() == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"weight: expected shape \(V, D\)"):
        reachable_words(torch.zeros(3))
    with pytest.raises(ValueError, match=r"bias: expected shape \(3,\), got \(2,\)"):
        reachable_words(torch.zeros(3, 2), torch.zeros(2))
    with pytest.raises(ValueError, match="finite"):
        reachable_words(torch.tensor([[1.0], [math.inf]]))
    with pytest.raises(ValueError, match="word: expected 0 <= word < 3, got 3"):
        winning_margin(torch.zeros(3, 2), 3)
    with pytest.raises(TypeError, match=r"word: expected a whole number, got float"):
        winning_margin(torch.zeros(3, 2), 1.5)
    for name, given in (
        ("weight", ([[1.0]],)),
        ("bias", (torch.eye(2), [0.0, 1.0])),
        ("weight", (torch.eye(2).cfloat(),)),
    ):
        with pytest.raises(TypeError, match=f"{name}: expected a Tensor of real numbers, got "):
            reachable_words(*given)
