"""A small modern decoder-only transformer: pre-norm, rotary positions, gated MLP, no biases.

RMSNorm: Zhang, Sennrich (2019), arXiv 1910.07467. Rotary positions: Su et al. (2021), arXiv 2104.09864.
SwiGLU: Shazeer (2020), arXiv 2002.05202. Shapes in comments: B batch, T time, D width, H heads, E = D / H.
"""

from typing import Literal, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from uncork.lab.errors import LabError
from uncork.lab.models.language_model import Backbone, BackboneConfig, BackboneOutput, require_tokens
from uncork.lab.validated import Share, Size, require

ROTARY_BASE = 10_000.0
INIT_STD = 0.02
NORM_EPS = 1e-6


class TransformerConfig(BackboneConfig):
    """Settings of a decoder-only transformer.

    >>> config = TransformerConfig(width=48, num_heads=4)
    >>> config.feature_size, config.hidden_size
    (48, 128)
    """

    kind: Literal["transformer"] = "transformer"
    width: Size = 256
    """Size of the word embeddings and of the residual stream."""
    depth: Size = 4
    """Number of blocks, each attention and MLP."""
    num_heads: Size = 4
    """Attention heads; each has width / num_heads features, an even number."""
    mlp_size: Size | None = None
    """Hidden units of the gated MLP. None: 8/3 of the width, rounded up to a multiple of 32."""
    max_length: Size = 512
    """Longest sequence (tokens) that a call accepts."""
    dropout: Share = 0.0
    """Dropout of the embedded words, of the attention weights and of what each block adds to the stream."""

    @model_validator(mode="after")
    def _require_pairs(self) -> Self:
        if self.width % (2 * self.num_heads):
            raise LabError(
                f"width must be a multiple of 2 * num_heads = {2 * self.num_heads} (rotary positions turn pairs of "
                f"features), got {self.width}"
            )
        return self

    @property
    def feature_size(self) -> int:
        return self.width if self.out_features is None else self.out_features

    @property
    def hidden_size(self) -> int:
        """Hidden units of the MLP, with the default worked out."""
        return self.mlp_size if self.mlp_size is not None else -(-8 * self.width // (3 * 32)) * 32

    def build(self, vocab_size: int) -> "Transformer":
        return Transformer(self, vocab_size)


def rotary_table(length: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (length, size / 2) of the angles position * base^(-2 i / size), on the device of `like`.

    They are made anew at each call, which is cheap, in float32 or better: a table kept in the module would be rounded
    when the module is cast to half precision.
    """
    dtype = torch.promote_types(like.dtype, torch.float32)
    rate = ROTARY_BASE ** (-torch.arange(0, size, 2, dtype=dtype, device=like.device) / size)
    angle = torch.outer(torch.arange(length, dtype=dtype, device=like.device), rate)
    return angle.cos(), angle.sin()


def rotate(input: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + E/2) of input (..., T, E) by the angles of cos and sin (T, E/2), which may be wider.

    The inner product of a query turned at position s and a key turned at position t depends on s - t alone.
    """
    first, second = input.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(input.dtype)


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.dropout = config.dropout
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, time, width = x.shape
        mixed = self.query_key_value(x).view(batch, time, 3, self.num_heads, width // self.num_heads)
        query, key, value = mixed.permute(2, 0, 3, 1, 4)  # each (B, H, T, E)
        attended = F.scaled_dot_product_attention(
            rotate(query, cos, sin),
            rotate(key, cos, sin),
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        out: Tensor = self.out(attended.transpose(1, 2).reshape(batch, time, width))
        return out


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.hidden_size, bias=False)
        self.out = nn.Linear(config.hidden_size, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        out: Tensor = self.out(F.silu(gate) * up)
        return out


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.mlp = GatedMLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class Transformer(Backbone):
    """Embedding, blocks, a last norm, and a linear map to `out_features` where asked. It carries no state.

    Matrices start normal with deviation 0.02, those that add to the residual stream with 0.02 / sqrt(2 depth), so that
    the stream's variance does not grow with the depth (GPT-2); the map to `out_features` keeps the variance.
    """

    def __init__(self, config: TransformerConfig, vocab_size: int) -> None:
        super().__init__()
        require("vocab_size", Size, vocab_size)
        self.config = config
        self.out_features = config.feature_size
        self.embedding = nn.Embedding(vocab_size, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        same = config.width == self.out_features
        self.projection = nn.Identity() if same else nn.Linear(config.width, self.out_features, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            std = INIT_STD
            if name == "projection.weight":
                std = self.config.width**-0.5
            elif name.endswith(".out.weight"):
                std = INIT_STD * (2 * self.config.depth) ** -0.5
            nn.init.normal_(parameter, std=std)

    def initial_state(self, batch_size: int) -> tuple[Tensor, ...]:
        return ()

    def forward(self, tokens: Tensor, state: tuple[Tensor, ...] = ()) -> BackboneOutput:
        """Features of tokens (B, T). Raises LabError for more than `max_length` tokens, ValueError for a state."""
        require_tokens(tokens)
        time = tokens.shape[1]
        if state:
            raise ValueError(f"state must be empty: a transformer carries none, got {len(state)} tensors")
        if time > self.config.max_length:
            raise LabError(f"the transformer reads at most max_length = {self.config.max_length} tokens, got {time}")
        x = self.dropout(self.embedding(tokens))
        cos, sin = rotary_table(time, self.config.width // self.config.num_heads, like=x)
        for block in self.blocks:
            x = block(x, cos, sin)
        features = self.projection(self.norm(x))
        wide = torch.promote_types(features.dtype, torch.float32)
        return BackboneOutput(features, (), features.new_zeros((), dtype=wide))
