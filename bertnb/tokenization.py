"""WordPiece.

Written by tools/extract.py from notebooks/07_wordpiece.md: edit that notebook, not this file.
"""

import json
import unicodedata
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from string import punctuation
from typing import Any

import torch
from tokenizers import (
    AddedToken,
    Encoding,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from bertnb.configuration import BertnbError, locate, read_json

__all__ = [
    "CHINESE_RANGES",
    "is_control",
    "is_whitespace",
    "is_punctuation",
    "is_chinese",
    "basic_tokenize",
    "MAX_WORD_CHARACTERS",
    "wordpiece",
    "SPECIAL_TOKENS",
    "WordPieceTokenizer",
    "check_texts",
    "read_vocabulary",
]


# %% From text to words: five rules
CHINESE_RANGES = (  # first and last code point
    (0x4E00, 0x9FFF),
    (0x3400, 0x4DBF),
    (0x20000, 0x2A6DF),
    (0x2A700, 0x2B73F),
    (0x2B740, 0x2B81F),
    (0x2B820, 0x2CEAF),
    (0xF900, 0xFAFF),
    (0x2F800, 0x2FA1F),
)


def is_control(character: str) -> bool:
    """Return whether a character is dropped: the controls and formats of Unicode, but for tab and line ends."""
    return character not in "\t\n\r" and (
        unicodedata.category(character) in ("Cc", "Cf")
    )


def is_whitespace(character: str) -> bool:
    """Return whether a character becomes a space: tab, line ends, and the spaces of Unicode."""
    return character in "\t\n\r" or unicodedata.category(character) == "Zs"


def is_punctuation(character: str) -> bool:
    """Return whether a character is a word of its own: the signs of ASCII, and what Unicode calls punctuation."""
    return character in punctuation or unicodedata.category(character)[0] == "P"


def is_chinese(character: str) -> bool:
    """Return whether a character is a Chinese one; kana and hangul are not."""
    return any(a <= ord(character) <= b for a, b in CHINESE_RANGES)


def basic_tokenize(
    text: str, lowercase: bool = True, strip_accents: bool | None = None
) -> list[str]:
    """Cut a text into words by the rules of the original BERT.

    Args:
        strip_accents: remove accents; None: as `lowercase`, the only way the original knows.
    """
    strip = lowercase if strip_accents is None else strip_accents
    clean = ""
    for c in text:
        if is_whitespace(c):
            clean += " "
        elif is_chinese(c):
            clean += f" {c} "
        elif c != "\ufffd" and not is_control(c):
            clean += c
    words = []
    for word in clean.split():
        if lowercase:
            word = word.lower()
        if strip:
            word = "".join(
                c
                for c in unicodedata.normalize("NFD", word)
                if unicodedata.category(c) != "Mn"
            )
        apart = (f" {c} " if is_punctuation(c) else c for c in word)
        words += "".join(apart).split()
    return words


# %% From a word to pieces: the longest, from the left
MAX_WORD_CHARACTERS = 100


def wordpiece(
    word: str,
    vocabulary: set[str] | dict[str, int],
    max_input_chars_per_word: int = MAX_WORD_CHARACTERS,
) -> list[str]:
    """Cut a word into the longest pieces of the vocabulary, from the left, (7.1).

    Pieces after the first begin with `##`. A word that cannot be cut, or has
    more than `max_input_chars_per_word` characters, becomes `[UNK]` as a whole.
    """
    if len(word) > max_input_chars_per_word:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):  # the longest first
            if prefix + word[start:end] in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


