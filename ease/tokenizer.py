"""tokenizer.json and the model's own chat template, so that prompts are the very ids the model was trained on."""

import json
import re
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from ease.gate import THINK_OPEN
from ease.records import UserError


def read_json(path: Path) -> dict:
    """A JSON file of a model folder, {} if it is not there."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


def compile_template(source: str):
    """A chat template as transformers compiles it, sandboxed. No clock is defined, so that a prompt is the same every day."""

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)  # unlike jinja's: no HTML escapes
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as e:
        raise UserError(f"the chat template is not valid: {e}") from None


class Tokenizer:
    """Text <-> ids.

    Prompt and response are encoded apart and the response in pieces, because byte-pair merges cross seams. Control tokens
    come from the template alone: text can never forge one.
    """

    def __init__(self, fast: FastTokenizer, template: str, settings: dict, stop_ids: set[int], files: dict[str, str]):
        """settings: tokenizer_config.json; stop_ids: ids that end a response; files: {name: text} to save beside a model."""
        fast.no_truncation()
        fast.no_padding()
        fast.encode_special_tokens = True  # "<|im_end|>" inside a text is text
        self.fast, self.files = fast, files
        self.template = compile_template(template)
        self.control = {t.content: i for i, t in fast.get_added_tokens_decoder().items() if t.special}
        longest_first = sorted(self.control, key=len, reverse=True)
        self.at_control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")  # split() keeps the tokens
        self.names = {k: v["content"] if isinstance(v, dict) else v
                      for k in ("bos_token", "eos_token", "pad_token", "unk_token") if (v := settings.get(k))}
        if self.names.get("eos_token") not in self.control:
            raise UserError("tokenizer_config.json: 'eos_token' is missing or is no special token of tokenizer.json")
        self.end_id = self.control[self.names["eos_token"]]  # closes every response, in training and in generation
        self.stop_ids = frozenset(stop_ids | {self.end_id})

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json, the chat template and the end-of-text ids of a model folder."""
        path = Path(path)
        settings = read_json(path / "tokenizer_config.json")
        try:
            fast = FastTokenizer.from_file(str(path / "tokenizer.json"))
        except Exception as e:  # the tokenizers library raises a bare Exception
            raise UserError(f"{path / 'tokenizer.json'}: {e}") from None
        jinja = path / "chat_template.jinja"
        template = jinja.read_text(encoding="utf-8") if jinja.exists() else settings.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not template:
            raise UserError(f"{path}: no chat template (chat_template.jinja, or 'chat_template' in tokenizer_config.json)")
        stop_ids = set()
        for name in ("generation_config.json", "config.json"):
            eos = read_json(path / name).get("eos_token_id")
            stop_ids |= set(eos if isinstance(eos, list) else [] if eos is None else [eos])
        names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
        files = {n: (path / n).read_text(encoding="utf-8") for n in names if (path / n).exists()}
        return cls(fast, template, settings, stop_ids, files)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text; control strings in it are encoded as the text they are."""
        return self.fast.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation, ready for the model's answer: those of apply_chat_template(add_generation_prompt=True).

        Control strings inside a message's content become private-use placeholders before the template is rendered; the result
        is split at the control tokens, the placeholders are put back, and each part is encoded as text.
        """
        everything = "".join(m["content"] for m in messages)
        unused = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in everything)
        placeholder = {token: next(unused) for token in self.control if token in everything}
        text = self.render([{**m, "content": replace_all(m["content"], placeholder)} for m in messages])
        restore = {mark: token for token, mark in placeholder.items()}
        ids = []
        for part in self.at_control.split(text):
            ids += [self.control[part]] if part in self.control else self.encode(replace_all(part, restore))
        return ids

    def render(self, messages: list[dict]) -> str:
        """The chat template's text of a conversation, generation prompt included. An open think marker at its end (R1's templates)
        is cut off: whether to reason is for the model to decide.
        """
        try:
            text = self.template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.names)
        except TemplateError as e:
            raise UserError(f"the chat template failed: {e}") from None
        opened = text.rstrip().endswith(THINK_OPEN.strip())
        return text.rstrip().removesuffix(THINK_OPEN.strip()) if opened else text

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens shown as they are (skipping them would hide think markers that are special tokens)."""
        return self.fast.decode(ids, skip_special_tokens=False)


def replace_all(text: str, table: dict[str, str]) -> str:
    """Replace every key of the table by its value, longer keys first."""
    for old in sorted(table, key=len, reverse=True):
        text = text.replace(old, table[old])
    return text
