"""Reading from a hub: a stub on 127.0.0.1 that answers as the real one does."""

import os
import subprocess
import sys
import threading
from hashlib import sha1
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from bertnb import BertConfig, BertModel

CONFIG = BertConfig(
    vocab_size=13,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=7,
)


class Hub(BaseHTTPRequestHandler):
    """GET and HEAD of /<owner>/<name>/resolve/main/<file> from a folder."""

    def do_GET(self):
        self.server.asked.append(self.path)
        repository, _, name = self.path[1:].partition("/resolve/main/")
        file = self.server.folder / name
        if repository != "somebody/tiny-bert" or not file.is_file():
            self.send_response(404)
            code = "EntryNotFound" if name else "RepoNotFound"
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content = file.read_bytes()
        self.send_response(200)
        self.send_header("ETag", f'"{sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def do_HEAD(self):
        self.do_GET()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = tmp_path / "served", []
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