# %% The tokenizer
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class WordPieceTokenizer:
    """BERT's tokenizer on the Rust library `tokenizers`, with a vocabulary of our own or of a checkpoint.

    Args:
        vocabulary: piece -> id, with the five special tokens.
        lowercase: lower-case the text.
        strip_accents: remove accents; None: as `lowercase`.
        never_split: pieces of the vocabulary that are kept as they are, capitals and all, where they stand in a text
            with no letter, digit or `_` beside them.
        max_input_chars_per_word: longer words become [UNK]; 100 in Hugging Face, 200 in the original.

    Raises:
        TypeError: `never_split` is one text.
        ValueError: a special token or one of `never_split` is missing, the ids are not 0..V-1, or the length of a word
            is no positive number.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        lowercase: bool = True,
        strip_accents: bool | None = None,
        never_split: Iterable[str] = (),
        max_input_chars_per_word: int = MAX_WORD_CHARACTERS,
    ) -> None:
        if isinstance(never_split, str):
            raise TypeError(f"never_split={never_split!r}; expected a list")
        self.never_split = tuple(never_split)
        needed = (*SPECIAL_TOKENS, *self.never_split)
        if absent := [piece for piece in needed if piece not in vocabulary]:
            raise ValueError(f"vocabulary lacks {', '.join(absent)}")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(
                "vocabulary must number its pieces 0, 1, 2, ... without gaps or repeats"
            )
        if max_input_chars_per_word < 1:
            raise ValueError(
                f"max_input_chars_per_word={max_input_chars_per_word}; expected 1 or more"
            )
        self.vocabulary = dict(vocabulary)
        self.lowercase, self.strip_accents = lowercase, strip_accents
        self.max_input_chars_per_word = max_input_chars_per_word
        self.vocab_size = len(vocabulary)
        self.pad_token_id = vocabulary["[PAD]"]
        self.unk_token_id = vocabulary["[UNK]"]
        self.cls_token_id = vocabulary["[CLS]"]
        self.sep_token_id = vocabulary["[SEP]"]
        self.mask_token_id = vocabulary["[MASK]"]
        # the second reads "[MASK]" in a text as the token, and is the one saved
        self._plain, self._special = (
            self._build(()),
            self._build(SPECIAL_TOKENS),
        )

    def _build(self, special: tuple[str, ...]) -> Tokenizer:
        model = WordPiece(
            self.vocabulary,
            unk_token="[UNK]",
            max_input_chars_per_word=self.max_input_chars_per_word,
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=self.lowercase, strip_accents=self.strip_accents
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        # the frame, for other readers of tokenizer.json; ours is in `_row`
        tokenizer.post_processor = processors.BertProcessing(
            ("[SEP]", self.sep_token_id), ("[CLS]", self.cls_token_id)
        )
        tokenizer.add_special_tokens(list(special))
        tokenizer.add_tokens(
            [
                AddedToken(piece, single_word=True, normalized=False)
                for piece in self.never_split
                if piece not in special
            ]
        )
        return tokenizer

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        lowercase: bool = True,
        strip_accents: bool | None = None,
    ) -> "WordPieceTokenizer":
        """Learn a vocabulary of at most `vocab_size` pieces by (7.5) from texts (read twice, so kept in memory).

        The special tokens get the ids 0 to 4. The same texts give the same vocabulary.

        Raises:
            TypeError: `texts` is one text, or holds something else.
            ValueError: `vocab_size` has no room for the special tokens and letters.
        """
        if isinstance(texts, str):
            raise TypeError("texts is a single text; expected several: [text]")
        texts = check_texts(texts, "texts")

        def learn(size: int, first: list[str]) -> dict[str, int]:
            start = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
            tokenizer = cls(start, lowercase, strip_accents)._plain
            trainer = WordPieceTrainer(
                vocab_size=size, special_tokens=first, show_progress=False
            )
            tokenizer.train_from_iterator(texts, trainer)
            return tokenizer.get_vocab()

        letters = learn(0, list(SPECIAL_TOKENS))  # no merges
        if vocab_size < len(letters):
            raise ValueError(
                f"vocab_size={vocab_size}: the special tokens and letters of these texts are {len(letters)} already"
            )
        inner = sorted(p for p in letters if len(p) == 3 and p[:2] == "##")
        vocabulary = learn(vocab_size, [*SPECIAL_TOKENS, *inner])
        return cls(vocabulary, lowercase, strip_accents)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        lowercase: bool | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> "WordPieceTokenizer":
        """Read `vocab.txt`, or else `tokenizer.json`, of a folder or of the hub.

        Args:
            lowercase: None: as `tokenizer_config.json` or `tokenizer.json` says, else True.
            revision: of a repository on the hub: its branch, tag or commit.
            token: what the hub asks for where a repository is not public.

        Raises:
            FileNotFoundError: there is neither file.
            BertnbError: a file is damaged, holds another kind of tokenizer, or a setting that is not supported.
        """
        try:
            vocabulary, settings = read_vocabulary(
                path_or_hub_id, revision, token
            )
            return cls(
                vocabulary,
                settings["do_lower_case"] if lowercase is None else lowercase,
                settings["strip_accents"],
                settings["never_split"],
                settings["max_input_chars_per_word"],
            )
        except ValueError as error:
            raise BertnbError(f"{path_or_hub_id}: {error}") from error

    def save_pretrained(
        self, folder: str | Path, model_max_length: int = 512
    ) -> None:
        """Write `vocab.txt`, `tokenizer_config.json` and `tokenizer.json`; `transformers` reads them.

        Args:
            model_max_length: the tokens to which the tokenizers of
                `transformers` cut a row: the model's
                `max_position_embeddings`.
        """
        pieces = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": True,
            "model_max_length": model_max_length,
            **{f"{t.strip('[]').lower()}_token": t for t in SPECIAL_TOKENS},
        }
        files = {
            "vocab.txt": "\n".join(pieces),
            "tokenizer_config.json": json.dumps(settings, indent=2),
            "tokenizer.json": self._special.to_str(pretty=True),
        }
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():  # whole or not at all
            unfinished = folder / f"{name}.tmp"
            unfinished.write_text(text + "\n", encoding="utf-8")
            unfinished.replace(folder / name)

    def tokenize(self, text: str, allow_special: bool = False) -> list[str]:
        """Return the pieces of a text, without [CLS] and [SEP]."""
        return self._encode([text], "text", allow_special, True)[0].tokens

    def ids(
        self, texts: Iterable[str], allow_special: bool = False
    ) -> list[list[int]]:
        """Return the ids of each text, without [CLS] and [SEP]: the fast path for a corpus."""
        return [e.ids for e in self._encode(texts, "texts", allow_special)]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True
    ) -> str:
        """Return readable text for ids; pieces are joined, special tokens left out unless asked for.

        Raises:
            ValueError: an id lies outside the vocabulary.
        """
        ids = [int(i) for i in ids]
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(
                    f"ids holds {i}; expected 0 to {self.vocab_size - 1}"
                )
        return self._special.decode(
            ids, skip_special_tokens=skip_special_tokens
        )

    def __call__(
        self,
        texts: str | Iterable[str],
        text_pairs: str | Iterable[str] | None = None,
        max_length: int | None = None,
        truncation: bool = True,
        padding: bool = True,
        return_tensors: str | None = "pt",
        allow_special: bool = False,
        return_offsets: bool = False,
    ) -> dict[str, Any]:
        """Encode texts, or pairs of texts, as rows of (7.6).

        Args:
            max_length: the longest row, special tokens included; None: no limit. Longer rows lose tokens from the end
                of their longer text if `truncation`, else they are an error.
            padding: fill rows with [PAD] to the longest of the batch.
            return_tensors: "pt" for int64 tensors, None for lists.
            allow_special: read "[MASK]" and the like in the text as the tokens; else they are ordinary characters.
            return_offsets: also return `offset_mapping`, (B, L, 2): where each token begins and ends in its text,
                (0, 0) for special tokens and padding.

        Returns:
            `input_ids`, `token_type_ids` (0 for A and its frame, 1 for B), `attention_mask`; each (B, L).

        Raises:
            TypeError: something is not a text.
            ValueError: there is no text, or one that UTF-8 cannot write; the numbers of texts differ; `padding` is no
                bool; `max_length` is too small for the frame, or for a row that may not be cut; rows of unequal length
                shall be a tensor.
        """
        firsts = self._encode(texts, "texts", allow_special, return_offsets)
        seconds: list[Encoding] = []
        if text_pairs is not None:
            seconds = self._encode(
                text_pairs, "text_pairs", allow_special, return_offsets
            )
            if len(seconds) != len(firsts):
                raise ValueError(
                    f"text_pairs has {len(seconds)} texts; expected {len(firsts)} like texts"
                )
        if not firsts:
            raise ValueError("texts is empty; expected one text or more")
        if padding not in (True, False):
            raise ValueError(
                f"padding={padding!r}; expected True (to the longest row) or False"
            )
        rows = [
            self._row(first, second, max_length, truncation, return_offsets)
            for first, second in zip_longest(firsts, seconds)
        ]
        width = max(len(row["input_ids"]) for row in rows) if padding else 0
        fillers = {"input_ids": self.pad_token_id, "offset_mapping": (0, 0)}
        columns = {
            name: [
                row[name] + [fillers.get(name, 0)] * (width - len(row[name]))
                for row in rows
            ]
            for name in rows[0]
        }
        if return_tensors is None:
            return columns
        if (
            return_tensors != "pt"
            or len(set(map(len, columns["input_ids"]))) > 1
        ):
            raise ValueError(
                f"return_tensors={return_tensors!r} with padding={padding!r}: "
                "expected None for lists, or 'pt' and rows of equal length"
            )
        return {name: torch.tensor(column) for name, column in columns.items()}

    def _encode(
        self,
        texts: str | Iterable[str],
        name: str,
        allow_special: bool,
        details: bool = False,
    ) -> list[Encoding]:
        backend = self._special if allow_special else self._plain
        encode = backend.encode_batch if details else backend.encode_batch_fast
        return encode(check_texts(texts, name), add_special_tokens=False)

    def _row(
        self,
        first: Encoding,
        second: Encoding | None,
        max_length: int | None,
        truncation: bool,
        return_offsets: bool,
    ) -> dict[str, list[Any]]:
        """Frame one text or two, (7.6)."""
        a, b = len(first), len(second or ())
        frame = 2 if second is None else 3
        if max_length is not None and a + b + frame > max_length:
            if not truncation or max_length < frame:
                raise ValueError(
                    f"max_length={max_length}, but a row has {a + b} tokens besides the {frame} of its frame: "
                    f"raise max_length to {a + b + frame}, or cut with truncation=True and max_length >= {frame}"
                )
            a, b = _shares(a, b, max_length - frame)
        ids, kinds, offsets = [self.cls_token_id], [0], [(0, 0)]
        for segment, (text, kept) in enumerate(((first, a), (second, b))):
            if text is not None:
                ids += [*text.ids[:kept], self.sep_token_id]
                kinds += [segment] * (kept + 1)
                if return_offsets:
                    offsets += [*text.offsets[:kept], (0, 0)]
        row = {
            "input_ids": ids,
            "token_type_ids": kinds,
            "attention_mask": [1] * len(ids),
        }
        return {**row, "offset_mapping": offsets} if return_offsets else row


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Return how much of two texts to keep: the longer is cut; where both are longer than half the room, both are."""
    if first > second:
        return _shares(second, first, room)[::-1]
    kept = min(first, room // 2)
    return kept, min(second, room - kept)


def check_texts(texts: str | Iterable[str], name: str) -> list[str]:
    """Return one text or several as a list; raise a readable error for what is not text."""
    if not isinstance(texts, Iterable):
        raise TypeError(f"{name}={texts!r}; expected a text or a list of texts")
    texts = [texts] if isinstance(texts, str) else list(texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"{name}[{i}] is of type {type(text).__name__}; expected str"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name}[{i}] has half a surrogate pair at character {error.start}: "
                "decode its source with errors='replace'"
            ) from error
    return texts


