"""WordPiece.

Written by tools/extract.py from notebooks/07_wordpiece.md: edit that notebook, not this file.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordPiece
from tokenizers.trainers import WordPieceTrainer

from bertnb.configuration import BertnbError, locate, read_json

__all__ = [
    "wordpiece",
    "MAX_WORD_CHARACTERS",
    "SPECIAL_TOKENS",
    "WordPieceTokenizer",
]


# %% The rule
def wordpiece(word: str, vocabulary: set[str] | dict[str, int]) -> list[str]:
    """Cut a word into the longest pieces of the vocabulary, from the left, (7.1).

    Pieces after the first begin with `##`. A word that cannot be cut, or is
    longer than 100 characters, becomes `[UNK]` as a whole.
    """
    if len(word) > MAX_WORD_CHARACTERS:
        return ["[UNK]"]
    pieces, start = [], 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            if prefix + word[start:end] in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(prefix + word[start:end])
        start = end
    return pieces


MAX_WORD_CHARACTERS = 100
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# %% The tokenizer
class WordPieceTokenizer:
    """BERT's tokenizer on the Rust library `tokenizers`, with a vocabulary of our own or of a checkpoint.

    Args:
        vocabulary: piece -> id, with the five special tokens.
        lowercase: lower-case the text.
        strip_accents: remove accents; None: as `lowercase`.

    Raises:
        ValueError: a special token is missing, or the ids are not 0..V-1.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        lowercase: bool = True,
        strip_accents: bool | None = None,
    ) -> None:
        absent = [token for token in SPECIAL_TOKENS if token not in vocabulary]
        if absent:
            raise ValueError(f"vocabulary lacks {', '.join(absent)}")
        if sorted(vocabulary.values()) != list(range(len(vocabulary))):
            raise ValueError(
                "vocabulary must number its pieces 0, 1, 2, ... without gaps or repeats"
            )
        self.vocabulary = dict(vocabulary)
        self.lowercase, self.strip_accents = lowercase, strip_accents
        self.vocab_size = len(vocabulary)
        (
            self.pad_token_id,
            self.unk_token_id,
            self.cls_token_id,
            self.sep_token_id,
            self.mask_token_id,
        ) = (vocabulary[token] for token in SPECIAL_TOKENS)
        self._plain = self._build()
        self._special = self._build()
        self._special.add_special_tokens(
            list(SPECIAL_TOKENS)
        )  # these read "[MASK]" in a text as the token

    def _build(self) -> Tokenizer:
        model = WordPiece(
            self.vocabulary,
            unk_token="[UNK]",
            max_input_chars_per_word=MAX_WORD_CHARACTERS,
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.BertNormalizer(
            lowercase=self.lowercase, strip_accents=self.strip_accents
        )
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        lowercase: bool = True,
        strip_accents: bool | None = None,
    ) -> "WordPieceTokenizer":
        """Learn a vocabulary of at most `vocab_size` pieces from texts (read twice, so kept in memory).

        The special tokens get the ids 0 to 4. The same texts give the same vocabulary.
        """
        texts = list(texts)

        def learn(first: list[str]) -> dict[str, int]:
            blank = cls(
                {token: i for i, token in enumerate(SPECIAL_TOKENS)},
                lowercase,
                strip_accents,
            )
            trainer = WordPieceTrainer(
                vocab_size=vocab_size, special_tokens=first, show_progress=False
            )
            blank._plain.train_from_iterator(texts, trainer)
            return blank._plain.get_vocab()

        # the library numbers "##a", "##b", ... in the order of a hash table, and breaks ties between merges by these
        # numbers (huggingface/tokenizers#1794): a first pass finds them, a second gets them in a fixed order
        letters = sorted(
            piece
            for piece in learn(list(SPECIAL_TOKENS))
            if len(piece) == 3 and piece.startswith("##")
        )
        return cls(learn([*SPECIAL_TOKENS, *letters]), lowercase, strip_accents)

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | Path, lowercase: bool | None = None
    ) -> "WordPieceTokenizer":
        """Read `vocab.txt` (or `tokenizer.json`) of a folder or of the hub.

        Args:
            lowercase: None: as `tokenizer_config.json` says, else True.

        Raises:
            FileNotFoundError: the folder holds neither file.
            BertnbError: a file is damaged or holds another kind of tokenizer.
        """
        try:
            settings = read_json(
                locate(path_or_hub_id, "tokenizer_config.json")
            )
        except FileNotFoundError:
            settings = {}
        try:
            lines = (
                locate(path_or_hub_id, "vocab.txt")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            vocabulary = {line.strip(): i for i, line in enumerate(lines)}
            if len(vocabulary) != len(lines):
                raise BertnbError(
                    f"{path_or_hub_id}: vocab.txt names a piece twice"
                )
        except FileNotFoundError:
            model = read_json(locate(path_or_hub_id, "tokenizer.json")).get(
                "model", {}
            )
            if model.get("type") != "WordPiece":
                raise BertnbError(
                    f"{path_or_hub_id}: tokenizer.json is of type {model.get('type')!r}; expected WordPiece"
                ) from None
            vocabulary = model["vocab"]
        if lowercase is None:
            lowercase = settings.get("do_lower_case", True)
        return cls(vocabulary, lowercase, settings.get("strip_accents"))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `vocab.txt`, `tokenizer_config.json` and `tokenizer.json`; `transformers` reads them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        pieces = sorted(self.vocabulary, key=self.vocabulary.__getitem__)
        (folder / "vocab.txt").write_text(
            "\n".join(pieces) + "\n", encoding="utf-8"
        )
        settings = {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": self.lowercase,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": True,
            "model_max_length": 512,
            **{
                f"{token.strip('[]').lower()}_token": token
                for token in SPECIAL_TOKENS
            },
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(settings, indent=2) + "\n", encoding="utf-8"
        )
        self._special.save(str(folder / "tokenizer.json"))

    def tokenize(self, text: str, allow_special: bool = False) -> list[str]:
        """Return the pieces of a text, without [CLS] and [SEP]."""
        return (
            self._backend(allow_special)
            .encode(text, add_special_tokens=False)
            .tokens
        )

    def ids(
        self, texts: list[str], allow_special: bool = False
    ) -> list[list[int]]:
        """Return the ids of each text, without [CLS] and [SEP]: the fast path for a corpus."""
        return [
            e.ids
            for e in self._backend(allow_special).encode_batch_fast(
                texts, add_special_tokens=False
            )
        ]

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True
    ) -> str:
        """Return readable text for ids; pieces are joined, special tokens left out unless asked for."""
        return self._special.decode(
            [int(i) for i in ids], skip_special_tokens=skip_special_tokens
        )

    def __call__(
        self,
        texts: str | list[str],
        text_pairs: str | list[str] | None = None,
        max_length: int | None = None,
        truncation: bool = True,
        padding: bool = True,
        return_tensors: str | None = "pt",
        allow_special: bool = False,
    ) -> dict[str, Any]:
        """Encode texts or pairs as [CLS] A [SEP] or [CLS] A [SEP] B [SEP].

        Args:
            max_length: the longest row, special tokens included; None: no limit. Longer rows lose tokens from the end
                of their longer text if `truncation`, else they are an error.
            padding: fill rows with [PAD] to the longest of the batch.
            return_tensors: "pt" for int64 tensors (needs `padding` unless the rows are equally long), None for lists.
            allow_special: read "[MASK]" and the like in the text as the tokens; else they are ordinary characters.

        Returns:
            `input_ids`, `token_type_ids` (0 for A and its frame, 1 for B), `attention_mask`; each (B, L).

        Raises:
            ValueError: the numbers of texts differ, or a row is longer than `max_length` without `truncation`.
        """
        firsts = [texts] if isinstance(texts, str) else list(texts)
        seconds = [text_pairs] if isinstance(text_pairs, str) else text_pairs
        if seconds is not None and len(seconds) != len(firsts):
            raise ValueError(
                f"text_pairs has {len(seconds)} texts and texts {len(firsts)}: expected as many"
            )
        a = self.ids(firsts, allow_special)
        b = (
            [[] for _ in a]
            if seconds is None
            else self.ids(list(seconds), allow_special)
        )
        rows: dict[str, list[list[int]]] = {
            "input_ids": [],
            "token_type_ids": [],
            "attention_mask": [],
        }
        for first, second in zip(a, b):
            second_frame = [] if seconds is None else [self.sep_token_id]
            room = (
                None
                if max_length is None
                else max_length - 2 - len(second_frame)
            )
            first, second = _fit(first, second, room, truncation)
            head = [self.cls_token_id, *first, self.sep_token_id]
            tail = [*second, *second_frame]
            rows["input_ids"].append(head + tail)
            rows["token_type_ids"].append([0] * len(head) + [1] * len(tail))
            rows["attention_mask"].append([1] * (len(head) + len(tail)))
        if padding:
            width = max(map(len, rows["input_ids"]), default=0)
            for key, fill in (
                ("input_ids", self.pad_token_id),
                ("token_type_ids", 0),
                ("attention_mask", 0),
            ):
                rows[key] = [
                    row + [fill] * (width - len(row)) for row in rows[key]
                ]
        if return_tensors is None:
            return dict(rows)
        if return_tensors != "pt":
            raise ValueError(
                f'return_tensors={return_tensors!r}: expected "pt" or None'
            )
        return {key: torch.tensor(value) for key, value in rows.items()}

    def _backend(self, allow_special: bool) -> Tokenizer:
        return self._special if allow_special else self._plain


def _fit(
    first: list[int], second: list[int], room: int | None, truncation: bool
) -> tuple[list[int], list[int]]:
    """Cut the longer text at its end until both fit into `room` tokens."""
    if room is None or len(first) + len(second) <= room:
        return first, second
    if not truncation:
        raise ValueError(
            f"a row has {len(first) + len(second)} tokens besides its frame and max_length leaves room for {room}; truncation is off"
        )
    if room < 0:
        raise ValueError("max_length leaves no room for [CLS] and [SEP]")
    while len(first) + len(second) > room:
        first, second = (
            (first[:-1], second)
            if len(first) > len(second)
            else (first, second[:-1])
        )
    return first, second
