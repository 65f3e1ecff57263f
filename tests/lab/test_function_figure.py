"""The picture of a function over its scores says what is so, or says in words why there is none."""

import numpy as np
import pytest
import torch

from uncork import PLIF, Compose, Scale, Softcap, build_head
from uncork.diagnose.output_layer import describe_function
from uncork.lab.report.function import draw_function

HEADS = ("temperature", "softcap", "sigsoftmax", "gss", "monotone", "plif", "plif-frozen", "moss", "mop")


@pytest.mark.parametrize("name", HEADS)
def test_every_head_with_a_function_is_drawn(name):
    torch.manual_seed(0)
    head = build_head(name, 8, 30)
    figure = draw_function(head, torch.randn(2, 5, 8))
    upper, _ = figure.axes
    x, y = upper.lines[1].get_data()
    wide = head.logit_function.double()
    origin = wide(torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(torch.tensor(y), (wide(torch.tensor(x)) - origin).detach())
    identity = upper.lines[0]
    assert list(identity.get_xdata()) == list(identity.get_ydata())


def test_the_share_beyond_the_bound_and_where_it_is_drawn():
    scores = torch.tensor([-9.0, -3.0, 0.0, 1.0, 5.0])
    described = describe_function(Compose(Scale(0.5), PLIF(bound=2.0)), scores=scores)
    assert described["bound"] == [-4.0, 4.0]  # in scores, before the factor
    assert described["beyond"] == pytest.approx(0.4)
    figure = draw_function(Compose(Scale(0.5), PLIF(bound=2.0)), scores=scores)
    lines = [np.asarray(line.get_xdata(), dtype=float) for line in figure.axes[0].lines]
    drawn = {float(x[0]) for x in lines if np.ptp(x) == 0}
    assert drawn == {-4.0, 4.0}
    assert "40 % of the scores\nbeyond −4 and 4" in [text.get_text() for text in figure.axes[0].texts]


def test_a_bound_that_no_score_reaches():
    described = describe_function(Compose(Softcap(10.0), PLIF(bound=20.0)), scores=torch.tensor([-99.0, 99.0]))
    assert (described["bound"], described["beyond"]) == ([None, None], 0.0)


def test_impossible_words_are_left_out_and_the_head_stays_as_it_was():
    head = build_head("plif", 4, 6)
    before = {key: value.clone() for key, value in head.state_dict().items()}
    assert head.bias is not None
    with torch.no_grad():
        assert head.bias is not None
        head.bias[0] = -torch.inf
    assert sum(describe_function(head, torch.randn(3, 4))["histogram"]["counts"]) == 3 * 5
    assert head.weight.dtype == torch.float32
    assert torch.equal(head.weight, before["weight"])


@pytest.mark.parametrize(
    ("head", "given", "error", "said"),
    [
        (build_head("mos", 4, 6), {"features": torch.randn(2, 4)}, TypeError, "got a MixtureHead: none to draw"),
        (torch.nn.Linear(4, 6), {"features": torch.randn(2, 4)}, TypeError, "got a Linear"),
        (PLIF(), {"features": torch.randn(2, 4)}, TypeError, "expected scores= for a PLIF"),
        (PLIF(), {}, ValueError, "expected one of them, got none"),
        (
            build_head("plif", 4, 6),
            {"features": torch.randn(2, 5)},
            ValueError,
            r"expected \(\.\.\., 4\) of at least one context, got \(2, 5\)",
        ),
        (PLIF, {"scores": torch.ones(1)}, TypeError, "got the class PLIF and no instance of it.*: none to draw"),
        (PLIF(), {"scores": [1.0]}, TypeError, "scores: expected a Tensor of real numbers, got list"),
        (
            build_head("plif", 4, 6),
            {"features": torch.tensor(1.0)},
            ValueError,
            r"features: expected \(\.\.\., 4\) of at least one context, got \(\)",
        ),
        (PLIF(), {"scores": torch.full((3,), -torch.inf)}, ValueError, "some that are finite, got none"),
    ],
)
def test_what_cannot_be_drawn_is_said(head, given, error, said):
    with pytest.raises(error, match=said):
        draw_function(head, **given)
