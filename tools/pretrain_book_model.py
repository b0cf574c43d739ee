"""Pretrain the model that the book and the package carry, bertnb/sotu.

    python tools/pretrain_book_model.py FOLDER

takes about 40 minutes on one core. Run it again to go on after a stop. At the
end it writes the model card and prints the files that go to bertnb/sotu.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import bertnb

MODEL = bertnb.BertConfig(
    vocab_size=4096,
    hidden_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=512,
    max_position_embeddings=128,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.05,  # 0.02 fits H = 768; the start scales as H^-0.5
)
FILES = (
    "config.json",
    "model.safetensors",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "log.jsonl",
    "README.md",
)
CARD = """---
license: apache-2.0
language: en
library_name: bertnb
---

# A small BERT of the State of the Union

The model of the book *BERT, derived and proven*: {layers} layers, {hidden} wide,
{parameters:,} parameters, {vocab:,} word pieces, lower case. Pretrained from
nothing with both of BERT's objectives on the training part of the package
`sotu` (United States presidents' addresses since 1790, MIT licence), by
`tools/pretrain_book_model.py`. `log.jsonl` is the record of the run: its first
line says with what it was made ({steps:,} steps, {minutes:.0f} minutes on
{threads} thread of an {cpu}).

On all pairs of the held-out addresses, with 15 % of the words hidden: loss
{loss:.2f} nats a word, {words:.0f} % of the words right at once, {order:.0f} %
of {pairs:,} pairs recognised as neighbours or strangers.

It knows the phrases of its genre and next to nothing of the world. It repeats
what presidents said, prejudice included. It is for learning, not for use.

    bertnb.BertForPreTraining.from_pretrained(bertnb.book_model())
"""


def main(folder: Path) -> None:
    """Train or go on, score the result, write the card."""
    torch.set_num_threads(1)
    config = bertnb.PretrainConfig(
        str(folder),
        MODEL,
        mlm_probability=0.3,
        total_steps=24_000,
        eval_every=500,
    )
    run = bertnb.pretrain(config)
    _, held_out = bertnb.split_documents(bertnb.load_sotu())
    documents = bertnb.encode_documents(held_out, run.tokenizer)
    data = bertnb.PretrainingData(documents, run.tokenizer)
    scores = bertnb.evaluate_pretraining(run.model, data)
    head = json.loads((folder / "log.jsonl").read_text().splitlines()[0])
    card = CARD.format(
        layers=MODEL.num_hidden_layers,
        hidden=MODEL.hidden_size,
        vocab=MODEL.vocab_size,
        parameters=sum(p.numel() for p in run.model.parameters()),
        steps=config.total_steps,
        minutes=sum(record["seconds"] for record in run.records) / 60,
        threads=head["hardware"]["threads"],
        cpu=head["hardware"]["cpu"],
        loss=scores.masked_lm_loss,
        words=100 * scores.masked_lm_accuracy,
        order=100 * scores.next_sentence_accuracy,
        pairs=scores.pairs,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print("cp", *(str(folder / name) for name in FILES), "bertnb/sotu/")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
