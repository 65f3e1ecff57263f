"""Streams, their segments and the evaluation batches: which token goes where, and how often."""

import statistics

import pytest
import torch

from uncork.lab.data.batching import TokenStreams, evaluation_batches
from uncork.lab.errors import LabError
from uncork.lab.models import AWDLSTMConfig, build_model


@pytest.mark.parametrize(("total", "batch_size"), [(101, 4), (100, 4), (5, 4), (2, 1), (50, 7)])
def test_streams_hold_each_target_once(total, batch_size):
    streams = TokenStreams(torch.arange(total), batch_size)
    tokens, target = streams.batch(0, streams.length)
    assert streams.num_streams == batch_size
    assert torch.equal(target, tokens + 1)
    count = (total - 1) // batch_size * batch_size
    assert target.flatten().tolist() == list(range(1, count + 1))
    assert total - 1 - count < batch_size


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_batches_are_int64(dtype):
    text = torch.arange(20).to(dtype)
    batches = [TokenStreams(text, 2).batch(0, 3), *evaluation_batches(text, 3, 4)]
    assert {part.dtype for batch in batches for part in batch} == {torch.int64}


def test_the_text_is_not_copied_whole():
    # One token seen 10**12 times: a copy would not fit in memory.
    text = torch.zeros(1, dtype=torch.int32).expand(10**12)
    tokens, target = TokenStreams(text, 4).batch(0, 3)
    assert tokens.tolist() == target.tolist() == [[0] * 3] * 4
    tokens, target = next(iter(evaluation_batches(text, 4, 3)))
    assert tokens.tolist() == target.tolist() == [[0] * 3] * 4


def test_processes_share_the_streams():
    text = torch.arange(100)
    whole = TokenStreams(text, 6).batch(3, 5)
    parts = [TokenStreams(text, 6, rank=rank, world_size=3) for rank in range(3)]
    assert [part.num_streams for part in parts] == [2, 2, 2]
    for i in range(2):
        assert torch.equal(torch.cat([part.batch(3, 5)[i] for part in parts]), whole[i])
    plans = [part.segments(5, variable=True, seed=1, epoch=2) for part in parts]
    assert plans[0] == plans[1] == plans[2]


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("bptt", [1, 7, 70])
def test_segments_cover_the_stream_once(variable, bptt):
    streams = TokenStreams(torch.arange(2001), 2)
    segments = streams.segments(bptt, variable=variable, seed=3, epoch=0)
    assert [step for start, length in segments for step in range(start, start + length)] == list(range(1000))
    lengths = [length for _, length in segments[:-1]]
    assert all(length >= 5 for length in lengths) if variable else set(lengths) <= {bptt}
    seen = torch.cat([streams.batch(*segment)[0] for segment in segments], dim=1)
    assert torch.equal(seen, streams.batch(0, 1000)[0])


def test_variable_lengths_are_drawn_as_published():
    streams = TokenStreams(torch.zeros(700_001, dtype=torch.int64), 1)
    lengths = [length for _, length in streams.segments(70, variable=True, seed=0, epoch=0)[:-1]]
    full = [length for length in lengths if length > 52]
    half = [length for length in lengths if length <= 52]
    # About 10,000 draws; int() cuts half a token on average.
    assert len(half) / len(lengths) == pytest.approx(0.05, abs=0.008)
    assert statistics.mean(full) == pytest.approx(69.5, abs=0.25)
    assert statistics.mean(half) == pytest.approx(34.5, abs=1.0)
    assert statistics.stdev(full) == pytest.approx(5.0, abs=0.2)


def test_segments_are_a_function_of_seed_and_epoch():
    streams = TokenStreams(torch.arange(3001), 2)
    plans = {
        (seed, epoch): streams.segments(20, variable=True, seed=seed, epoch=epoch)
        for seed in (0, 1, 11)
        for epoch in (0, 1, 11)
    }
    torch.rand(3)  # the global generator has no say
    for (seed, epoch), plan in plans.items():
        assert streams.segments(20, variable=True, seed=seed, epoch=epoch) == plan
    assert len({tuple(plan) for plan in plans.values()}) == 9
    # Fixed for good: a checkpoint of today must go on tomorrow, on another machine.
    assert [length for _, length in plans[0, 0][:6]] == [24, 9, 18, 22, 30, 23]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 50, 99, 100, 101, 1000])
