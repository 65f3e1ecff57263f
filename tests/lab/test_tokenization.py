"""Words, vocabularies, subwords: what is a word, which id it gets, and that decoding gives the text back."""

import json
import random
import re
import subprocess
import sys
import time
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uncork.lab.data import tokenization
from uncork.lab.data.tokenization import BPETokenizer, Tokenizer, WordTokenizer
from uncork.lab.data.words import EOS, RAW_WORD, UNK, count_words, normalize, number_words, split_words
from uncork.lab.errors import LabError

TEXT = (
    "Four score and seven years ago our fathers brought forth, on this continent, a new nation.\n"
    "Now we are engaged in a great civil war; testing whether that nation can long endure.\n"
)


def words_of(text, style):
    return split_words(normalize(text, style), style)


def word_tokenizer(text=TEXT, style="raw", **options):
    return WordTokenizer.train(words_of(text, style), style, **options)


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train(TEXT.split("\n"), "raw", vocab_size=300)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't well-known -- it's", ["don't", "well-known", "-", "-", "it's", EOS]),
        ("$1,234.50, or 3%", ["$", "<num>", ",", "or", "<num>", "%", EOS]),
        ("the 19th\n\n  \nend", ["the", "<num>", "th", EOS, "end", EOS]),
        ("<unk> <UNK> <num> <eos>", [UNK, UNK, "<num>", "<", "eos", ">", EOS]),
        ("E\u0301te\u0301 ÉTÉ", ["été", "été", EOS]),
        ("snake_case", ["snake", "_", "case", EOS]),
        ("a\r\nb\rc", ["a", EOS, "b", EOS, "c", EOS]),
        ("हिन्दी में लिखा", ["हिन्दी", "में", "लिखा", EOS]),
        ("العَرَبِيَّة שָׁלוֹם", ["العَرَبِيَّة", "שָׁלוֹם", EOS]),
        ("می\u200cخواهم", ["می\u200cخواهم", EOS]),  # a joiner spells
        ("ภาษาไทย\u200bครับ", ["ภาษาไทย", "ครับ", EOS]),  # a zero-width space parts
        ("\ufeffco\u00adoperate\u2060\u200e, \u200d \ufe0f", ["cooperate", ",", EOS]),  # nobody sees these
        ("\u1112\u1161\u11ab\u1100\u1173\u11af", ["한글", EOS]),
        ("J\u030c İzmir ΟΔΟΣ", ["ǰ", "i̇zmir", "οδος", EOS]),
        ("👩\u200d👩\u200d👧 🇩🇪🇫🇷 👍🏽!", ["👩\u200d👩\u200d👧", "🇩🇪", "🇫🇷", "👍🏽", "!", EOS]),
        ("rock ’n’ roll\u00a0x² 1\ufe0f\u20e3", ["rock", "'", "n", "'", "roll", "x²", "<num>", EOS]),
        ("a\ud800b", ["a", "\ufffd", "b", EOS]),
        ("", []),
        (" \n\n", []),
    ],
)
def test_words_of_raw_text(text, words):
    assert words_of(text, "raw") == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" The N <unk> .  \n", ["The", "N", UNK, ".", EOS]),
        ("a\n \n\nb", ["a", EOS, EOS, EOS, "b", EOS]),
        ("a\n\n", ["a", EOS, EOS]),
        ("", []),
    ],
)
def test_words_of_spaced_text(text, words):
    assert words_of(text, "spaced") == words


@settings(deadline=None)
@given(st.text(), st.sampled_from(["raw", "spaced"]))
def test_normalising_twice_changes_nothing_more(text, style):
    once = normalize(text, style)
    assert normalize(once, style) == once
    assert once == "" or once.endswith("\n")
    words = split_words(once, style)
    assert words.count(EOS) >= once.count("\n")
    different, places = number_words(once, style)
    assert [different[place] for place in places] == words
    assert (len(set(different)), count_words(once, style)) == (len(different), len(words))


@settings(deadline=None, max_examples=500)
@given(st.text(st.one_of(st.characters(), st.sampled_from("a’-,. \n\t\u0600\u0301\u200d\u00a0\ufe0f्ह한👩🏽🇩"))))
def test_no_word_goes_over_a_space(text):
    """`split_words` matches and remembers what stands between spaces, not whole lines."""
    lines = normalize(text, "raw").split("\n")[:-1]
    places = [number for number, line in enumerate(lines) for _ in RAW_WORD.findall(line)]
    words = split_words("\n".join(lines) + "\n", "raw") if lines else []
    assert len(words) - words.count(EOS) == len(places)
    for line in lines:
        parts = [match for part in line.split(" ") for match in RAW_WORD.findall(part)]
        assert RAW_WORD.findall(line) == parts


