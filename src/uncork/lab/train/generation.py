"""Text from a model, drawn from the exact distribution of its head."""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor

from uncork.heads import Head
from uncork.lab.data.corpora import encode_text
from uncork.lab.data.tokenization import Tokenizer
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.lab.models.language_model import require_non_negative, require_size
from uncork.lab.train.evaluation import evaluation_mode

DEFAULT_WINDOW = 64


def generate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str = "",
    *,
    max_tokens: int = 100,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    window: int = DEFAULT_WINDOW,
) -> str:
    """The prompt, as the tokenizer writes it, and what the model says next. Arguments as in `sample_ids`.

    Words of the prompt that are not in the vocabulary become ``<unk>``. An empty prompt is the beginning of a line.
    """
    ids = prompt_ids(tokenizer, prompt)
    sampled = sample_ids(
        model,
        ids or [tokenizer.eos_id],
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        window=window,
    )
    return tokenizer.decode([*ids, *sampled])


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; it ends in ``<eos>`` only where the prompt ends its line.

    >>> from uncork.lab.data.tokenization import WordTokenizer
    >>> tokenizer = WordTokenizer(["<unk>", "<eos>", "the", "war"], "raw")
    >>> prompt_ids(tokenizer, "The cold war"), prompt_ids(tokenizer, "The war\\n")
    ([2, 0, 3], [2, 3, 1])
    """
    ids: list[int] = encode_text(tokenizer, prompt)[0].tolist()
    return ids if prompt.endswith("\n") else ids[:-1]


def sample_ids(
    model: LanguageModel,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    window: int = DEFAULT_WINDOW,
) -> Iterator[int]:
    """Sample one token after another.

        p_v proportional to P(v | tokens so far)^(1 / temperature),   over the words that top_k and top_p leave

    P is the head's whole distribution, its logit function and its mixture included. Without options the samples come
    from P itself.

    Args:
        model: on any device. An LSTM carries its state on; a transformer reads the last `window` tokens again.
        prompt: at least one id.
        max_tokens: how many tokens to sample.
        temperature: 1 is the model's own distribution, less is bolder, 0 always takes the likeliest word.
        top_k: keep the k likeliest words. None: all.
        top_p: of those, keep the fewest likeliest that hold this share of probability, in (0, 1]. None: all.
        seed: the same seed, the same text.
        window: how far back a transformer looks, in tokens; choose the bptt that it was trained with.

    Raises:
        LabError: a bad option, or an empty prompt.
    """
    _check_options(prompt, max_tokens, temperature, top_k, top_p, window)
    return _sample(model, list(prompt), max_tokens, temperature, top_k, top_p, seed, window)


def _sample(
    model: LanguageModel,
    ids: list[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    window: int,
) -> Iterator[int]:
    device = next(model.parameters()).device
    head = cast(Head, model.head)
    generator = torch.Generator().manual_seed(seed)
    state: tuple[Tensor, ...] = ()
    carries_state = bool(model.initial_state(1))
    unread = ids
    for _ in range(max_tokens):
        with torch.no_grad(), evaluation_mode(model):
            tokens = torch.tensor([unread if carries_state else ids[-window:]], device=device)
            features, state = model.features(tokens, state)
            chosen = _choose(head, features[0, -1], temperature, top_k, top_p, generator)
        ids.append(chosen)
        unread = [chosen]
        yield chosen


def _choose(
    head: Head,
    features: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator,
) -> int:
    """One word after features (D,)."""
    if temperature == 0:
        return int(head.predict(features))
    # Ranked by the head, which knows the order of words whose logits its function has made equal.
    log_prob, ids = head.topk(features, head.vocab_size if top_k is None else min(top_k, head.vocab_size))
    log_prob = log_prob.double().cpu()
    prob = ((log_prob - log_prob.max()) / temperature).softmax(-1)
    if top_p is not None:
        before = prob.cumsum(-1) - prob
        prob = torch.where(before < top_p, prob, 0.0)
    return int(ids[int(torch.multinomial(prob, 1, generator=generator))])


def _check_options(
    prompt: Sequence[int],
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    window: int,
) -> None:
    if not prompt:
        raise LabError("prompt must have at least one token; begin with the end of a line, <eos>")
    require_size("max_tokens", max_tokens)
    require_size("window", window)
    require_non_negative("temperature", temperature)
    if top_k is not None:
        require_size("top_k", top_k)
    if top_p is not None and not (isinstance(top_p, int | float) and math.isfinite(top_p) and 0 < top_p <= 1):
        raise LabError(f"top_p must be in (0, 1], got {top_p!r}")
