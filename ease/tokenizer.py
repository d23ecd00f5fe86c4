"""tokenizer.json and the model's own chat template: prompts are the very ids the model knows."""

import json
import re
import signal
import sys
import threading
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from ease.method import THINK_CLOSE, THINK_OPEN
from ease.records import UserError, check_text, read_text
from ease.tokenizer_files import FILES, add_tokens, chat_template, special_tokens, stated_stop_ids

OPEN, CLOSE = THINK_OPEN.strip(), THINK_CLOSE.strip()
LONGEST = 2_000_000  # characters; a template that writes more does not come to an end


@contextmanager
def bounded():
    """Within it a template, which is a program, has a second and 64 MB (on Linux)."""
    if sys.platform != "linux" or threading.current_thread() != threading.main_thread():
        return (yield)
    import resource

    def stop(*_):
        raise TimeoutError("more than a second")

    pages, memory = Path("/proc/self/statm").read_text().split()[0], resource.RLIMIT_AS
    soft, hard = resource.getrlimit(memory)
    most = min(int(pages) * resource.getpagesize() + 2**26, hard % 2**63)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(memory, (most, hard))
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(memory, (soft, hard))


def compile_template(source: str):
    """A chat template as transformers compiles it, sandboxed, but without a clock: strftime_now
    always tells 26 July 2024 (Llama 3.2's own default), so that a prompt is the same every day.
    """

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)  # unlike jinja's: no HTML escapes

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.intercepted_binops, environment.binop_table = {"**"}, {}  # 9**9**9 has no end
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception,
                            "strftime_now": datetime(2024, 7, 26).strftime}
    # {% generation %} marks the assistant's text. Here it is a mere block with its own scope.
    source = re.sub(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", r"\1\2with\3", source)
    try:
        with bounded():
            return environment.from_string(source)
    except Exception as e:  # mostly TemplateError, but not only
        raise UserError(f"the chat template is not valid: {e!r}") from None


def without_prefix(step: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer without the space that sentencepiece's and some others add."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Sequence":
        key = "normalizers" if "normalizers" in step else "pretokenizers"
        return {**step, key: [kept for kept in map(without_prefix, step[key]) if kept]}
    off = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return step | off.get(step["type"], {})


class Tokenizer:
    """Text <-> ids. Prompt and response are encoded apart and the response in pieces, because
    byte-pair merges cross seams. Control tokens come from the template alone: text forges none.
    """

    def __init__(self, fast: FastTokenizer, template: str, settings: dict, stop_ids, files: dict):
        """settings: as in tokenizer_config.json; stop_ids: ends of a response by the model's files;
        files: {name: text} to save beside a model.
        """
        self.fast, self.files = fast, files
        self.names = {k: t.content for k, t in special_tokens(settings, Path()) if k}
        self.template = compile_template(template)
        self.try_template()
        # Special ones, ends of a response, and what the template writes besides (R1's "<|User|>").
        # Think markers are the model's to write.
        written = template + self.conversation
        self.control = {t.content: i for i, t in fast.get_added_tokens_decoder().items()
                        if t.content not in (OPEN, CLOSE)
                        and (t.special or i in stop_ids or t.content in self.names.values()
                             or len(t.content.strip()) > 1 and t.content in written)}
        spec = json.loads(fast.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["content"] in self.control  # inside a text it is text: encode
        spec |= {key: without_prefix(spec[key]) for key in ("normalizer", "pre_tokenizer")}
        self.inner = FastTokenizer.from_str(json.dumps(spec))  # for the middle of a sequence
        self.end_id = self.find_end(stop_ids)  # closes every response, in training and generation
        self.stop_ids = frozenset({*stop_ids, self.end_id})

    def try_template(self) -> None:
        """Find by trying whether the template wants content as a list of parts, takes a system
        turn, and ends a prompt in an open think marker (R1).
        """
        system, user, assistant = ({"role": role, "content": f"{role}-probe"}
                                   for role in ("system", "user", "assistant"))
        self.content_as_parts, self.takes_system, self.opens_thinking = False, True, False
        self.content_as_parts = not self.tried([user]) and bool(self.tried([as_parts(user)]))
        self.takes_system = bool(self.tried([system, user]))
        self.conversation = self.tried([system] * self.takes_system + [user, assistant, user])
        if not self.tried([user]):
            with bounded():
                self.render([user])  # says why, if it fails
        self.opens_thinking = self.tried([user]).rstrip().endswith(OPEN)

    def tried(self, messages: list[dict]) -> str:
        """render, but "" if the template does not take the messages or hides one."""
        try:
            with bounded():
                text = self.render(messages)
        except UserError:
            return ""
        return text if all(f"{m['role']}-probe" in text for m in messages) else ""

    def turn_end(self) -> int | None:
        """The control token that the template writes behind an assistant's text."""
        behind = self.conversation.partition("assistant-probe")[2].lstrip()
        return self.control.get(max(filter(behind.startswith, self.control), key=len, default=""))

    def find_end(self, stop_ids) -> int:
        """The end of a turn where it is a stop id, else eos_token, else the first stop id."""
        eos = self.names.get("eos_token")
        end = self.fast.token_to_id(eos) if eos else next(iter(stop_ids), None)
        if end not in self.fast.get_vocab().values():
            given = f"'eos_token' {eos!r}" if eos else f"no 'eos_token', and 'eos_token_id' {end}"
            raise UserError(f"{given} is no token (tokenizer_config.json, generation_config.json)")
        return self.turn_end() if self.turn_end() in stop_ids else end

    @classmethod
    def from_dir(cls, path: str | Path) -> "Tokenizer":
        """The tokenizer of a model folder."""
        path = Path(path)
        files = {name: read_text(path / name) for name in FILES
                 if name == "tokenizer.json" or (path / name).exists()}
        try:
            fast = FastTokenizer.from_str(files["tokenizer.json"])
            fast.no_truncation()
            fast.no_padding()
            fast.encode("a \U0010ffff")  # unknown, if anything is
        except BaseException as e:
            raise UserError(f"{path / 'tokenizer.json'}: {e}") from None
        settings, stop_ids = add_tokens(fast, path), stated_stop_ids(path)
        template = chat_template(path, settings)
        try:
            self = cls(fast, template, settings, stop_ids, files)
        except Exception as e:
            raise UserError(f"{path}: {e}") from None
        if (end := self.turn_end()) not in (None, *(stop_ids or [self.end_id])):
            print(f"{path}: {fast.id_to_token(end)!r} (id {end}) ends a turn in the chat template "
                  f"but is no 'eos_token_id'; responses end at {sorted(self.stop_ids)}")
        return self

    def encode(self, text: str, control: bool = False) -> list[int]:
        """The ids of text in the middle of a sequence, control strings in it as text by default."""
        self.inner.encode_special_tokens = not control
        return self.inner.encode(text, add_special_tokens=False).ids

    def user_prompt(self, text: str) -> list[int]:
        """encode_prompt of one user turn."""
        return self.encode_prompt([{"role": "user", "content": text}])

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """The ids of a conversation, as apply_chat_template(add_generation_prompt=True) has them.

        Control strings inside a message become private-use placeholders before the template is
        rendered. The result is cut at these and each is encoded as the text it stands for (what
        follows as the middle of a text: there Llama-2 has no space behind control tokens).
        """
        contents = check_text("".join(m["content"] for m in messages), "content", "a prompt")
        text = self.render(messages)
        unused = (c for c in map(chr, range(0xE000, 0xF900)) if c not in contents + text)
        forged = sorted((t for t in self.control if t in contents), key=len, reverse=True)
        restore = dict(zip(unused, forged))
        if len(restore) < len(forged):
            raise UserError("a prompt has control tokens in it and no private-use character "
                            "(U+E000 to U+F8FF) is left to stand for them")
        for c, token in restore.items():
            messages = [m | {"content": m["content"].replace(token, c)} for m in messages]
        pieces = [text]
        if restore:
            pieces = re.split(f"([{''.join(restore)}])", self.render(messages))
        ids = self.fast.encode(pieces[0], add_special_tokens=False).ids
        for piece in pieces[1:]:
            ids += self.encode(restore.get(piece, piece), control=piece not in restore)
        return ids

    def render(self, messages: list[dict]) -> str:
        """The chat template's text of a conversation, generation prompt included.

        A system turn that the template does not take is put in front of the user's. An open think
        marker at the end (R1) is cut off: whether to reason is for the model to decide (a teacher's
        is put back by traces.rejection_sample).
        """
        if messages[0]["role"] == "system" and not self.takes_system:
            system, user, *rest = messages
            user = user | {"content": f"{system['content']}\n\n{user['content']}"}
            messages = [user, *rest]
        if self.content_as_parts:
            messages = [as_parts(m) for m in messages]
        text = ""
        try:
            for piece in self.template.generate(messages=messages, add_generation_prompt=True,
                                                tools=None, documents=None, **self.names):
                text += piece
                if len(text) > LONGEST:
                    raise ValueError(f"it writes more than {LONGEST:,} characters")
            text.encode()  # no half of a surrogate pair
        except Exception as e:  # a template is a program: it may fail in any way
            raise UserError(f"the chat template failed: {e!r}") from None
        return text.rstrip().removesuffix(OPEN) if self.opens_thinking else text

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens too (some tokenizers have the think markers among them)."""
        return self.fast.decode(ids, skip_special_tokens=False)


def as_parts(message: dict) -> dict:
    """A message with its content as a list of parts, the form that some newer templates want."""
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def shared_vocabulary(a: Tokenizer, b: Tokenizer) -> list[int]:
    """The ids that mean the same token in both: over them two models can be compared."""
    return sorted({i for _, i in a.fast.get_vocab().items() & b.fast.get_vocab().items()})
