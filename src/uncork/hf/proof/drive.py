"""Drives chosen hidden states into a model's output layer, and leaves the model as it was.

Shapes in comments: B batch, T time, D features, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from uncork.heads.hooks import modes_kept
from uncork.hf.fusion import Fusion

Replace = Callable[[Tensor], Tensor]


class NotDriven(RuntimeError):
    """The model's forward takes neither the output layer's input nor the body's output from where they can be given."""


class Rows:
    """Gives its rows (B, T, D) in place of every input, and notes the inputs."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.inputs: list[Tensor] = []

    def __call__(self, input: Tensor) -> Tensor:
        self.inputs.append(input)
        if input.numel() != self.rows.numel():
            raise NotDriven(
                f"the output layer was given a tensor of shape {tuple(input.shape)}, where hidden states of shape "
                f"{tuple(self.rows.shape)} are to be driven into it"
            )
        return self.rows.view(input.shape)


class Steps:
    """Gives the next of its rows (S, B, D) in place of each input (B, T, D): one a step of `generate`."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self.taken = 0

    def __call__(self, input: Tensor) -> Tensor:
        row = self.rows[min(self.taken, len(self.rows) - 1)]
        self.taken += 1
        return row.view(*row.shape[:1], *[1] * (input.ndim - 2), row.shape[-1]).expand(input.shape).to(input.dtype)


class Drive:
    """A model whose output layer's input is replaced.

    Args:
        model, head: the model and its output layer. fusion: of a model that is fused or has a head of this library.
        inputs: what the forward takes beside labels.
    """

    def __init__(
        self, model: PreTrainedModel, head: nn.Module, fusion: Fusion | None, inputs: Mapping[str, Any]
    ) -> None:
        self.model, self.head, self.fusion, self.inputs = model, head, fusion, dict(inputs)
        self.past_the_head = False  # whether a forward with labels was driven at the body's output
        self._factor: float | None = None

    @contextmanager
    def at_head(self, replace: Replace) -> Iterator[None]:
        """Within, the output layer computes from replace(input)."""
        if self.fusion is not None:
            self.fusion.driver = replace
            try:
                yield
            finally:
                self.fusion.driver = None
            return
        hook = self.head.register_forward_pre_hook(lambda _, args: (replace(args[0]), *args[1:]))
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def at_body(self, rows: Tensor) -> Iterator[None]:
        """Within, the body's output is `rows`."""

        def replace(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (rows, *output[1:])
            output.last_hidden_state = rows
            return output

        hook = self.model.base_model.register_forward_hook(replace)
        try:
            yield
        finally:
            hook.remove()

    def forward(self, rows: Tensor, **with_labels: Any) -> Any:
        """The model's outputs, with rows (B, T, D) at the input of its output layer.

        Where the forward computes its loss past the output layer, without calling it, they are given as the output of
        the body.

        Raises:
            NotDriven: neither is possible.
        """
        driver = Rows(rows)
        with self.at_head(driver):
            outputs = self.model(**self.inputs, **with_labels)
        if driver.inputs:
            return outputs
        self.past_the_head = True
        with self.at_body(rows / self._factor_of_body(rows.detach())):
            return self.model(**self.inputs, **with_labels)

    def _factor_of_body(self, rows: Tensor) -> float:
        """What the model multiplies its body's output by before its output layer."""
        if self._factor is None:
            found = Rows(rows)
            found_input: list[Tensor] = found.inputs
            with torch.no_grad(), self.at_body(rows), self.at_head(found):
                self.model(**self.inputs)
            if not found_input:
                raise NotDriven("the forward calls its output layer neither with labels nor without")
            seen, given = found_input[0].double().flatten(), rows.double().flatten()
            factor = float(seen @ given / (given @ given))
            if not torch.allclose(seen, factor * given, rtol=0.05, atol=1e-6) or factor == 0:
                raise NotDriven(
                    "the forward with labels does not call the output layer, and changes the body's output before it "
                    "by more than a factor: give this path as loss="
                )
            self._factor = factor
        return self._factor

    def observed(self) -> tuple[Tensor, Any]:
        """The output layer's input (B, T, D) in the model's own forward without labels, and that forward's outputs.

        Raises:
            NotDriven: it is not called once a forward, with a hidden state for each token.
        """
        seen: list[Tensor] = []

        def look(input: Tensor) -> Tensor:
            seen.append(input.detach())
            return input

        with torch.no_grad(), self.at_head(look):
            outputs = self.model(**self.inputs)
        if not seen:
            raise NotDriven("the forward without labels does not call its output layer")
        shape = self.inputs["input_ids"].shape
        if seen[0].shape[:-1].numel() != shape.numel():
            raise NotDriven(
                f"the output layer was given a tensor of shape {tuple(seen[0].shape)}, where one hidden state for each "
                f"token of the input {tuple(shape)} was expected"
            )
        return seen[0].reshape(*shape, -1), outputs


@contextmanager
def untouched(model: PreTrainedModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within, parameters require gradients; afterwards modes, requires_grad and random numbers are as before."""
    wanted = [(parameter, parameter.requires_grad) for parameter in parameters]
    generation = vars(model).get("generation_config")
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=[device.index for device in devices]), modes_kept(model):
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)
            if generation is not None:
                model.generation_config = generation
