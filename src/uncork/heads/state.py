"""A head's state says what it was trained as, so that no other head loads its weights in silence."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uncork.logit_functions import Identity, LogitFunction
from uncork.logit_functions.base import table_dtype
from uncork.loss.function import apply_function, check_function
from uncork.messages import kind_of

KEY = "head_spec"
Definition = dict[str, Any]
_FUNCTION = "logit_function."
_OF_A_LINEAR = (
    "A state without head_spec is of an nn.Linear or a plain softmax: strict=False loads it into a head that keeps its "
    "logits, and leaves the function at its start (in a whole model too)."
)


class SelfDescribing(nn.Module):
    """A module whose state holds what decides its logits beside the tensors: the function, fixed factors, the mixture.

    It is a persistent buffer `head_spec`, the UTF-8 bytes of canonical JSON, which safetensors can hold and casts leave
    alone. Saving and comparing start from the live module and never from the buffer's bytes, which `to_empty()` loses.
    A head without function or mixture has none, and exchanges states with nn.Linear.
    """

    family: str
    """Name of the library's class, which says how components are mixed; subclasses and wrappers keep it."""
    logit_function: nn.Module | None
    latent_activation: str | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "logit_function":
            check_function(value)
        super().__setattr__(name, value)
        if name in ("logit_function", "latent_activation"):
            self._write_definition()

    def _definition(self) -> Definition | None:
        """What a loaded state is compared with; None if weight and bias alone decide the logits."""
        function = getattr(self, "logit_function", None)
        described: Any = None
        if isinstance(function, LogitFunction):
            described = None if isinstance(function, Identity) else function.definition()
        elif function is not None:
            described = {"module": f"{type(function).__module__}.{type(function).__qualname__}"}
        if described is None and self.family == "LinearHead":
            return None
        definition = {"head": self.family, "logit_function": described}
        if self.family != "LinearHead":
            definition["latent_activation"] = self.latent_activation
        return definition

    def _write_definition(self, device: torch.device | None = None) -> None:
        """Writes the live module's definition into the buffer, on its device or, if it is new, on the weight's."""
        definition = self._definition()
        present = self._buffers.pop(KEY, None)
        if definition is None:
            return
        if device is None:
            known = present if present is not None else next(self.parameters(), None)
            device = None if known is None else known.device
        self.register_buffer(KEY, _encode(definition).to(device))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._write_definition()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + KEY
        # torch does not load the definition: if it differs, our own error says so, with strict=False too.
        problem = self._problem(state_dict, prefix)
        if problem:
            error_msgs.append(problem)
        rest = {k: v for k, v in state_dict.items() if k != key}
        missing: list[str] = []
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing, unexpected_keys, [] if problem else error_msgs
        )
        found = key in state_dict or bool(problem)
        missing_keys.extend(k for k in missing if k != key or not found)
        first = next((v for k, v in rest.items() if k.startswith(prefix) and isinstance(v, Tensor)), None)
        assigned = first is not None and local_metadata.get("assign_to_params_buffers", False)
        self._write_definition(first.device if assigned and first is not None else None)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """nn.Module's; where a strict load lacks what an nn.Linear's state cannot have, the error says what to do."""
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            if strict and KEY not in state_dict and self._definition() is not None and "Missing key" in str(error):
                raise RuntimeError(f"{error}\n\t{_OF_A_LINEAR}") from None
            raise

    def _problem(self, state_dict: Mapping[str, Any], prefix: str) -> str:
        """Why the head would not give the logits that the state was trained with; empty if it would."""
        own = {k.removeprefix(prefix) for k in state_dict if k.startswith(prefix)}
        names = {*self._parameters, *self._buffers, *self._modules, KEY}
        own = {k for k in own if k.split(".")[0] in names or k.startswith(_FUNCTION)}
        mine = self._definition()
        if KEY not in own:
            return self._problem_without(own, prefix) if own and mine is not None else ""
        try:
            theirs = _decode(state_dict[prefix + KEY])
        except ValueError as error:
            return (
                f"{prefix}{KEY}: cannot be read ({error}): the state is damaged; when averaging states, copy head_spec "
                "unchanged"
            )
        if theirs is not None and theirs != mine:
            return (
                f"{prefix}{KEY}: the state was trained as {told(theirs)}, this head is {told(mine)}, and would give "
                f"its weights other logits. {_remedy(theirs)}"
            )
        there = {k for k in own if k.startswith(_FUNCTION)}
        here = set() if self.logit_function is None else {_FUNCTION + k for k in self.logit_function.state_dict()}
        if theirs is not None and there != here:
            return (
                f"{prefix}{KEY}: only one of state and head has {', '.join(sorted(there ^ here)[:3])}, so the function "
                "would not be the trained one"
            )
        return ""

    def _problem_without(self, own: set[str], prefix: str) -> str:
        """`_problem` of a state without a definition: an nn.Linear's, or one of uncork 0.1.0."""
        mine = told(self._definition())
        older = (
            "if it was written by uncork 0.1.0 for a head like this one, load "
            f"uncork.heads.convert_state_0_1(state, head{f', prefix={prefix!r}' if prefix else ''})"
        )
        if any(k.split(".")[0] in self._modules or k.startswith(_FUNCTION) for k in own):
            return f"{prefix}{KEY}: missing, so the state does not say that it was trained as {mine}; {older}"
        if self.family == "LinearHead" and keeps_logits(self.logit_function):
            return ""
        start = (
            "the layer keeps its logits in build_head with a function that starts as the identity (plif, say), and "
            "scale=1"
            if self.family == "LinearHead"
            else f"{self.family}.from_linear(linear, num_components=...) starts a mixture from its weights"
        )
        return (
            f"{prefix}{KEY}: missing, so the state is of an nn.Linear or a plain softmax, and this head, {mine}, "
            f"would give its weights other logits: {start}; {older}"
        )


