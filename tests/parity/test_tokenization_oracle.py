"""Every character of Unicode, cut by five programs.

The rules of the original BERT are transcribed here a second time, as tables,
from their description in `tokenization.py` of google-research/bert at commit
eedf571 (lines 196 to 399), and compared with ours, with `BertTokenizerFast`
and with the pure Python tokenizer of `transformers`. What is said of all
characters holds on any Python; the counts are those of Unicode 14.0 (Python
3.11) and tokenizers 0.23. All together: 40 s on an idle core.
"""

import unicodedata
from collections import Counter
from functools import cache

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast
from transformers.models.bert.tokenization_bert_legacy import BasicTokenizer

from bertnb.tokenization import (
    SPECIAL_TOKENS,
    WordPieceTokenizer,
    basic_tokenize,
    is_chinese,
    is_control,
    is_punctuation,
    is_whitespace,
)

CHARACTERS = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
CATEGORY = {c: unicodedata.category(c) for c in CHARACTERS}
# the original's own list, `tokenization.py:274-281`, of first and last
HAN = (
    "4E00 9FFF 3400 4DBF 20000 2A6DF 2A700 2B73F "
    "2B740 2B81F 2B820 2CEAF F900 FAFF 2F800 2FA1F"
).split()
MISSED = range(0x2B820, 0x2B920)  # by the Rust program
VOCABULARY = {token: i for i, token in enumerate(SPECIAL_TOKENS)}


# the second transcription: four tables


@cache
def tables():
    ranges = zip(HAN[::2], HAN[1::2], strict=True)
    cleaned = {
        number: f" {chr(number)} "
        for first, last in ranges
        for number in range(int(first, 16), int(last, 16) + 1)
    }
    cleaned |= {ord(c): " " for c in CHARACTERS if CATEGORY[c] == "Zs"}
    dropped = [c for c in CHARACTERS if CATEGORY[c] in {"Cc", "Cf"}]
    cleaned |= dict.fromkeys(map(ord, ["\x00", "\ufffd", *dropped]))
    cleaned |= dict.fromkeys(map(ord, "\t\n\r"), " ")
    marks = {ord(c): None for c in CHARACTERS if CATEGORY[c] == "Mn"}
    signs = [*range(33, 48), *range(58, 65), *range(91, 97), *range(123, 127)]
    signs += [ord(c) for c in CHARACTERS if CATEGORY[c].startswith("P")]
    return cleaned, marks, {n: f" {chr(n)} " for n in signs}


def transcribed(text, lowercase=True):
    cleaned, marks, signs = tables()
    words = text.translate(cleaned).split()
    if lowercase:
        lowered = [word.lower() for word in words]
        apart = [unicodedata.normalize("NFD", word) for word in lowered]
        words = [word.translate(marks) for word in apart]
    return " ".join(words).translate(signs).split()


# each character between an a and a b


def every(cut):
    """Cut "acb" for each character c; q stands between them."""
    found = []
    for i in range(0, len(CHARACTERS), 4096):
        some = CHARACTERS[i : i + 4096]
        text = " q ".join(f"a{c}b" for c in some)
        found += " ".join(cut(text)).split(" q ")
    assert len(found) == len(CHARACTERS)
    return found


def library(backend):
    def cut(text):
        clean = backend.normalizer.normalize_str(text)
        return [w for w, _ in backend.pre_tokenizer.pre_tokenize_str(clean)]

    return cut


@cache
def original(lowercase):
    return every(lambda text: transcribed(text, lowercase))


@cache
def ours(lowercase):
    return every(library(WordPieceTokenizer(VOCABULARY, lowercase)._plain))


@cache
def legacy(lowercase):
    return every(BasicTokenizer(do_lower_case=lowercase).tokenize)


@cache
def differing(cuts, lowercase):
    """Return character -> (the original's words, the other's)."""
    rows = zip(CHARACTERS, original(lowercase), cuts(lowercase), strict=True)
    return {c: (want, got) for c, want, got in rows if want != got}


