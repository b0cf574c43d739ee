"""The commands, called in this process: results, streams and exit codes."""

import gzip
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import tf_bundle
import torch
import transformers
from typer.testing import CliRunner, Result

import bertnb
from bertnb import cli
from bertnb.choices import SHAPES
from bertnb.engine import PretrainResult
from bertnb.recipe import PretrainConfig

COMMANDS = (
    "train-tokenizer prepare pretrain bench fill-mask embed convert "
    "finetune evaluate predict answer"
).split()
SMALL = {  # a model that learns nothing, quickly
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
MISTAKE = "a mistake in bertnb, please report it"
SENTENCES = [
    "The people of the United States have a right to know.",
    "We ask the Congress for a budget that every family can read.",
    "Peace is our aim, and work is what brings it about.",
    "Last year the schools grew by a tenth, and so did the roads.",
    "No nation is safe that does not keep its word.",
]


def run(*arguments: str | Path, input: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli.app, [*map(str, arguments)], input=input)


def answer(*arguments: str | Path, input: str | bytes | None = None) -> Any:
    """Run a command with --json that must succeed; return what it says."""
    done = run(*arguments, "--json", input=input)
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)  # one document, and nothing else


def document(number: int) -> str:
    """Return a text of twelve lines; no line is empty."""
    return "\n".join(
        SENTENCES[(number + i) % len(SENTENCES)] for i in range(12)
    )


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(24):
        (folder / f"{number:02}.txt").write_text(document(number))
    return folder


@pytest.fixture(scope="module")
def tokenizer(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    run("train-tokenizer", texts, "--vocab-size", "300", "--output", folder)
    return folder


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("settings") / "run.json"
    values = {"total_steps": 4, "batch_size": 4, "eval_batches": 2}
    file.write_text(json.dumps({"model": SMALL, "device": "cpu"} | values))
    return file


# --- the frame


def test_all_commands_are_there_and_show_an_example() -> None:
    listed = run("--help").stdout.split("Commands:")[1]
    assert re.findall(r"^  ([a-z-]+) ", listed, re.M) == COMMANDS
    for name in COMMANDS:
        done = run(name, "--help")
        assert done.exit_code == 0
        assert re.search(
            rf"^ +Example: .*\n +bertnb {name} ", done.stdout, re.M
        )
        assert "--json" in done.stdout


def test_the_version_is_shown() -> None:
    assert run("--version").stdout == f"bertnb {bertnb.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("train-tokenizer nowhere --output t", 1, "nowhere"),
        ("train-tokenizer {t} --vocab-size 9 --output t", 1, "vocab_size=9"),
        ("prepare {t} --tokenizer {t} --output s", 1, "vocab.txt"),
        ("prepare {t} --tokenizer {k} --output s --workers 0", 2, "workers"),
        ("prepare --tokenizer {k} --output s", 2, "no TEXTS"),
        ("pretrain nowhere --output m", 1, "nowhere"),
        ("pretrain {t}", 2, "--output"),
        ("pretrain {t} --output m --batch-size none", 2, "--batch-size"),
        ("pretrain {t} --output m --precision int8", 2, "int8"),
        ("pretrain {t} --output m --config nowhere.json", 1, "nowhere.json"),
        ("pretrain {t} --output {t}/model", 1, "lies in the corpus"),
        ("pretrain {t} --output m --device nodevice", 1, "nodevice"),
        ("fill-mask nothing", 1, "no [MASK]"),
        ("fill-mask [MASK] --top-k 0", 1, "top_k=0"),
        ("fill-mask [MASK] --model {t}", 1, "vocab.txt"),
        ("embed {t}/00.txt", 2, "--output or --json"),
        ("embed {t}/00.txt --pooling sum --json", 2, "sum"),
        ("embed nowhere.txt --json", 1, "nowhere.txt"),
        ("convert {t} --output c", 1, "config.json"),
        ("bench --size huge", 2, "huge"),
        ("sing", 2, "sing"),
    ],
)
def test_a_wrong_call_is_one_line_and_a_code(
    arguments: str,
    code: int,
    said: str,
    texts: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments.format(t=texts, k=tokenizer).split())
    assert done.exit_code == code
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    if code == 1:
        assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.glob("*/*.txt"))  # nothing half is left


