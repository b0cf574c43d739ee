"""Record the pairs that Google's own sampler makes of small corpora.

    pip download --no-deps tf-models-official==2.20.0
    python tools/record_original_pairs.py tf_models_official-*.whl

runs the sampler of the wheel's official/nlp/data/create_pretraining_data.py,
with its masking taken out, and writes tests/parity/original_pairs.json: sizes
of the sentences, settings, seed, and of each pair where its two segments start,
how long they are, and the label. Tokens are numbered through the corpus.
Only the record is kept here; with --compare N it is made for N corpora and
compared with `bertnb.original_pairs` instead.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import zipfile
from pathlib import Path
from typing import Any

from manifest import ROOT

from bertnb.next_sentence import original_pairs

FILE = "official/nlp/data/create_pretraining_data.py"
NEEDED = {
    "TrainingInstance",
    "create_instances_from_document",
    "truncate_seq_pair",
}
RECORD = ROOT / "tests" / "parity" / "original_pairs.json"
Documents = list[list[list[int]]]


def google(wheel: Path) -> dict[str, Any]:
    """Return the names that the file's sampler defines, without masking."""
    source = zipfile.ZipFile(wheel).read(FILE).decode()
    nodes: list[ast.stmt] = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and node.name in NEEDED
    ]
    names: dict[str, Any] = {
        "create_masked_lm_predictions": lambda tokens, *_: (tokens, [], [])
    }
    exec(compile(ast.Module(nodes, []), FILE, "exec"), names)
    return names


def corpus(seed: int) -> tuple[list[list[int]], int, float]:
    """Return sizes of sentences, the most tokens a pair, short_seq_prob."""
    dice = random.Random(seed)
    sizes = [
        [dice.randint(0, 9) for _ in range(dice.randint(0, 12))]
        for _ in range(dice.randint(1, 6))
    ]
    return sizes, dice.randint(2, 40), dice.choice([0, 0.1, 0.5, 1])


def numbered(sizes: list[list[int]]) -> Documents:
    """Return documents of these sizes, whose tokens are 0, 1, 2, ..."""
    tokens = iter(range(sum(map(sum, sizes))))
    return [[[next(tokens) for _ in range(n)] for n in row] for row in sizes]


def theirs(
    names: dict[str, Any],
    documents: Documents,
    room: int,
    short: float,
    seed: int,
) -> list[list[int]]:
    """Return start and length of both segments, and the label, of each pair."""
    rng = random.Random(seed)
    texts = [[[str(t) for t in s] for s in d if s] for d in documents]
    texts = [d for d in texts if d]
    rng.shuffle(texts)
    instances = []
    for i in range(len(texts)):
        instances += names["create_instances_from_document"](
            texts, i, room + 3, short, 0.15, 20, [], rng
        )
    rng.shuffle(instances)
    rows = []
    for x in instances:
        cut = x.tokens.index("[SEP]")
        first, second = x.tokens[1:cut], x.tokens[cut + 1 : -1]
        starts = int(first[0]), len(first), int(second[0]), len(second)
        rows.append([*starts, int(x.is_random_next)])
    return rows


def main() -> None:
    """Write the record, or compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--compare", type=int, metavar="N", default=0)
    arguments = parser.parse_args()
    names, cases, pairs = google(arguments.wheel), [], 0
    for seed in range(arguments.compare or 90):
        sizes, room, short = corpus(seed)
        if not any(map(sum, sizes)):
            continue
        found = theirs(names, numbered(sizes), room, short, seed)
        pairs += len(found)
        if arguments.compare:
            ours = original_pairs(
                numbered(sizes), room, random.Random(seed), short
            )
            assert found == [
                [p.first[0], len(p.first), p.second[0], len(p.second), p.label]
                for p in ours
            ], seed
        elif seed % 5 == 0:
            cases.append(
                {
                    "sizes": sizes,
                    "max_tokens": room,
                    "short_seq_prob": short,
                    "seed": seed,
                    "pairs": found,
                }
            )
    if arguments.compare:
        print(f"{pairs:,} pairs are equal")
        return
    record = {"from": f"{arguments.wheel.name}: {FILE}", "cases": cases}
    RECORD.write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
