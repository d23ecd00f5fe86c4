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

from ease import loading
from ease.loading import (
    Place,
    base_and_adapter,
    load_model,
    load_tokenizer,
    load_trainable,
    load_weights,
    pick_device,
    pick_dtype,
    resolve,
    save_model,
    save_weights,
)
from ease.lora import add_lora, lora_state, save_adapter
from ease.records import UserError
from ease.run import TrainingFlags
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
    assert torch.allclose(back(IDS), model.float()(IDS), atol=1e-5) and not any(
        p.requires_grad for p in back.parameters()
    )
    assert (back.lm_head.weight is back.model.embed_tokens.weight) == tied
    assert load_tokenizer(str(tmp_path)).encode("to paint it") == TOKENIZER.encode("to paint it")


def test_config_has_both_rope_forms(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 700.0, "factor": 2.0}
    save_model(tiny_model(rope_parameters=rope), TOKENIZER, tmp_path)
    c = json.loads((tmp_path / "config.json").read_text())
    assert (
        c["rope_parameters"] == rope
        and c["rope_theta"] == 700.0
        and c["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    )
    assert (
        c["architectures"] == ["LlamaForCausalLM"] and c["dtype"] == c["torch_dtype"] == "float32"
    )
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
    cases = {
        "missing.*up_proj": {k: v for k, v in tensors.items() if k != name},
        "unexpected.*extra": {**tensors, "extra": torch.zeros(1)},
        "shape": {**tensors, name: tensors[name].T.contiguous()},
    }
    for message, changed in cases.items():
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_model(str(tmp_path))
    save_file(
        {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(5)},
        tmp_path / "model.safetensors",
    )
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


def one_line(message, call, *arguments):
    with pytest.raises(UserError, match=message) as e:
        call(*arguments)
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


def change(folder, name="config.json", **changes):
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("changes, message", [
    ({"num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, 2 are stored"),
    ({"num_hidden_layers": 1}, "num_hidden_layers 1, 2 are stored"),
    ({"vocab_size": 10**12}, r"embed_tokens.weight has shape .* needs \(1000000000000, 30"),
    ({"hidden_size": 10**14, "vocab_size": 10**14}, "impossible sizes"),
    ({"num_attention_heads": 3 * 10**14}, "q_proj.weight has shape|impossible sizes"),
    ({"intermediate_size": 10**12}, "mlp.* has shape"), ({"head_dim": 10}, "has shape"),
    ({"num_key_value_heads": 2}, "has shape"), ({"hidden_size": 31}, "has shape"),
    ({"vocab_size": -1}, "vocab_size -1"), ({"vocab_size": "941"}, "vocab_size '941'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers 0"), ({"hidden_size": True}, "hidden_size True")])
def test_sizes_that_do_not_fit_the_file(tmp_path, changes, message):
    """One line before anything of such a size is made: there is no memory for any of these."""
    tiny_folder(tmp_path)
    change(tmp_path, **changes)
    one_line(message, load_model, str(tmp_path))


def test_a_config_that_is_no_object(tmp_path):
    tiny_folder(tmp_path)
    for text in ("[]", "[1]", "3", "null", "{", "", "[" * 100_000):
        (tmp_path / "config.json").write_text(text)
        one_line("config.json:", load_model, str(tmp_path))


@pytest.mark.parametrize("content, message", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 988097824\n", "git-lfs"),
    (b"", "header"), (b"junk", "header"), (b"\xff" * 8 + b"{}", "header"),
    (b"\x02" + b"\0" * 7 + b"[]", "header"), (b"\x04" + b"\0" * 7 + b"\xff\xfe{}", "header"),
    (b"\x37" + b"\0" * 7 + b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}', "eader")])
def test_files_that_are_no_weights(tmp_path, content, message):
    tiny_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    one_line(message, load_model, str(tmp_path))


def test_a_damaged_header_gives_one_line(tmp_path):
    tiny_folder(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    size, refused = int.from_bytes(whole[:8], "little"), 0
    for i in range(0, 8 + size, 61):
        (tmp_path / "model.safetensors").write_bytes(whole[:i] + b"\x7f" + whole[i + 1 :])
        try:
            load_model(str(tmp_path))
        except UserError as e:
            refused += "\n" not in str(e)
    assert refused > 30


Q = "model.layers.0.self_attn.q_proj."


@pytest.mark.parametrize("added", [
    {Q + "weight": torch.ones(48, 30, dtype=torch.int8), Q + "SCB": torch.ones(48)},  # bitsandbytes
    {Q + "weight": torch.ones(720, 1, dtype=torch.uint8), Q + "weight.absmax": torch.ones(23)},
    {Q + "qweight": torch.ones(4, 48, dtype=torch.int32), Q + "scales": torch.ones(1, 48)},  # GPTQ
    {Q + "weight": torch.ones(48, 30).to(torch.float8_e4m3fn), Q + "weight_scale": torch.ones(1)}])
def test_quantised_weights_are_refused_by_that_word(tmp_path, added):
    tiny_folder(tmp_path)
    plain = load_file(tmp_path / "model.safetensors")
    del plain[Q + "weight"]
    save_file(plain | added, tmp_path / "model.safetensors")
    one_line("quantised weights are not supported: model.layers.0", load_model, str(tmp_path))


@pytest.mark.parametrize("shards", [
    ["../other.safetensors"], ["/etc/passwd"], ["a/b.safetensors"], [".."], ["."], [""], [None],
    [3],
    [["model.safetensors"]], [{"a": 1}], None, [], 5, "model.safetensors", ["\0.safetensors"]])
def test_the_index_names_files_of_its_own_folder(tmp_path, shards):
    tiny_folder(tmp_path / "m")
    for place in ("other.safetensors", "m/one.safetensors"):
        (tmp_path / place).write_bytes((tmp_path / "m/model.safetensors").read_bytes())
    (tmp_path / "m/model.safetensors").unlink()
    index, one = tmp_path / "m/model.safetensors.index.json", {"x": "one.safetensors"}
    index.write_text(json.dumps({"weight_map": one}))
    load_model(str(tmp_path / "m"))
    named = {f"y{i}": n for i, n in enumerate(shards)} if isinstance(shards, list) else shards
    index.write_text(json.dumps({"weight_map": one | named if named else named}) if
                     isinstance(named, dict | None) else json.dumps({"weight_map": named}))
    one_line("weight_map|is missing|0 are stored", load_model, str(tmp_path / "m"))
    index.write_text("[]")
    one_line("index.json", load_model, str(tmp_path / "m"))


def test_a_tensor_in_two_shards(tmp_path):
    tiny_folder(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    save_file(whole, tmp_path / "a.safetensors")
    save_file({Q + "weight": whole[Q + "weight"]}, tmp_path / "b.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(names))
    one_line("q_proj.weight is in another file too", load_model, str(tmp_path))


def test_a_tokenizer_with_more_ids_than_the_model(tmp_path):
    """Fewer are usual: Qwen2.5 has 151,665 ids and 151,936 or 152,064 rows."""
    tiny_folder(tmp_path, vocab_size=VOCAB + 5)
    load_tokenizer(str(tmp_path))
    change(tmp_path, vocab_size=VOCAB)
    load_tokenizer(str(tmp_path))
    change(tmp_path, vocab_size=VOCAB - 1)
    message = f"tokenizer.json has id {VOCAB - 1} .*vocab_size of {VOCAB - 1}"
    one_line(message, load_tokenizer, str(tmp_path))
    change(tmp_path, vocab_size=VOCAB)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append(spec["added_tokens"][0] | {"id": VOCAB, "content": "<late>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    one_line(f"has id {VOCAB} \\('<late>'\\)", load_tokenizer, str(tmp_path))


def test_what_looks_like_a_path_is_never_asked_of_the_hub(tmp_path, monkeypatch):
    """./, ../, /, ~ and . begin a path, and so does the name of a folder or a file that is here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(loading, "fetch", lambda name: ("hub", name))
    (tmp_path / "models").mkdir(), (tmp_path / "file").write_text("")
    for name in ("./a", "../a", "/a/b", "~/a", "~a/b", ".a/b", ".", "..", "a", "models/x", "file/x",
                 "models/x@1", "data/x", "runs/x", "a/b/c", "-a/b", "a/..", "a/.", "a/", "/", "",
                 "a b/c"):
        one_line("no model here", resolve, name)
    for name in ("owner/name", "Qwen/Qwen2.5-0.5B@main", "3b/x_y.z"):
        assert resolve(name) == ("hub", name)
    tiny_folder(tmp_path / "home/mine"), tiny_folder(tmp_path / "owner/name")
    assert resolve("~/mine") == tmp_path / "home/mine"
    assert resolve("owner/name") == Path("owner/name")


FP32, BF16 = Place(torch.float32, "cpu"), Place(torch.bfloat16, "cpu")


def flags(rank: int, *targets: str) -> TrainingFlags:
    return TrainingFlags(out="", lora_rank=rank, lora_targets=list(targets or ["q_proj"]))


def test_what_is_trained(tmp_path):
    tiny_folder(tmp_path / "m")
    model, base = load_trainable(flags(2), str(tmp_path / "m"), "", BF16)
    trained = {n: p.dtype for n, p in model.named_parameters() if p.requires_grad}
    assert (
        base == str(tmp_path / "m")
        and set(trained) == set(lora_state(model))
        and set(trained.values()) == {torch.float32}
    )
    assert model.lm_head.weight.dtype == torch.bfloat16
    full, _ = load_trainable(flags(0), str(tmp_path / "m"), "", BF16)
    assert all(
        p.requires_grad and p.dtype == torch.float32 for p in full.parameters()
    ) and not lora_state(full)


def test_init_from_an_adapter_or_a_model(tmp_path):
    tiny_folder(tmp_path / "m"), tiny_folder(tmp_path / "other", seed=1)
    model = load_model(str(tmp_path / "m"))
    add_lora(model, 3, 6.0, ["q_proj", "o_proj"])
    for p in lora_state(model).values():
        p.data.normal_(0, 0.3)
    save_adapter(model, tmp_path / "a", "m")
    m, a, other = (str(tmp_path / n) for n in ("m", "a", "other"))
    assert (
        base_and_adapter(m, "") == (m, "")
        and base_and_adapter(m, a) == (m, a)
        and base_and_adapter(m, other) == (other, "")
    )
    on, base = load_trainable(
        flags(99, "v_proj"), m, a, FP32
    )  # the adapter keeps its own rank and targets
    assert base == m and torch.allclose(on(IDS), model(IDS), atol=1e-5) and len(lora_state(on)) == 8
    assert load_trainable(flags(2), m, other, FP32)[1] == other
    with pytest.raises(UserError, match="lora_rank 0"):
        load_trainable(flags(0), m, a, FP32)


@pytest.mark.parametrize("rank", [0, 3])
def test_save_and_load_weights(tmp_path, rank):
    tiny_folder(tmp_path / "m")
    make = lambda: load_trainable(flags(rank), str(tmp_path / "m"), "", FP32)[0]  # noqa: E731
    model, other = make(), make()
    for p in model.parameters():
        p.data.add_(0.1 * p.requires_grad)
    save_weights(model, TOKENIZER, "base", tmp_path / "w")
    load_weights(other, tmp_path / "w")
    assert torch.equal(model(IDS), other(IDS)) and not torch.equal(make()(IDS), other(IDS))


def test_device(monkeypatch, capsys):
    assert pick_device("cpu") == "cpu" and pick_device("auto") in ("cpu", "cuda")
    for flag in ("tpu", "cuda:99", "cudax", "", "cpu:0"):
        one_line(f"--device {flag}: ", pick_device, flag)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    one_line("--device mps: there is only cpu", pick_device, "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert capsys.readouterr().out == "" and pick_device("mps") == "mps"
    assert "untried" in capsys.readouterr().out and pick_dtype("auto", "mps") == torch.float32


@pytest.mark.parametrize("found, wanted", [
    ({"avx512_bf16": True, "amx_bf16": False}, "avx512_bf16"), ({"bf16": True}, "bf16"),
    ({"amx_bf16": True, "avx512_bf16": True}, "amx_bf16"), ({"avx512_bf16": False}, ""), ({}, "")])
def test_dtype(monkeypatch, capsys, found, wanted):
    """bfloat16 where the processor has instructions for it, and what decided is said."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert pick_dtype("bfloat16", "cpu") == torch.bfloat16 and capsys.readouterr().out == ""
    assert pick_dtype("float32", "cpu") == torch.float32 and capsys.readouterr().out == ""
    assert pick_dtype("auto", "cpu") == (torch.bfloat16 if wanted else torch.float32)
    said = capsys.readouterr().out
    assert said == (f"dtype: bfloat16 ({wanted} computes in it)\n" if wanted else
                    "dtype: float32 (cpu without fast bfloat16)\n")


class Hub(BaseHTTPRequestHandler):
    """The three calls of the hub's protocol that a download makes: revision -> commit, commit ->
    files, file.
    """

    def do_GET(self):
        server, path = self.server, urlparse(self.path).path
        server.asked.append(path)
        head, body, kind = {}, None, "application/json"
        if path == "/api/models/someone/tiny/revision/main":
            body = json.dumps({"id": "someone/tiny", "sha": COMMIT, "siblings": []}).encode()
        elif path.startswith(f"/api/models/someone/tiny/tree/{COMMIT}"):
            files = [f for f in server.folder.rglob("*") if f.is_file()]
            body = json.dumps([
                {
                    "type": "file",
                    "path": f.relative_to(server.folder).as_posix(),
                    "size": f.stat().st_size,
                    "oid": f.name,
                }
                for f in files
            ]).encode()
        elif path.startswith(f"/someone/tiny/resolve/{COMMIT}/"):
            name = path.rpartition(f"{COMMIT}/")[2]
            body, kind = (server.folder / name).read_bytes(), "application/octet-stream"
            head = {"ETag": f'"{name}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        self.send_response(200 if body is not None else 404)
        for key, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body or b"")),
            **head,
        }.items():
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
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", "import sys\nfrom ease.loading import *\n" + code],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
        check=False,
    )


def test_hub_ids(tmp_path, hub):
    """Fetched once through the client, known by its commit, loaded like a folder; a folder asks
    nobody and loads no client.
    """
    code = (
        "print(load_model('someone/tiny')(torch.arange(5)[None]).sum().item()); "
        "load_tokenizer('someone/tiny'); print(resolve('someone/tiny').name)"
    )
    wanted = load_model(str(hub.folder))(torch.arange(5)[None]).sum().item()
    found = in_a_process(tmp_path, code, hub.server_port)
    assert found.returncode == 0, found.stderr
    asking = "someone/tiny: no such folder here, asking the Hugging Face hub"
    said = [asking, f"someone/tiny at revision {COMMIT}"]
    *before, number, commit = found.stdout.splitlines()
    assert before == said and commit == COMMIT and float(number) == pytest.approx(wanted)
    names = {path.rpartition("/")[2] for path in hub.asked if "/resolve/" in path}
    assert names == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    hub.asked.clear()
    found = in_a_process(
        tmp_path,
        f"load_model({str(hub.folder)!r}); load_tokenizer({str(hub.folder)!r}); "
        "print('huggingface_hub' in sys.modules)",
        hub.server_port,
    )
    assert found.stdout == "False\n" and not hub.asked, found.stderr
    found = in_a_process(
        tmp_path, "resolve(f'someone/tiny@" + COMMIT + "')", 1
    )  # nobody there: the cache has this revision
    said[0] = said[0].replace(":", f"@{COMMIT}:")
    assert found.stdout.splitlines() == said, found.stderr
    for name, port, message in (
        (
            "someone/nothing",
            hub.server_port,
            "someone/nothing: no such folder, and the hub did not give it",
        ),
        ("other/model", 1, "other/model: no such folder"),
        ("runs/none", hub.server_port, "runs/none: no model here"),
    ):
        found = in_a_process(tmp_path, f"resolve({name!r})", port)
        assert (
            f"ease.records.UserError: {message}" in found.stderr
            and len(found.stderr.split("UserError: ")[1].splitlines()) == 1
        )


def test_an_adapter_of_another_base_is_said(tmp_path, capsys):
    """Keys and shapes fit, so it loads; its numbers would be wrong without a word."""
    model = tiny_folder(tmp_path / "m")
    tiny_folder(tmp_path / "other", seed=1)
    add_lora(model, 2, 4.0, ["q_proj"])
    save_adapter(model, tmp_path / "a", str(tmp_path / "m"))
    load_model(str(tmp_path / "m") + "/", str(tmp_path / "a"))
    assert "warning" not in capsys.readouterr().out
    load_model(str(tmp_path / "other"), str(tmp_path / "a"))
    message = f"warning: {tmp_path / 'a'} was made for {tmp_path / 'm'}, not for"
    assert message in capsys.readouterr().out
