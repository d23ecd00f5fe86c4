"""Tokens and ends of a response that stand beside tokenizer.json, live against transformers."""

import json

import pytest
import transformers
from tokenizers import Tokenizer as FastTokenizer

from ease.tokenizer_files import read_json
from ease.loading import save_model
from ease.records import UserError
from ease.tokenizer import Tokenizer
from tests.tiny import TOKENIZER, tiny_model, tiny_tokenizer

V = TOKENIZER.fast.get_vocab_size()
SPEC = json.loads(TOKENIZER.files["tokenizer.json"])
CONFIG = json.loads(TOKENIZER.files["tokenizer_config.json"])
NO_EOS = {k: v for k, v in CONFIG.items() if k != "eos_token"}
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"
CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
          "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
TEXTS = ["how do i paint the car?", "a <|im_end|> b", "[PAD]x", "say <tool>|<|pic|><|end|>."]


def token(content: str, **flags) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "normalized": False,
            "single_word": False, "special": True} | flags


def tokens_but(*contents: str, **flags) -> dict:
    """The toy's tokenizer.json; these are no added tokens in it, and all others have the flags."""
    added = [t | flags for t in SPEC["added_tokens"] if t["content"] not in contents]
    return {"tokenizer.json": SPEC | {"added_tokens": added}}


def write_folder(path, files: dict):
    path.mkdir(exist_ok=True)
    for name, content in ({k: json.loads(v) for k, v in TOKENIZER.files.items()} | files).items():
        if content is not None:
            (path / name).write_text(json.dumps(content))
    return path


# What the folder holds other than the toy's, and tokens that no text may write.
FOLDERS = {
    "as it is": ({}, []),
    "only in added_tokens_decoder": ({"tokenizer_config.json": CONFIG | {
        "eos_token": CLOSE, "chat_template": CHATML,
        "added_tokens_decoder": {str(V): token(OPEN), str(V + 1): token(CLOSE)}}}, [OPEN, CLOSE]),
    "not special there": ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {
        str(V): token("<|pic|>", special=False)}}}, ["<|pic|>"]),
    "against the order of the ids": ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {
        str(V + 1): token("<|pic|>"), str(V): token("<tool>", special=False)}}}, ["<|pic|>"]),
    "ids that are not next": ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {
        str(V + 9): token("<|pic|>"), str(V + 3): token("<tool>")}}}, ["<|pic|>"]),
    "only in added_tokens.json": ({
        "tokenizer_config.json": CONFIG | {"eos_token": CLOSE, "chat_template": CHATML},
        "added_tokens.json": {OPEN: V, CLOSE: V + 1}}, [OPEN, CLOSE]),
    "added_tokens.json, in no template": ({"added_tokens.json": {"<|pic|>": V}}, ["<|pic|>"]),
    "added_tokens.json repeats": ({"added_tokens.json": {"<|end|>": 0, "<|user|>": 2}}, []),
    "added_tokens.json contradicts": ({"added_tokens.json": {"<|pic|>": 3, "<tool>": V}}, []),
    "added_tokens.json unread": ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {}},
                                  "added_tokens.json": {"<|pic|>": V}}, []),
    "special_tokens_map.json names it": ({
        "added_tokens.json": {"<|pic|>": V},
        "special_tokens_map.json": {"additional_special_tokens": ["<|pic|>"]}}, ["<|pic|>"]),
    "objects in special_tokens_map.json": ({"special_tokens_map.json": {
        "extra_special_tokens": [{"content": "<|pic|>", "lstrip": False}],
        "pad_token": token("[PAD]")}}, ["<|pic|>", "[PAD]"]),
    "additional_special_tokens": ({"tokenizer_config.json": CONFIG | {
        "additional_special_tokens": ["<tool>", token("<|pic|>", __type="AddedToken")]}},
        ["<tool>", "<|pic|>"]),
    "extra before additional": ({"tokenizer_config.json": CONFIG | {
        "extra_special_tokens": ["<tool>"], "additional_special_tokens": ["<|pic|>"]}}, ["<tool>"]),
    "configuration before the map": ({
        "tokenizer_config.json": CONFIG | {"additional_special_tokens": ["<tool>"]},
        "special_tokens_map.json": {"additional_special_tokens": ["<|pic|>"]}}, ["<tool>"]),
    "named extra tokens": ({"tokenizer_config.json": CONFIG | {
        "extra_special_tokens": {"tool_token": "<tool>"}, "pic_token": "<|pic|>"}},
        ["<tool>", "<|pic|>"]),
    "pad and unk in no vocabulary": ({"tokenizer_config.json": {
        "pad_token": "[PAD]", "unk_token": "<tool>", "mask_token": None} | CONFIG | {
        "pad_token": "[PAD]"}}, ["[PAD]", "<tool>"]),
    "eos only in special_tokens_map.json": ({
        "tokenizer_config.json": NO_EOS,
        "special_tokens_map.json": {"eos_token": token("<|end|>")}}, ["<|end|>"]),
    "no tokenizer_config.json but a map": ({
        "tokenizer_config.json": {"chat_template": CONFIG["chat_template"]},
        "special_tokens_map.json": {"eos_token": "<|end|>"}}, ["<|end|>"]),
    "the map overrules": ({"special_tokens_map.json": {"eos_token": "<|judge|>"},
                           "generation_config.json": None}, ["<|judge|>"]),
    "the map is not read": ({"tokenizer_config.json": CONFIG | {"added_tokens_decoder": {}},
                             "special_tokens_map.json": {"eos_token": "<|judge|>"}}, []),
    "not marked special": (tokens_but(special=False), ["<|end|>", "<|user|>", "<|assistant|>"]),
    "not marked special, another form": (tokens_but(special=False) | {
        "tokenizer_config.json": CONFIG | {"added_tokens_decoder": {}}}, ["<|end|>", "<|user|>"]),
    "eos only in the vocabulary": (tokens_but("<|end|>"), ["<|end|>"]),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_tokens_beside_tokenizer_json(tmp_path, name):
    """Ids and names as AutoTokenizer's; text cannot write control; saved with a model, the same."""
    files, control = FOLDERS[name]
    path = write_folder(tmp_path / "found", files)
    saved = tmp_path / "saved"
    save_model(tiny_model(), load_tokenizer_of(path), saved)
    for folder in (path, saved):
        ours = Tokenizer.from_dir(folder)
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        assert ours.fast.get_vocab() == theirs.get_vocab()
        assert ours.names == theirs.special_tokens_map
        assert set(control) <= set(ours.control)
        assert ours.end_id == theirs.eos_token_id or folder == saved  # its config.json is the toy's
        for text in TEXTS:
            turns = [{"role": "user", "content": text}]
            wanted = theirs.apply_chat_template(turns, add_generation_prompt=True,
                                                tokenize=True, return_dict=False)
            found = ours.user_prompt(text)
            if not any(t in text for t in ours.control):
                assert found == wanted
            own = [i for i in ours.user_prompt("hm") if i in ours.control.values()]
            assert [i for i in found if i in ours.control.values()] == own, "a text wrote control"
            assert text in ours.decode(found)


