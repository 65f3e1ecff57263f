"""What is told of memory before a step is what a fresh process then needs."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import uncork
from uncork.lab.experiments.bench.contenders import Step, training_step
from uncork.lab.experiments.bench.memory import measurable, peak_of
from uncork.loss import tile_native
from uncork.loss.chunked import Chunked
from uncork.loss.implementations import IMPLEMENTATIONS
from uncork.loss.plan import Plan

MIB = 2**20
FUNCTIONS = {
    "softmax": lambda: None,
    "plif": lambda: uncork.PLIF(1000),
    "plif-100000": lambda: uncork.PLIF(100_000),
    "chain": lambda: uncork.Compose(uncork.Scale(1.3, learnable=True), uncork.PLIF(50), uncork.Softcap(30.0)),
    "module": nn.Softplus,
}
FAST = {"tokens": 96, "features": 256, "vocab": 36_000}
WIDE = {"tokens": 2048, "features": 400, "vocab": 33_278}
BFLOAT16 = {"dtype": "bfloat16", "scores_dtype": "float32"}


def options_of(case):
    """A case's shape, and its options as `estimate_memory` takes them."""
    options = {key: value for key, value in case.items() if key not in ("tokens", "features", "vocab")}
    for key in {"dtype", "scores_dtype"} & options.keys():
        options[key] = getattr(torch, options[key])
    options["logit_function"] = FUNCTIONS[options.pop("function", "softmax")]()
    return (case["tokens"], case["features"], case["vocab"]), options


def step(case):
    """The step that a case describes, on random numbers."""
    (tokens, features, vocab), options = options_of(case)
    dtype, components = options.pop("dtype", torch.float32), options.pop("num_components", 1)
    gradients, bias = options.pop("gradients", True), options.pop("bias", False)
    leading = (tokens,) if components == 1 else (tokens, components)
    leaves = {"input": torch.randn(*leading, features).to(dtype), "weight": torch.randn(vocab, features).to(dtype)}
    given = [*leaves.values()]
    if components > 1:
        leaves["prior"] = torch.randn(leading).to(dtype)
        given.append(leaves["prior"])
    if bias:
        leaves["bias"] = options["linear_bias"] = torch.randn(vocab).to(dtype)
    if options["logit_function"] is not None:
        leaves |= dict(options["logit_function"].named_parameters())
    for leaf in leaves.values():
        leaf.requires_grad_(gradients)
    target = torch.randint(vocab, (tokens,))
    call: Any = uncork.linear_cross_entropy if components == 1 else uncork.mixture_cross_entropy

    def loss():
        return call(*given, target, **options)

    return training_step(loss, leaves) if gradients else Step(loss, leaves)


def measure(case):
    """Bytes at the peak of a case's step in this process, after a small one."""
    torch.set_num_threads(1)
    step({**case, "tokens": 32, "vocab": 4096}).run()
    found = peak_of(step(case))
    return found["extra"] + found["gradients"]


