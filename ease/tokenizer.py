"""tokenizer.json and the model's own chat template, so that prompts are the very ids the model was trained on."""

import json
import re
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from ease.method import THINK_CLOSE, THINK_OPEN
from ease.records import UserError


def read_json(path: Path) -> dict:
    """A JSON file of a model folder, {} if it is not there."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{path}: not JSON ({e})") from None


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text in newer templates. Here it is no more than its content."""

    tags = {"generation"}

    def parse(self, parser):
        """The statements between the tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def compile_template(source: str):
    """A chat template as transformers compiles it, sandboxed. No clock is defined, so that a prompt is the same every day."""

    def raise_exception(message: str):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, GenerationTag])
    environment.filters["tojson"] = lambda x, **kw: json.dumps(x, ensure_ascii=False, **kw)  # unlike jinja's: no HTML escapes
    environment.globals["raise_exception"] = raise_exception
    try:
        return environment.from_string(source)
    except TemplateError as e:
        raise UserError(f"the chat template is not valid: {e}") from None


def without_prefix(step: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer of tokenizer.json without the space that sentencepiece's (and some others) put in front."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for kept in map(without_prefix, step[key]) if kept]}
    return step | {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}.get(step["type"], {})


class Tokenizer:
    """Text <-> ids.

    Prompt and response are encoded apart and the response in pieces, because byte-pair merges cross seams. Control tokens
    come from the template alone: text can never forge one.
    """

    def __init__(self, fast: FastTokenizer, template: str, settings: dict, stop_ids: set[int], files: dict[str, str]):
        """settings: tokenizer_config.json; stop_ids: ids that end a response; files: {name: text} to save beside a model."""
        fast.no_truncation()
        fast.no_padding()
        self.fast, self.files = fast, files
        self.template = compile_template(template)
        # Control tokens: special ones, and others that the template writes (R1's "<|User|>"). Think markers are the model's to write.
        self.control = {t.content: i for i, t in fast.get_added_tokens_decoder().items()
                        if (t.special or len(t.content.strip()) > 1 and t.content in template) and t.content not in (THINK_OPEN.strip(), THINK_CLOSE.strip())}
        spec = json.loads(fast.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in self.control  # "<|im_end|>" inside a text is text: see encode
        spec |= {part: without_prefix(spec[part]) for part in ("normalizer", "pre_tokenizer")}
        self.inner = FastTokenizer.from_str(json.dumps(spec))  # for text in the middle of a sequence
        self.names = {k: v["content"] if isinstance(v, dict) else v
                      for k in ("bos_token", "eos_token", "pad_token", "unk_token") if (v := settings.get(k))}
        if self.names.get("eos_token") not in self.control:
            raise UserError("tokenizer_config.json: 'eos_token' is missing or is no special token of tokenizer.json")
        self.end_id = self.control[self.names["eos_token"]]  # closes every response, in training and in generation
        self.stop_ids = frozenset(stop_ids | {self.end_id})
        # What the template wants, found by trying: content as a string or as a list of parts; whether it takes a system turn;
        # whether the prompt ends in an open think marker (R1).
        user = {"role": "user", "content": "user-probe"}
        self.content_as_parts = not self.shows([user]) and self.shows([as_parts(user)])
        self.takes_system = self.shows([as_parts(m) if self.content_as_parts else m for m in ({"role": "system", "content": "system-probe"}, user)])
        self.opens_thinking = self.shows([user]) and self.fill([user]).rstrip().endswith(THINK_OPEN.strip())

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

    def encode(self, text: str, control: bool = False) -> list[int]:
        """The ids of text in the middle of a sequence; control strings in it are the text they are, unless `control`."""
        self.inner.encode_special_tokens = not control
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation, ready for the model's answer: those of apply_chat_template(add_generation_prompt=True).

        Control strings inside a message's content become private-use placeholders before the template is rendered. The result
        is encoded as a whole; where there are placeholders, it is cut at them and each is encoded as the text it stands for (and
        what follows as the middle of a text, so there Llama-2's legacy tokenizers put no space behind control tokens).
        """
        everything = "".join(m["content"] for m in messages)
        unused = (chr(c) for c in range(0xE000, 0xF900) if chr(c) not in everything)
        placeholder = {token: next(unused) for token in self.control if token in everything}
        text = self.render([{**m, "content": replace_all(m["content"], placeholder)} for m in messages])
        restore = {mark: token for token, mark in placeholder.items()}
        first, *parts = re.split(f"([{''.join(restore)}])", text) if restore else [text]
        ids = self.fast.encode(first, add_special_tokens=False).ids
        for part in parts:
            ids += self.encode(restore.get(part, part), control=part not in restore)
        return ids

    def render(self, messages: list[dict]) -> str:
        """The chat template's text of a conversation, generation prompt included.

        A system turn that the template does not take is put in front of the user's. An open think marker at the end (R1) is
        cut off: whether to reason is for the model to decide (a teacher's is put back by traces.rejection_sample).
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            system, user, *rest = messages
            messages = [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]
        try:
            text = self.fill([as_parts(m) if self.content_as_parts else m for m in messages])
        except Exception as e:  # a template is a program: it may fail in any way
            raise UserError(f"the chat template failed: {e}") from None
        return text.rstrip().removesuffix(THINK_OPEN.strip()) if self.opens_thinking else text

    def fill(self, messages: list[dict]) -> str:
        """The template's own output."""
        return self.template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.names)

    def shows(self, messages: list[dict]) -> bool:
        """Whether the template takes these messages and writes their texts."""
        try:
            text = self.fill(messages)
        except Exception:  # a template is a program: it may fail in any way
            return False
        return all(f"{m['role']}-probe" in text for m in messages)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens shown as they are (skipping them would hide think markers that are special tokens)."""
        return self.fast.decode(ids, skip_special_tokens=False)


def as_parts(message: dict) -> dict:
    """A message with its content as a list of parts, the form that some newer templates want."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def shared_vocabulary(a: Tokenizer, b: Tokenizer) -> list[int]:
    """The ids that mean the same token in both: the vocabulary over which two models' distributions can be compared."""
    of_a, of_b = ({i: t for t, i in x.fast.get_vocab(with_added_tokens=True).items()} for x in (a, b))
    return sorted(i for i in of_a if of_b.get(i) == of_a[i])


def replace_all(text: str, table: dict[str, str]) -> str:
    """Replace every key of the table by its value, longer keys first."""
    for old in sorted(table, key=len, reverse=True):
        text = text.replace(old, table[old])
    return text
