"""Gives the rows of rows.jsonl the keys that know preset, head, rules and text by their content, and changes no number.

    UNCORK_DATA=FOLDER python results/lm/migrate_keys.py [FOLDER_OF_ROWS]

Run once, when keys came to hold more than settings by name. A row gets a record of everything that decided its numbers,
the key of that record, and a config that states what was not asked for then (no bias prior, no rate of its own for the
output layer, decay of all weights). Nothing is written unless all of this holds:

1. the old key is that of the row's settings, so that these resolve to what they did then;
2. the code of the commit that made the row resolves its settings to the same body, training and output layer;
3. the text has the vocabulary, the tokens of validation and test, and the bytes that the row's numbers tell of;
4. the keys are as many as before, and all else in every row is the same, byte for byte.

The column "run" of FOLDER/*/runs.csv gets the new keys too.
"""

import dataclasses
import hashlib
import importlib
import io
import json
import math
import multiprocessing
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from uncork.lab.errors import LabError
from uncork.lab.experiments.compare import Texts
from uncork.lab.run.files import atomic_write_text, plain
from uncork.lab.run.key import flat, key_of
from uncork.lab.train.config import TrainConfig

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
# What the versions that wrote these rows did, and had no setting for or another value by default.
THEN: dict[str, Any] = {"bias_prior": False, "output_lr_scale": 1.0}
OPTIONS_OF_LATER = {"PLIF.unit_slope": "false"}  # of output layers: what the code of before did
NEW_OF_TRAINING = ("bias_prior", "output_lr_scale", "decay")


def old_key(config: TrainConfig) -> str:
    """As version 0.1.0 made it: of the settings alone, a field that was new then left out at its default."""
    settings = {k: v for k, v in config.resolved().to_dict().items() if k not in TrainConfig.HARMLESS}
    if settings["output_lr_scale"] == 1:
        del settings["output_lr_scale"]
    return hashlib.sha256(json.dumps(plain(settings), sort_keys=True).encode()).hexdigest()[:16]


def resolved_then(commit: str, configs: list[dict[str, Any]]) -> list[list[Any]]:
    """Body, training and output layer of each config, by the code of that commit, in a process of its own."""
    archive = subprocess.run(["git", "archive", commit, "src"], cwd=ROOT, capture_output=True, check=True)
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
            tar.extractall(folder, filter="data")
        # Forked, so that torch need not be imported again.
        with multiprocessing.get_context("fork").Pool(1) as pool:
            return pool.apply(_resolve, (f"{folder}/src", configs))


def _resolve(source: str, configs: list[dict[str, Any]]) -> list[list[Any]]:
    for name in [name for name in sys.modules if name.split(".")[0] == "uncork"]:
        del sys.modules[name]
    sys.path.insert(0, source)
    importlib.invalidate_caches()
    of_then = importlib.import_module("uncork.lab.train.config")
    heads = importlib.import_module("uncork.heads")
    assert str(of_then.__file__).startswith(source)
    found = []
    for values in configs:
        config = of_then.TrainConfig.from_dict(values)
        preset = config.resolved_preset()
        head = heads.build_head(config.head, preset.model.feature_size, 4, **config.head_options).spec()
        del head["options"]["in_features"], head["options"]["vocab_size"]
        found.append(json.loads(json.dumps([preset.model.to_dict(), preset.training.to_dict(), head])))
    return found