# %% Reading a vocabulary
def read_vocabulary(
    path_or_hub_id: str | Path,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Return piece -> id of `vocab.txt`, or else of `tokenizer.json`, and the settings of the tokenizer."""
    whole = _json_if_there(path_or_hub_id, "tokenizer.json", revision, token)
    normalizer, model = whole.get("normalizer") or {}, whole.get("model") or {}
    added = whole.get("added_tokens") or []
    settings = {
        "do_lower_case": normalizer.get("lowercase", True),
        "strip_accents": normalizer.get("strip_accents"),
        "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        **_json_if_there(
            path_or_hub_id, "tokenizer_config.json", revision, token
        ),
        "never_split": [  # as we write them
            t["content"]
            for t in added
            if t.get("single_word") and not t.get("special")
        ],
        "max_input_chars_per_word": model.get(
            "max_input_chars_per_word", MAX_WORD_CHARACTERS
        ),
    }
    if not settings["tokenize_chinese_chars"]:
        raise ValueError("tokenize_chinese_chars=False is not supported")
    try:
        file = locate(path_or_hub_id, "vocab.txt", revision, token)
    except FileNotFoundError as error:
        if not whole:
            raise FileNotFoundError(
                f"{path_or_hub_id}: neither vocab.txt nor tokenizer.json could be found ({error})"
            ) from None
        if model.get("type") != "WordPiece":
            raise ValueError(
                f"tokenizer.json is of type {model.get('type')!r}; expected 'WordPiece'"
            ) from None
        vocabulary = model.get("vocab") or {}
        if new := sorted({t["content"] for t in added} - set(vocabulary)):
            raise ValueError(
                f"tokenizer.json adds {new[:3]} to its vocabulary: not supported"
            ) from None
        return vocabulary, settings
    # a piece a line; only a line feed ends a line, for Chinese vocabularies hold U+2028
    lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {line.rstrip(): i for i, line in enumerate(lines)}
    if len(vocabulary) < len(lines):
        raise ValueError(
            f"vocab.txt has {len(lines)} lines and only {len(vocabulary)} different pieces"
        )
    return vocabulary, settings


def _json_if_there(
    path_or_hub_id: str | Path,
    name: str,
    revision: str | None,
    token: str | None,
) -> dict[str, Any]:
    try:
        return read_json(locate(path_or_hub_id, name, revision, token))
    except FileNotFoundError:
        return {}