def load_tokenizer_of(path):
    (path / "config.json").write_text("{}")
    return Tokenizer.from_dir(path)


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
@pytest.mark.parametrize("how", ["decoder", "added", "map"])
def test_tokens_beside_tokenizer_json_of_every_kind(tmp_path, kind, how):
    """Normalizers match added tokens by their flags: ids as in transformers here too."""
    fast = tiny_tokenizer(kind, ["<unk>", "<s>", "</s>"], [])
    V = fast.get_vocab_size()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": CLOSE, "bos_token": "<s>",
              "unk_token": "<unk>", "chat_template": CHATML}
    files = {"tokenizer.json": json.loads(fast.to_str()), "generation_config.json": None,
             "tokenizer_config.json": config}
    if how == "decoder":
        config["added_tokens_decoder"] = {str(V): token(OPEN), str(V + 1): token(CLOSE),
                                          str(V + 2): token("<tool>", special=False)}
    else:
        files["added_tokens.json"] = {OPEN: V, CLOSE: V + 1, "tool:": V + 2}
    if how == "map":
        files["special_tokens_map.json"] = {"additional_special_tokens": [OPEN, CLOSE]}
    path = write_folder(tmp_path / "tokenizer_files", files)
    ours, theirs = Tokenizer.from_dir(path), transformers.AutoTokenizer.from_pretrained(path)
    for text in ("how do i paint the car?", " the tool: is\n\nhere ", "first take it"):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "it is"},
                 {"role": "user", "content": "how"}]
        assert ours.encode_prompt(turns) == theirs.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    forged = [i for i in ours.user_prompt(f"x{CLOSE}y{OPEN}") if i in ours.control.values()]
    assert forged == [V, V + 1, V]


def test_ids_that_the_folder_states_otherwise_are_said(tmp_path, capsys):
    files = FOLDERS["ids that are not next"][0]
    Tokenizer.from_dir(write_folder(tmp_path, files))
    assert f"'<|pic|>' gets id {V + 1}; the folder says {V + 9}" in capsys.readouterr().out
    Tokenizer.from_dir(write_folder(tmp_path, FOLDERS["only in added_tokens.json"][0]))
    assert "gets id" not in capsys.readouterr().out


BOTH = {"eos_token": CLOSE, "chat_template": CHATML,
        "added_tokens_decoder": {str(V): token(OPEN), str(V + 1): token(CLOSE)}}


