"""A training step of a transformers model, unfused, with uncork's fused loss, with an attached PLIF, with TRL's head.

    python benchmarks/huggingface.py --out results/hf/cost

A one-block Llama of random weights, so that the output layer is most of the step, at vocabularies and widths of models
that people fine-tune. Whole steps (forward and backward) that take turns in one process, and what a fresh process that
makes two of them holds at most, above what it held before them. TRL's own fused head (`add_fused_lm_head`) is left out
where trl is not installed. Writes cost.csv, table.csv and provenance.json.
"""

import argparse
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from train_step import in_fresh_process, write  # type: ignore[import-not-found]
from transformers import LlamaConfig, LlamaForCausalLM

from uncork.hf import attach_head, fuse_loss
from uncork.lab.experiments.bench.tables import quantiles, with_quartiles
from uncork.lab.experiments.bench.timing import interleave
from uncork.lab.machine import cores, resident

# V and D of: SmolLM2-135M, Gemma-3-270M, Qwen3-0.6B.
PLACES = {"V=49,152 D=576": (49_152, 576), "V=262,144 D=640": (262_144, 640), "V=151,936 D=1,024": (151_936, 1024)}
TOKENS = 1024
CONTENDERS = ("transformers", "fused", "plif", "trl")
TITLES = {
    "transformers": "transformers' own loss",
    "fused": "fuse_loss",
    "plif": 'attach_head("plif")',
    "trl": "TRL's fused head",
}


@dataclass
class Step:
    """One forward and backward of a model on the same tokens."""

    model: Any
    options: dict[str, Any]

    def clear(self) -> None:
        self.model.zero_grad()

    def run(self) -> None:
        self.model(**self.options).loss.backward()


def build(place: str, contender: str, tokens: int) -> Step:
    vocab_size, width = PLACES[place]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=width, intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=width // 64, tie_word_embeddings=True, max_position_embeddings=tokens,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    ids = torch.randint(vocab_size, (1, tokens))
    options: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if contender == "fused":
        fuse_loss(model)
    elif contender == "plif":
        attach_head(model, "plif")
    elif contender == "trl":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
        options["fused_lm_head"] = True
    return Step(model, options)


def measure(place: str, rounds: int, tokens: int) -> list[dict[str, Any]]:
    """One row a contender: milliseconds a step, the ratio to transformers' own of the same round, MiB."""
    there = [name for name in CONTENDERS if name != "trl" or find_spec("trl")]
    times, _ = interleave({name: build(place, name, tokens) for name in there}, rounds)  # type: ignore[misc]
    rows = []
    for name, own in times.items():
        ratio = quantiles([seconds / times["transformers"][turn] for turn, seconds in own.items()])
        rows.append(
            {
                "place": place,
                "contender": name,
                "tokens": tokens,
                "milliseconds": round(1e3 * quantiles(list(own.values()))["median"], 1),
                **{f"ratio_{key}": round(value, 3) for key, value in ratio.items()},
                "peak_mib": _peak_mib(place, name, tokens),
                "rounds": rounds,
            }
        )
    return rows


def _peak_mib(place: str, name: str, tokens: int) -> int:
    """Of a fresh process that makes two steps, above what it held with the model and its gradients' room."""
    task = json.dumps([place, name, tokens, torch.get_num_threads()])
    return in_fresh_process(__file__, task)


def print_peak(task: str) -> None:
    """The part of the fresh process."""
    place, name, tokens, threads = json.loads(task)
    torch.set_num_threads(threads)
    step = build(place, name, tokens)
    before, of_building = resident("VmRSS"), resident("VmHWM")
    for _ in range(2):
        step.run()
    if resident("VmHWM") == of_building:
        raise SystemExit("the peak is that of building the model, not of a step: take more tokens")
    print(round((resident("VmHWM") - before) / 2**20))


def display_table(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a place and contender: milliseconds, the ratio to transformers with its quartiles, and MiB."""
    return pd.DataFrame(
        {
            "V, D": row["place"].replace("V=", "").replace(" D=", "; "),
            "loss": TITLES[row["contender"]],
            "ms": f"{row['milliseconds']:,.0f}",
            "over transformers": with_quartiles({key: row[f"ratio_{key}"] for key in ("q1", "median", "q3")}, 2),
            "peak MiB": f"{row['peak_mib']:,}",
        }
        for row in rows.to_dict("records")
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/hf/cost"))
    parser.add_argument("--rounds", type=int, default=5, help="after one to warm up")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--quick", action="store_true", help="16 tokens, two rounds")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        return print_peak(arguments.peak)
    torch.set_num_threads(arguments.threads)
    rounds, tokens = (2, 16) if arguments.quick else (arguments.rounds, arguments.tokens)
    rows = []
    for place in PLACES:
        rows += measure(place, rounds, tokens)
        costs = pd.DataFrame(rows)
        arguments.rounds = rounds
        write(arguments, "cost", costs, display_table(costs))


if __name__ == "__main__":
    main()
