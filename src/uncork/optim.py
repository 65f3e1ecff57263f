"""An optimiser's parameter groups: what decays, and what has a learning rate of its own."""

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any, Never

from torch import Tensor, nn

from uncork.logit_functions import LogitFunction
from uncork.messages import kind_of, unknown_options

DECAYS = ("matrices", "all")
_OPTIONS = ("lr", "weight_decay", "decay", "function_lr_scale", "output_lr_scale", "groups")
_NORM = re.compile(r"Norm(\d+d)?$")
# Common names of embeddings without "embed" in them.
_EMBEDDING_NAMES = {"emb", "wte", "wpe"}

Named = dict[str, nn.Parameter]


def parameter_groups(
    model: nn.Module | Iterable[tuple[str, nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    decay: str = "matrices",
    function_lr_scale: float = 1.0,
    output_lr_scale: float = 1.0,
    groups: Sequence[Mapping[str, Any]] = (),
    **others: Never,
) -> list[dict[str, Any]]:
    """An optimiser's groups: weight decay for matrices alone, own learning rates for logit functions and output layer.

    Weight decay would pull a learned function back to its start; the published PLIF trains its slopes at 0.02 beside
    20 or 30 for the rest (`function_lr_scale` = 1e-3). A larger rate for W and b alone is one half of what a fixed
    factor on the scores does under Adam (docs/math.md, section 5), and leaves a trained model's logits as they are.
    Equivalent code, without the two factors and `groups`::

        no_decay = [p for p in parameters if p.dim() < 2 or is_embedding(p) or is_norm(p) or is_bias(p)]
        [{"params": others, "lr": lr, "weight_decay": weight_decay},
         {"params": no_decay, "lr": lr, "weight_decay": 0.0},
         {"params": of_functions, "lr": lr, "weight_decay": 0.0}]

    | name | what it holds | learning rate | weight decay |
    |---|---|---|---|
    | rest | all else | lr | weight_decay |
    | no_decay | of all else: biases, norms, embeddings, fewer than 2 dimensions | lr | 0 |
    | output | the heads' weight, where output_lr_scale is not 1 | lr * output_lr_scale | weight_decay |
    | output_no_decay | their bias, and their weight where it is an embedding's too | lr * output_lr_scale | 0 |
    | function | the logit functions' parameters | lr * function_lr_scale | 0 |

    An empty group is left out, and so are frozen parameters (requires_grad=False). A shared parameter is in one group.
    Within a group parameters keep the model's order.

    Args:
        model: a module that holds LogitFunctions, or heads with a function of your own; or named parameters, such as
            `model.named_parameters()`, which are told apart by their names alone: a function's has a module named
            `logit_function` in its path, a bias has "bias" in its last part, and an embedding has one of its last two
            parts with "embed" in it, or equal to "emb", "wte" or "wpe".
        lr: learning rate of all other parameters. weight_decay: of the matrices.
        decay: "matrices": no decay for parameters of fewer than two dimensions (biases, norms, scalars), for those
            whose own name has "bias" or "embed" in it, for the own parameters of modules whose class name ends in
            Norm, Norm1d, Norm2d ... and of nn.Embedding and nn.EmbeddingBag, output weights tied to them included.
            "all": decay for everything but the functions' parameters.
        function_lr_scale: factor on lr for the functions' parameters.
        output_lr_scale: factor on lr for weight and bias of the heads, tied embeddings included. It needs a module.
            Try 1, 4 and 16: which is best depends on the model and on lr, and a large one can do harm.
        groups: your own groups, as optimisers take them: `{"params": [...], "lr": ...}`. Their parameters are left out
            of the groups above. They come last, with the lr and weight_decay given here and the name "own" as defaults.
        others: none; an optimiser's own settings belong to it, or to one of `groups`.

    >>> from uncork import build_head
    >>> head = build_head("plif", 8, 100)
    >>> made = parameter_groups(head, lr=1e-3, weight_decay=0.1, function_lr_scale=2.0)
    >>> [(g["name"], len(g["params"]), g["lr"], g["weight_decay"]) for g in made]
    [('rest', 1, 0.001, 0.1), ('no_decay', 1, 0.001, 0.0), ('function', 1, 0.002, 0.0)]
    >>> made = parameter_groups(head.named_parameters(), lr=1e-3, groups=[{"params": [head.bias], "lr": 0.0}])
    >>> [(g["name"], len(g["params"]), g["lr"]) for g in made]
    [('rest', 1, 0.001), ('function', 1, 0.001), ('own', 1, 0.0)]

    Raises:
        TypeError: a rate or decay is no number; `model` is neither a module nor named parameters, or one of `groups` is
            no mapping with "params".
        ValueError: a negative number; an unknown `decay`; an output_lr_scale where no head trains its weight or bias; a
            parameter in two of `groups`, or in one but not in the model; a name given to two parameters.
    """
    for name in others:
        raise TypeError(
            f"{unknown_options('parameter_groups', [name], _OPTIONS)}; an optimiser's own settings go to it, as in "
            "AdamW(groups, ...), or into one of `groups`"
        )
    _check_numbers(
        lr=lr, weight_decay=weight_decay, function_lr_scale=function_lr_scale, output_lr_scale=output_lr_scale
    )
    if decay not in DECAYS:
        raise ValueError(f'decay: expected "matrices" or "all", got {decay!r}')
    named = _named(model)
    own = _own_groups(groups, named, lr, weight_decay)
    taken = {id(p) for group in own for p in _parameters_of(group["params"])}
    functions = _functions(model, named)
    output = _output(model) if output_lr_scale != 1 else {}
    undecayed = _undecayed(model, named) if decay == "matrices" else set()
    held: dict[str, list[nn.Parameter]] = {n: [] for n in ("rest", "no_decay", "output", "output_no_decay", "function")}
    for key, p in _in_order(named, output, functions):
        if key in taken or not p.requires_grad:
            continue
        if key in functions:
            held["function"].append(p)
        elif key in output:
            held["output_no_decay" if key in undecayed else "output"].append(p)
        else:
            held["no_decay" if key in undecayed else "rest"].append(p)
    if output_lr_scale != 1 and not held["output"] + held["output_no_decay"]:
        what = type(model).__name__ if isinstance(model, nn.Module) else "named parameters"
        raise ValueError(
            "output_lr_scale: expected a model with a head of this library that trains its weight or bias, "
            f"found none in {what}; uncork.LinearHead.from_linear(layer) makes one of an nn.Linear"
        )
    rates = {
        "output": lr * output_lr_scale,
        "output_no_decay": lr * output_lr_scale,
        "function": lr * function_lr_scale,
    }
    made: list[dict[str, Any]] = [
        {
            "name": name,
            "params": params,
            "lr": rates.get(name, lr),
            "weight_decay": weight_decay if name in ("rest", "output") else 0.0,
        }
        for name, params in held.items()
        if params
    ]
    return made + own


def _check_numbers(**numbers: Any) -> None:
    for name, number in numbers.items():
        if not isinstance(number, Real | Tensor):
            raise TypeError(f"{name}: expected a number, got {number!r}")
    if not all(0 <= number < float("inf") for number in numbers.values()):
        raise ValueError(
            f"{', '.join(numbers)}: expected numbers of at least 0, got {', '.join(map(str, numbers.values()))}"
        )


def _named(model: nn.Module | Iterable[tuple[str, nn.Parameter]]) -> Named:
    """Every parameter by name; a tied one has several names."""
    if isinstance(model, nn.Module):
        return dict(model.named_parameters(remove_duplicate=False))
    expected = "expected an nn.Module or pairs of (name, parameter), such as model.named_parameters()"
    if not isinstance(model, Iterable):
        raise TypeError(f"model: {expected}, got {kind_of(model)}")
    named: Named = {}
    for pair in model:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(f"model: {expected}, got one of {type(pair).__name__}")
        name, parameter = pair
        if not isinstance(parameter, nn.Parameter):
            raise TypeError(f"model: {expected}, got {name!r} of {type(parameter).__name__}")
        if named.setdefault(name, parameter) is not parameter:
            raise ValueError(f"model: expected one parameter a name, got two of {name!r}")
    return named


def _parameters_of(params: Iterable[Any]) -> list[nn.Parameter]:
    """Of a group's "params": parameters, or pairs of (name, parameter)."""
    return [p[1] if isinstance(p, tuple) else p for p in params]


def _own_groups(
    groups: Sequence[Mapping[str, Any]], named: Named, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """The caller's groups, checked."""
    names = {id(p): name for name, p in named.items()}
    seen: set[int] = set()
    own = []
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise TypeError(f'groups[{i}]: expected a mapping with "params", got {group!r}')
        params = group["params"]
        params = [params] if isinstance(params, nn.Parameter) else list(params)
        for j, p in enumerate(_parameters_of(params)):
            if not isinstance(p, nn.Parameter):
                raise TypeError(f"groups[{i}]: expected parameters, got {type(p).__name__} at position {j}")
            if id(p) not in names:
                raise ValueError(
                    f"groups[{i}]: expected parameters of the model, got another of shape {tuple(p.shape)} at {j}"
                )
            if id(p) in seen:
                raise ValueError(f"groups[{i}]: expected each parameter once, got {names[id(p)]!r} again")
            seen.add(id(p))
        own.append({"name": "own", "lr": lr, "weight_decay": weight_decay, **group, "params": params})
    return own


def _direct(module: nn.Module, names: Iterable[str] | None = None) -> dict[int, nn.Parameter]:
    """A module's own parameters, parametrised ones by their originals; `names` picks some, in that order."""
    parametrized = getattr(module, "parametrizations", {})
    found: dict[int, nn.Parameter] = {}
    for name in [*module._parameters, *parametrized] if names is None else names:
        origin = parametrized[name].parameters() if name in parametrized else [module._parameters.get(name)]
        found |= {id(p): p for p in origin if p is not None}
    return found


def _functions(model: Any, named: Named) -> dict[int, nn.Parameter]:
    """The logit functions' parameters."""
    if not isinstance(model, nn.Module):
        return {id(p): p for name, p in named.items() if "logit_function" in name.split(".")[:-1]}
    modules = list(model.modules())
    functions: list[nn.Module] = [m for m in modules if isinstance(m, LogitFunction)]
    functions += [f for m in modules if isinstance(f := getattr(m, "logit_function", None), nn.Module)]
    return {id(p): p for f in functions for p in f.parameters()}


def _output(model: Any) -> dict[int, nn.Parameter]:
    """Weight and bias of the heads."""
    if not isinstance(model, nn.Module):
        raise ValueError("output_lr_scale: expected 1 with named parameters, which do not say where the heads are")
    output: dict[int, nn.Parameter] = {}
    for head in model.modules():
        if hasattr(head, "logit_function"):
            output |= _direct(head, ("weight", "bias"))
    return output


def _undecayed(model: Any, named: Named) -> set[int]:
    """Biases, norms, embeddings, and what has fewer than two dimensions."""
    found: set[int] = set()
    for name, p in named.items():
        *_, holder, last = ("", *name.split("."))
        parts = [last] if isinstance(model, nn.Module) else [last, holder]
        embedding = any("embed" in part.lower() or part in _EMBEDDING_NAMES for part in parts)
        if p.dim() < 2 or "bias" in last or embedding:
            found.add(id(p))
    for module in model.modules() if isinstance(model, nn.Module) else ():
        # Only the module's own parameters: a block that begins with a norm may be called PreNorm and hold other layers.
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) or _NORM.search(type(module).__name__):
            found |= _direct(module).keys()
    return found


def _in_order(
    named: Named, output: dict[int, nn.Parameter], functions: dict[int, nn.Parameter]
) -> list[tuple[int, nn.Parameter]]:
    """Every parameter once: in the model's order, a head's weight before its bias, a function's in its own order."""
    every = {id(p): p for p in named.values()}
    special = output.keys() | functions.keys()
    rest = [(key, p) for key, p in every.items() if key not in special]
    return [*rest, *output.items(), *((key, p) for key, p in functions.items() if key not in output)]
