"""What decides a run: two curves, the corpus, and what a record says of it."""

import gzip
import json
import subprocess
from dataclasses import replace

import pytest
import torch

from bertnb import (
    SCHEDULES,
    BertConfig,
    Document,
    PretrainConfig,
    PretrainingData,
    WordPieceTokenizer,
    World,
    book_model,
    cut_documents,
    load_corpus,
    load_folder,
    memory_advice,
    pick_size,
    prepare,
    run_facts,
    split_documents,
    split_sentences,
    token_counts,
)
from bertnb.recipe import FREE

SMALL = BertConfig(
    vocab_size=90,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty short documents, each about one animal, not of one length."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        animal = ("cat", "dog", "owl", "fox")[number % 4]
        birds = range(5 + number % 7)
        lines = [f"The {animal} saw {n} birds on a tree." for n in birds]
        (folder / f"{number:02}.txt").write_text(" ".join(lines))
    return folder


def config(**changes):
    return replace(
        PretrainConfig("nowhere", SMALL, sequence_length=24, batch_size=4),
        **changes,
    )


# curves


@pytest.mark.equation("12.5")
@pytest.mark.parametrize("steps", [1, 2, 10, 97])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 1.0])
def test_the_learning_rate_is_that_between_the_zeros(measured, steps, ratio):
    run = config(total_steps=steps, learning_rate=2.0, warmup_ratio=ratio)
    warmup = round(ratio * steps)
    for name, line in (("hugging_face", None), ("original", 0)):
        one = replace(run, schedule=name)
        rates = [one.learning_rate_at(t) for t in range(steps)]
        expected = []
        for s in range(1, steps + 1):
            begin = warmup if line is None else line
            down = (steps + 1 - s) / (steps + 1 - begin)
            expected.append(2 * (s / warmup if s < warmup else down))
        measured(torch.tensor(rates) - torch.tensor(expected), 1e-6)
        assert min(rates) > 0
    constant = replace(run, schedule="constant")
    assert constant.learning_rate_at(steps - 1) == 2.0


@pytest.mark.equation("12.5")
@pytest.mark.parametrize("ratio", [0.01, 0.3, 1.0])
def test_whatever_the_warmup_the_rates_have_one_sum(measured, ratio):
    run = config(total_steps=100, learning_rate=3.0, warmup_ratio=ratio)
    rates = [run.learning_rate_at(t) for t in range(100)]
    measured(sum(rates) - 3.0 * 101 / 2, 1e-11)


@pytest.mark.equation("12.6")
def test_the_share_of_hidden_words_is_a_straight_line(measured):
    run = config(
        total_steps=51, mlm_probability=0.4, final_mlm_probability=0.15
    )
    shares = [run.mlm_probability_at(t) for t in range(51)]
    measured(shares[0] - 0.4, 0)
    measured(shares[50] - 0.15, 1e-15)
    steps = torch.tensor(shares, dtype=torch.float64).diff()
    measured(steps + 0.25 / 50, 1e-15)
    measured(sum(shares) / 51 - 0.275, 1e-15)
    same = replace(run, final_mlm_probability=None)
    assert {same.mlm_probability_at(t) for t in range(51)} == {0.4}
    assert replace(run, total_steps=1).mlm_probability_at(0) == 0.4


@pytest.mark.equation("12.7")
def test_the_places_are_those_of_the_batches(corpus, measured):
    run = config(corpus=str(corpus), batch_size=6, sequence_length=20)
    loaded = load_corpus(run)
    data = PretrainingData(loaded.training, loaded.tokenizer, 20, 6)
    seen = sum(data.batch(step)["input_ids"].numel() for step in range(7))
    measured(run.places(7) - seen, 0)