def test_vocabulary_is_by_count_then_alphabet():
    tokenizer = word_tokenizer("b a c b\nd c b\n")
    assert tokenizer.tokens() == [UNK, EOS, "b", "c", "a", "d"]
    assert (tokenizer.unk_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 6)


def test_vocab_size_and_min_count_cut_the_vocabulary():
    text = "b a c b\nd c b\n"
    assert word_tokenizer(text, vocab_size=5).tokens() == [UNK, EOS, "b", "c", "a"]
    assert word_tokenizer(text, min_count=2).tokens() == [UNK, EOS, "b", "c"]
    assert word_tokenizer(text, min_count=2).encode("a b") == [0, 2, 1]


def test_the_text_s_own_unk_is_the_unknown_word():
    tokenizer = word_tokenizer("a <unk> <unk> b\n", "spaced")
    assert tokenizer.tokens() == [UNK, EOS, "a", "b"]
    assert tokenizer.encode("<unk> a zebra") == [0, 2, 0, 1]


def test_a_vocabulary_of_one_word_is_an_error():
    with pytest.raises(LabError, match="at least 2 words besides <unk> and <eos>, got 1"):
        word_tokenizer("word word\nword\n")
    with pytest.raises(LabError, match=r"got 0.*min_count is 99"):
        word_tokenizer(min_count=99)


def test_decoding_words_reads_well():
    tokenizer = word_tokenizer("He said (in 1863): it costs $5, no?\nYes.\n")
    text = "he said (in <num>): it costs $<num>, no?\nyes.\n"
    assert tokenizer.decode(tokenizer.encode("He said (in 1863): it costs $5, no?\nYes.\n")) == text


def test_decoding_spaced_words_leaves_the_spaces():
    tokenizer = word_tokenizer("a , b\n\nc .\n", "spaced")
    assert tokenizer.decode(tokenizer.encode("a , b\n\nc .\n")) == "a , b\n\nc .\n"


@settings(deadline=None)
@given(st.lists(st.sampled_from([*"ab,.()$%'-\"", "it's", "7", "\n", "_"]), max_size=20))
def test_decoded_words_encode_to_the_same_ids(pieces):
    tokenizer = word_tokenizer("a b , . ( ) $ % ' - \" it's 7 _\n")
    ids = tokenizer.encode(" ".join(pieces))
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.one_of(st.characters(), st.sampled_from("aİΣ'’-,.$([ \n1\u0301\u200d\u200c\u200b\u00ad\ufe0f्िह한👩🇩")))
)
def test_words_of_any_text_are_words_again(text):
    words = words_of(text, "raw")
    tokenizer = WordTokenizer(list(dict.fromkeys([UNK, EOS, *words])), "raw")
    ids = tokenizer.ids_of(words)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    Tokenizer.from_spec(tokenizer.spec())  # which refuses what is no word


@given(st.text())
def test_composed_and_decomposed_text_have_the_same_words(text):
    decomposed = unicodedata.normalize("NFD", text)
    assert words_of(decomposed, "raw") == words_of(unicodedata.normalize("NFC", text), "raw")


def test_a_vocabulary_that_was_split_at_combining_marks_is_refused():
    spec = {**word_tokenizer().spec(), "tokens": [UNK, EOS, "ह", "ि", "न"]}
    with pytest.raises(LabError, match=r"is not one word by today's rule .* train anew"):
        Tokenizer.from_spec(spec)


