"""The tokenizer against `transformers`, `tokenizers` and loops.

The 100,000 lines, three times, take 35 s on an idle core, the rest 7 s.
"""

import gzip
import json
import os
import re
import unicodedata
from collections import Counter
from functools import cache
from itertools import islice, pairwise
from math import log
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import (
    BertTokenizerLegacy,
)

from bertnb.configuration import BertnbError
from bertnb.tokenization import (
    SPECIAL_TOKENS,
    WordPieceTokenizer,
    basic_tokenize,
    wordpiece,
)

DATA = Path(
    os.environ.get("BERTNB_DATA", Path(__file__).parents[3] / "shared/data")
)
few = settings(max_examples=25, deadline=None)
TEXTS = [
    "I love natural language processing",
    "The president's 2nd address, \u00e0 la carte: na\u00efve caf\u00e9s!",
    "unaffable playing embeddings (1,234.50 USD) e.g. re-elected",
    "\u6211\u7231\u81ea\u7136\u8bed\u8a00 and \ud55c\uad6d\uc5b4 \u306e",
    "tabs\tand\nlines\u00a0and\u200bzero width, emoji \U0001f917 ^$`",
    "",
]
OPTIONS = [(True, None), (False, None), (True, False), (False, True)]


def two(folder, vocabulary, lowercase=True, strip_accents=None):
    """The same vocabulary in our hands and in those of `transformers`."""
    ours = WordPieceTokenizer(vocabulary, lowercase, strip_accents)
    ours.save_pretrained(folder)
    return ours, BertTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def pairs_of_tokenizers(tmp_path_factory):
    vocabulary = WordPieceTokenizer.train(
        [*TEXTS, *map(str.upper, TEXTS)], 300, lowercase=False
    ).vocabulary
    folder = tmp_path_factory.mktemp("trained")
    return [
        two(folder / str(i), vocabulary, *options)
        for i, options in enumerate(OPTIONS)
    ]


def assert_same_rows(ours, theirs, texts, pairs=None, **options):
    """`transformers` always reads "[MASK]" as the token: so do we here."""
    a = ours(
        texts,
        pairs,
        return_tensors=None,
        return_offsets=True,
        allow_special=True,
        **options,
    )
    b = theirs(
        texts,
        pairs,
        truncation="max_length" in options,
        padding=True,
        return_offsets_mapping=True,
        **options,
    )
    for name in a:
        assert a[name] == b[name], name
    assert set(a) == set(b)


@few
@given(st.lists(st.text(max_size=30), min_size=1, max_size=3))
def test_any_text_gives_the_rows_of_transformers(pairs_of_tokenizers, texts):
    for ours, theirs in pairs_of_tokenizers:
        assert_same_rows(ours, theirs, texts)


@few
@given(
    st.lists(
        st.tuples(st.text("ab \u00e9.", max_size=24), st.text("Ab ,\u4e2d")),
        min_size=1,
        max_size=3,
    ),
    st.integers(3, 16),
)
def test_pairs_are_framed_and_cut_as_in_transformers(
    pairs_of_tokenizers, pairs, width
):
    first, second = map(list, zip(*pairs, strict=True))
    for ours, theirs in pairs_of_tokenizers:
        assert_same_rows(ours, theirs, first, second, max_length=width)


@pytest.mark.equation("7.6")
def test_every_way_to_cut_a_pair_is_that_of_transformers(pairs_of_tokenizers):
    ours, theirs = pairs_of_tokenizers[0]
    for a in range(6):
        for b in range(6):
            texts = [" ".join("a" * a)], [" ".join("e" * b)]
            for width in range(3, 16):
                assert_same_rows(ours, theirs, *texts, max_length=width)


def test_special_strings_and_decoding_are_those_of_transformers(
    pairs_of_tokenizers,
):
    texts = ["a [MASK] b[SEP]", "[CLS]", "it 's \" so \" . do n't !", *TEXTS]
    for ours, theirs in pairs_of_tokenizers:
        assert_same_rows(ours, theirs, texts)
        for ids in ours.ids(texts, allow_special=True):
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(
                    ids, skip_special_tokens=skip
                )


