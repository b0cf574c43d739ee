"""Reading from a hub: a stub on 127.0.0.1 that answers as the real one does."""

import json
import os
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from safetensors.torch import load_file, save_file

from bertnb import BertConfig, BertModel

CONFIG = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)


COMMITS = {"a" * 40: "main", "b" * 40: "v1"}


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of /<owner>/<name>/resolve/<revision>/<file>.

    Repositories: somebody/tiny-bert is public, has `main`, a tag `v1` in the
    folder of that name, and answers to its commits; somebody/private wants a
    token.
    """

    def do_GET(self):
        sent = self.headers.get("Authorization")
        self.server.asked.append(self.path)
        self.server.tokens.append(sent)
        repository, _, rest = self.path[1:].partition("/resolve/")
        revision, _, name = rest.partition("/")
        revision = COMMITS.get(revision, revision)
        folder = self.server.folder / ("v1" if revision == "v1" else "")
        if repository == "somebody/private" and sent != "Bearer hf_right":
            return self.refuse(401, "RepoNotFound" if not sent else "GatedRepo")
        if repository not in ("somebody/tiny-bert", "somebody/private"):
            return self.refuse(404, "RepoNotFound")
        if revision not in ("main", "v1"):
            return self.refuse(404, "RevisionNotFound")
        if not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / name).read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{sha1(content).hexdigest()}"')
        commits = {where: commit for commit, where in COMMITS.items()}
        self.send_header("X-Repo-Commit", commits[revision])
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)
        return None

    def refuse(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path / "served"
    server.asked, server.tokens = [], []
    server.folder.mkdir()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def python(code, tmp_path, **environment):
    """Run code in a fresh Python with an empty cache of the hub's files."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=clean
        | {
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


LOAD = """
import torch
from bertnb import BertModel
model = BertModel.from_pretrained("somebody/tiny-bert")
total = sum(p.double().abs().sum().item() for p in model.parameters())
print(f"{total:.6f}")
"""
LOCATE = """
from bertnb import locate
print(locate("somebody/tiny-bert", "model.safetensors"))
"""
MISSING = """
from bertnb import BertConfig
try:
    BertConfig.from_pretrained("somebody/nothing")
except FileNotFoundError as error:
    print(error)
"""


def test_a_model_is_read_from_the_hub_and_then_from_the_cache(hub, tmp_path):
    torch.manual_seed(0)
    model = BertModel(CONFIG)
    model.save_pretrained(hub.folder)
    total = sum(p.double().abs().sum().item() for p in model.parameters())
    address = f"http://127.0.0.1:{hub.server_port}"
    first = python(LOAD, tmp_path, HF_ENDPOINT=address)
    assert first.stdout.strip() == f"{total:.6f}", first.stderr
    assert {path.rsplit("/", 1)[-1] for path in hub.asked} == {
        "config.json",
        "model.safetensors",
    }
    assert set(hub.tokens) == {None}

    asked = len(hub.asked)
    again = python(LOAD, tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
    assert again.stdout == first.stdout, again.stderr
    assert len(hub.asked) == asked


def test_a_name_that_the_hub_does_not_know(hub, tmp_path):
    address = f"http://127.0.0.1:{hub.server_port}"
    done = python(MISSING, tmp_path, HF_ENDPOINT=address)
    assert "'somebody/nothing' is not a folder" in done.stdout, done.stderr
    assert "config.json" in done.stdout
    assert hub.asked


def test_a_repository_without_weights_names_the_file(hub, tmp_path):
    BertModel(CONFIG).save_pretrained(hub.folder)
    (hub.folder / "model.safetensors").unlink()
    address = f"http://127.0.0.1:{hub.server_port}"
    done = python(LOCATE, tmp_path, HF_ENDPOINT=address)
    assert done.returncode == 1
    assert "FileNotFoundError: 'somebody/tiny-bert'" in done.stderr
    assert "gave no model.safetensors" in done.stderr


def test_offline_with_an_empty_cache_is_a_clear_error(tmp_path):
    done = python(MISSING, tmp_path, HF_HUB_OFFLINE="1")
    assert "'somebody/nothing' is not a folder" in done.stdout, done.stderr


def test_a_local_folder_asks_no_hub(hub, tmp_path):
    local = tmp_path / "somebody" / "tiny-bert"
    BertModel(CONFIG).save_pretrained(local)
    address = f"http://127.0.0.1:{hub.server_port}"
    code = f"import os; os.chdir({str(tmp_path)!r})" + LOCATE
    done = python(code, tmp_path, HF_ENDPOINT=address)
    assert "tiny-bert" in done.stdout, done.stderr
    assert not hub.asked


def shell(hub, tmp_path, code, **environment):
    """Run code that may use `bertnb`, with the stub as its hub."""
    address = f"http://127.0.0.1:{hub.server_port}"
    environment = {"HF_ENDPOINT": address} | environment
    prelude = """
import bertnb, torch
from bertnb import BertConfig, BertModel
def total(*arguments, **more):
    model = BertModel.from_pretrained("somebody/" + arguments[0], **more)
    return round(sum(p.double().abs().sum().item() for p in model.parameters()), 4)
def said(call, *arguments, **more):
    try:
        return call(*arguments, **more)
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""
    done = python(prelude + code, tmp_path, **environment)
    assert not done.returncode, done.stderr
    return done.stdout.splitlines()


def sizes(model):
    total = sum(p.double().abs().sum().item() for p in model.parameters())
    return str(round(total, 4))


def two_revisions(hub):
    """Models that differ in size and weights, as `main` and as `v1`."""
    torch.manual_seed(0)
    new, old = BertModel(CONFIG), BertModel(replace(CONFIG, hidden_size=4))
    new.save_pretrained(hub.folder)
    old.save_pretrained(hub.folder / "v1")
    return sizes(new), sizes(old)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, tmp_path):
    new, old = two_revisions(hub)
    code = """
for revision in (None, "main", "v1", "b" * 40):
    print(total("tiny-bert", revision=revision))
config = BertConfig.from_pretrained("somebody/tiny-bert", revision="v1")
print(config.hidden_size)
print(bertnb.locate("somebody/tiny-bert", "config.json", "v1").parent.name)
said(total, "tiny-bert", revision="v2")
"""
    lines = shell(hub, tmp_path, code)
    assert lines[:6] == [new, new, old, old, "4", "b" * 40]
    assert lines[6].startswith("FileNotFoundError 'somebody/tiny-bert' is not")
    assert "v2" in lines[6]
    asked = {tuple(path.split("/")[4:6]) for path in hub.asked}
    assert ("v1", "model.safetensors") in asked
    assert ("main", "model.safetensors") in asked


def test_a_token_reaches_the_hub_with_every_file_and_goes_nowhere_else(
    hub, tmp_path
):
    new, _ = two_revisions(hub)
    code = """
said(total, "private")
said(BertConfig.from_pretrained, "somebody/private", token="hf_wrong")
print(total("private", token="hf_right"))
"""
    lines = shell(hub, tmp_path, code)
    assert "FileNotFoundError 'somebody/private' is not a folder" in lines[0]
    assert "401" in lines[0]
    assert "config.json" in lines[1]
    assert "hf_wrong" not in lines[1]
    assert lines[2] == new
    files = zip(hub.asked, hub.tokens, strict=True)
    with_token = {path for path, token in files if token == "Bearer hf_right"}
    assert {path.rsplit("/", 1)[-1] for path in with_token} == {
        "config.json",
        "model.safetensors",
    }
    cache = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert not any(b"hf_right" in path.read_bytes() for path in cache)


def test_the_token_of_the_environment_is_taken(hub, tmp_path):
    new, _ = two_revisions(hub)
    code = 'print(total("private"))'
    assert shell(hub, tmp_path, code, HF_TOKEN="hf_right") == [new]


def test_weights_that_are_not_allowed_are_not_replaced_by_others(hub, tmp_path):
    """Refused is not absent: the next kind of file is not asked for."""
    code = 'said(bertnb.read_weights, "somebody/private")'
    (line,) = shell(hub, tmp_path, code)
    assert "gave no model.safetensors" in line
    assert {path.rsplit("/", 1)[-1] for path in hub.asked} == {
        "model.safetensors"
    }


def test_shards_are_downloaded_and_then_come_from_the_cache(hub, tmp_path):
    new, _ = two_revisions(hub)
    weights = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    index, names = {"weight_map": {}}, sorted(weights)
    for number in (0, 1, 2):
        part = {n: weights[n] for n in names[number::3]}
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        save_file(part, hub.folder / shard)
        index["weight_map"] |= dict.fromkeys(part, shard)
    file = hub.folder / "model.safetensors.index.json"
    file.write_text(json.dumps(index))
    code = 'print(total("tiny-bert"))'
    assert shell(hub, tmp_path, code) == [new]
    asked = {path.rsplit("/", 1)[-1] for path in hub.asked}
    shards = set(index["weight_map"].values())
    assert {n for n in asked if "00003" in n} == shards
    count = len(hub.asked)
    assert shell(hub, tmp_path, code, HF_HUB_OFFLINE="1") == [new]
    assert len(hub.asked) == count  # not a single question


def test_an_index_from_the_hub_can_ask_for_no_file_outside(hub, tmp_path):
    two_revisions(hub)
    for folder, shard in ((hub.folder, "../../x"), (hub.folder / "v1", "x")):
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"words.weight": f"{shard}.safetensors"}}
        file = folder / "model.safetensors.index.json"
        file.write_text(json.dumps(index))
    code = 'said(total, "tiny-bert"); said(total, "tiny-bert", revision="v1")'
    lines = shell(hub, tmp_path, code)
    assert "wants words.weight from '../../x.safetensors'" in lines[0]
    assert "words.weight is in x.safetensors" in lines[1]
    assert all(line.startswith("BertnbError") for line in lines)
    assert not any("main/../" in path for path in hub.asked)


def test_offline_and_not_in_the_cache_says_how_to_go_on(hub, tmp_path):
    two_revisions(hub)
    lines = shell(
        hub,
        tmp_path,
        'said(total, "tiny-bert"); said(bertnb.read_weights, "somebody/x")',
        HF_HUB_OFFLINE="1",
    )
    assert "'somebody/tiny-bert' is not a folder" in lines[0]
    assert "HF_HUB_OFFLINE" in lines[0]
    assert "Weights are looked for in model.safetensors, " in lines[1]
    assert not hub.asked


def test_offline_the_kind_that_is_in_the_cache_is_read(hub, tmp_path):
    """Only the pickle was ever there: the cache knows of no better file."""
    new, _ = two_revisions(hub)
    weights = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    torch.save(weights, hub.folder / "pytorch_model.bin")
    code = 'print(total("tiny-bert"))'
    assert shell(hub, tmp_path, code) == [new]
    assert shell(hub, tmp_path, code, HF_HUB_OFFLINE="1") == [new]


def test_a_pickle_from_the_hub_is_not_run(hub, tmp_path):
    two_revisions(hub)
    (hub.folder / "model.safetensors").unlink()
    made = tmp_path / "made"
    command = f"cos\nmkdir\n(V{made}\ntR."  # a pickle in letters
    (hub.folder / "pytorch_model.bin").write_text(command)
    (line,) = shell(hub, tmp_path, 'said(total, "tiny-bert")')
    assert line.startswith("BertnbError")
    assert "pytorch_model.bin wants to call os.mkdir; nothing was run" in line
    assert not made.exists()
    pickle.loads(command.encode())
    assert made.exists()  # it would have worked


def test_the_tokenizer_comes_from_the_same_revision(hub, tmp_path):
    two_revisions(hub)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new"]
    (hub.folder / "vocab.txt").write_text("\n".join(words))
    (hub.folder / "v1" / "vocab.txt").write_text("\n".join(words[:5]))
    code = """
for revision in (None, "v1"):
    tokenizer = bertnb.WordPieceTokenizer.from_pretrained(
        "somebody/tiny-bert", revision=revision
    )
    print(tokenizer.vocab_size)
"""
    assert shell(hub, tmp_path, code) == ["6", "5"]
