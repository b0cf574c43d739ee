"""Train the book's small model on with other shares than 80/10/10.

    python tools/masking_ablation.py bertnb/sotu/masking.jsonl

took about 15 minutes on one core with the model of its record, 128 wide; the
book's model is larger now. The first line of the record says how it was made;
each other line is one run: a scheme, a seed, and what the model can do
afterwards on held-out addresses. Chapter 8 reads it.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bertnb import (
    BertConfig,
    BertForMaskedLM,
    Document,
    PretrainConfig,
    WordPieceTokenizer,
    adamw,
    book_model,
    encode_documents,
    gather_positions,
    linear_warmup_decay,
    load_sotu,
    mask_tokens,
    run_facts,
    split_documents,
    train,
)

# the shares of [MASK], of a random word, and of the word itself
SCHEMES = {
    "100/0/0": (1.0, 0.0, 0.0),
    "80/10/10": (0.8, 0.1, 0.1),
    "0/100/0": (0.0, 1.0, 0.0),
    "0/0/100": (0.0, 0.0, 1.0),
}
SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH, PEAK = 600, 32, 62, 1e-3
HELD_OUT = 512  # rows
tokenizer = WordPieceTokenizer.from_pretrained(book_model())


def rows(documents: list[Document]) -> Tensor:
    """Cut documents into rows [CLS] 62 tokens [SEP]."""
    found = []
    for sentences in encode_documents(documents, tokenizer):
        ids = [i for sentence in sentences for i in sentence]
        for start in range(0, len(ids) - LENGTH + 1, LENGTH):
            row = ids[start : start + LENGTH]
            found.append([tokenizer.cls_token_id, *row, tokenizer.sep_token_id])
    return torch.tensor(found)


def hide(
    ids: Tensor, shares: tuple[float, float, float], generator: torch.Generator
) -> dict[str, Tensor]:
    """Choose words as always, and replace them in other shares."""
    frame = torch.tensor([tokenizer.cls_token_id, tokenizer.sep_token_id])
    _, positions, labels = mask_tokens(
        ids,
        torch.isin(ids, frame),
        vocab_size=tokenizer.vocab_size,
        mask_token_id=tokenizer.mask_token_id,
        generator=generator,
    )
    u = torch.rand(labels.shape, generator=generator)
    noise = torch.randint(
        tokenizer.vocab_size, labels.shape, generator=generator
    )
    shown = torch.where(u < shares[0] + shares[1], noise, labels)
    shown = torch.where(u < shares[0], tokenizer.mask_token_id, shown)
    return {
        "input_ids": ids.scatter(1, positions, shown),  # no row is short
        "masked_positions": positions,
        "labels": labels,
    }


def continued(
    shares: tuple[float, float, float], seed: int, texts: Tensor
) -> BertForMaskedLM:
    """Return the recorded model after some more steps under a scheme."""
    model = BertForMaskedLM.from_pretrained(book_model())
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(texts), generator=generator)

    def learning_rate(step: int) -> float:
        return PEAK * linear_warmup_decay(step + 1, STEPS // 10, STEPS + 1)

    batches = (
        hide(texts[order[i * BATCH : (i + 1) * BATCH]], shares, generator)
        for i in range(STEPS)
    )
    for _ in train(model, adamw(model), batches, learning_rate):
        pass
    return model.eval()


def restored(
    model: BertForMaskedLM, texts: Tensor, shares: tuple[float, float, float]
) -> tuple[float, float]:
    """Return loss and accuracy at chosen words, shown in one way."""
    batch = hide(texts, shares, torch.Generator().manual_seed(0))
    output = model(**batch)
    assert output.loss is not None
    right = (output.logits.argmax(-1) == batch["labels"]).double().mean()
    return output.loss.item(), right.item()


def probe(model: BertForMaskedLM, parts: list[tuple[Tensor, Tensor]]) -> float:
    """Fit a linear layer on frozen vectors of visible text; return its F1.

    Each part is (rows, labels), the labels 0 or 1, -100 where there is none.
    """
    found = []
    for texts, labels in parts:
        states = model.bert(texts).last_hidden_state
        counts = labels >= 0
        found.append((states[counts], labels[counts].float()))
    (x, y), (x_test, y_test) = found
    weight = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200)

    def scores(states: Tensor) -> Tensor:
        return states @ weight[:-1] + weight[-1]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(scores(x), y)
        loss = loss + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    guess = scores(x_test) > 0
    both = (guess & (y_test > 0)).sum().item()
    return 2 * both / (guess.sum().item() + y_test.sum().item())


def capitals(
    documents: list[Document], limit: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Return rows of text, and where the text has a word in capitals.

    The tokenizer lower-cases, so the vectors must know it from the context.
    """
    passages = []
    for document in documents:
        words = document.text.split()
        passages += [
            " ".join(words[i : i + 40]) for i in range(0, len(words) - 40, 40)
        ]
    passages = random.Random(seed).sample(passages, limit)
    batch = tokenizer(passages, max_length=LENGTH + 2, return_offsets=True)
    labels = torch.full_like(batch["input_ids"], -100)
    for b, text in enumerate(passages):
        for i, (start, end) in enumerate(batch["offset_mapping"][b].tolist()):
            first = start == 0 or text[start - 1].isspace()
            after_stop = start < 2 or text[start - 2] in ".?!:;"
            if end and first and not after_stop and text[start].isalpha():
                labels[b, i] = int(text[start].isupper())
    keep = batch["attention_mask"].sum(1) == LENGTH + 2  # no padding
    return batch["input_ids"][keep], labels[keep]