@pytest.mark.parametrize("bptt", [1, 6, 10, 1000])
def test_evaluation_holds_every_target_once(batch_size, bptt):
    text = torch.arange(101)
    batches = list(evaluation_batches(text, batch_size, bptt))
    tokens = torch.cat([batch[0] for batch in batches], dim=1)
    target = torch.cat([batch[1] for batch in batches], dim=1)
    kept = target != -100
    assert kept.sum() == len(text) - 1
    assert sorted(target[kept].tolist()) == list(range(1, 101))
    assert torch.equal(target[kept], tokens[kept] + 1)
    # Along a row the text goes on without a gap, so that a state may be carried.
    for row, keep in zip(target, kept, strict=True):
        steps = row[keep]
        assert (steps.diff() == 1).all()
        assert not keep[len(steps) :].any()
    assert all(batch[0].shape[1] <= bptt for batch in batches)
    assert all((batch[1] != -100).any() for batch in batches)


def test_evaluation_in_pieces_equals_one_pass():
    torch.manual_seed(0)
    config = AWDLSTMConfig(embedding_size=4, hidden_sizes=(5,))
    model = build_model(config, _Head(5, 11), 11).double().eval()
    text = torch.randint(11, (42,))

    def total_loss(batch_size, bptt):
        total, state = torch.zeros((), dtype=torch.float64), ()
        for tokens, target in evaluation_batches(text, batch_size, bptt):
            output = model(tokens, target, state)
            state = output.state
            total += output.cross_entropy * (target != -100).sum()
        return total

    torch.testing.assert_close(total_loss(1, 7), total_loss(1, 100))
    torch.testing.assert_close(total_loss(4, 3), total_loss(4, 100))


class _Head(torch.nn.Linear):
    def loss(self, input, target):
        return torch.nn.functional.cross_entropy(self(input).flatten(0, -2), target.flatten())


def test_smallest_text():
    assert [tuple(part.tolist() for part in b) for b in evaluation_batches(torch.tensor([4, 9]), 8, 8)] == [
        ([[4]], [[9]])
    ]
    assert TokenStreams(torch.tensor([4, 9]), 1).batch(0, 1)[1].tolist() == [[9]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 10}, LabError, "10 tokens, too few for 10 streams"),
        ({"batch_size": 0}, LabError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 3, "world_size": 2}, LabError, "multiple of the 2 processes, got 3"),
        ({"batch_size": 2, "world_size": 2, "rank": 2}, ValueError, "rank"),
        ({"batch_size": 2, "tokens": torch.zeros(4)}, ValueError, "tokens must be integers"),
        ({"batch_size": 2, "tokens": torch.zeros(4, 2, dtype=torch.int64)}, ValueError, r"\(4, 2\)"),
        ({"batch_size": 1, "tokens": torch.zeros(0, dtype=torch.int64)}, LabError, "0 tokens"),
    ],
)
def test_bad_streams(options, error, message):
    with pytest.raises(error, match=message):
        TokenStreams(**{"tokens": torch.arange(10), **options})


def test_bad_requests():
    streams = TokenStreams(torch.arange(11), 2)
    for start, length in ((-1, 2), (0, 6), (5, 1), (0, 0)):
        with pytest.raises(ValueError, match="start and length"):
            streams.batch(start, length)
    with pytest.raises(LabError, match="bptt"):
        streams.segments(0, variable=False, seed=0, epoch=0)
    with pytest.raises(LabError, match="at least two"):
        evaluation_batches(torch.arange(1), 1, 1)
    with pytest.raises(LabError, match="batch_size"):
        evaluation_batches(torch.arange(9), 0, 1)
    with pytest.raises(LabError, match="bptt"):
        evaluation_batches(torch.arange(9), 1, 0)
    with pytest.raises(ValueError, match="integers"):
        evaluation_batches(torch.rand(9), 1, 1)
