"""The tokenizer against `transformers`, `tokenizers` and loops over (7.2)."""

import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertTokenizerFast

from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer, wordpiece

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


@few
@given(
    st.sets(st.text("abc", min_size=1, max_size=3), max_size=8),
    st.sets(st.text("abc", min_size=1, max_size=3), max_size=8),
    st.text("abc", min_size=1, max_size=8),
)
def test_the_readable_rule_is_the_librarys(starts, middles, word):
    pieces = [*SPECIAL_TOKENS, *sorted(starts), *("##" + m for m in middles)]
    tok = WordPieceTokenizer({p: i for i, p in enumerate(pieces)})
    assert wordpiece(word, tok.vocabulary) == tok.tokenize(word)


def merge_pairs(words, ids, size):
    """Transcribe (7.2): the most frequent pair, on a tie the smaller ids."""
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
@given(st.text("abcd ", min_size=1, max_size=60), st.integers(13, 40))
def test_training_merges_the_most_frequent_pair(text, size):
    words = Counter(re.findall(r"\w+", text))
    inner = sorted({"##" + c for word in words for c in word[1:]})
    start = [*SPECIAL_TOKENS, *inner, *sorted({c for w in words for c in w})]
    by_loop = merge_pairs(words, {p: i for i, p in enumerate(start)}, size)
    assert WordPieceTokenizer.train([text], size).vocabulary == by_loop


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