def test_folders_go_both_ways(pairs_of_tokenizers, tmp_path):
    for i, (ours, theirs) in enumerate(pairs_of_tokenizers):
        folder = tmp_path / str(i)
        theirs.save_pretrained(folder)  # no vocab.txt any more
        back = WordPieceTokenizer.from_pretrained(folder)
        assert not (folder / "vocab.txt").exists()
        assert back.vocabulary == ours.vocabulary
        assert back.lowercase == ours.lowercase
        assert back.strip_accents == ours.strip_accents
        ours.save_pretrained(folder / "ours")
        auto = AutoTokenizer.from_pretrained(folder / "ours")
        assert_same_rows(ours, auto, TEXTS)
        assert auto.model_max_length == 512


def test_tokenizer_json_alone_frames_a_row(pairs_of_tokenizers, tmp_path):
    ours, _ = pairs_of_tokenizers[0]
    ours.save_pretrained(tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    row = ours("a b", "c d [MASK]", return_tensors=None, allow_special=True)
    assert alone.encode("a b", "c d [MASK]").ids == row["input_ids"][0]
    assert alone.encode("a b", "c d").type_ids == [0, 0, 0, 0, 1, 1, 1]


# the loops


def longest_pieces(word, pieces):
    """Transcribe (7.1), with sets as it stands there."""
    ends, cut = [0], []
    while ends[-1] < len(word):
        mark = "##" if cut else ""
        later = range(ends[-1] + 1, len(word) + 1)
        fits = {e for e in later if mark + word[ends[-1] : e] in pieces}
        if not fits:
            return ["[UNK]"]
        cut.append(mark + word[ends[-1] : max(fits)])
        ends.append(max(fits))
    return cut


@few
@pytest.mark.equation("7.1")
@given(
    st.sets(st.text("abc", min_size=1, max_size=3), max_size=8),
    st.sets(st.text("abc", min_size=1, max_size=3), max_size=8),
    st.text("abc", min_size=1, max_size=8),
)
def test_the_readable_rule_is_the_librarys_and_the_formulas(
    starts, middles, word
):
    pieces = [*SPECIAL_TOKENS, *sorted(starts), *("##" + m for m in middles)]
    tok = WordPieceTokenizer({p: i for i, p in enumerate(pieces)})
    expected = longest_pieces(word, set(pieces))
    assert wordpiece(word, tok.vocabulary) == tok.tokenize(word) == expected


@pytest.mark.parametrize("limit", [1, 7, 100, 200])
def test_the_longest_word_is_an_argument_and_100_like_hugging_faces(limit):
    vocabulary = {p: i for i, p in enumerate([*SPECIAL_TOKENS, "a", "##a"])}
    tok = WordPieceTokenizer(vocabulary, max_input_chars_per_word=limit)
    usual = WordPieceTokenizer(vocabulary)
    theirs = BertTokenizerFast(vocab=vocabulary)
    for length in (1, 2, 7, 8, 99, 100, 101, 150, 200, 201):
        word = "a" * length
        pieces = wordpiece(word, vocabulary, limit)
        assert pieces == tok.tokenize(word)
        assert (pieces == ["[UNK]"]) == (length > limit)
        assert usual.tokenize(word) == theirs.tokenize(word)
        assert usual.tokenize(word) == wordpiece(word, vocabulary)


def merge_pairs(words, ids, size):
    """Transcribe (7.5): the most frequent pair, on a tie the smaller ids."""
    cuts = {w: [w[0], *("##" + c for c in w[1:])] for w in words}
    while len(ids) < size:
        count = Counter()
        for word, cut in cuts.items():
            for pair in pairwise(cut):
                count[pair] += words[word]
        if not count:
            break
        x, y = min(count, key=lambda p: (-count[p], ids[p[0]], ids[p[1]]))
        ids.setdefault(x + y[2:], len(ids))
        for cut in cuts.values():
            at = 0
            while at < len(cut) - 1:
                if cut[at : at + 2] == [x, y]:
                    cut[at : at + 2] = [x + y[2:]]
                at += 1
    return ids


@few
@pytest.mark.equation("7.5")
@given(st.text("abcd ", min_size=1, max_size=60), st.integers(13, 40))
def test_training_merges_the_most_frequent_pair(text, size):
    words = Counter(re.findall(r"\w+", text))
    inner = sorted({"##" + c for word in words for c in word[1:]})
    start = [*SPECIAL_TOKENS, *inner, *sorted({c for w in words for c in w})]
    by_loop = merge_pairs(words, {p: i for i, p in enumerate(start)}, size)
    assert WordPieceTokenizer.train([text], size).vocabulary == by_loop


def likelihood(pieces):
    """(7.2) from its definition: each piece is drawn alone."""
    count = Counter(pieces)
    return sum(log(count[p] / len(pieces)) for p in pieces)


def gain(n_xy, n_x, n_y, n):
    """Transcribe (7.3)."""

    def f(z):
        return z * log(z) if z else 0.0

    return (
        f(n_xy)
        + f(n_x - n_xy)
        - f(n_x)
        + f(n_y - n_xy)
        - f(n_y)
        + f(n)
        - f(n - n_xy)
    )


@few
@pytest.mark.equation("7.2", "7.3")
@given(st.text("abcd", min_size=4, max_size=60))
def test_the_gain_of_a_merge_is_the_difference_of_two_likelihoods(
    measured, text
):
    count, size = Counter(text), len(text)
    by_counts = sum(c * log(c) for c in count.values()) - size * log(size)
    measured(by_counts - likelihood(text), 1e-10)
    for x, y in {p for p in pairwise(text) if p[0] != p[1]}:
        joined = re.findall(f"{x}{y}|.", text)
        n = text.count(x + y)
        expected = likelihood(joined) - likelihood(text)
        measured(gain(n, count[x], count[y], size) - expected, 1e-10)


@few
@pytest.mark.equation("7.4")
@given(st.integers(1, 50), st.integers(0, 500), st.integers(0, 500), st.data())
def test_the_gain_of_one_place_is_the_score_within_its_bounds(
    n_xy, more_x, more_y, data
):
    n_x, n_y = n_xy + more_x, n_xy + more_y
    n = n_x + n_y + data.draw(st.integers(0, 10_000))
    score = log(n_xy * n / (n_x * n_y))

    def epsilon(c):
        left = c - n_xy
        return c / n_xy * log(c) - (left and left / n_xy * log(left)) - log(c)

    each = np.array([epsilon(n), epsilon(n_x), epsilon(n_y)])
    assert (each > -1e-9).all()
    assert (each < 1 + 1e-9).all()
    found = gain(n_xy, n_x, n_y, n) / n_xy
    assert abs(found - score - each @ [1, -1, -1]) < 1e-8
    assert not more_x or epsilon(n_x) > 0
    assert more_x or abs(epsilon(n_x)) < 1e-12


def test_the_library_trains_by_frequency_and_not_by_likelihood():
    """The chapter's ten words: three criteria, three pairs."""
    ten = "the the the then them other her here quit quick".split()
    cuts = [[w[0], *("##" + c for c in w[1:])] for w in ten]
    single = Counter(p for cut in cuts for p in cut)
    pairs = Counter(p for cut in cuts for p in pairwise(cut))
    n = single.total()
    assert n == 38
    best = {
        "frequency": max(pairs, key=pairs.get),
        "ratio": max(
            pairs, key=lambda p: pairs[p] / single[p[0]] / single[p[1]]
        ),
        "gain": max(
            pairs,
            key=lambda p: gain(pairs[p], single[p[0]], single[p[1]], n),
        ),
    }
    assert best["frequency"] == ("##h", "##e")
    assert best["ratio"] == ("##c", "##k")
    assert best["gain"] == ("t", "##h")
    inner = {c for word in ten for c in word[1:]}
    least = 5 + len(inner) + len(set("".join(ten)))
    letters = WordPieceTokenizer.train([" ".join(ten)], least)
    first = WordPieceTokenizer.train([" ".join(ten)], least + 1)
    assert set(first.vocabulary) - set(letters.vocabulary) == {"##he"}


# words that stay whole, and special tokens in a text


NEVER = ["U.S.", "[unused1]"]


@pytest.fixture(scope="module")
def never_split(tmp_path_factory):
    pieces = "u s . x , [ ] unused1 U.S. [unused1] the ##s \u4e2d".split()
    vocabulary = {p: i for i, p in enumerate([*SPECIAL_TOKENS, *pieces])}
    folder = tmp_path_factory.mktemp("never")
    ours = WordPieceTokenizer(vocabulary, never_split=NEVER)
    ours.save_pretrained(folder)
    return ours, folder


def test_never_split_keeps_a_piece_whole_where_it_stands_alone(never_split):
    ours, _ = never_split
    apart = ["u", ".", "s", "."]
    for text, pieces in {
        "the U.S. x": ["the", "U.S.", "x"],
        "U.S., (U.S.)": ["U.S.", ",", "[UNK]", "U.S.", "[UNK]"],
        "U.S.": ["U.S."],
        "u.s.": apart,
        "U.S.x": [*apart, "x"],
        "xU.S.": ["[UNK]", ".", "s", "."],
        "\u4e2dU.S.": ["\u4e2d", *apart],
        "_U.S.": ["[UNK]", *apart],
        "[unused1][unused1]": ["[unused1]", "[unused1]"],
        "[UNUSED1]": ["[", "unused1", "]"],
        "[MASK]": ["[", "[UNK]", "]"],
    }.items():
        assert ours.tokenize(text) == pieces, text
        if "[MASK]" not in text:
            assert ours.tokenize(text, allow_special=True) == pieces
    row = ours("x U.S.", return_offsets=True)
    assert row["offset_mapping"][0].tolist() == [[0, 0], [0, 1], [2, 6], [0, 0]]
    assert ours.decode(ours.ids(["the U.S. x"])[0]) == "the U.S. x"


def test_transformers_keeps_our_never_split_but_ignores_its_own(never_split):
    ours, folder = never_split
    theirs = AutoTokenizer.from_pretrained(folder)
    assert_same_rows(ours, theirs, ["the U.S. x", "xU.S.", "u.s. [unused1]"])
    alone = BertTokenizerFast(vocab=ours.vocabulary, never_split=NEVER)
    assert alone.tokenize("U.S.") == ["u", ".", "s", "."]
    (folder / "tokenizer.json").rename(folder / "hidden")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["never_split"] = NEVER
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder)
    assert theirs.tokenize("U.S.") == ["u", ".", "s", "."]
    old = BertTokenizerLegacy(str(folder / "vocab.txt"), never_split=NEVER)
    assert old.tokenize("U.S. x") == ["U.S.", "x"]
    (folder / "hidden").rename(folder / "tokenizer.json")


