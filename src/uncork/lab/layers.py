"""Layers of language models that need no settings, and so neither pydantic nor the rest of the laboratory.

Shapes in comments: B batch, T time, D features, H hidden units.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def locked_dropout(input: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout of input (B, T, D) with one mask for all time steps, drawn for each sequence and feature."""
    if not training or probability == 0.0:
        return input
    keep = 1.0 - probability
    return input * input.new_empty(input.shape[0], 1, input.shape[2]).bernoulli_(keep).div_(keep)


def embedded(embedding: nn.Embedding, tokens: Tensor, probability: float, training: bool) -> Tensor:
    """Embeddings of tokens (B, T), whole words of which are dropped with this probability."""
    found: Tensor = embedding(tokens)
    if not training or probability == 0.0:
        return found
    keep = 1.0 - probability
    # One draw per word of the vocabulary: all occurrences of a word in the batch are dropped together.
    mask = found.new_empty(embedding.num_embeddings).bernoulli_(keep).div_(keep)
    return found * mask[tokens].unsqueeze(-1)


class WeightDropLSTM(nn.Module):
    """One LSTM layer, batch first, whose hidden-to-hidden matrix is dropped element by element (DropConnect).

        weight_hh' = weight_hh * mask / (1 - p),  one mask for all time steps of a call; no mask in evaluation

    It owns plain parameters, initialised as in nn.LSTM, and hands the dropped matrix to torch.lstm as an ordinary
    tensor: autograd reaches the raw weight, and no parameter is swapped behind a module's back.

    Args:
        in_features: size D of the input.
        hidden_size: number H of hidden units.
        weight_drop: the probability p, in [0, 1).
    """

    def __init__(self, in_features: int, hidden_size: int, weight_drop: float = 0.0) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weight_drop = weight_drop
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, in_features))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size))
        self.bias_ih = nn.Parameter(torch.empty(4 * hidden_size))
        self.bias_hh = nn.Parameter(torch.empty(4 * hidden_size))
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -(hidden_size**-0.5), hidden_size**-0.5)

    def forward(self, input: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output (B, T, H), hidden and cell (B, H) after input (B, T, D), from hidden and cell (B, H)."""
        weight_hh = F.dropout(self.weight_hh, self.weight_drop, self.training)
        weights = [self.weight_ih, weight_hh, self.bias_ih, self.bias_hh]
        if input.is_cuda:
            weights = in_one_block(weights)
        plain = lacks_bfloat16(input.device)
        if plain:
            input, hidden, cell = input.float(), hidden.float(), cell.float()
        state = (hidden.unsqueeze(0), cell.unsqueeze(0))
        with torch.autocast("cpu", enabled=False) if plain else nullcontext():
            output, hidden, cell = torch.lstm(input, state, weights, True, 1, 0.0, self.training, False, True)
        return output, hidden.squeeze(0), cell.squeeze(0)

    def extra_repr(self) -> str:
        return f"{self.weight_ih.shape[1]}, {self.hidden_size}, weight_drop={self.weight_drop}"


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether autocast asks a CPU for a bfloat16 LSTM that it does not have (x86 without AVX-512): torch raises then.

    Such a CPU computes in float32, which is more exact and no slower there.
    """
    return (
        device.type == "cpu"
        and torch.is_autocast_enabled("cpu")
        and torch.get_autocast_dtype("cpu") == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def in_one_block(weights: list[Tensor]) -> list[Tensor]:
    """The same weights as views of one new block of memory, in their order; autograd goes through.

    cuDNN wants a layer's weights side by side. It copies them at every call when they are not, and warns about it.
    """
    block = torch.cat([weight.flatten() for weight in weights])
    parts = torch.split(block, [weight.numel() for weight in weights])
    return [part.view_as(weight) for part, weight in zip(parts, weights, strict=True)]