def failing(error: BaseException) -> Any:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (bertnb.BertnbError("no\n  room"), 1, "error: no room\n"),
        (KeyError("x"), 1, f"error: KeyError: 'x': {MISTAKE}\n"),
        (ValueError(), 1, "error: ValueError\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_whatever_goes_wrong_is_one_line(
    error: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertnb.choices.measure_speed", failing(error))
    done = run("bench")
    assert (done.exit_code, done.stdout, done.stderr) == (code, "", said)


def test_a_traceback_is_shown_on_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = ValueError("here")
    monkeypatch.setattr("bertnb.choices.measure_speed", failing(error))
    monkeypatch.setenv("BERTNB_TRACEBACK", "1")
    assert run("bench").exception is error


def test_a_warning_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(*arguments: object, **options: object) -> dict[str, int]:
        warnings.warn("beware\nof it", stacklevel=1)
        return {"x": 1}

    monkeypatch.setattr("bertnb.choices.measure_speed", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = run("bench", "--json")
    assert done.stderr == "warning: beware of it\n"
    assert json.loads(done.stdout) == {"model": "tiny", "x": 1}


def test_a_bar_in_a_file_is_not_written_ten_times_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bertnb.choices.measure_speed", lambda *_, **__: {})
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    run("bench")
    assert os.environ["TQDM_MININTERVAL"] == "10"


# --- texts, vocabularies, shards


def test_train_tokenizer_learns_what_the_function_learns(
    texts: Path, tmp_path: Path
) -> None:
    said = answer(
        "train-tokenizer", texts, "--vocab-size", "300", "--output", tmp_path
    )
    whole = [document(number) for number in range(24)]
    ours = bertnb.WordPieceTokenizer.train(whole, 300)
    made = bertnb.WordPieceTokenizer.from_pretrained(tmp_path)
    assert made.vocabulary == ours.vocabulary
    assert said == {
        "documents": 24,
        "characters": sum(map(len, whole)),
        "pieces": ours.vocab_size,
        "output": str(tmp_path),
    }


def test_cased_keeps_capitals(texts: Path, tmp_path: Path) -> None:
    answer("train-tokenizer", texts, "--cased", "--output", tmp_path)
    made = bertnb.WordPieceTokenizer.from_pretrained(tmp_path)
    assert "Peace" in made.vocabulary
    assert not made.lowercase


@pytest.fixture
def ways(texts: Path, tmp_path: Path) -> list[list[Any]]:
    """The same two documents, in every way that texts may come."""
    two = [document(0), document(1)]
    zipped = tmp_path / "b.txt.gz"
    zipped.write_bytes(gzip.compress(two[1].encode()))
    blank = tmp_path / "both.txt"
    blank.write_text("\n\n \n".join(two) + "\n")
    rows = tmp_path / "rows"
    rows.mkdir()
    lines = [json.dumps({"words": text}) + "\n" for text in two]
    (rows / "train.jsonl").write_text("".join(lines))
    return [
        [texts / "00.txt", texts / "01.txt"],
        [texts / "00.txt", zipped],
        [blank, "--blank-lines"],
        ["-", "--blank-lines"],
        ["--dataset", rows, "--column", "words"],
    ]


def test_texts_come_from_everywhere(
    ways: list[list[Any]], tokenizer: Path, tmp_path: Path
) -> None:
    encoder = bertnb.WordPieceTokenizer.from_pretrained(tokenizer)
    documents = [bertnb.Document("", document(n)) for n in range(2)]
    expected = bertnb.encode_documents(documents, encoder)
    both = "\n\n\n".join(document(n) for n in range(2))
    for number, way in enumerate(ways):
        folder = tmp_path / str(number)
        arguments = ["--tokenizer", tokenizer, "--output", folder]
        said = answer("prepare", *way, *arguments, input=both)
        made = bertnb.Shards.open(folder, encoder)
        assert list(made) == expected, way
        assert said["documents"] == 2
        assert said["tokens"] == made.tokens


def test_prepare_takes_as_many_workers_as_asked_for(
    texts: Path,
    tokenizer: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(
        documents: object,
        encoder: object,
        folder: Path,
        workers: int,
        progress: bool,
    ) -> None:
        raise ValueError(f"{folder.name} by {workers}, {progress}")

    monkeypatch.setattr("bertnb.shards.prepare", look)
    arguments = ["--tokenizer", tokenizer, "--output", tmp_path / "s"]
    done = run("prepare", texts, *arguments, "--workers", "3")
    assert done.stderr == "error: s by 3, True\n"


def test_standard_input_is_one_document(
    tokenizer: Path, tmp_path: Path
) -> None:
    arguments = ["-", "--tokenizer", tokenizer, "--output", tmp_path]
    said = answer("prepare", *arguments, input="One.\n\nTwo.\r\n")
    assert said["documents"] == 1
    assert len(bertnb.Shards.open(tmp_path)[0]) == 2


def test_the_state_of_the_union_is_a_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    three = [bertnb.Document("", document(number)) for number in range(3)]
    monkeypatch.setattr("bertnb.data.load_sotu", lambda: three)
    said = answer("train-tokenizer", "sotu", "--output", tmp_path)
    assert said["documents"] == 3


def test_standard_input_must_be_utf8(tmp_path: Path) -> None:
    for more in ([], ["--blank-lines"]):
        arguments = ["-", *more, "--output", tmp_path]
        done = run("train-tokenizer", *arguments, input=b"caf\xe9\n")
        assert done.exit_code == 1
        assert "error: standard input is not UTF-8" in done.stderr


def test_prepare_leaves_the_tokenizer_where_pretrain_looks(
    texts: Path, tokenizer: Path, tmp_path: Path
) -> None:
    shards, model = tmp_path / "shards", tmp_path / "model"
    answer("prepare", texts, "--tokenizer", tokenizer, "--output", shards)
    arguments = ["--total-steps", "1", "--batch-size", "2", "--device", "cpu"]
    answer("pretrain", shards, "--output", model, *arguments)
    assert (model / "vocab.txt").read_text() == (
        tokenizer / "vocab.txt"
    ).read_text()
    name = "tokenizer_config.json"
    told, before = (
        json.loads((folder / name).read_text()) for folder in (model, tokenizer)
    )
    limit = bertnb.BertConfig.from_json_file(model / "config.json")
    assert told == before | {"model_max_length": limit.max_position_embeddings}


# --- pretrain


def settings_of(*arguments: str | Path) -> PretrainConfig:
    """Return the configuration that `pretrain` would run."""
    seen: list[PretrainConfig] = []

    def look(config: PretrainConfig) -> None:
        seen.append(config)
        raise ValueError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bertnb.engine.pretrain", look)
        done = run("pretrain", *arguments)
    assert done.stderr.endswith("error: seen\n"), done.stderr
    return seen[0]


def test_every_setting_is_an_option() -> None:
    fields = PretrainConfig.__dataclass_fields__
    otherwise = {"corpus", "output_dir", "model"}
    expected = {*fields} - otherwise | {"size", "vocab_size"}
    assert {*cli._SETTINGS} == expected
    for name, (kind, _) in cli._SETTINGS.items():
        if name in fields:
            values = get_args(kind) or (kind(1),)
            accepted: Any = fields[name].type
            assert all(isinstance(value, accepted) for value in values), name


def test_the_help_tells_the_defaults(texts: Path, tmp_path: Path) -> None:
    """What it says is what happens where nothing is given, on a CPU."""
    config = settings_of("sotu", "--output", tmp_path, "--device", "cpu")
    told = {}
    for name, (_, help) in cli._SETTINGS.items():
        if found := re.search(r"\[default: ([\w.]+)[\];,]", help):
            told[name] = found[1]
    assert len(told) > 20
    for name, text in told.items():
        if name == "size":
            assert config.model.hidden_size == SHAPES[text][1]
        elif text in ("yes", "no"):
            assert getattr(config, name) is (text == "yes"), name
        else:
            assert str(getattr(config, name)) == text, name


def test_the_sizes_are_those_that_have_a_shape() -> None:
    assert get_args(cli._Size) == tuple(SHAPES)


def test_every_option_arrives(texts: Path, tmp_path: Path) -> None:
    given = {
        "total_steps": 7,
        "batch_size": 6,
        "sequence_length": 33,
        "learning_rate": 0.5,
        "max_seconds": 2.5,
        "max_tokens": 11,
        "mlm_probability": 0.4,
        "final_mlm_probability": 0.2,
        "sampler": "original",
        "pack": 2,
        "parts": 3,
        "schedule": "original",
        "warmup_ratio": 0.3,
        "weight_decay": 0.2,
        "max_grad_norm": 2.0,
        "on_nonfinite": "skip",
        "eval_every": 3,
        "eval_batches": 5,
        "save_every": 2,
        "keep": 4,
        "patience": 9,
        "divergence": 1.5,
        "seed": 8,
        "device": "cpu",
        "precision": "float32",
    }
    flags = {"bias_correction": False, "compile": True, "tensorboard": True}
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    arguments += ["--no-bias-correction", "--compile", "--tensorboard"]
    config = settings_of(texts, "--output", tmp_path, *arguments)
    for name, value in (given | flags).items():
        assert getattr(config, name) == value, name
    assert config.corpus == str(texts)
    assert config.output_dir == str(tmp_path)


def test_options_overrule_the_file(
    texts: Path, tmp_path: Path, settings: Path
) -> None:
    arguments = [texts, "--output", tmp_path, "--config", settings]
    config = settings_of(*arguments, "--batch-size", "5")
    assert (config.batch_size, config.total_steps) == (5, 4)
    assert config.model.hidden_size == 16
    assert settings_of(*arguments, "--size", "mini").model.hidden_size == 256


def test_a_record_is_a_configuration(texts: Path, tmp_path: Path) -> None:
    """`config` in a log's first line repeats the run, the folder included."""
    first = settings_of(texts, "--output", tmp_path / "m", "--size", "mini")
    record = bertnb.run_facts(first)["config"]
    (tmp_path / "again.json").write_text(json.dumps(record))
    assert settings_of("--config", tmp_path / "again.json") == first


@pytest.mark.parametrize(
    ("stopped", "code", "goes_on"),
    [
        (None, 0, False),
        ("patience", 0, False),
        ("divergence", 0, False),
        ("max_seconds", 0, True),
        ("max_tokens", 0, True),
        ("SIGINT", 130, True),
        ("SIGTERM", 143, True),
    ],
)
def test_the_exit_code_says_how_a_run_ended(
    stopped: str | None,
    code: int,
    goes_on: bool,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(config: PretrainConfig) -> PretrainResult:
        return PretrainResult(None, None, [], stopped)  # type: ignore[arg-type]

    monkeypatch.setattr("bertnb.engine.pretrain", end)
    done = run("pretrain", texts, "--output", tmp_path, "--json")
    assert done.exit_code == code
    said = json.loads(done.stdout)
    assert said["stopped"] == stopped
    assert ("goes on" in said["next"]) == goes_on


def test_only_the_first_process_of_torchrun_reports(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(config: PretrainConfig) -> PretrainResult:
        return PretrainResult(None, None, [], "SIGTERM")  # type: ignore[arg-type]

    monkeypatch.setattr("bertnb.engine.pretrain", end)
    monkeypatch.setenv("RANK", "1")
    done = run("pretrain", texts, "--output", tmp_path)
    assert (done.exit_code, done.stdout, done.stderr) == (143, "", "")


def test_a_new_user_gets_a_model_that_transformers_loads(
    texts: Path, tmp_path: Path
) -> None:
    """Issue 4: from a folder of text files, in one command."""
    model = tmp_path / "model"
    arguments = ["--total-steps", "3", "--device", "cpu"]
    done = run("pretrain", texts, "--output", model, *arguments)
    assert done.exit_code == 0, done.stderr
    assert "pretraining: 100%" in done.stderr
    for name in ("masked lm loss", "unigram loss", "next sentence accuracy"):
        assert re.search(rf"^{name} +\d", done.stdout, re.M)
    assert "stopped" not in done.stdout  # it was not
    assert re.search(rf"^output +{re.escape(str(model))}$", done.stdout, re.M)
    theirs = transformers.BertForPreTraining.from_pretrained(model).eval()
    ours = bertnb.BertForPreTraining.from_pretrained(model)
    words = "Peace is our aim.", "What about the roads?"
    batch = transformers.AutoTokenizer.from_pretrained(model)(
        *words, return_tensors="pt"
    )
    tokenizer = bertnb.WordPieceTokenizer.from_pretrained(model)
    mine = tokenizer([words[0]], [words[1]])
    assert torch.equal(batch["input_ids"], mine["input_ids"])
    with torch.no_grad():
        expected, found = theirs(**batch), ours(**mine)
    for name in ("prediction_logits", "seq_relationship_logits"):
        difference = getattr(expected, name) - getattr(found, name)
        assert difference.abs().max() <= 1e-5
    again = answer("pretrain", texts, "--output", model, *arguments)
    assert again["step"] == 3  # nothing was left to do


# --- models at work


def test_bench_measures_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def look(
        config: bertnb.BertConfig,
        length: int,
        batch_size: int,
        rounds: int,
        device: str,
        progress: bool,
    ) -> dict[str, Any]:
        assert config == bertnb.named_config("mini", 77, 16)
        assert (length, batch_size, rounds) == (16, 2, 5)
        assert (device, progress) == ("cpu", True)
        return {"speed": 1.5}

    monkeypatch.setattr("bertnb.choices.measure_speed", look)
    arguments = "--size mini --vocab-size 77 --sequence-length 16"
    more = "--batch-size 2 --rounds 5 --device cpu"
    said = answer("bench", *arguments.split(), *more.split())
    assert said == {"model": "mini", "speed": 1.5}


def test_bench_measures() -> None:
    said = answer("bench", "--rounds", "1", "--batch-size", "1")
    assert said["training_tokens_per_second"] > 0
    assert said["reading_tokens_per_second"] > 0


def test_fill_mask_says_what_the_function_says() -> None:
    texts = ["the [MASK] of the [MASK] states", "[MASK] ."]
    said = answer("fill-mask", *texts, "--top-k", "3", "--device", "cpu")
    assert said == answer(
        "fill-mask", "-", "--top-k=3", "--device=cpu", input="\n".join(texts)
    )
    folder = bertnb.book_model()
    model = bertnb.BertForMaskedLM.from_pretrained(folder)
    tokenizer = bertnb.WordPieceTokenizer.from_pretrained(folder)
    two, one = (bertnb.fill_mask(model, tokenizer, t, 3) for t in texts)
    assert said["texts"] == [
        {"text": texts[0], "masks": two},
        {"text": texts[1], "masks": [one]},
    ]
    table = run("fill-mask", texts[1], "--top-k", "3").stdout.splitlines()
    assert table == [f"{w['score']:.3f}  {w['sequence']}" for w in one]


def test_embed_writes_what_the_function_returns(tmp_path: Path) -> None:
    lines = ["We want peace.", "", "The budget of this year."]
    file, output = tmp_path / "lines", tmp_path / "vectors.npy"
    file.write_text("\n".join(lines) + "\n")
    options = ["--pooling", "cls", "--normalize", "--device", "cpu"]
    said = answer("embed", file, "--output", output, *options)
    folder = bertnb.book_model()
    width = bertnb.BertConfig.from_pretrained(folder).hidden_size
    assert said == {"texts": 3, "size": width, "output": str(output)}
    expected = bertnb.embed(
        bertnb.BertModel.from_pretrained(folder),
        bertnb.WordPieceTokenizer.from_pretrained(folder),
        lines,
        "cls",
        normalize=True,
    ).numpy()
    assert np.array_equal(np.load(output), expected)
    typed = answer("embed", "-", *options, input="\r\n".join(lines))
    assert np.allclose(np.array(typed["vectors"]), expected)
    cut = answer("embed", file, "--max-length", "3", *options)
    assert not np.allclose(np.array(cut["vectors"]), expected)


def test_embed_needs_a_text(tmp_path: Path) -> None:
    done = run("embed", "-", "--json", input="")
    assert (done.exit_code, done.stdout) == (1, "")


def test_embed_keeps_the_order_over_many_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines are embedded 1,024 at a time."""

    def lengths(
        model: object,
        tokenizer: object,
        texts: list[str],
        pooling: str,
        normalize: bool,
        max_length: int | None,
    ) -> torch.Tensor:
        assert len(texts) <= 1024
        return torch.tensor([[float(len(text))] for text in texts])

    monkeypatch.setattr("bertnb.inference.embed", lengths)
    texts = ["x" * (i % 7) for i in range(2501)]
    said = answer("embed", "-", input="\n".join(texts))
    assert said["vectors"] == [[float(i % 7)] for i in range(2501)]


def test_convert_changes_the_head(tmp_path: Path) -> None:
    folder = bertnb.book_model()
    said = answer("convert", folder, "--output", tmp_path / "same")
    assert said["model"] == "BertForPreTraining"
    saved = bertnb.read_weights(tmp_path / "same")[0]
    source = bertnb.read_weights(folder)[0]
    assert saved.keys() == source.keys()
    assert all(torch.equal(saved[name], source[name]) for name in saved)
    answer(
        "convert", folder, "--class", "BertModel", "--output", tmp_path / "body"
    )
    again = answer("convert", tmp_path / "body", "--output", tmp_path / "too")
    assert again["model"] == "BertModel"  # as the source says
    body = bertnb.BertModel.from_pretrained(tmp_path / "too")
    table = body.embeddings.word_embeddings.weight
    assert torch.equal(table, saved["bert.embeddings.word_embeddings.weight"])
    settings = (tmp_path / "body" / "tokenizer_config.json").read_text()
    assert json.loads(settings)["model_max_length"] == 128
    vocabulary = (tmp_path / "body" / "vocab.txt").read_text()
    assert vocabulary == (folder / "vocab.txt").read_text()


def test_convert_names_a_head_that_it_does_not_know(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SMALL)
    transformers.BertForMultipleChoice(config).save_pretrained(tmp_path / "mc")
    done = run("convert", tmp_path / "mc", "--output", tmp_path / "out")
    assert done.exit_code == 1
    assert "holds a BertForMultipleChoice" in done.stderr
    assert "--class" in done.stderr
    assert not (tmp_path / "out").exists()


def test_embed_writes_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one line")
    done = run("embed", tmp_path / "a.txt", "--output", tmp_path / "vec")
    assert done.exit_code == 2
    assert "expected .npy" in " ".join(done.stderr.split())
    done = run("embed", "-", "--output", tmp_path / "a.npy", input="")
    assert done.exit_code == 1
    assert "standard input is empty" in done.stderr
    done = run("embed", "-", "--output", tmp_path / "no" / "a.npy", input="a")
    assert done.exit_code == 2
    assert "is not writable" in " ".join(done.stderr.split())


def tensorflow_name(name: str) -> str:
    """Return what the original calls a weight of a `BertModel`."""
    name = re.sub(r"layer\.(\d+)\.", r"layer_\1/", name).replace(".", "/")
    name = name.replace("_embeddings/weight", "_embeddings")
    name = name.replace("LayerNorm/weight", "LayerNorm/gamma")
    name = name.replace("LayerNorm/bias", "LayerNorm/beta")
    return "bert/" + name.replace("/weight", "/kernel")


def test_convert_reads_the_format_of_2018(tmp_path: Path) -> None:
    model = bertnb.BertModel(bertnb.BertConfig(**SMALL))
    model.save_pretrained(tmp_path / "expected")
    weights = bertnb.read_weights(tmp_path / "expected")[0]
    arrays = {}
    for name, tensor in weights.items():
        old = tensorflow_name(name)
        arrays[old] = (tensor.T if old.endswith("kernel") else tensor).numpy()
    folder = tmp_path / "cased_L-1_H-16_A-2"
    folder.mkdir()
    tf_bundle.write_bundle(folder / "bert_model.ckpt", arrays)
    config = json.dumps(model.config.to_dict())
    (folder / "bert_config.json").write_text(config)
    pieces = [*bertnb.SPECIAL_TOKENS, "Peace", "peace"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    for source in (folder, folder / "bert_model.ckpt"):
        output = tmp_path / "out" / source.name
        said = answer(
            "convert",
            source,
            "--output",
            output,
            "--class=BertModel",
            "--cased",
        )
        assert said["model"] == "BertModel"
        made = bertnb.read_weights(output)[0]
        assert made.keys() == weights.keys()
        assert all(torch.equal(made[name], weights[name]) for name in weights)
        tokenizer = bertnb.WordPieceTokenizer.from_pretrained(output)
        assert tokenizer.tokenize("Peace peace") == ["Peace", "peace"]


def test_convert_goes_without_a_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bertnb.BertModel(bertnb.BertConfig(**SMALL))
    model.save_pretrained(tmp_path / "bare")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = run("convert", tmp_path / "bare", "--output", tmp_path / "out")
    assert done.exit_code == 0
    assert "warning" in done.stderr
    assert not (tmp_path / "out" / "vocab.txt").exists()
