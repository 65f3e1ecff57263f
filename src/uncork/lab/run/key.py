"""What identifies a run: the record of everything that decides its numbers, its key, and how two records differ.

A record holds plain JSON:

    rules                             the version of the rules by which these settings were trained
    settings, model, training, head   every setting, resolved: a preset or a head is values here, not a name
    text                              {"sha256": ...} of what was read, and counts of it for a person to read
    asked                             the settings as they were given, to explain differences by

The key is a digest of all but `asked` and the counts. Machine, threads and versions of libraries are not in it: they
change numbers by rounding only (a GPU also by its own random numbers for dropout), and are kept in result.json.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

FORM = 1
"""Version of how keys are made: to be raised when the same record should get another key."""
LATER: dict[str, Any] = {"PLIF.unit_slope_at": 0.0, "settings.function_start": 0.0}
"""Settings that records gained later, by the end of their dotted names (as "training.decay" or "PLIF.unit_slope"), with
the value that all earlier runs had. At that value they are left out of the key, so that earlier keys stay."""
RECORD = "record"
"""The field of config.json that holds the record of the run."""
_MOST = 6
_TEXT_FIELDS = ("corpus", "tokenization", "vocab_size", "min_count", "max_train_tokens")


def key_of(record: Mapping[str, Any]) -> str:
    """The key of a record: 16 hexadecimal digits, the same only for records that decide the same numbers.

    >>> key_of({"rules": 1, "settings": {"lr": 1}}) == key_of({"settings": {"lr": 1.0}, "rules": 1, "asked": {}})
    True
    """
    return hashlib.sha256(json.dumps([FORM, _decisive(record)], sort_keys=True).encode()).hexdigest()[:16]


def differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The differences of two records, one phrase each: the setting, what it was and what it is; [] for equal ones."""
    old, new = _decisive(was), _decisive(now)
    changed = [path for path in {**old, **new} if old.get(path, "absent") != new.get(path, "absent")]
    asked = (flat(was.get("asked", {})), flat(now.get("asked", {})))
    told: dict[str, None] = {}
    for path in changed:
        for phrase in _explained(path, old.get(path, "absent"), new.get(path, "absent"), asked, (was, now)):
            told[phrase] = None
    return list(told)


def told(differences: list[str]) -> str:
    """The first of the differences in one line, and the number of further ones."""
    more = f"; and {len(differences) - _MOST} more" if len(differences) > _MOST else ""
    return "; ".join(differences[:_MOST]) + more


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The leaves of nested values by dotted name, as JSON text in which 1.0 is 1: 4 and 4.0 are the same setting.

    The options of a spec, {"name": ..., "options": ...}, get its name in theirs.

    >>> flat({"sizes": [8], "function": {"name": "Softcap", "options": {"cap": 30.0}}})
    {'sizes': '[8]', 'function.name': '"Softcap"', 'function.Softcap.cap': '30'}
    """
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
            found |= flat({str(place): item for place, item in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            spec = name == "options" and isinstance(values.get("name"), str)
            found |= flat(value, f"{prefix}{values['name'] if spec else name}.")
        else:
            found[prefix + name] = json.dumps(_whole_as_int(value))
    return found


def _decisive(record: Mapping[str, Any]) -> dict[str, str]:
    """The values, by dotted name, of which the key is a digest."""
    kept = {name: value for name, value in record.items() if name not in ("asked", "text")}
    if "text" in record:
        kept["text"] = {"sha256": record["text"]["sha256"]}
    later = [(f".{name}", json.dumps(_whole_as_int(value))) for name, value in LATER.items()]
    return {
        path: value
        for path, value in flat(kept).items()
        if not any(f".{path}".endswith(end) and value == before for end, before in later)
    }


def _explained(
    path: str,
    was: str,
    now: str,
    asked: tuple[dict[str, str], dict[str, str]],
    records: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> list[str]:
    """The phrases for one value that differs; they name the setting given for it, else the head or preset it is of."""
    group, _, leaf = path.partition(".")
    given = {**asked[0], **asked[1]}
    if group == "rules":
        return [f"the version of the rules was {was}, is {now}"]
    if group == "text":
        behind = "--corpus" if "corpus" in given else "the targets"
        return _asked(asked, _TEXT_FIELDS) or [f"the text behind {behind} has changed{_counts(*records)}"]
    if group == "head":
        names = [name for name in given if name == "head" or name.startswith("head_options.")]
        name = json.loads(asked[1].get("head", '"softmax"'))
        return _asked(asked, names) or [f"head {name}: {leaf} was {was}, is {now}"]
    own = {"model": ("model_options",), "training": ("training_options",), "settings": ()}.get(group, ())
    for name in ("in_features" if path == "model.out_features" else leaf, *(f"{options}.{leaf}" for options in own)):
        if name in given or (group == "settings" and name not in ("epochs", "function_clip")):
            return [f"{name} was {was}, is {now}"]
    if asked[0].get("preset") != asked[1].get("preset"):
        return _asked(asked, ["preset"])
    if leaf == "function_clip":
        return []  # it follows from clip, which has its own phrase
    preset = json.loads(asked[1].get("preset", "null"))
    return [f"preset {preset}: {'training' if group == 'settings' else group}.{leaf} was {was}, is {now}"]


def _asked(asked: tuple[dict[str, str], dict[str, str]], names: Any) -> list[str]:
    """The phrases for those of the settings `names` that were given differently."""
    was, now = ({**dict.fromkeys(names, "not given"), **given} for given in asked)
    return [f"{name} was {was[name]}, is {now[name]}" for name in names if was[name] != now[name]]


def _counts(was: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first count of the text that differs, to show that it is another text."""
    there, here = flat(was["text"]), flat(now["text"])
    for name, count in here.items():
        if name != "sha256" and there.get(name, count) != count:
            return f" ({name} was {there[name]}, is {count})"
    return ""


def _whole_as_int(value: object) -> object:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list | tuple):
        return [_whole_as_int(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _whole_as_int(item) for key, item in value.items()}
    return value