@pytest.fixture(params=[True, False], ids=["uncased", "cased"])
def lowercase(request):
    return request.param


def test_there_are_1112064_characters():
    assert len(CHARACTERS) == 1_112_064


def test_the_readable_rules_are_the_originals_on_every_character(lowercase):
    found = every(lambda text: basic_tokenize(text, lowercase))
    rows = zip(CHARACTERS, original(lowercase), found, strict=True)
    assert not [f"U+{ord(c):04X}" for c, want, got in rows if want != got]


def test_the_four_questions_are_the_originals_tables_on_every_character():
    cleaned, _, signs = tables()
    for c in CHARACTERS:
        becomes = cleaned.get(ord(c), c)
        assert is_control(c) == (becomes is None and c != "\ufffd")
        assert is_whitespace(c) == (becomes == " ")
        assert is_chinese(c) == (becomes == f" {c} ")
        assert is_punctuation(c) == (ord(c) in signs)


texts = st.text(st.sampled_from("aB \u00c9e\u0301\u03a3\u4e2d\u200b.\t\u2028$"))


@settings(max_examples=100, deadline=None)
@given(st.one_of(texts, st.text()), st.booleans())
def test_the_readable_rules_are_the_originals_on_any_text(text, lowercase):
    assert basic_tokenize(text, lowercase) == transcribed(text, lowercase)


def test_ours_is_the_fast_tokenizer_on_every_character(tmp_path):
    for lowercase in (False, True):
        mine = WordPieceTokenizer(VOCABULARY, lowercase)
        mine.save_pretrained(tmp_path)
        theirs = BertTokenizerFast.from_pretrained(tmp_path).backend_tokenizer
        for part in ("normalizer", "pre_tokenizer"):
            state = getattr(theirs, part).__getstate__()
            assert state == getattr(mine._plain, part).__getstate__()
    assert every(library(theirs)) == ours(True)


@settings(max_examples=100, deadline=None)
@given(st.text(), st.booleans())
def test_the_fast_path_is_the_readable_one_on_other_texts(text, lowercase):
    """No differing character, no capital sigma: any text is cut alike."""
    different = differing(ours, lowercase)
    text = "".join(c for c in text if c not in different and c != "\u03a3")
    fast = library(WordPieceTokenizer(VOCABULARY, lowercase)._plain)
    assert fast(text) == basic_tokenize(text, lowercase)


# where the fast tokenizer differs from the original


def test_private_use_is_kept_by_the_original_only(lowercase):
    private = [c for c in CHARACTERS if CATEGORY[c] == "Co"]
    assert len(private) == 137_468
    for cuts in (ours, legacy):
        found = differing(cuts, lowercase)
        assert all(found[c] == (f"a{c}b", "ab") for c in private)


def test_256_chinese_characters_are_not_spaced_by_the_fast_one(lowercase):
    found = differing(ours, lowercase)
    chinese = set(filter(is_chinese, CHARACTERS))
    assert chinese & set(found) == set(map(chr, MISSED))
    for c in map(chr, MISSED):
        assert found[c] == (f"a {c} b", f"a{c}b")


def test_no_character_of_ordinary_text_is_cut_otherwise(lowercase):
    ordinary = [range(0x61D), range(0x3000, 0xA000), range(0xFF00, 0xFFF0)]
    ordinary += [range(0x2000, 0x2E00), range(0x1F000, 0x1FB00)]
    found = differing(ours, lowercase)
    for block in ordinary:
        assert not [hex(n) for n in block if chr(n) in found]


def test_the_rest_is_a_matter_of_unicode_versions(lowercase):
    """They are few, and if case stays, none of them is a letter."""
    found = differing(ours, lowercase)
    rest = Counter(
        CATEGORY[c]
        for c in found
        if CATEGORY[c] != "Co" and ord(c) not in MISSED
    )
    assert rest.total() < 2000
    if not lowercase:
        assert not [kind for kind in rest if kind[0] == "L"]