# values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected 1 or more"),
        ({"parts": 0}, "parts=0"),
        ({"pack": 0}, "pack=0"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"eval_every": 0}, "eval_every=0"),
        ({"eval_batches": 0}, "eval_batches=0"),
        ({"save_every": 0}, "save_every=0"),
        ({"keep": 0}, "keep=0"),
        ({"patience": 0}, "patience=0"),
        ({"max_tokens": 0}, "max_tokens=0"),
        ({"max_seconds": 0.0}, r"max_seconds=0\.0: expected more than 0"),
        ({"divergence": -1.0}, r"divergence=-1\.0"),
        ({"learning_rate": 0.0}, r"learning_rate=0\.0"),
        ({"max_grad_norm": 0.0}, r"max_grad_norm=0\.0"),
        ({"mlm_probability": 0.0}, r"mlm_probability=0\.0: expected in"),
        ({"final_mlm_probability": 1.1}, r"final_mlm_probability=1\.1"),
        ({"warmup_ratio": 1.5}, r"warmup_ratio=1\.5"),
        ({"sequence_length": 33}, "max_position_embeddings=32"),
        ({"sequence_length": 4}, "sequence_length=4"),
        ({"sampler": "any"}, "sampler='any': expected one of exact, original"),
        ({"schedule": "cosine"}, "schedule='cosine': expected one of hugging"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"on_nonfinite": "hope"}, "on_nonfinite='hope': expected one of stop"),
    ],
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        config(**change)


def test_every_schedule_can_be_chosen():
    for name in SCHEDULES:
        assert config(schedule=name).learning_rate_at(0) > 0


def test_what_binds_a_run_is_all_but_what_is_free():
    binding = config().binding()
    assert binding["model.hidden_size"] == 16
    assert binding["seed"] == 0
    assert not set(binding) & set(FREE)
    fields = {f for f in vars(config()) if f != "model"}
    own = {name for name in binding if not name.startswith("model.")}
    assert own | set(FREE) == fields
    assert config(keep=7, max_tokens=1).binding() == binding
    json.dumps(binding)


# text


def test_documents_of_a_folder_are_split_like_the_corpus(corpus):
    loaded = load_corpus(config(corpus=str(corpus)))
    assert (len(loaded.training), len(loaded.held_out)) == (18, 2)
    assert loaded.tokenizer.vocab_size <= 90
    learn, _ = split_documents(load_folder(corpus))
    own = WordPieceTokenizer.train((d.text for d in learn), 90)
    assert loaded.tokenizer.vocabulary == own.vocabulary


def test_shards_are_the_same_corpus(tmp_path, corpus):
    """With the tokenizer beside them, or with one that is named."""
    texts = load_corpus(config(corpus=str(corpus)))
    texts.tokenizer.save_pretrained(tmp_path / "tokenizer")
    prepare(load_folder(corpus), texts.tokenizer, tmp_path / "shards")
    named = {"tokenizer": str(tmp_path / "tokenizer")}
    one = load_corpus(config(corpus=str(tmp_path / "shards"), **named))
    texts.tokenizer.save_pretrained(tmp_path / "shards")
    for shards in (one, load_corpus(config(corpus=str(tmp_path / "shards")))):
        assert list(shards.training) == texts.training
        assert list(shards.held_out) == texts.held_out
        assert shards.digest == one.digest
        for name in ("training", "held_out"):
            counted = list(token_counts(getattr(shards, name)))
            assert counted == list(token_counts(getattr(texts, name)))
    fewer = load_folder(corpus)[1:]
    prepare(fewer, texts.tokenizer, tmp_path / "fewer")
    other = config(corpus=str(tmp_path / "fewer"), **named)
    assert load_corpus(other).digest != one.digest


def test_a_tokenizer_larger_than_the_model_is_refused(corpus):
    with pytest.raises(ValueError, match=r"tokenizer=.* vocab_size=90"):
        load_corpus(config(corpus=str(corpus), tokenizer=str(book_model())))


def test_the_digest_is_that_of_the_texts_and_the_tokenizer(tmp_path, corpus):
    first = load_corpus(config(corpus=str(corpus)))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in corpus.iterdir():  # elsewhere, and compressed: the same texts
        with gzip.open(copy / f"{file.name}.gz", "wt") as packed:
            packed.write(file.read_text())
    assert load_corpus(config(corpus=str(copy))).digest == first.digest
    first.tokenizer.save_pretrained(tmp_path / "tokenizer")
    named = config(corpus=str(copy), tokenizer=str(tmp_path / "tokenizer"))
    assert load_corpus(named).digest == first.digest
    cased = WordPieceTokenizer(first.tokenizer.vocabulary, lowercase=False)
    cased.save_pretrained(tmp_path / "cased")
    other = replace(named, tokenizer=str(tmp_path / "cased"))
    assert load_corpus(other).digest != first.digest
    with gzip.open(copy / "07.txt.gz", "at") as packed:
        packed.write(" ")
    assert load_corpus(named).digest != first.digest


