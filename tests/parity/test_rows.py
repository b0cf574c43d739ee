"""Rows against the libraries they come from."""

from collections import Counter

import torch
from transformers import BertTokenizerFast

from bertnb.next_sentence import Pair
from bertnb.rows import PretrainingData, collate_pairs
from bertnb.tokenization import SPECIAL_TOKENS, WordPieceTokenizer

WORDS = "i love natural language processing it is fun . we do too".split()
VOCABULARY = {t: i for i, t in enumerate([*SPECIAL_TOKENS, *WORDS])}
TEXTS = [
    ("I love natural language processing", "It is fun."),
    ("We do.", "I love it too."),
    ("Fun", "it is fun it is fun it is fun"),
]


def test_rows_equal_those_of_hugging_faces_tokenizer():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    pairs = [Pair(*tokenizer.ids(list(text)), 0) for text in TEXTS]
    ours = collate_pairs(pairs, tokenizer, 16)
    theirs = BertTokenizerFast(vocab=VOCABULARY)(
        [a for a, _ in TEXTS],
        [b for _, b in TEXTS],
        padding="max_length",
        max_length=16,
        return_special_tokens_mask=True,
        return_tensors="pt",
    )
    assert set(theirs) == set(ours) - {"next_sentence_label"}
    for key, value in theirs.items():
        assert torch.equal(ours[key].long(), value), key


def test_hidden_words_are_drawn_as_the_paper_says():
    tokenizer = WordPieceTokenizer(
        {t: i for i, t in enumerate([*SPECIAL_TOKENS, *map(str, range(995))])}
    )
    documents = [
        [[5 + (17 * d + s) % 995] * 7 for s in range(300)] for d in range(9)
    ]
    data = PretrainingData(documents, tokenizer, 64, 16, seed=3)
    shown = Counter()
    for step in range(data.batches_per_epoch):
        batch = data.batch(step)
        found = batch["input_ids"].gather(1, batch["masked_positions"])
        hidden = batch["labels"] != -100
        same = (found == batch["labels"])[hidden].sum().item()
        masks = (found == tokenizer.mask_token_id)[hidden].sum().item()
        shown.update(all=hidden.sum().item(), same=same, mask=masks)
        rows = batch["attention_mask"].sum(1)
        assert torch.equal(hidden.sum(1), (0.15 * rows).round().long())
    assert shown["all"] > 2000
    assert abs(shown["mask"] / shown["all"] - 0.8) < 0.03
    assert abs(shown["same"] / shown["all"] - 0.1) < 0.02
