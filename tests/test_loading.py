import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from safetensors.torch import load_file, save_file

from ease.loading import base_and_adapter, load_model, load_tokenizer, load_trainable, load_weights, pick_device, pick_dtype, resolve, save_model, save_weights
from ease.lora import add_lora, lora_state, save_adapter
from ease.records import UserError
from tests.tiny import TOKENIZER, VOCAB, tiny_folder, tiny_model

IDS = torch.arange(12)[None] * 3 % VOCAB


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_of_a_folder(tmp_path, dtype, tied):
    model = tiny_model(tie_word_embeddings=tied).to(dtype)
    save_model(model, TOKENIZER, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert ("lm_head.weight" in stored) != tied and {v.dtype for v in stored.values()} == {dtype}
    back = load_model(str(tmp_path))
    assert torch.allclose(back(IDS), model.float()(IDS), atol=1e-5) and not any(p.requires_grad for p in back.parameters())
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert load_tokenizer(str(tmp_path)).encode("to paint it") == TOKENIZER.encode("to paint it")


def test_config_has_both_rope_forms(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
    save_model(tiny_model(rope_parameters=rope), TOKENIZER, tmp_path)
    c = json.loads((tmp_path / "config.json").read_text())
    assert c["rope_parameters"] == rope and c["rope_theta"] == 700.0 and c["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert c["architectures"] == ["LlamaForCausalLM"] and c["dtype"] == c["torch_dtype"] == "float32"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).exists()


def test_unmerged_lora_is_not_saved_as_a_model(tmp_path):
    model = tiny_model()
    add_lora(model, 2, 4.0, ["q_proj"])
    with pytest.raises(ValueError, match="merge"):
        save_model(model, TOKENIZER, tmp_path)


def test_keys_and_shapes_are_strict(tmp_path):
    tiny_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    cases = {"missing.*up_proj": {k: v for k, v in tensors.items() if k != name}, "unexpected.*extra": {**tensors, "extra": torch.zeros(1)},
             "shape": {**tensors, name: tensors[name].T.contiguous()}}
    for message, changed in cases.items():
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path))
    save_file({**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)}, tmp_path / "model.safetensors")
    load_model(str(tmp_path))  # old Llama files carry this table; it is computed here


