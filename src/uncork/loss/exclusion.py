"""Words that must not be ranked."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uncork.logit_functions.operations import readable
from uncork.messages import position


@dataclass(frozen=True)
class Exclusion:
    """Which words a ranking leaves out: a mask (V,) or (N, V), or ids (N, m), -1 for none, of N tokens over V words."""

    mask: Tensor | None
    ids: Tensor | None

    @classmethod
    def build(
        cls, exclude: Tensor, leading: tuple[int, ...], vocab_size: int, device: torch.device, k: int
    ) -> "Exclusion":
        """Checks the argument `exclude` of `Head.topk`, and on a CPU that k words are left for every token.

        Args:
            exclude: integers (..., m), -1 for none, or booleans (V,) or (..., V), for tokens of the shape `leading`.
        """
        if not isinstance(exclude, Tensor):
            raise TypeError(f"exclude: expected a Tensor of ids or a boolean mask, got {type(exclude).__name__}")
        if exclude.device != device:
            raise ValueError(f"exclude: expected device {device} as the input, got {exclude.device}")
        shape = tuple(exclude.shape)
        checked = readable(exclude)
        if exclude.dtype == torch.bool:
            if shape not in ((vocab_size,), (*leading, vocab_size)):
                raise ValueError(
                    f"exclude: expected a mask of shape ({vocab_size},) or {(*leading, vocab_size)}, got {shape}"
                )
            mask = exclude if exclude.dim() == 1 else exclude.reshape(-1, vocab_size)
            if checked:
                _check_left(vocab_size - mask.sum(-1).reshape(-1), k, vocab_size, shape[:-1])
            return cls(mask, None)
        if exclude.is_floating_point() or exclude.is_complex():
            raise TypeError(f"exclude: expected integers (ids) or booleans (a mask), got {exclude.dtype}")
        if exclude.dim() != len(leading) + 1 or shape[:-1] != leading:
            tokens = ", ".join(map(str, (*leading, "m")))
            raise ValueError(f"exclude: expected ids of shape ({tokens}), a row for each token, got {shape}")
        ids = exclude.reshape(math.prod(leading), shape[-1]).long()
        if checked and ids.numel():
            wrong = (ids < -1) | (ids >= vocab_size)
            if bool(wrong.any()):
                where = int(wrong.int().argmax())
                got = f"{int(ids.reshape(-1)[where])}{position(where, shape)}"
                raise IndexError(f"exclude: expected ids in [0, {vocab_size}), or -1 to fill a row up, got {got}")
            different = 1 + (ids.sort(-1).values.diff() != 0).sum(-1) - (ids < 0).any(-1).int()
            _check_left(vocab_size - different, k, vocab_size, leading)
        return cls(None, ids)

    def best(self, scores: Tensor, k: int, span: slice) -> Tensor:
        """Ids (C, k) of the k highest scores that are not left out, of the tokens in the span; -1 where none is left.

        Args:
            scores: (C, V). One copy of them is made.
        """
        # An impossible word (-inf) still comes before an excluded one.
        shown = scores.detach().clamp(min=torch.finfo(scores.dtype).min)
        if self.ids is not None:
            ids = self.ids[span]
            # Where an id is -1, some word's score is lowered to +inf, which leaves it as it is.
            highest = torch.where(ids < 0, torch.inf, -torch.inf).to(shown.dtype)
            shown.scatter_reduce_(-1, ids.clamp(min=0), highest, "amin")
        elif self.mask is not None:
            shown.masked_fill_(self.mask if self.mask.dim() == 1 else self.mask[span], -torch.inf)
        values, ids = shown.topk(k, dim=-1)
        return ids.masked_fill(values == -torch.inf, -1)


def _check_left(left: Tensor, k: int, vocab_size: int, shape: tuple[int, ...]) -> None:
    """Raises unless k words are left of every token; shape: that of the tokens, () if they have one mask."""
    short = left < k
    if bool(short.any()):
        where = int(short.int().argmax())
        of = position(where, shape) if left.numel() > 1 else ""
        raise ValueError(
            f"k: expected at most {int(left[where])}, since exclude leaves no more of {vocab_size} words{of}, got {k}"
        )


def best(scores: Tensor, k: int, exclusion: Exclusion | None, span: slice) -> Tensor:
    """Ids (C, k) of the k highest scores (C, V); see `Exclusion.best`."""
    return scores.topk(k, dim=-1).indices if exclusion is None else exclusion.best(scores, k, span)


def take(values: Tensor, ids: Tensor) -> Tensor:
    """values (C, V) at ids (C, k), and -inf where an id is -1."""
    return values.gather(-1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)