def keeps_logits(function: nn.Module | None) -> bool:
    """Whether a function is the identity up to a constant on a grid; True on the meta device, which has no values."""
    if function is None or isinstance(function, Identity):
        return True
    tensors = [*function.parameters(), *function.buffers()]
    if any(t.device.type == "meta" for t in tensors):
        return True
    device = tensors[0].device if tensors else torch.device("cpu")
    wide = isinstance(function, LogitFunction) or any(t.dtype == torch.float64 for t in tensors)
    dtype = table_dtype(device) if wide else torch.float32
    with torch.no_grad():
        points = torch.linspace(-100, 100, 4001, dtype=dtype, device=device)
        moved = apply_function(function, points) - points
        return bool((moved - moved[2000]).abs().max() <= (1e-6 if dtype == torch.float64 else 1e-4))


def convert_state_0_1(state_dict: Mapping[str, Any], head: nn.Module, prefix: str = "") -> dict[str, Any]:
    """Adds the head's definition to a state that uncork 0.1.0 wrote, so that it loads with strict=True.

    Version 0.1.0 saved the tensors alone, so the state does not tell which head it belongs to: `head` has to.

    Args:
        state_dict: of a head, or of a model that holds it. head: built with the options that the state was trained with
            (those of its `spec()`). prefix: of the head's keys in the state, "lm_head." for instance.

    Returns:
        a new dict with the same tensors. A definition that the state has already is kept.

    >>> import torch
    >>> from uncork import build_head
    >>> old = {"weight": torch.randn(100, 8), "bias": torch.zeros(100)}
    >>> head = build_head("softcap", 8, 100, cap=15.0)
    >>> head.load_state_dict(convert_state_0_1(old, head))
    <All keys matched successfully>

    Raises:
        TypeError: if the head is none of this library's.
    """
    if not isinstance(head, SelfDescribing):
        raise TypeError(f"head: expected a Head of uncork, got {kind_of(head)}")
    converted = dict(state_dict)
    definition = head._definition()
    if definition is not None:
        converted.setdefault(prefix + KEY, _encode(definition))
    return converted


def _encode(definition: Definition) -> Tensor:
    try:
        text = json.dumps(definition, sort_keys=True, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise TypeError(f"logit_function: expected options() in plain JSON, {error}") from error
    return torch.tensor(list(text.encode()), dtype=torch.uint8, device="cpu")


def _decode(stored: Any) -> Definition | None:
    """The definition in the buffer's bytes; None for a meta or fake tensor, which has no bytes."""
    if not isinstance(stored, Tensor):
        raise ValueError(f"expected a Tensor, got {type(stored).__name__}")
    if stored.device.type == "meta" or isinstance(stored, torch._subclasses.FakeTensor):
        return None
    # Rounded: a weighted mean of equal states is off by the last digits.
    definition = json.loads(bytes(round(byte) % 256 for byte in stored.flatten().tolist()).decode())
    if not isinstance(definition, dict):
        raise ValueError(f"expected an object, got {definition!r}")
    return definition


def told(definition: Definition | None) -> str:
    """A definition in words."""
    if definition is None:
        return "a LinearHead without a function (an nn.Linear)"
    function = definition.get("logit_function")
    activation = definition.get("latent_activation", "tanh")
    mixture = "" if activation == "tanh" else f", latent_activation={activation!r}"
    with_function = "without a function" if function is None else f"with {_told_function(function)}"
    return f"a {definition.get('head')} {with_function}{mixture}"


def _told_function(function: Any) -> str:
    if not isinstance(function, dict) or "name" not in function:
        return str(function.get("module", function)) if isinstance(function, dict) else str(function)
    options = function.get("options", {})
    parts = options.get("functions")
    if isinstance(parts, list):
        inside = ", ".join(map(_told_function, parts))
    else:
        inside = ", ".join(f"{key}={value!r}" for key, value in options.items())
    version = function.get("version", 1)
    return f"{function['name']}({inside})" + ("" if version == 1 else f" of version {version}")


def _remedy(theirs: Definition) -> str:
    """How to build the head that a state belongs to."""
    function = theirs.get("logit_function")
    parts = [function] if isinstance(function, dict) else []
    parts = parts[0].get("options", {}).get("functions", parts) if parts else []
    first = parts[0] if parts and isinstance(parts[0], dict) else {}
    options = first.get("options", {})
    fixed = first.get("name") == "Scale" and not options.get("learnable")
    scale = f"scale={options.get('factor')}, " if fixed else ""
    return (
        f"Load it into the head that it belongs to: build_head(..., {scale}...) with the options of its training, or "
        "head_from_spec(spec) of what that head's spec() gave"
    )