def measured(case):
    """The same in a fresh process, in which what is freed is given back."""
    code = (
        "import json, sys; from tests.loss import test_memory_estimate as t; print(t.measure(json.loads(sys.argv[1])))"
    )
    root = Path(__file__).parents[2]
    paths = os.pathsep.join([str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", code, json.dumps(case)]
    return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def check(impl, case):
    if impl == "native" and tile_native.missing:
        pytest.skip(tile_native.missing)
    case = {**case, "impl": impl}
    shape, options = options_of(case)
    told = uncork.estimate_memory(*shape, **options).total
    assert told >= 50 * MIB
    assert measured(case) == pytest.approx(told, rel=0.1)


linux = pytest.mark.skipif(not measurable(), reason="resident memory is read from /proc")


@linux
@pytest.mark.parametrize(
    "case",
    [
        ("native", {"function": "plif"}),
        (
            "native",
            {**BFLOAT16, "scores_dtype": "bfloat16", "vocab": 150_000},
        ),  # one chunk, whose product is W's gradient
        ("torch", {**BFLOAT16, "bias": True}),
    ],
    ids=str,
)
def test_a_step_needs_what_was_told(case):
    check(case[0], {**FAST, **case[1]})


@linux
@pytest.mark.slow
@pytest.mark.parametrize("of", ["native", "torch"])
@pytest.mark.parametrize(
    "case",
    [
        *({"function": f, **dtype} for f in ("softmax", "plif") for dtype in ({}, BFLOAT16)),
        *({"function": f, **BFLOAT16, "scores_dtype": "bfloat16", "tokens": 512} for f in ("softmax", "plif")),
        {"function": "plif", "num_components": 4, "tokens": 512},
        {"function": "plif", **BFLOAT16, "num_components": 3, "bias": True, "tokens": 512},
        {"function": "plif-100000", "tokens": 1024},
        {"function": "chain", "tokens": 1024, "chunk_size": 512},
        {"function": "plif", "tokens": 1024, "memory_budget": 2**25},
        {"function": "plif", "tokens": 1024, "gradients": False, "chunk_size": 512},
    ],
    ids=str,
)
def test_steps_need_what_was_told(of, case):
    check(of, {**WIDE, **case})


@linux
@pytest.mark.slow
@pytest.mark.parametrize("function", ["softmax", "plif", "module"])
def test_the_reference_needs_what_was_told(function):
    check("reference", {"tokens": 256, "features": 400, "vocab": 30_000, "function": function})


def test_every_implementation_says_what_it_needs():
    for impl in IMPLEMENTATIONS:
        if impl == "triton" or (impl == "native" and tile_native.missing):
            continue
        for components in (1, 3):
            found = uncork.estimate_memory(100, 8, 50, impl=impl, num_components=components, bias=True)
            assert found.impl == impl
            assert found.total == found.scores + found.weight + found.gradients + found.other
            assert found.gradients == 4 * (100 * components * 8 + 50 * 8 + 50 + 100 * components * (components > 1))
            assert found.total > uncork.estimate_memory(100, 8, 50, impl=impl, gradients=False).total


def test_rows_are_those_that_the_walk_takes(chunked_impl, make_problem):
    problem = make_problem("plif", tokens=70, vocab=90, features=5, dtype=torch.float32)
    for options in ({}, {"chunk_size": 9}, {"memory_budget": 2**14}):
        plan = Plan.of(replace(problem.call(), **options), IMPLEMENTATIONS[chunked_impl].tiles)
        assert isinstance(IMPLEMENTATIONS[chunked_impl], Chunked)
        assert uncork.estimate_memory(70, 5, 90, impl=chunked_impl, **options).rows == plan.rows


def test_a_gpu_is_estimated_without_one():
    found = uncork.estimate_memory(4096, 64, 50_000, device="cuda", impl="torch", logit_function=uncork.PLIF())
    assert found.rows == 320
    pytest.importorskip("triton")
    found = uncork.estimate_memory(8192, 64, 152_000, device="cuda", logit_function=uncork.PLIF())
    assert (found.impl, found.rows) == ("triton", 2048)


def test_the_numbers_of_the_native_tile_are_those_of_its_source():
    source = (Path(tile_native.__file__).parent / "native" / "rows.cpp").read_text(encoding="utf-8")
    numbers = "constexpr int64_t kMostBlocks = 128, kFewestBlocks = 4, kNumbers = 1 << 20;"
    assert numbers in source
    assert (tile_native._MOST_BLOCKS, tile_native._FEWEST_BLOCKS, tile_native._MOST_SUMS) == (128, 4, 1 << 20)
    worker = (Path(tile_native.__file__).parent / "native" / "worker.h").read_text(encoding="utf-8")
    few = re.findall(r"pieces <= (\d+) \? 4 : pieces <= vocab / 2 \? 2 : 0", worker)
    assert few == [str(tile_native._FEW_PIECES)]


class Reads(nn.Module):
    """Needs values."""

    def forward(self, scores):
        return scores * float(scores.abs().max())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"tokens": 0}, ValueError),
        ({"in_features": 2.5}, ValueError),
        ({"vocab_size": True}, ValueError),
        ({"num_components": -1}, ValueError),
        ({"dtype": "float32"}, TypeError),
        ({"dtype": torch.int64}, ValueError),
        ({"device": "tpu"}, ValueError),
        ({"device": "meta"}, ValueError),
        ({"device": 0}, TypeError),
        ({"bias": torch.zeros(9)}, TypeError),
        ({"gradients": None}, TypeError),
        ({"logit_function": torch.tanh}, TypeError),
        ({"logit_function": Reads()}, ValueError),
        ({"chunk_size": 0}, ValueError),
        ({"memory_budget": 4}, ValueError),
        ({"memory_budget": 4096, "chunk_size": 3}, ValueError),
        ({"scores_dtype": torch.bfloat16}, ValueError),
        ({"impl": "nativ"}, ValueError),
    ],
)
def test_bad_input_is_named(options, error):
    with pytest.raises(error, match=f"^{next(iter(options))}: "):
        uncork.estimate_memory(**{"tokens": 7, "in_features": 3, "vocab_size": 9, **options})


@pytest.mark.parametrize("impl", ["native", "torch"])
def test_few_features_need_no_more_in_bfloat16(impl):
    """The rows that are raised share the room of the block of scores."""
    if impl == "native" and tile_native.missing:
        pytest.skip(tile_native.missing)
    whole = uncork.estimate_memory(512, 16, 10_000, impl=impl).total
    half = {"dtype": torch.bfloat16, "scores_dtype": torch.bfloat16}
    assert uncork.estimate_memory(512, 16, 10_000, impl=impl, **half).total <= 1.25 * whole