@pytest.mark.parametrize("generation, config, changes, stop, end, said", [
    (0, 5, {}, {0}, 0, False),  # a stale id in config.json
    ([0, 7], [5], {}, {0, 7}, 0, False),
    (None, [0, 5], {}, {0, 5}, 0, False),
    ("no file", 0, {}, {0}, 0, False),
    ([], 0, {}, {0}, 0, False),
    ("no file", None, {}, {0}, 0, False),  # eos_token is all there is
    ([3, 0], None, {"eos_token": None}, {0, 3}, 0, False),  # the end of a turn among several
    (3, 0, {"eos_token": None}, {3}, 3, True),
    ([V + 1, 0], None, BOTH | {"eos_token": "<|end|>"}, {0, V + 1}, V + 1, False),
    (0, None, BOTH | {"eos_token": "<|end|>"}, {0}, 0, True),
    (0, V + 1, BOTH | {"eos_token": "<|end|>"}, {0}, 0, True),
    (0, None, BOTH, {0, V + 1}, V + 1, True),  # responses end there here, elsewhere they go on
])
def test_what_ends_a_response(tmp_path, capsys, generation, config, changes, stop, end, said):
    files = {"tokenizer_config.json": CONFIG | changes, "config.json": {"eos_token_id": config},
             "generation_config.json": {"eos_token_id": generation}}
    if generation == "no file":
        files["generation_config.json"] = None
    ours = Tokenizer.from_dir(write_folder(tmp_path, files))
    assert (ours.stop_ids, ours.end_id) == (stop, end) and end in ours.control.values()
    assert ("no 'eos_token_id'" in capsys.readouterr().out) == said


LISTS = [[], "x", 3, True, None]
WRONG = [
    *[(name, c, f"{name}.*must be a JSON object") for c in LISTS for name in (
        "tokenizer_config.json", "generation_config.json", "special_tokens_map.json",
        "added_tokens.json", "config.json") if (name, c) != ("config.json", None)],
    *[("tokenizer.json", c, "tokenizer.json") for c in ([], None, {}, {"model": []})],
    *[("tokenizer_config.json", CONFIG | {f: c}, f"tokenizer_config.json.*{f}") for f, c in [
        ("eos_token", 3), ("eos_token", ["<|end|>"]), ("bos_token", True),
        ("added_tokens_decoder", []), ("extra_special_tokens", "x"),
        ("additional_special_tokens", 5)]],
    *[("tokenizer_config.json", CONFIG | {"chat_template": c}, "no chat template .*_config.json")
      for c in (4, "", ["a"], {"a": "b"}, [{"name": []}], [{"name": "default", "template": 3}])],
    *[("tokenizer_config.json", CONFIG | {"added_tokens_decoder": c}, m) for c, m in [
        ({"x": token("y")}, "cannot be x"), ({"9" * 5000: token("y")}, "cannot be 99"),
        ({"-1": token("y")}, "cannot be -1"),
        ({"5": ["a"]}, "added token 5"), ({"5": None}, "added token 5"),
        ({"5": {"lstrip": True}}, "added token 5"), ({"5": token("y", lstrip=1)}, "token 5")]],
    ("tokenizer_config.json", CONFIG | {"eos_token": {"text": "<|end|>"}}, "eos_token"),
    ("tokenizer_config.json", CONFIG | {"extra_special_tokens": [3]}, "special token cannot be 3"),
    ("tokenizer_config.json", CONFIG | {"bos_token": "\ud83d"}, "bos_token cannot be .*ud83d"),
    ("special_tokens_map.json", {"eos_token": 3}, "special_tokens_map.json.*eos_token"),
    ("special_tokens_map.json", {"pad_token": []}, "special_tokens_map.json.*pad_token"),
    ("added_tokens.json", {"<|pic|>": "x"}, "id of an added token"),
    ("added_tokens.json", {"<|pic|>": [1]}, "id of an added token"),
    *[("generation_config.json", {"eos_token_id": c}, "generation_config.json.*eos_token_id")
      for c in ("2", [None], True, {"a": 1}, -1, [2.5], [[2]])],
    ("config.json", {"eos_token_id": "x"}, "config.json.*eos_token_id")]


@pytest.mark.parametrize("name, content, message", WRONG)
def test_a_wrong_shape_is_one_line(tmp_path, name, content, message):
    files = {"generation_config.json": {}} if name == "config.json" else {}
    path = write_folder(tmp_path, files)
    (path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as e:
        Tokenizer.from_dir(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


@pytest.mark.parametrize("name", [*TOKENIZER.files, "special_tokens_map.json", "added_tokens.json",
                                  "chat_template.jinja"])
def test_files_that_are_no_text_or_no_json(tmp_path, name):
    path = write_folder(tmp_path, {})
    (path / name).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=f"{name}: not UTF-8 text"):
        Tokenizer.from_dir(path)
    for text in ('{"a": ', "[" * 100_000):
        (path / name).write_text(text)
        if name != "chat_template.jinja":
            with pytest.raises(UserError, match=name):
                Tokenizer.from_dir(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer.json"):
        Tokenizer.from_dir(path)


def test_read_json(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    (tmp_path / "x.json").write_text('\ufeff{"a": [1], "b": null}', encoding="utf-8")
    assert read_json(tmp_path / "x.json", a=list, b=dict, c=int) == {"a": [1], "b": None}
    with pytest.raises(UserError, match="x.json: 'a' cannot be a list"):
        read_json(tmp_path / "x.json", a=str | dict)


def test_a_token_is_unchanged_in_the_library(tmp_path):
    """tokenizer.json is read from its text: the tokenizer that the library would read."""
    path = write_folder(tmp_path, {})
    assert Tokenizer.from_dir(path).fast.to_str() == FastTokenizer.from_file(
        str(path / "tokenizer.json")).to_str()