def test_never_split_and_the_longest_word_survive_a_folder(tmp_path):
    pieces = {p: i for i, p in enumerate([*SPECIAL_TOKENS, "a", "##a", "B.A"])}
    tok = WordPieceTokenizer(pieces, True, None, ["B.A"], 200)
    tok.save_pretrained(tmp_path)
    for file in ("vocab.txt", "tokenizer_config.json", None):
        back = WordPieceTokenizer.from_pretrained(tmp_path)
        assert back.never_split == ("B.A",)
        assert back.max_input_chars_per_word == 200
        text = "B.A " + "a" * 150
        assert len(back.tokenize(text)) == 151
        assert back.tokenize(text) == tok.tokenize(text)
        if file:
            (tmp_path / file).unlink()


def test_a_special_string_is_three_pieces_in_the_original_and_in_ours():
    pieces = {p: i for i, p in enumerate([*SPECIAL_TOKENS, "[", "]", "mask"])}
    cut = [
        p for w in basic_tokenize("[MASK]") for p in wordpiece(w, pieces, 200)
    ]
    ours = WordPieceTokenizer(pieces)
    assert cut == ours.tokenize("[MASK]") == ["[", "mask", "]"]
    theirs = BertTokenizerFast(vocab=pieces)
    assert theirs.tokenize("[MASK]") == ["[MASK]"]
    assert ours.tokenize("[MASK]", allow_special=True) == ["[MASK]"]
    asked = theirs("[MASK]", split_special_tokens=True)["input_ids"]
    assert asked == ours("[MASK]", return_tensors=None)["input_ids"][0]