def migrated(row: dict[str, Any], resolved: list[Any], texts: Texts) -> dict[str, Any]:
    """The row under its new key.

    Args:
        row: as it was. resolved: what `resolved_then` says of it.

    Raises:
        ValueError: it is not what its settings, the code of its commit and the text say.
    """
    then = TrainConfig(**{**THEN, **row["config"]})
    if old_key(then) != row["key"]:
        raise ValueError(f"{row['key']}: its settings have the key {old_key(then)}")
    config = TrainConfig(**{**THEN, **row["config"], "training_options": {"decay": "all"}})
    text = texts.of(config)
    require_text(row, text)
    model, training, head = resolved
    try:
        record = config.record(text)
    except LabError:  # an option of the output layer that is no more: as its commit has it
        record = {**dataclasses.replace(config, head="softmax", head_options={}).record(text), "head": head}
        print(f"{row['key']}: {config.head} {config.head_options} cannot be built any more; as its commit resolves it")
    del record["asked"], training["epochs"]
    now = {name: value for name, value in record["training"].items() if name not in NEW_OF_TRAINING}
    added = {path: value for path, value in flat(record["head"]).items() if path not in flat(head)}
    same_head = {**flat(head), **added} == flat(record["head"]) and all(
        any(path.endswith(f".{name}") and value == before for name, before in OPTIONS_OF_LATER.items())
        for path, value in added.items()
    )
    if [model, training] != [record["model"], now] or not same_head:
        raise ValueError(
            f"{row['key']}: commit {row['commit'][:10]} resolves it to {resolved}, and now it is "
            f"{[record['model'], now, record['head']]}"
        )
    rest = {name: value for name, value in row.items() if name not in ("key", "config")}
    return {"key": key_of(record), "config": config.asked(), "record": plain(record), **rest}


def require_text(row: dict[str, Any], text: dict[str, Any]) -> None:
    """Raise ValueError unless the row's numbers are of a text with these counts."""
    result = row["result"]
    found = {"vocab_size": result["vocab_size"]}
    expected = {"vocab_size": text["vocab_size"]}
    for split in ("valid", "test"):
        if split in result:
            scored, length = result[split], text["tokens"][split]
            found[f"tokens of {split}"], expected[f"tokens of {split}"] = scored["tokens"], length - 1
            if text["bytes"] is None:
                found[f"bits of {split}"], expected[f"bits of {split}"] = scored["bits_per_byte"], None
            else:
                bits = scored["cross_entropy"] * length / (text["bytes"][split] * math.log(2))
                if not math.isclose(bits, scored["bits_per_byte"], rel_tol=1e-5):  # rows hold six digits
                    raise ValueError(f"{row['key']}: {bits} bits per byte of {split}, its row has {scored}")
    if found != expected:
        raise ValueError(f"{row['key']}: is of a text with {found}, this one has {expected}")


def all_resolved_then(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """What the commit of each row resolves it to."""
    commits: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        commits.setdefault(row["commit"], []).append(place)
    found: dict[int, list[Any]] = {}
    for commit, places in commits.items():
        resolved = resolved_then(commit, [rows[place]["config"] for place in places])
        found |= dict(zip(places, resolved, strict=True))
    return [found[place] for place in range(len(rows))]


def main() -> None:
    """Reads, proves, writes, and says what was proved."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else HERE) / "rows.jsonl"
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    if any("record" in row for row in rows):
        raise SystemExit(f"{path}: has rows with a record already; it is migrated")
    texts, old_keys = Texts(None), [row["key"] for row in rows]
    resolved = all_resolved_then(rows)
    new = [migrated(row, then, texts) for row, then in zip(rows, resolved, strict=True)]
    commits = len({row["commit"] for row in rows})
    if len({row["key"] for row in new}) != len({row["key"] for row in rows}):
        raise SystemExit(f"{path}: two rows would come to have one key")
    written = [json.dumps(row) for row in new]
    compared = 0
    for line, row in zip(written, rows, strict=True):
        for name, value in json.loads(line).items():
            if name not in ("key", "config", "record"):
                if json.dumps(value) != json.dumps(row.pop(name)):
                    raise SystemExit(f"{row['key']}: {name} would change")
                compared += len(json.dumps(value))
        if row.keys() != {"key", "config"}:
            raise SystemExit(f"{row['key']}: {sorted(row)} would be lost")
    atomic_write_text(path, "".join(line + "\n" for line in written))
    keys = {was: is_now["key"] for was, is_now in zip(old_keys, new, strict=True)}
    for table in path.parent.glob("*/runs.csv"):  # whose column "run" has the keys
        atomic_write_text(table, re.sub(r"\b[0-9a-f]{16}\b", lambda key: keys.get(key[0], key[0]), table.read_text()))
    print(
        f"{path}: {len(new)} rows have new keys. The settings of all {len(new)} resolve to those of their old keys; "
        f"the code of all {commits} commits resolves them to the same body, training and output layer; vocabularies, "
        f"tokens and bytes are those of the texts; the {compared:,} bytes of all other fields are the same"
    )


if __name__ == "__main__":
    main()
