"""How much memory the loss will need, told before it runs."""

from typing import cast

import torch
from torch import Tensor, nn

from uncork.arguments import positive_int
from uncork.loss.call import Call, check_scores_dtype, checked_chunk
from uncork.loss.function import check_function, module_state
from uncork.loss.implementations import IMPLEMENTATIONS, choose
from uncork.loss.memory import MemoryEstimate
from uncork.loss.stand_in import Described


def estimate_memory(
    tokens: int,
    in_features: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    num_components: int = 1,
    bias: bool = False,
    logit_function: nn.Module | None = None,
    chunk_size: int | None = None,
    memory_budget: int | None = None,
    scores_dtype: torch.dtype | None = None,
    impl: str | None = None,
    gradients: bool = True,
) -> MemoryEstimate:
    """Bytes that one forward and backward of the loss needs at its peak beyond its inputs, told before it runs.

    Of `linear_cross_entropy`, or `mixture_cross_entropy` for several components, with index targets and
    reduction="mean". With R rows of scores at once, N tokens, D features, K components, V words::

        total = scores (R V, times the blocks that live at once) + copy of W (0, D V or a part)
              + gradients (N K D + D V, in float32 or better) + tables and histograms

    The rows, blocks and dtypes are those that the implementation takes. Nothing of these sizes is allocated.

    Args:
        tokens: N, at least 1. in_features: D. vocab_size: V.
        dtype: of input and weight, floating.
        device: "cpu" or "cuda". No GPU is touched, nor need there be one; a GPU's figure was never measured.
        num_components: K; 1 is no mixture.
        bias: whether there is a linear_bias.
        logit_function, chunk_size, memory_budget, scores_dtype, impl: as in `linear_cross_entropy`.
        gradients: whether input, weight, bias, prior and those parameters of the function that require one get a
            gradient; False is a forward under `torch.no_grad()`.

    On a CPU, steps that need 50 MiB or more were measured within 10 % of it. Not in it: what torch's product keeps for
    itself (5 MiB, once a process); memory that was freed and the C library's allocator does not give back, which with
    impl="torch" may be more than all the rest (MALLOC_MMAP_THRESHOLD_=65536 in the environment makes glibc give it
    back); and copies of the rows that are left where some targets are ignored.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    >>> import torch, uncork
    >>> found = uncork.estimate_memory(2048, 400, 33_278, impl="torch")
    >>> found.rows, found.scores, found.gradients, round(found.total / 2**20)
    (32, 8519680, 56521600, 62)
    >>> half = uncork.estimate_memory(2048, 400, 33_278, dtype=torch.bfloat16, impl="torch")
    >>> half.gradients, round(half.total / 2**20)  # at the end: those in float32 are cast
    (84782400, 81)
    """
    n, features, vocab_size, k = (
        positive_int(name, value)
        for name, value in (
            ("tokens", tokens),
            ("in_features", in_features),
            ("vocab_size", vocab_size),
            ("num_components", num_components),
        )
    )
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {type(dtype).__name__}")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype: expected a floating dtype, got {dtype}")
    place = _checked_device(device)
    for name, value in (("bias", bias), ("gradients", gradients)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")

    def described(*shape: int) -> Tensor:
        return cast(Tensor, Described(shape, dtype, place))

    input = described(n, features) if k == 1 else described(n, k, features)
    check_function(logit_function)
    chunk_size, memory_budget = checked_chunk(chunk_size, memory_budget)
    check_scores_dtype(scores_dtype, input)
    call = Call(
        input,
        described(vocab_size, features),
        described(vocab_size) if bias else None,
        None if k == 1 else described(n, k),
        logit_function,
        None,
        chunk_size=chunk_size,
        memory_budget=memory_budget,
        scores_dtype=scores_dtype,
        module_state=module_state(logit_function),
    )
    serving = choose(impl, call)
    name = next(name for name, one in IMPLEMENTATIONS.items() if one is serving)
    return serving.memory(call, gradients)._replace(impl=name)


def _checked_device(device: object) -> torch.device:
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device: expected a device's name or a torch.device, got {type(device).__name__}")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device: expected "cpu" or "cuda", got {device!r}') from error
    if found.type not in ("cpu", "cuda"):
        raise ValueError(f'device: expected "cpu" or "cuda", got {str(device)!r}')
    return found