# vocabularies as files


def write_vocabulary(folder, *lines):
    text = "\n".join([*SPECIAL_TOKENS, *lines]) + "\n"
    (folder / "vocab.txt").write_text(text, encoding="utf-8")


def test_lines_are_stripped_like_the_fast_tokenizers(tmp_path):
    """The original strips both ends, the legacy tokenizer the line feed."""
    write_vocabulary(tmp_path, " x", "y \t", "\u2028", "##\u2028")
    ours = WordPieceTokenizer.from_pretrained(tmp_path)
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    old = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert ours.vocabulary == theirs.get_vocab()
    assert list(ours.vocabulary)[5:] == [" x", "y", "", "##"]
    assert list(old.vocab)[5:] == [" x", "y \t", "\u2028", "##\u2028"]


def test_the_chinese_vocabulary_holds_line_separators(published):
    name, ours, theirs = published
    if name != "chinese":
        assert "" not in ours.vocabulary
        return
    text = (DATA / "vocabs/bert-base-chinese-vocab.txt").read_text("utf-8")
    lines = text.split("\n")
    assert (lines[343], lines[13502]) == ("\u2028", "##\u2028")
    assert len(text.splitlines()) == ours.vocab_size + 2  # would be wrong
    assert ours.vocabulary[""] == theirs.get_vocab()[""] == 343
    assert ours.vocabulary["##"] == 13502
    assert ours.ids(["a\u2028b"]) == [theirs.encode("a\u2028b")[1:-1]]


