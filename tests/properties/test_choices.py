"""The choices of a first run: the rules, what is kept, and the summary."""

import gzip
import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import bertnb
from bertnb.choices import (
    SHAPES,
    choose_config,
    count_tokens,
    measure_speed,
    named_config,
    summarize,
    unigram_loss,
)
from bertnb.engine import PretrainResult
from bertnb.recipe import PretrainConfig, load_corpus

SENTENCE = "The people of the United States have a right to know. "


def corpus(folder: Path, size: int) -> str:
    """Return a folder with one text of so many bytes."""
    folder.mkdir(exist_ok=True)
    text = (SENTENCE * (size // len(SENTENCE) + 1))[:size]
    (folder / "a.txt").write_text(text)
    return str(folder)


def choose(corpus: str, **more: Any) -> PretrainConfig:
    given = {"corpus": corpus, "output_dir": "model", "device": "cpu"}
    return choose_config(given | more)


@pytest.mark.equation("21.1")
@pytest.mark.parametrize("size", [100, 30_000, 260_000, 2_000_000, 9_000_000])
def test_the_steps_are_forty_epochs_within_bounds(
    size: int, tmp_path: Path, measured: Any
) -> None:
    config = choose(corpus(tmp_path, size))
    tokens = size // 5
    places = config.batch_size * config.sequence_length
    steps = math.floor(40 * tokens / places)
    steps = 200 if steps < 200 else 10_000 if steps > 10_000 else steps
    measured(config.total_steps - steps, 0)


@pytest.mark.equation("21.2")
def test_the_start_keeps_the_size_of_a_layers_output(measured: Any) -> None:
    """At every width the outputs are as large as at 768 with 0.02."""
    for size, (_, hidden) in SHAPES.items():
        config = named_config(size)
        assert config.hidden_size == hidden
        std = config.initializer_range
        # rounded to three digits behind the point
        measured((std * math.sqrt(hidden) / (0.02 * math.sqrt(768))) - 1, 0.03)
    torch.manual_seed(0)
    inputs = torch.randn(2000, 128)
    model = bertnb.BertModel(named_config("tiny", 100))
    query = model.encoder.layer[0].attention.query.weight
    drawn = (inputs @ query.T).std().item()
    # truncated at two standard deviations, so smaller by 0.88
    assert drawn == pytest.approx(0.88 * 0.02 * math.sqrt(768), rel=0.05)


@pytest.mark.equation("21.3")
def test_the_rate_falls_with_the_width(tmp_path: Path, measured: Any) -> None:
    folder = corpus(tmp_path, 1000)
    for size, (_, hidden) in SHAPES.items():
        rate = choose(folder, size=size).learning_rate
        measured(rate - 0.003 / (hidden / 128), 5.1e-6)  # five digits are kept


def test_few_rows_where_there_is_little_text(tmp_path: Path) -> None:
    assert choose(corpus(tmp_path, 100)).batch_size == 1
    assert choose(corpus(tmp_path, 64_000)).batch_size == 10
    assert choose(corpus(tmp_path, 640_000)).batch_size == 32


@pytest.mark.parametrize(
    ("size", "pieces"),
    [(24_000_000, 4096), (25_000_000, 8192), (250_000_000, 30522)],
)
def test_the_vocabulary_grows_with_the_text(
    size: int, pieces: int, tmp_path: Path
) -> None:
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(size)  # a hole, which takes no room
    assert choose(str(tmp_path)).model.vocab_size == pieces
    assert choose(str(tmp_path), vocab_size=77).model.vocab_size == 77


def test_what_is_given_is_kept(tmp_path: Path) -> None:
    given = {
        "sequence_length": 200,
        "batch_size": 3,
        "total_steps": 70,
        "learning_rate": 1.0,
        "mlm_probability": 0.2,
        "final_mlm_probability": None,
        "eval_every": 9,
        "divergence": None,
        "seed": 4,
    }
    config = choose(corpus(tmp_path, 10_000), **given)
    for name, value in given.items():
        assert getattr(config, name) == value, name
    assert config.model.max_position_embeddings == 200


def test_a_model_may_be_given_in_three_ways(tmp_path: Path) -> None:
    folder = corpus(tmp_path, 10_000)
    model = bertnb.BertConfig(hidden_size=24, num_attention_heads=2)
    assert choose(folder, model=model).model == model
    assert choose(folder, model=model.to_dict()).model == model
    assert choose(folder, model=model).learning_rate == 0.016
    assert choose(folder, size="base").model == named_config("base", 4096, 64)
    named = choose(folder, size="mini", model=model)  # the name wins
    assert named.model == named_config("mini", 4096, 64)


def test_the_vocabulary_is_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder = corpus(tmp_path / "texts", 10_000)
    tokenizer = bertnb.WordPieceTokenizer.train([SENTENCE], 60)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    config = choose(folder, tokenizer=str(tmp_path / "tokenizer"))
    assert config.model.vocab_size == tokenizer.vocab_size
    documents = [bertnb.Document("", SENTENCE)] * 20
    shards = bertnb.prepare(documents, tokenizer, tmp_path / "shards")
    assert count_tokens(str(tmp_path / "shards")) == shards.tokens
    tokenizer.save_pretrained(tmp_path / "shards")
    config = choose(str(tmp_path / "shards"))
    assert config.model.vocab_size == tokenizer.vocab_size


def test_text_is_counted_wherever_it_lies(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("x" * 500)
    (tmp_path / "deep" / "b.txt").write_text("x" * 100)
    (tmp_path / "deep" / "c.md").write_text("x" * 100)
    packed = gzip.compress(SENTENCE.encode() * 9)
    (tmp_path / "d.txt.gz").write_bytes(packed)
    assert count_tokens(str(tmp_path)) == (600 + 3 * len(packed)) // 5
    assert count_tokens(str(tmp_path / "a.txt")) == 100
    for nothing in ("nowhere", str(tmp_path / "deep" / "c.md")):
        with pytest.raises(FileNotFoundError, match="holds no text"):
            count_tokens(nothing)


def test_the_estimate_for_real_text_is_near() -> None:
    documents = bertnb.load_sotu()
    folder = bertnb.book_model()
    tokenizer = bertnb.WordPieceTokenizer.from_pretrained(folder)
    some = documents[::12]
    tokens = sum(map(len, tokenizer.ids(d.text for d in some)))
    share = sum(len(d.text) for d in some) / sum(len(d.text) for d in documents)
    assert count_tokens("sotu") * share == pytest.approx(tokens, rel=0.15)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"learning_rte": 1}, "unknown learning_rte; known: .*learning_rate"),
        ({"size": "huge"}, "size='huge': expected one of tiny, mini"),
        ({"output_dir": "{t}/model"}, "lies in the corpus"),
        ({"output_dir": "{t}"}, "lies in the corpus"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_wrong_settings_are_named(
    given: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = corpus(tmp_path, 1000)
    filled = {
        k: v.format(t=folder) if isinstance(v, str) else v
        for k, v in given.items()
    }
    with pytest.raises(ValueError, match=said):
        choose(folder, **filled)


def test_corpus_and_folder_must_be_given() -> None:
    with pytest.raises(ValueError, match="corpus and output_dir must be given"):
        choose_config({})


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[PretrainConfig, PretrainResult]:
    home = tmp_path_factory.mktemp("run")
    (home / "texts").mkdir()
    for number in range(20):
        words = [SENTENCE, f"This is number {number}. "][: 1 + number % 2] * 9
        (home / "texts" / f"{number:02}.txt").write_text("".join(words))
    model = bertnb.BertConfig(
        vocab_size=100,
        hidden_size=8,
        num_attention_heads=2,
        num_hidden_layers=1,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    config = choose(
        str(home / "texts"),
        output_dir=str(home / "model"),
        model=model,
        total_steps=2,
        batch_size=2,
        eval_batches=2,
    )
    return config, bertnb.pretrain(config, progress=False)


def test_the_unigram_loss_is_that_of_counted_words(
    finished: tuple[PretrainConfig, PretrainResult], measured: Any
) -> None:
    config, result = finished
    texts = load_corpus(config)
    counts = Counter(t for d in texts.training for s in d for t in s)
    pieces = result.tokenizer.vocab_size
    total = sum(counts.values()) + pieces
    losses = [
        -math.log((counts[token] + 1) / total)
        for document in texts.held_out
        for sentence in document
        for token in sentence
    ]
    measured(unigram_loss(config) - sum(losses) / len(losses), 1e-9)


def record(step: int, loss: float) -> dict[str, Any]:
    shares = {"masked_lm_accuracy": 0.1, "next_sentence_accuracy": 0.75}
    return {"step": step, "masked_lm_loss": loss, "pairs": 400} | shares


def test_the_summary_is_of_the_model_in_the_folder(
    finished: tuple[PretrainConfig, PretrainResult],
) -> None:
    config, result = finished
    records = [record(10, 3.0), record(20, 2.0), record(30, 2.5)]
    made = replace(result, records=records)
    best = summarize(config, made)  # divergence is set: the best is kept
    assert (best["step"], best["masked_lm_loss"]) == (20, 2.0)
    last = summarize(replace(config, divergence=None), made)
    assert (last["step"], last["masked_lm_loss"]) == (30, 2.5)
    patient = replace(config, divergence=None, patience=2)
    assert summarize(patient, made)["step"] == 20
    assert best["unigram_loss"] == unigram_loss(config)
    low, high = bertnb.accuracy_interval(0.75, 400)
    assert (best["next_sentence_low"], best["next_sentence_high"]) == (
        low,
        high,
    )
    assert json.loads(json.dumps(best)) == best


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", "32"), ("corpus", 5), ("seed", 1.5), ("model", "tiny")],
)
def test_wrong_types_are_named(name: str, value: Any, tmp_path: Path) -> None:
    given = {"corpus": corpus(tmp_path, 1000)} | {name: value}
    with pytest.raises(TypeError, match=f"^{name}={value!r}: expected"):
        choose(**given)


def test_a_whole_number_is_a_number(tmp_path: Path) -> None:
    assert choose(corpus(tmp_path, 1000), learning_rate=1).learning_rate == 1


@pytest.mark.parametrize("stopped", ["SIGINT", "SIGTERM"])
def test_after_a_signal_there_is_no_time_for_scores(
    stopped: str, finished: tuple[PretrainConfig, PretrainResult]
) -> None:
    config, result = finished
    made = replace(result, stopped=stopped)
    expected = {"output": config.output_dir, "stopped": stopped}
    assert summarize(config, made) == expected


def test_before_the_first_evaluation_there_are_no_scores(
    finished: tuple[PretrainConfig, PretrainResult],
) -> None:
    config, result = finished
    made = replace(result, records=[], stopped="max_seconds")
    assert [*summarize(config, made)] == ["output", "stopped"]


def test_the_speed_is_measured_on_full_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that moves by as much as a step has rows: medians of these."""
    model = named_config("tiny", 50)
    ticks = iter(range(10**6))
    monkeypatch.setattr("bertnb.choices.perf_counter", lambda: next(ticks))
    facts = measure_speed(model, 20, 3, rounds=3, device="cpu")
    assert facts["training_milliseconds"] == 1000
    assert facts["training_tokens_per_second"] == 60
    assert facts["reading_tokens_per_second"] == 60
    assert facts["device"] == "cpu"
    expected = bertnb.BertForPreTraining(model)
    count = sum(parameter.numel() for parameter in expected.parameters())
    assert facts["parameters"] == count