def test_what_is_no_model(tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        resolve(str(tmp_path))
    with pytest.raises(UserError, match="python -m data.toy"):
        resolve("data/toy/does-not-exist")
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin.*pickles are refused"):
        load_model(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(str(tmp_path))


def test_what_is_trained(tmp_path):
    tiny_folder(tmp_path / "m")
    model, base = load_trainable(str(tmp_path / "m"), "", 2, 4.0, ["q_proj"], 0, torch.bfloat16, "cpu")
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert base == str(tmp_path / "m") and set(trained) == set(lora_state(model)) and set(trained.values()) == {torch.float32}
    assert model.lm_head.weight.dtype == torch.bfloat16
    full, _ = load_trainable(str(tmp_path / "m"), "", 0, 4.0, ["q_proj"], 0, torch.bfloat16, "cpu")
    assert all(p.requires_grad and p.dtype == torch.float32 for p in full.parameters()) and not lora_state(full)


def test_init_from_an_adapter_or_a_model(tmp_path):
    tiny_folder(tmp_path / "m"), tiny_folder(tmp_path / "other", seed=1)
    model = load_model(str(tmp_path / "m"))
    add_lora(model, 3, 6.0, ["q_proj", "o_proj"])
    for p in lora_state(model).values():
        p.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "a", "m")
    m, a, other = (str(tmp_path / n) for n in ("m", "a", "other"))
    assert base_and_adapter(m, "") == (m, "") and base_and_adapter(m, a) == (m, a) and base_and_adapter(m, other) == (other, "")
    on, base = load_trainable(m, a, 99, 1.0, ["v_proj"], 0, torch.float32, "cpu")  # the adapter keeps its own rank and targets
    assert base == m and torch.allclose(on(IDS), model(IDS), atol=1e-5) and len(lora_state(on)) == 8
    assert load_trainable(m, other, 2, 1.0, ["v_proj"], 0, torch.float32, "cpu")[1] == other
    with pytest.raises(UserError, match="lora_rank 0"):
        load_trainable(m, a, 0, 1.0, [], 0, torch.float32, "cpu")


@pytest.mark.parametrize("rank", [0, 3])
def test_save_and_load_weights(tmp_path, rank):
    tiny_folder(tmp_path / "m")
    make = lambda: load_trainable(str(tmp_path / "m"), "", rank, 6.0, ["q_proj"], 0, torch.float32, "cpu")[0]  # noqa: E731
    model, other = make(), make()
    for p in model.parameters():
        p.data.add_(0.1 * p.requires_grad)
    save_weights(model, TOKENIZER, "base", tmp_path / "w")
    load_weights(other, tmp_path / "w")
    assert torch.equal(model(IDS), other(IDS)) and not torch.equal(make()(IDS), other(IDS))


def test_device():
    assert pick_device("cpu") == "cpu" and pick_device("auto") in ("cpu", "cuda")
    with pytest.raises(UserError, match="--device tpu"):
        pick_device("tpu")


def test_dtype(capsys):
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16 and capsys.readouterr().out == ""
    assert pick_dtype("auto", "cpu") == torch.float32 and "float32 (cpu" in capsys.readouterr().out


class Hub(BaseHTTPRequestHandler):
    """The three calls of the hub's protocol that a download makes: revision -> commit, commit -> files, file."""

    def do_GET(self):
        server, path = self.server, urlparse(self.path).path
        server.asked.append(path)
        head, body, kind = {}, None, "application/json"
        if path == "/api/models/someone/tiny/revision/main":
            body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith(f"/api/models/someone/tiny/tree/{COMMIT}"):
            files = [f for f in server.folder.rglob("*") if f.is_file()]
            body = json.dumps([{"type": "file", "path": f.relative_to(server.folder).as_posix(), "size": f.stat().st_size, "oid": f.name} for f in files]).encode()
        elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
            name = path.rpartition(f"{COMMIT}/")[2]
            body, kind = (server.folder / name).read_bytes(), "application/octet-stream"
            head = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send_response(200 if body is not None else 404)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body or b"")), **head}.items():
            self.send_header(key, value)
        self.end_headers()
        if body and self.command == "GET":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, *arguments):
        """Quiet."""


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.asked = tmp_path / "served", []
    tiny_folder(server.folder)
    for extra in ("pytorch_model.bin", "code.py", "onnx/config.json"):  # never fetched
        (server.folder / extra).parent.mkdir(exist_ok=True)
        (server.folder / extra).write_text("{}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def in_a_process(tmp_path, code: str, port: int) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()} | {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, "-c", "import sys\nfrom ease.loading import *\n" + code], env=environment, capture_output=True, text=True,
                          cwd=Path(__file__).parent.parent, check=False)


def test_hub_ids(tmp_path, hub):
    """Fetched once through the client, known by its commit, loaded like a folder; a folder asks nobody and loads no client."""
    code = "print(load_model('someone/tiny')(torch.arange(5)[None]).sum().item()); load_tokenizer('someone/tiny'); print(resolve('someone/tiny').name)"
    wanted = load_model(str(hub.folder))(torch.arange(5)[None]).sum().item()
    found = in_a_process(tmp_path, code, hub.server_port)
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines() == [f"someone/tiny at revision {COMMIT}", str(wanted), COMMIT]
    names = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    hub.asked.clear()
    found = in_a_process(tmp_path, f"load_model({str(hub.folder)!r}); load_tokenizer({str(hub.folder)!r}); print('huggingface_hub' in sys.modules)", hub.server_port)
    assert found.stdout == "False\n" and not hub.asked, found.stderr
    found = in_a_process(tmp_path, "resolve(f'someone/tiny@" + COMMIT + "')", 1)  # nobody there: the cache has this revision
    assert found.stdout == f"someone/tiny at revision {COMMIT}\n", found.stderr
    for name, port, message in (("someone/nothing", hub.server_port, "someone/nothing: no such folder, and the hub did not give it"),
                                ("other/model", 1, "other/model: no such folder"), ("runs/none", hub.server_port, "runs/none: no model here")):
        found = in_a_process(tmp_path, f"resolve({name!r})", port)
        assert f"ease.records.UserError: {message}" in found.stderr and len(found.stderr.split("UserError: ")[1].splitlines()) == 1
