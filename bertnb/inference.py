"""Inference.

Written by tools/extract.py from notebooks/16_inference.md: edit that notebook, not this file.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bertnb.configuration import BertConfig
from bertnb.encoder import BertModel
from bertnb.masked_lm import BertForMaskedLM
from bertnb.next_sentence import BertForNextSentencePrediction
from bertnb.pretraining import BertForPreTraining, PreTrainingOutput
from bertnb.tokenization import WordPieceTokenizer, check_texts

__all__ = [
    "POOLINGS",
    "check_pooling",
    "pool",
    "cosine_similarity",
    "BATCH_POSITIONS",
    "length_batches",
    "evaluating",
    "embed",
    "fill_mask",
    "next_sentence_probability",
]


# %% The code: pooling and comparing
POOLINGS = ("mean", "cls", "max")


def check_pooling(pooling: str) -> None:
    """Raise ValueError for a pooling that `pool` does not know."""
    if pooling not in POOLINGS:
        raise ValueError(
            f"pooling={pooling!r}: expected one of {', '.join(POOLINGS)}"
        )


def pool(
    hidden_states: Tensor, attention_mask: Tensor, pooling: str = "mean"
) -> Tensor:
    """Make one vector of a row's: (B, L, H) and the mask (B, L) -> (B, H).

    Args:
        pooling: "mean" of the tokens, (16.1), "max", (16.2), or "cls", the
            first of them. [CLS] and [SEP] are tokens, padding is none.

    Raises:
        ValueError: `pooling` is none of the three.
    """
    check_pooling(pooling)
    if pooling == "cls":
        return hidden_states[:, 0]
    keep = attention_mask.bool()[..., None]  # (B, L, 1)
    if pooling == "max":
        return hidden_states.masked_fill(~keep, -torch.inf).amax(1)
    return hidden_states.masked_fill(~keep, 0).sum(1) / keep.sum(1)


def cosine_similarity(first: Tensor, second: Tensor) -> Tensor:
    """Compare all with all by (16.3): (n, H) and (m, H) -> (n, m)."""
    return F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).mT


BATCH_POSITIONS = {"cpu": 512, "others": 32768}


def length_batches(
    lengths: Sequence[int], batch_size: int, max_positions: int | None = None
) -> list[list[int]]:
    """Return row numbers in batches of like lengths, the longest first.

    Args:
        lengths: the tokens of each row.
        batch_size: the most rows of a batch.
        max_positions: the most positions of a batch, padding included; a
            longer row is a batch of its own. None: no limit.

    Raises:
        ValueError: `batch_size` or `max_positions` is below 1.
    """
    for name, value in (
        ("batch_size", batch_size),
        ("max_positions", max_positions),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: expected 1 or more")
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    batches, start = [], 0
    while start < len(order):
        rows = batch_size
        if max_positions is not None:  # the first row is the widest
            fit = max_positions // max(1, lengths[order[start]])
            rows = min(rows, max(1, fit))
        batches.append(order[start : start + rows])
        start += rows
    return batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a while, errors included."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


# %% The code: texts in, vectors out
def _rows(
    config: BertConfig,
    tokenizer: WordPieceTokenizer,
    texts: list[str],
    max_length: int | None = None,
    allow_special: bool = False,
    pairs: list[str] | None = None,
) -> dict[str, list[list[int]]]:
    """Return what the tokenizer makes of texts; refuse what the model cannot read."""
    limit = config.max_position_embeddings
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer has {tokenizer.vocab_size} pieces, the model only "
            f"vocab_size={config.vocab_size}: load both from the same folder"
        )
    if max_length is not None and max_length > limit:
        raise ValueError(
            f"max_length={max_length}: the model reads at most "
            f"max_position_embeddings={limit} tokens"
        )
    if not texts:
        return {"input_ids": [], "token_type_ids": []}
    rows = tokenizer(
        texts,
        pairs,
        max_length=max_length,
        padding=False,
        return_tensors=None,
        allow_special=allow_special,
    )
    for text, row in zip(texts, rows["input_ids"], strict=True):
        if len(row) > limit:
            raise ValueError(
                f"a text has {len(row)} tokens, the model reads at most "
                f"max_position_embeddings={limit}: split it, or cut it (embed: "
                f"max_length={limit}); it begins {text[:40]!r}"
            )
    return rows


def _batches(
    rows: list[list[int]], batch_size: int | None, device: torch.device
) -> list[list[int]]:
    """Return batches of so many rows, or of as many as the device likes."""
    lengths = [len(row) for row in rows]
    if batch_size is not None:
        return length_batches(lengths, batch_size)
    kind = "cpu" if device.type == "cpu" else "others"
    return length_batches(lengths, len(rows) or 1, BATCH_POSITIONS[kind])


def _padded(
    rows: list[list[int]], batch: list[int], value: int, device: torch.device
) -> Tensor:
    """Lay some rows of numbers one below the other: int64 (B, L)."""
    return pad_sequence(
        [torch.tensor(rows[i]) for i in batch],
        batch_first=True,
        padding_value=value,
    ).to(device)


def _mask(
    rows: list[list[int]], batch: list[int], device: torch.device
) -> Tensor | None:
    """Return True for tokens, False for padding, (B, L); None: no padding."""
    lengths = [len(rows[i]) for i in batch]
    if min(lengths) == max(lengths):
        return None
    places = torch.arange(max(lengths))
    return (places < torch.tensor(lengths)[:, None]).to(device)


def embed(
    model: nn.Module,
    tokenizer: WordPieceTokenizer,
    texts: str | Iterable[str],
    pooling: str = "mean",
    layers: Sequence[int] = (-1,),
    batch_size: int | None = None,
    normalize: bool = False,
    max_length: int | None = None,
) -> Tensor:
    """Return a vector for each text, in the order of the texts.

    Args:
        model: a `BertModel`, or a model with one as `bert`. It stays in the
            mode it was in; dropout and gradients are off here.
        texts: one text is as a list of one. No text gives no row.
        pooling: "mean", "cls" or "max"; see `pool`.
        layers: which hidden states, 0 the embeddings, N or -1 the last
            layer's; several are concatenated.
        batch_size: how many texts at once, like lengths together; None: as
            many as fill `BATCH_POSITIONS`.
        normalize: divide each row by its length.
        max_length: cut longer texts to so many tokens, [CLS] and [SEP]
            included; None: a text that is too long is an error.

    Returns:
        float32 (n, H * len(layers)), on the CPU.

    Raises:
        TypeError: `model` holds no `BertModel`, `layers` is a single number,
            or something is not a text.
        ValueError: `pooling`, `layers`, `batch_size` or `max_length` lies
            outside its range, a text is too long, or the tokenizer belongs
            to another model.
    """
    body = getattr(model, "bert", model)
    if not isinstance(body, BertModel):
        raise TypeError(
            f"model is of type {type(model).__name__}: expected a BertModel, "
            "or a model that has one as its attribute bert"
        )
    config, device = body.config, next(body.parameters()).device
    check_pooling(pooling)
    _check_layers(layers, config.num_hidden_layers)
    rows = _rows(config, tokenizer, check_texts(texts, "texts"), max_length)[
        "input_ids"
    ]
    batches = _batches(rows, batch_size, device)
    vectors = torch.empty(len(rows), len(layers) * config.hidden_size)
    every = tuple(layers) != (-1,)
    cls = pooling == "cls" and not every  # of the last layer only [CLS]
    with evaluating(body):
        for batch in batches:
            ids = _padded(rows, batch, tokenizer.pad_token_id, device)  # (B, L)
            mask = _mask(rows, batch, device)
            only = ids.new_zeros(len(batch), 1) if cls else None
            output = body(
                ids, mask, output_hidden_states=every, masked_positions=only
            )
            states = output.hidden_states or [output.last_hidden_state]
            counts = torch.ones_like(ids) if mask is None else mask
            pooled = [pool(states[i].float(), counts, pooling) for i in layers]
            vectors[batch] = torch.cat(pooled, dim=-1).cpu()
    return F.normalize(vectors, dim=-1) if normalize else vectors


def _check_layers(layers: Sequence[int], last: int) -> None:
    if isinstance(layers, int):
        raise TypeError(f"layers={layers}: expected several, as in ({layers},)")
    wrong = [
        layer for layer in layers if layer not in range(-last - 1, last + 1)
    ]
    if wrong or not len(layers):
        raise ValueError(
            f"layers={layers}: expected one or more of 0 (embeddings) to {last} "
            f"(the last layer), or of -1 (the last) to {-last - 1}"
        )


# %% The code: filling blanks
def fill_mask(
    model: BertForMaskedLM | BertForPreTraining,
    tokenizer: WordPieceTokenizer,
    text: str,
    top_k: int = 5,
) -> list[Any]:
    """Find the likeliest words for each [MASK] of a text, (16.6).

    Args:
        text: one text; [MASK] and other special tokens in it are read as such.
        top_k: how many words for each.

    Returns:
        For one [MASK] a list of dicts, the best first: `score`, the
        probability; `token`, the id; `token_str`; `sequence`, the whole text
        with the word in it. For several a list of such lists: each word
        judged alone, the other [MASK]s left standing.

    Raises:
        TypeError: `model` has no masked-word head, or `text` is no text.
        ValueError: no [MASK] in the text, or it is too long; `top_k` outside
            1..V; or the tokenizer belongs to another model.
    """
    if not isinstance(model, BertForMaskedLM | BertForPreTraining):
        raise TypeError(
            f"model is of type {type(model).__name__}, without a masked-word "
            "head: load it by BertForMaskedLM.from_pretrained"
        )
    if not isinstance(text, str):
        raise TypeError(
            f"text is of type {type(text).__name__}: expected one text"
        )
    ids = _rows(model.config, tokenizer, [text], allow_special=True)[
        "input_ids"
    ][0]
    places = [i for i, id in enumerate(ids) if id == tokenizer.mask_token_id]
    if not places:
        raise ValueError(
            f"text={text!r} has no [MASK]: write [MASK] for the word to find"
        )
    words = tokenizer.vocab_size
    if top_k not in range(1, words + 1):
        raise ValueError(f"top_k={top_k}: expected 1 to {words}")
    device = next(model.parameters()).device
    with evaluating(model):
        output = model(
            torch.tensor([ids], device=device),
            masked_positions=torch.tensor([places], device=device),
        )  # logits of the masks only, (1, P, V)
    both = isinstance(output, PreTrainingOutput)
    logits = output.prediction_logits if both else output.logits
    # the table may be longer than the vocabulary
    best = logits[0, :, :words].float().softmax(-1).topk(top_k)  # (P, k)
    found = [
        [
            _filled(tokenizer, ids, place, word, score, len(places) == 1)
            for word, score in zip(some, scores, strict=True)
        ]
        for place, some, scores in zip(
            places, best.indices.tolist(), best.values.tolist(), strict=True
        )
    ]
    return found[0] if len(places) == 1 else found


def _filled(
    tokenizer: WordPieceTokenizer,
    ids: list[int],
    place: int,
    word: int,
    score: float,
    alone: bool,
) -> dict[str, Any]:
    """Return one proposal, and the text with it; other masks stay in view."""
    row = [*ids[:place], word, *ids[place + 1 :]]
    row = [i for i in row if i != tokenizer.pad_token_id]
    return {
        "score": score,
        "token": word,
        "token_str": tokenizer.decode([word], skip_special_tokens=False),
        "sequence": tokenizer.decode(row, skip_special_tokens=alone),
    }


# %% The code: does it follow?
def next_sentence_probability(
    model: BertForNextSentencePrediction | BertForPreTraining,
    tokenizer: WordPieceTokenizer,
    first: str | Iterable[str],
    second: str | Iterable[str],
) -> Tensor:
    """Return how likely each second text follows its first, (9.2).

    Args:
        first, second: a text each, or equally many.

    Returns:
        float32 (n,), probabilities, on the CPU.

    Raises:
        TypeError: `model` has no next-sentence head, or something is no text.
        ValueError: the numbers of texts differ, a pair is too long, or the
            tokenizer belongs to another model.
    """
    if not isinstance(
        model, BertForNextSentencePrediction | BertForPreTraining
    ):
        raise TypeError(
            f"model is of type {type(model).__name__}, without a next-sentence "
            "head: load it by BertForNextSentencePrediction.from_pretrained"
        )
    firsts, seconds = check_texts(first, "first"), check_texts(second, "second")
    if len(firsts) != len(seconds):
        raise ValueError(
            f"first has {len(firsts)} texts and second {len(seconds)}: each "
            "first text needs one second"
        )
    rows = _rows(model.config, tokenizer, firsts, pairs=seconds)
    ids, segments = rows["input_ids"], rows["token_type_ids"]
    device = next(model.parameters()).device
    probabilities = torch.empty(len(ids))
    with evaluating(model):
        for batch in _batches(ids, None, device):
            row = _padded(ids, batch, tokenizer.pad_token_id, device)
            pooled = model.bert(
                row,
                _mask(ids, batch, device),
                _padded(segments, batch, 0, device),
                masked_positions=row[:, :0],  # of the last layer only [CLS]
            ).pooler_output
            follows = model.next_sentence(pooled).float().softmax(-1)[:, 0]
            probabilities[batch] = follows.cpu()
    return probabilities
