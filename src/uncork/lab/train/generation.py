"""Text from a model, drawn from the exact distribution of its head."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor

from uncork.heads import Head
from uncork.lab.data.corpora import encode_text
from uncork.lab.data.tokenization import Tokenizer
from uncork.lab.data.words import UNK, normalize, split_words
from uncork.lab.errors import LabError
from uncork.lab.models import LanguageModel
from uncork.lab.run.progress import told
from uncork.lab.train.evaluation import evaluation_mode
from uncork.lab.validated import NonNegative, Seed, Size, Validated, expects


class Sampling(Validated):
    """How words are drawn."""

    max_tokens: Size = 100
    """How many tokens to sample."""
    temperature: NonNegative = 1.0
    """1 is the model's own distribution, less favours likely words, 0 always takes the likeliest."""
    top_k: Size | None = None
    """Keep the k likeliest words. None: all."""
    top_p: Annotated[float, Field(gt=0, le=1), expects("in (0, 1]")] | None = None
    """Of those, keep the fewest likeliest that hold this share of probability. None: all."""
    seed: Seed = 0
    """The same seed, the same text."""
    window: Size = 64
    """How far back a transformer looks, in tokens; choose the bptt that it was trained with."""


def generate(model: LanguageModel, tokenizer: Tokenizer, prompt: str = "", **options: Any) -> str:
    """The prompt, as the tokenizer decodes it, and the model's continuation. Options: the fields of `Sampling`.

    Words of the prompt that are not in the vocabulary become ``<unk>``. An empty prompt is the beginning of a line.
    """
    ids = prompt_ids(tokenizer, prompt)
    sampled = sample_ids(model, ids or [tokenizer.eos_id], **options)
    return tokenizer.decode([*ids, *told(sampled, "sampling", Sampling(**options).max_tokens)])


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt; it ends in ``<eos>`` only where the prompt ends its line.

    >>> from uncork.lab.data.tokenization import WordTokenizer
    >>> tokenizer = WordTokenizer(["<unk>", "<eos>", "the", "war"], "raw")
    >>> prompt_ids(tokenizer, "The cold war"), prompt_ids(tokenizer, "The war\\n")
    ([2, 0, 3], [2, 3, 1])
    """
    try:
        ids: list[int] = encode_text(tokenizer, prompt)[0].tolist()
    except LabError as error:
        raise LabError(f"prompt: {error}") from None
    return ids if prompt.endswith("\n") else ids[:-1]


def unknown_words(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """The words of a prompt that the model reads as ``<unk>``, each once.

    >>> from uncork.lab.data.tokenization import WordTokenizer
    >>> unknown_words(WordTokenizer(["<unk>", "<eos>", "the", "war"], "raw"), "The cold, cold war")
    ['cold', ',']
    """
    text = normalize(prompt, tokenizer.style)
    words = split_words(text, tokenizer.style) if tokenizer.unk_id is not None else []
    read = zip(words, tokenizer.encode(text), strict=True) if words else ()
    return list(dict.fromkeys(word for word, number in read if number == tokenizer.unk_id and word != UNK))


def sample_ids(model: LanguageModel, prompt: Sequence[int], **options: Any) -> Iterator[int]:
    """Sample one token after another.

        p_v proportional to P(v | tokens so far)^(1 / temperature),   over the words that top_k and top_p leave

    P is the head's whole distribution, its logit function and its mixture included. Without options the samples come
    from P itself.

    Args:
        model: on any device. An LSTM carries its state on; a transformer reads the last `window` tokens again.
        prompt: at least one id.
        options: the fields of `Sampling`.

    Raises:
        LabError: a bad option, or an empty prompt.
    """
    if not prompt:
        raise LabError("prompt must have at least one token; begin with the end of a line, <eos>")
    return _sample(model, list(prompt), Sampling(**options))


def _sample(model: LanguageModel, ids: list[int], options: Sampling) -> Iterator[int]:
    device = next(model.parameters()).device
    head = cast(Head, model.head)
    generator = torch.Generator().manual_seed(options.seed)
    state: tuple[Tensor, ...] = ()
    carries_state = bool(model.initial_state(1))
    unread = ids
    for _ in range(options.max_tokens):
        with torch.no_grad(), evaluation_mode(model):
            tokens = torch.tensor([unread if carries_state else ids[-options.window :]], device=device)
            features, state = model.features(tokens, state)
            chosen = _choose(head, features[0, -1], options, generator)
        ids.append(chosen)
        unread = [chosen]
        yield chosen


def _choose(head: Head, features: Tensor, options: Sampling, generator: torch.Generator) -> int:
    """One word after features (D,)."""
    if options.temperature == 0:
        return int(head.predict(features))
    # Ranked by the head, by its scores: its function may have made the logits of different words equal.
    log_prob, ids = head.topk(features, min(options.top_k or head.vocab_size, head.vocab_size))
    log_prob = log_prob.double().cpu()
    prob = ((log_prob - log_prob.max()) / options.temperature).softmax(-1)
    if options.top_p is not None:
        before = prob.cumsum(-1) - prob
        prob = torch.where(before < options.top_p, prob, 0.0)
    return int(ids[int(torch.multinomial(prob, 1, generator=generator))])
