"""What a model folder says of its tokenizer beside tokenizer.json, read as transformers does."""

import json
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as FastTokenizer

from ease.records import UserError, parse_json, read_text

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "generation_config.json")
NAMES = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def read_json(path: Path, **types) -> dict:
    """The object in a JSON file, {} if there is no such file. types: {field: type} for fields that
    may be missing or null, but of no other type.
    """
    found = parse_json(read_text(path), path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be a JSON object, is a {type(found).__name__}")
    for field, allowed in types.items():
        if not isinstance(value := found.get(field), allowed | None):
            raise UserError(f"{path}: {field!r} cannot be a {type(value).__name__}")
    return found


def chat_template(path: Path, settings: dict) -> str:
    """The source: chat_template.jinja before tokenizer_config.json; of several, the default."""
    if (file := path / "chat_template.jinja").exists():
        return read_text(file)
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
    if isinstance(found, dict):
        found = found.get("default")
    if not found or not isinstance(found, str):
        raise UserError(f"{path}: no chat template (chat_template.jinja, or a text as "
                        "'chat_template' in tokenizer_config.json)")
    return found


def token_of(value, where: str) -> AddedToken:
    """A token as JSON has it: a text, or an object with its "content" and how it is matched."""
    if isinstance(value, str):
        value = {"content": value, "special": True}
    flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
    try:
        return AddedToken(value["content"], **{k: value[k] for k in flags if k in value})
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{where} cannot be {json.dumps(value)}") from None


def special_tokens(settings: dict, path: Path) -> list[tuple[str, AddedToken]]:
    """(name, token) of all special tokens in transformers' order, "" for those without a name."""
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    named = dict.fromkeys(NAMES) | settings | (more if isinstance(more, dict) else {})
    found = [(k, v) for k, v in named.items() if k.endswith("_token") and isinstance(v, str | dict)]
    found += [("", v) for v in more if not isinstance(more, dict)]
    return [(k, token_of(v | {"special": True} if isinstance(v, dict) else v,
                         f"{path}: {k or 'a special token'}")) for k, v in found if v]


def read_settings(path: Path, known: dict[int, AddedToken]) -> dict:
    """tokenizer_config.json. Without "added_tokens_decoder" (an older form) it is overruled by
    special_tokens_map.json, and added_tokens.json stands for that field as far as its ids are not
    among `known`, the added tokens of tokenizer.json.
    """
    types = dict.fromkeys(NAMES, str | dict) | dict.fromkeys(
        ("extra_special_tokens", "additional_special_tokens"), list | dict)
    settings = read_json(path / "tokenizer_config.json", added_tokens_decoder=dict, **types)
    if not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None)
    if settings.get("added_tokens_decoder") is None:
        settings |= read_json(path / "special_tokens_map.json", **types)
        listed = special_tokens(settings | {"additional_special_tokens": None}, path)
        special, known = {t.content for _, t in listed}, set(map(str, known))
        settings["added_tokens_decoder"] = {
            str(i): {"content": t, "special": t in special, "normalized": t not in special}
            for t, i in read_json(path / "added_tokens.json").items() if str(i) not in known}
    return settings


def add_tokens(fast: FastTokenizer, path: Path) -> dict:
    """Add the tokens that stand beside tokenizer.json, in the order of their ids; the settings.

    A new token that looks like a marker counts as special, so that no text can write it.
    """
    known = fast.get_added_tokens_decoder()
    settings, stated = read_settings(path, known), {}
    texts = {token.content for token in known.values()}
    for i, value in settings["added_tokens_decoder"].items():
        if not i.isdecimal() or len(i) > 9:
            raise UserError(f"{path}: the id of an added token cannot be {i}: {json.dumps(value)}")
        stated[int(i)] = token = token_of(value, f"{path}: added token {i}")
        token.special |= token.content not in texts and token.content[:1] in ("<", "[")
    fast.add_tokens([stated[i] for i in sorted(stated)])
    texts |= {token.content for token in stated.values()}
    fast.add_tokens([t for name, t in special_tokens(settings, path) if t.content not in texts
                     and (name != "eos_token" or fast.token_to_id(t.content) is not None)])
    for i, token in stated.items():
        if (found := fast.token_to_id(token.content)) != i:
            print(f"{path}: token {token.content!r} gets id {found}; the folder says {i}")
    return settings


def stated_stop_ids(path: Path) -> list[int]:
    """The ids that end a response: generation_config.json's, where it has none config.json's."""
    for file in (path / "generation_config.json", path / "config.json"):
        found = read_json(file).get("eos_token_id")
        ids = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{file}: 'eos_token_id' cannot be {found}")
        if ids:
            return ids
    return []