def test_a_missing_unknown_token_is_found_while_reading(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n[SEP]\n[MASK]\na\n")
    with pytest.raises(BertnbError, match=r"lacks \[UNK\]"):
        WordPieceTokenizer.from_pretrained(tmp_path)
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"Missing \[UNK\]"):
        theirs("z")  # not before


def test_a_repeated_piece_is_refused_where_others_lose_an_id(tmp_path):
    write_vocabulary(tmp_path, "a", "a", "b")
    with pytest.raises(BertnbError, match="8 lines and only 7 different"):
        WordPieceTokenizer.from_pretrained(tmp_path)
    old = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    assert (len(old.vocab), old.vocab["a"]) == (7, 6)


def test_a_vocabulary_file_given_by_name_is_ignored_by_transformers(tmp_path):
    """Why these tests hand over `vocab=` or a folder."""
    write_vocabulary(tmp_path, "a", "b")
    assert len(BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"))) == 5


# the vocabularies of 2018


@pytest.fixture(params=["uncased", "cased", "chinese"])
def published(request, tmp_path):
    file = DATA / "vocabs" / f"bert-base-{request.param}-vocab.txt"
    if not file.exists():
        pytest.skip(f"no {file}: set BERTNB_DATA to the folder of real data")
    (tmp_path / "vocab.txt").write_bytes(file.read_bytes())
    lower = request.param != "cased"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"do_lower_case": lower})
    )
    theirs = BertTokenizerFast.from_pretrained(tmp_path)
    ours = WordPieceTokenizer.from_pretrained(tmp_path)
    assert ours.lowercase == lower
    return request.param, ours, theirs


def test_published_vocabularies_give_the_rows_of_transformers(published):
    _, ours, theirs = published
    assert ours.vocab_size == len(theirs)
    assert ours.vocabulary == theirs.get_vocab()
    assert_same_rows(ours, theirs, TEXTS)
    assert_same_rows(ours, theirs, TEXTS, TEXTS[::-1], max_length=12)

    @few
    @given(st.lists(st.text(max_size=40), min_size=1, max_size=3))
    def any_text(texts):
        assert_same_rows(ours, theirs, texts)

    any_text()