def test_the_legacy_tokenizer_drops_what_is_not_assigned(lowercase):
    found = differing(legacy, lowercase)
    unassigned = [c for c in CHARACTERS if CATEGORY[c] == "Cn"]
    assert all(found[c][1] == "ab" for c in unassigned)
    assert not [c for c in unassigned if c not in found[c][0]]
    others = {CATEGORY[c] for c in found} - {"Co", "Cn"}
    if lowercase:
        assert not others
    else:  # it composes letters and marks, the original leaves them as they are
        for c, (want, _) in found.items():
            if CATEGORY[c] not in ("Co", "Cn"):
                assert unicodedata.normalize("NFC", want) != want


# the published table

COUNTS = {  # (program, lowercase) -> category -> differing characters
    ("fast", True): {
        "Co": 137_468, "Mn": 384, "Lo": 256, "Po": 94, "Cn": 55, "Cf": 13,
        "Ps": 4, "Pe": 4, "Mc": 2, "Pd": 2, "So": 1,
    },
    ("fast", False): {
        "Co": 137_468, "Lo": 256, "Po": 94, "Cf": 13, "Ps": 4, "Pe": 4,
        "Pd": 2, "So": 1, "Mn": 1,
    },
    ("legacy", True): {"Cn": 829_834, "Co": 137_468},
    ("legacy", False): {
        "Cn": 829_834, "Co": 137_468, "Lo": 1061, "Mn": 31, "So": 13,
        "Ll": 10, "Lu": 10, "Sk": 3, "Po": 2, "Lm": 1, "Ps": 1, "Pe": 1,
        "Sm": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("program", ["fast", "legacy"])
def test_the_published_counts(program, lowercase):
    here = (unicodedata.unidata_version, tokenizers.__version__[:5])
    if here != ("14.0.0", "0.23."):
        pytest.skip(f"the table is for Unicode 14.0, tokenizers 0.23: {here}")
    cuts = {"fast": ours, "legacy": legacy}[program]
    found = Counter(CATEGORY[c] for c in differing(cuts, lowercase))
    assert found == COUNTS[program, lowercase]
    total = {("fast", True): 138_283, ("fast", False): 137_843}
    total |= {("legacy", True): 967_302, ("legacy", False): 968_436}
    assert found.total() == total[program, lowercase]


def test_what_the_published_table_says_of_the_fast_one():
    """One line for each row of the chapter's table, from the marks on."""
    if unicodedata.unidata_version != "14.0.0":
        pytest.skip("the table is for Unicode 14.0")
    forms = {}
    for c, (want, got) in differing(ours, True).items():
        kept, cut = f"a{c}b", f"a {c} b"
        name = {kept: "kept", cut: "cut off", "ab": "dropped"}
        pair = (name.get(want, "other"), name.get(got, "other"))
        forms.setdefault(CATEGORY[c][0].replace("M", CATEGORY[c]), Counter())
        forms[CATEGORY[c][0].replace("M", CATEGORY[c])][pair] += 1
    assert forms["Mn"] == {("dropped", "kept"): 383, ("dropped", "cut off"): 1}
    assert forms["P"] == {("cut off", "kept"): 104}
    assert forms["L"] == {("cut off", "kept"): 256}
    assert forms["C"][("dropped", "kept")] == 13  # Cf
    assert forms["C"][("kept", "other")] == 55  # lower-cased


# what a character between two letters does not show


def test_a_final_sigma_is_final_in_the_original_only():
    word = "\u039f\u0394\u039f\u03a3"
    fast = library(WordPieceTokenizer(VOCABULARY)._plain)
    assert basic_tokenize(word) == transcribed(word) == [word.lower()]
    assert word.lower()[-1] == "\u03c2"
    assert fast(word) == [word.lower()[:-1] + "\u03c3"]