@pytest.mark.parametrize("files", [1, 3, 19])
def test_few_documents_are_cut_between_sentences(files):
    documents = [
        Document(f"{n}", " ".join(f"It is {n}, {i}." for i in range(40)))
        for n in range(files)
    ]
    pieces = cut_documents(documents)
    assert 20 <= len(pieces) <= 20 + files
    for document in documents:
        mine = [p for p in pieces if p.name.startswith(f"{document.name}#")]
        again = [s for piece in mine for s in split_sentences(piece.text)]
        assert again == split_sentences(document.text)
    assert len({piece.name for piece in pieces}) == len(pieces)


def test_enough_documents_stay_whole():
    documents = [Document(f"{n}", "One. Two.") for n in range(20)]
    assert cut_documents(documents) == documents


def test_too_little_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("One. Two. Three.")
    with pytest.raises(ValueError, match="1 documents with 3 sentences"):
        load_corpus(config(corpus=str(tmp_path)))


def test_a_folder_without_texts_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_corpus(config(corpus=str(tmp_path)))


# facts


def test_a_record_says_what_made_it():
    facts = run_facts(config(), processes=3)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["hardware"]["cpu"]
    assert facts["hardware"]["threads"] == torch.get_num_threads()
    assert facts["hardware"]["processes"] == 3
    assert facts["config"]["model"]["hidden_size"] == 16
    assert facts["resumed_at"] == []
    json.dumps(facts)


def test_a_machine_without_git_writes_records_too(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", missing)
    assert run_facts(config())["commit"] is None


# size


@pytest.mark.parametrize(("gib", "size"), [(15, "colab"), (79, "full")])
def test_a_large_gpu_does_the_full_work(monkeypatch, gib, size):
    class Gpu:
        total_memory = gib * 2**30

    monkeypatch.delenv("BERTNB_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Gpu)
    assert pick_size() == size


def test_the_size_of_the_work_follows_the_machine(monkeypatch):
    monkeypatch.delenv("BERTNB_SIZE", raising=False)
    if not torch.cuda.is_available():
        assert pick_size() == "tiny"
    monkeypatch.setenv("BERTNB_SIZE", "colab")
    assert pick_size() == "colab"
    monkeypatch.setenv("BERTNB_SIZE", "huge")
    with pytest.raises(ValueError, match="BERTNB_SIZE='huge'"):
        pick_size()


def test_the_advice_names_numbers_that_fit(monkeypatch):
    run = config(batch_size=24, parts=2)
    cpu = torch.device("cpu")
    advice = memory_advice(run, World(0, 1, cpu))
    assert "12 rows of sequence_length=24" in advice
    assert "parts=3 takes 8 rows at a time" in advice
    assert "another output_dir" in advice  # `parts` binds the run in this one
    assert "sequence_length=12" in advice
    advice = memory_advice(replace(run, batch_size=32), World(0, 1, cpu))
    assert "parts=4 takes 8 rows at a time" in advice  # 3 does not divide 32
    advice = memory_advice(run, World(0, 4, cpu))  # 6 rows each, 3 at a time
    assert "3 rows of sequence_length=24" in advice
    assert "parts=3 takes 2 rows at a time" in advice
    advice = memory_advice(replace(run, parts=24), World(0, 1, cpu))
    assert "1 rows" in advice  # nothing left to divide
    assert "parts=25" not in advice
    assert "takes" not in advice
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (2**29, 15 * 2**30)
    )
    advice = memory_advice(run, World(0, 1, torch.device("cuda", 0)))
    assert "15.0 GiB, 0.5 free" in advice
