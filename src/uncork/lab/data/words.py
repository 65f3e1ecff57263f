"""What a text's lines and words are.

A corpus has one of two styles of writing, and its style says what a *word* of it is:

- ``raw``: running text. A word is a run of letters and their combining marks with inner apostrophes and hyphens
  (``nation's``, ``well-known``, ``हिन्दी``), lower-cased; every number is the one word ``<num>`` (``N`` in Penn
  Treebank); every other visible character is a word of its own, as a reader counts characters (an emoji of several
  code points is one: Unicode's grapheme clusters). Invisible characters are no words. The literals ``<unk>`` and
  ``<num>`` are words. Blank lines do not count. Made for scripts that put spaces between words: where there are none
  (Thai, Chinese), a whole run of letters is one word, and ``bpe`` is the tokenisation to take.
- ``spaced``: text that others have split into words already (Penn Treebank, WikiText). Words stand between spaces, are
  taken as they are, and blank lines count.

In both, the end of a line (a paragraph of raw text) is the word ``<eos>``.

This file imports nothing of uncork: `text.each` runs it as a program of its own, which starts in a tenth of a second.
"""

import pickle
import re
import signal
import sys
import unicodedata
from array import array
from collections import defaultdict
from collections.abc import Callable
from itertools import count
from typing import Any, Literal, TypeAlias

import regex

Style: TypeAlias = Literal["raw", "spaced"]

EOS = "<eos>"
UNK = "<unk>"
NUM = "<num>"

# Python's own `re` knows neither combining marks nor grapheme clusters (\X). Marks belong to the letter or digit before
# them, and so do the two joiners, with which Persian and the scripts of India spell; alone neither is a word.
_JOINERS = r"\u200c\u200d"
_LETTER = r"[\p{L}\p{Nl}\p{No}--\p{DI}]"
_LETTERS = rf"{_LETTER}[\p{{L}}\p{{Nl}}\p{{No}}\p{{M}}{_JOINERS}]*"
_DIGITS = r"\p{Nd}[\p{Nd}\p{M}]*"
_VISIBLE = r"(?![\s\p{M}\p{DI}])"
RAW_WORD = regex.compile(
    rf"(?i:<unk>|<num>)|{_LETTERS}(?:['’-]{_LETTERS})*|{_DIGITS}(?:[.,]{_DIGITS})*"
    rf"|\p{{GCB=Prepend}}|{_VISIBLE}\X",  # a sign like U+0600 would make a cluster with the space after it
    regex.V1,
)
# What is neither seen nor spelled with: soft hyphens, byte order marks, marks of direction, control characters. The
# zero-width space stands between words, as a space does, and so do the ASCII separators, which Python counts among the
# spaces.
_INVISIBLE = regex.compile(rf"[[\p{{DI}}\p{{Cc}}]--[\p{{M}}\p{{L}}\s{_JOINERS}]]+", regex.V1)
_SPACES = re.compile("[\x1c-\x1f\u200b]")
_HAS_WORD = regex.compile(rf"{_VISIBLE}\S", regex.V1)
_TRAILING = "\u200c\u200d"  # joiners that join nothing
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # halves of characters, which UTF-8 cannot hold


def normalize(text: str, style: Style) -> str:
    r"""The text that a corpus counts: its lines, each ended by a newline.

    Raw text loses lines without a word, spaces at the ends of lines and invisible characters, and is brought to
    Unicode's composed form (NFC). Spaced text keeps blank lines and has one space between words. Surrogates, which are
    no characters, become U+FFFD.

    >>> normalize("One line.  \r\n\r\nAnother", "raw")
    'One line.\nAnother\n'
    >>> normalize(" one  line \n\nanother\n", "spaced")
    'one line\n\nanother\n'
    """
    lines = lines_of(_SURROGATE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")))
    if style == "raw":
        return "".join(line + "\n" for line in map(_normalize_line, lines) if line)
    return "".join(" ".join(line.split()) + "\n" for line in lines)


def _normalize_line(line: str) -> str:
    """A line of raw text, empty where no word is in it."""
    if not (line.isascii() and line.isprintable()):  # most lines have nothing to normalise
        line = unicodedata.normalize("NFC", _INVISIBLE.sub("", _SPACES.sub(" ", line)))
        if not _HAS_WORD.search(line):
            return ""
    return line.rstrip()


def lines_of(text: str) -> list[str]:
    """The lines of a text without their newlines; the last line may lack its newline."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return lines


def split_words(text: str, style: Style) -> list[str]:
    """The words of a normalised text, with ``<eos>`` at the end of each line.

    >>> split_words("The Nation’s 1,234 well-known (and new) laws.", "raw")
    ['the', "nation's", '<num>', 'well-known', '(', 'and', 'new', ')', 'laws', '.', '<eos>']
    """
    words: list[str] = []
    for line in lines_of(text):
        if style == "raw":
            for part in line.split(" "):  # no word contains a space
                words += _words_of[part]
        else:
            words += line.split()
        words.append(EOS)
    return words


class _RememberedWords(dict[str, tuple[str, ...]]):
    """A cache of the words in each part of raw text between two spaces: parts repeat, and a look-up is quicker than
    matching."""

    def __missing__(self, part: str) -> tuple[str, ...]:
        words = tuple(map(_raw_word, RAW_WORD.findall(part)))
        if len(self) >= 200_000:  # some 40 MB
            self.clear()
        if len(part) <= 50:
            self[part] = words
        return words


_words_of = _RememberedWords()


def _raw_word(word: str) -> str:
    if word[0].isdecimal():
        return NUM
    if word.isascii():
        return word.lower()
    # Composed once more: the small letter may have a composed form where the capital has none.
    return unicodedata.normalize("NFC", word.lower()).replace("’", "'").rstrip(_TRAILING)


def number_words(text: str, style: Style) -> tuple[list[str], "array[int]"]:
    """The different words of a normalised text, in the order of their first use, and the text as places in that list.

    >>> number_words("to be or not to be", "raw")
    (['to', 'be', 'or', 'not', '<eos>'], array('i', [0, 1, 2, 3, 0, 1, 4]))
    """
    places: defaultdict[str, int] = defaultdict(count().__next__)
    numbers = array("i", [places[word] for word in split_words(text, style)])
    return list(places), numbers


def count_words(text: str, style: Style) -> int:
    """The number of words of a normalised text."""
    return len(split_words(text, style))


def _serve() -> None:
    """Answer pickled requests (function's name, its arguments) from the standard input until it ends."""
    tasks: dict[str, Callable[..., Any]] = {task.__name__: task for task in (normalize, number_words, count_words)}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, and with it this process's input
    while True:
        try:
            task, *arguments = pickle.load(sys.stdin.buffer)  # from the parent process, not from a file
        except EOFError:
            return
        pickle.dump(tasks[task](*arguments), sys.stdout.buffer, protocol=5)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    _serve()