@torch.no_grad()
def measure(
    model: BertForMaskedLM, texts: Tensor, parts: list[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """Return what a model does with words hidden, seen, and replaced."""
    loss, right = restored(model, texts, (1.0, 0.0, 0.0))
    seen = gather_positions(
        model(texts).logits, torch.arange(1, LENGTH + 1).expand(len(texts), -1)
    ).argmax(-1)
    wrong_loss, wrong_right = restored(model, texts, (0.0, 1.0, 0.0))
    return {
        "loss_behind_mask": loss,
        "right_behind_mask": right,
        "right_in_plain_sight": (seen == texts[:, 1:-1]).double().mean().item(),
        "loss_at_random_word": wrong_loss,
        "right_at_random_word": wrong_right,
        "probe_f1": probe(model, parts),
    }


def main() -> None:
    """Run all schemes and seeds, and write the record."""
    target = Path(sys.argv[1])
    learn, held_out = split_documents(load_sotu())
    texts, test = rows(learn), rows(held_out)
    test = test[:: len(test) // HELD_OUT][:HELD_OUT]
    parts = [capitals(learn, 1500, 0), capitals(held_out, 800, 1)]
    config = BertConfig.from_pretrained(book_model())
    facts: dict[str, Any] = run_facts(PretrainConfig("", config))
    del facts["config"]
    facts = {
        "command": "python tools/masking_ablation.py bertnb/sotu/masking.jsonl",
        "start": "bertnb/sotu",
        "steps": STEPS,
        "rows": BATCH,
        "peak_learning_rate": PEAK,
        "held_out_rows": len(test),
        "probe_words": [int((y >= 0).sum()) for _, y in parts],
        **facts,
    }
    lines: list[dict[str, Any]] = [facts]
    start = BertForMaskedLM.from_pretrained(book_model())
    lines.append(
        {"scheme": "start", "seed": None} | measure(start, test, parts)
    )
    print(lines[-1], flush=True)
    for seed in SEEDS:
        for scheme, shares in SCHEMES.items():
            torch.manual_seed(seed)
            model = continued(shares, seed, texts)
            found = measure(model, test, parts)
            lines.append({"scheme": scheme, "seed": seed} | found)
            print(lines[-1], flush=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    target.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