def test_ids_outside_the_vocabulary_are_an_error(bpe):
    tokenizer = word_tokenizer()
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=rf"ids must lie in \[0, {tokenizer.vocab_size}\), got {bad}"):
            tokenizer.decode([bad])
    with pytest.raises(ValueError, match="got 300"):
        bpe.decode([300])


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_subwords_give_every_text_back(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == (text if text.endswith("\n") or not text else text + "\n")
    assert all(0 <= token_id < bpe.vocab_size for token_id in ids)
    assert ids.count(bpe.eos_id) == bpe.decode(ids).count("\n")


def test_the_characters_of_eos_are_not_the_end_of_a_line(bpe):
    assert bpe.encode("<eos>").count(bpe.eos_id) == 1


def test_subwords_are_learned(bpe):
    assert bpe.vocab_size == 300
    assert bpe.eos_id == 299
    assert len(bpe.tokens()) == 300
    assert len(set(bpe.tokens())) == 300
    assert "Ġnation" in bpe.tokens()
    assert len(bpe.encode(TEXT)) < len(TEXT.encode()) / 1.5


def test_min_count_limits_the_merges():
    merges = BPETokenizer.train(TEXT.split("\n"), "raw", vocab_size=400, min_count=3).vocab_size
    assert 257 < merges < BPETokenizer.train(TEXT.split("\n"), "raw", vocab_size=400).vocab_size


def test_another_process_learns_the_same_subwords(bpe):
    code = (
        "import json, sys; from uncork.lab.data.tokenization import BPETokenizer;"
        "print(json.dumps(BPETokenizer.train(json.loads(sys.argv[1]), 'raw', vocab_size=300).spec()))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, json.dumps(TEXT.split("\n"))], capture_output=True, text=True, check=True
    )
    assert json.loads(run.stdout) == bpe.spec()


@pytest.mark.parametrize("letters", ["abcdefghij", " \t", "汉字"])
def test_subwords_of_a_long_line_without_spaces_are_learned_quickly(letters):
    # Uncut, learning takes the square of the length: 300,000 letters more than a minute.
    line = "".join(random.Random(0).choices(letters, k=300_000))
    start = time.process_time()
    tokenizer = BPETokenizer.train([f"a{line}b"], "raw", vocab_size=600)
    assert tokenizer.decode(tokenizer.encode(line)) == line + "\n"
    assert time.process_time() - start < 25


@given(st.text(st.sampled_from("a \t"), min_size=30, max_size=99))
def test_long_runs_alone_are_cut(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenization, "LONGEST_RUN", 10)
        parts = list(tokenization._cut_long_runs(text))
    assert "".join(parts) == text
    runs = [run for run in re.findall(r"\S+|\s+", text) if len(run) > 10]
    assert len(parts) == 1 + sum((len(run) - 1) // 10 for run in runs)
    assert all(len(run) <= 10 for part in parts for run in re.findall(r"\S+|\s+", part))


@pytest.mark.parametrize("kind", ["word", "spaced", "bpe"])
def test_spec_survives_json(kind, bpe):
    tokenizer = {"word": word_tokenizer(), "spaced": word_tokenizer(style="spaced"), "bpe": bpe}[kind]
    again = Tokenizer.from_spec(json.loads(json.dumps(tokenizer.spec())))
    text = "A new nation, <unk>\n\nwith 3 zebras"
    assert type(again) is type(tokenizer)
    assert again.spec() == tokenizer.spec()
    assert again.encode(text) == tokenizer.encode(text)
    assert again.tokens() == tokenizer.tokens()
    assert (again.vocab_size, again.eos_id, again.unk_id) == (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.unk_id)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 1 is expected, got 99"),
        ({"type": "pickle"}, "type must be 'word' or 'bpe', got 'pickle'"),
        ({"style": None}, "style must be"),
        ({"tokens": "abc"}, "tokens must be a list of strings"),
        ({"tokens": [UNK, EOS, 3]}, "tokens must be a list of strings"),
        ({"tokens": ["a", "b"]}, "must hold <unk> and <eos>"),
        ({"tokens": [UNK, EOS, "a", "a"]}, "distinct"),
        ({"type": "bpe"}, "model must be"),
        ({"type": "bpe", "model": "{"}, "model is damaged"),
    ],
)
def test_a_damaged_spec_is_one_clear_error(change, message):
    with pytest.raises(LabError, match=message):
        Tokenizer.from_spec(word_tokenizer().spec() | change)


def test_a_spec_that_is_no_object_is_an_error():
    with pytest.raises(LabError, match="a JSON object is expected, got list"):
        Tokenizer.from_spec([])


def test_prefix_is_what_the_first_tokens_cover(bpe):
    line = "Four score, and 1,000 zebras"
    assert word_tokenizer().prefix(line, 0) == ""
    assert word_tokenizer().prefix(line, 3) == "Four score,"
    assert word_tokenizer().prefix(line, 5) == "Four score, and 1,000"
    assert word_tokenizer(style="spaced").prefix(line, 2) == "Four score,"
    for count in range(len(bpe.encode(line))):
        assert bpe.encode(bpe.prefix(line, count))[:count] == bpe.encode(line)[:count]