def test_playing_is_one_piece_in_english_vocabularies(published):
    name, ours, _ = published
    assert {
        "uncased": (["playing"], 2652),
        "cased": (["playing"], 1773),
        "chinese": (["play", "##ing"], None),
    }[name] == (ours.tokenize("playing"), ours.vocabulary.get("playing"))


def test_published_vocabularies_survive_our_folder(published, tmp_path):
    _, ours, _ = published
    ours.save_pretrained(tmp_path / "again")
    again = WordPieceTokenizer.from_pretrained(tmp_path / "again")
    assert again.vocabulary == ours.vocabulary
    assert again.lowercase == ours.lowercase


# 100,000 lines


def sets_of_lines():
    """Real text of eight kinds; the last fills up what is missing."""

    def tab(name):
        rows = (DATA / name).read_text("utf-8").split("\n")[1:]
        return [row.split("\t") for row in rows if row]

    def squad(name):
        text = (DATA / name).read_bytes()
        if name.endswith(".gz"):
            text = gzip.decompress(text)
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                yield paragraph["context"]
                yield from (qa["question"] for qa in paragraph["qas"])

    with gzip.open(DATA / "lm/squad_wikipedia_articles.txt.gz") as file:
        yield from (line.decode().strip() for line in islice(file, 0, None, 4))
    for name in ("dev.conll", "test.annotated"):
        words = (DATA / f"wnut17/emerging.{name}").read_text("utf-8")
        for sentence in re.split(r"\n\s*\n", words):
            rows = sentence.split("\n")
            yield " ".join(row.split("\t")[0] for row in rows)
    words = (DATA / "wnut17/wnut17train.conll").read_text("utf-8")
    for sentence in re.split(r"\n\s*\n", words):
        yield " ".join(row.split("\t")[0] for row in sentence.split("\n"))
    yield from squad("squad/train-40-articles.json.gz")
    for name in ("train", "dev", "test"):
        yield from (row[-1] for row in tab(f"zh/chnsenticorp/{name}.tsv"))
    for name in ("train", "dev"):
        text = (DATA / f"zh/cluener/{name}.json").read_text("utf-8")
        yield from (json.loads(row)["text"] for row in text.split("\n") if row)
    for name in ("zh/drcd/DRCD_dev.json", "xquad/xquad.zh.json"):
        yield from squad(name)
    yield from (row[0] for row in tab("sst2/train.tsv"))


@cache
def many_lines():
    return list(islice(filter(None, sets_of_lines()), 100_000))


def test_the_ids_of_100000_lines_are_those_of_transformers(published):
    _, ours, theirs = published
    lines = many_lines()
    assert len(lines) == 100_000
    for i in range(0, len(lines), 2000):
        some = lines[i : i + 2000]
        expected = theirs(some, add_special_tokens=False)["input_ids"]
        assert ours.ids(some, allow_special=True) == expected


def test_the_100000_lines_hold_chinese_emoji_and_accents(published):
    """So that the test above is about them too; each is cut alike by hand."""
    name, ours, _ = published
    accent = re.compile("[\u00c0-\u017f]")
    emoji = re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]")
    chinese = re.compile("[\u4e00-\u9fff]")
    for kind, least in ((accent, 1000), (emoji, 100), (chinese, 20_000)):
        lines = [line for line in many_lines() if kind.search(line)]
        assert len(lines) > least, (kind.pattern, len(lines))
        for line in lines[::100]:
            if "\u03a3" in line or any(
                unicodedata.category(c) == "Co" for c in line
            ):
                continue  # the oracle's differences
            words = basic_tokenize(line, name != "cased")
            pieces = [p for w in words for p in wordpiece(w, ours.vocabulary)]
            assert pieces == ours.tokenize(line), line
