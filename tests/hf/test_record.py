"""What a model's forward may do to its logits is recorded; what it may not is refused by name."""

import pickle

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from uncork.hf.record import NotRecordable, Record, RecordedLogits, function_of

B, T, D, V = 2, 5, 6, 11


def made() -> tuple[RecordedLogits, torch.Tensor, torch.Tensor]:
    """A stand-in for logits (B, T, V), the logits, and the head's weight."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=generator) for shape in ((B, T, D), (V, D)))
    return RecordedLogits(Record(hidden, slice(0, V), (), V, torch.float32)), hidden @ weight.T, weight


def changed_in_place(z, *calls):
    for name, *args in calls:
        getattr(z, name)(*args)
    return z


def divided(z):
    z /= 4
    z *= 3
    return z


RECORDED = {
    "mul": lambda z: z * 2,
    "right mul": lambda z: 2 * z,
    "div": lambda z: z / 3,
    "methods": lambda z: z.mul(2).div(3),
    "functions": lambda z: torch.div(torch.mul(2.5, z), 3),
    "number in a tensor": lambda z: torch.tensor(0.5) * z / torch.tensor([4.0]),
    "softcap": lambda z: torch.tanh(z / 3) * 3,
    "softcap by method": lambda z: 3 * (z / 3).tanh(),
    "softcap by multiplication": lambda z: torch.tanh(z * 0.25) * 4,
    "softcap, two numbers": lambda z: torch.tanh(z / 3) * 5,
    "softcap, in two steps": lambda z: torch.tanh(z / 3 / 2) * 2 * 3,
    "scale, softcap": lambda z: torch.tanh(z * 0.5 / 3) * 3,
    "softcap, scale": lambda z: torch.tanh(z / 3) * 3 * 0.5,
    "bare tanh": torch.tanh,
    "two softcaps": lambda z: torch.tanh(torch.tanh(z / 3) * 3 / 2) * 2,
    "in place, as a statement": lambda z: changed_in_place(z, ("div_", 3), ("tanh_",), ("mul_", 3)),
    "in place, chained": lambda z: z.div_(3).tanh_().mul_(3),
    "augmented": divided,
    "augmented after a cast": lambda z: divided(z.double()),
    "a copy changed in place": lambda z: (changed_in_place(z.clone(), ("mul_", 3)), z * 2)[1],
    "itself changed in place": lambda z: (changed_in_place(z.float(), ("mul_", 3)), z * 2)[1],
    "float": lambda z: z.float() / 2,
    "there and back": lambda z: z.double().float(),
    "to": lambda z: z.to(torch.float64).to(z.device),
    "to a tensor": lambda z: z.to(torch.zeros(1, dtype=torch.float64)),
    "words": lambda z: z[..., :7] * 2,
    "words of words": lambda z: z[..., 2:][..., :-3],
    "last words": lambda z: z[:, :, -4:],
    "words of a token": lambda z: z[:, -1, 1:5],
    "all words": lambda z: z[..., 0, :],
    "shift": lambda z: z[..., :-1, :].contiguous(),
    "row": lambda z: z[0],
    "token": lambda z: z[1, 3],
    "last": lambda z: z[:, -1:],
    "mask": lambda z: z[torch.arange(T).expand(B, T) % 2 == 0],
    "tokens": lambda z: z[:, torch.tensor([0, 2])],
    "new dimension": lambda z: z[:, None],
    "view": lambda z: z.view(-1, z.size(-1)),
    "view by shape": lambda z: z.view(torch.Size((T, B, V))),
    "reshape": lambda z: torch.reshape(z, (B * T, -1)),
    "flatten": lambda z: torch.flatten(z, 0, 1),
    "split": lambda z: z.split(2, dim=1)[1],
    "split function": lambda z: torch.split(z, [1, 4], 1)[1],
    "squeeze": lambda z: z.unsqueeze(1).squeeze(1),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_the_record_stands_for_the_logits(name):
    stand_in, logits, weight = made()
    wanted = RECORDED[name](logits.clone())
    record = RECORDED[name](stand_in).record
    assert (record.shape, record.dtype) == (wanted.shape, wanted.dtype)
    scores = record.hidden @ weight[record.words].T
    function = function_of(record.steps)
    torch.testing.assert_close((scores if function is None else function(scores)).to(wanted.dtype), wanted)
    replayed = record.hidden @ weight.T
    for _, replay in record.replay:
        replayed = replay(replayed)
    torch.testing.assert_close(replayed, wanted)


@pytest.mark.parametrize("name", ["shape", "dtype", "device", "ndim", "requires_grad", "is_cuda"])
def test_what_is_known_without_them(name):
    stand_in, logits, _ = made()
    assert getattr(stand_in, name) == getattr(logits, name)
    for ask in (len, lambda z: z.dim(), lambda z: z.size(), lambda z: z.size(-1), lambda z: z.numel()):
        assert ask(stand_in) == ask(logits)
    assert stand_in.is_floating_point()


def after_a_view(z):
    z[:, 1:].mul_(2)
    return z


def before_a_view(z):
    part = z[:, 1:]
    z.mul_(2)
    return part


REFUSED = {
    "add": (lambda z: z + 1, "add"),
    "bias": (lambda z: torch.zeros(V) + z, "add"),
    "subtraction": (lambda z: z - z, "sub"),
    "negative": (lambda z: -z, "neg"),
    "from the right": (lambda z: 2 / z, "rtruediv"),
    "power": (lambda z: z**2, "pow"),
    "comparison": (lambda z: z > 0, "gt"),
    "equality": (lambda z: z == 0, "eq"),
    "assignment": (lambda z: z.__setitem__(0, 1.0), "setitem"),
    "iteration": (list, "iter"),
    "truth": (bool, "bool"),
    "softmax": (lambda z: z.softmax(-1), "softmax"),
    "function": (lambda z: F.softmax(z, -1), "torch's softmax"),
    "cross entropy": (lambda z: F.cross_entropy(z[0], torch.zeros(T).long()), "torch's cross_entropy"),
    "clamp": (lambda z: z.clamp(-1, 1), "clamp"),
    "transpose": (lambda z: z.transpose(1, 2), "transpose"),
    "scale of a word": (lambda z: z * torch.ones(V), r"multiplication by a tensor of shape \(11,\)"),
    "learned scale": (lambda z: z * torch.nn.Parameter(torch.ones(())), "by a tensor of shape .* that is learned"),
    "by itself": (lambda z: z * z, "multiplication by a RecordedLogits"),
    "bool": (lambda z: z * True, "multiplication by a bool"),
    "numpy": (lambda z: z * np.float32(2), "multiplication by a"),
    "rounded": (lambda z: z.div(2, rounding_mode="floor"), "division with rounding_mode='floor'"),
    "integers": (lambda z: z.to(torch.int64), "a cast to torch.int64"),
    "word": (lambda z: z[..., 3], "the index"),
    "words with a step": (lambda z: z[..., ::2], "the index"),
    "chosen words": (lambda z: z[..., torch.tensor([1, 2])], "the index"),
    "after the words": (lambda z: z[..., None], "the index"),
    "mask of words": (lambda z: z[torch.ones(B, T, V, dtype=torch.bool)], "the index"),
    "flat": (lambda z: z.view(-1), "a view of shape"),
    "mixed": (lambda z: z.reshape(B, V, T), "a view of shape"),
    "flatten": (lambda z: z.flatten(1), "flatten of the vocabulary"),
    "split": (lambda z: z.split(3, -1), "split of the vocabulary"),
    "squeeze": (lambda z: z.squeeze(-1), "squeeze of the vocabulary"),
    "unsqueeze": (lambda z: z.unsqueeze(-1), "unsqueeze after the vocabulary"),
    "in place, of a part": (after_a_view, "in place on logits that were sliced"),
    "in place, of which there is a part": (before_a_view, "in place on logits that were sliced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_by_name(name):
    program, match = REFUSED[name]
    with pytest.raises(NotRecordable, match=f"^the model's forward does .* cannot be fused: .*{match}"):
        program(made()[0])


@pytest.mark.parametrize("steps", [(("mul", -1.0),), (("mul", 0.0),), (("div", 3.0), ("tanh", 0.0), ("mul", -3.0))])
def test_what_does_not_increase_is_refused(steps):
    with pytest.raises(NotRecordable, match="which does not increase"):
        function_of(steps)


def test_the_refusal_survives_another_process():
    error = pickle.loads(pickle.dumps(NotRecordable("add")))
    assert str(error) == str(NotRecordable("add"))
