"""What an evaluation compares: models, adapters on them, responses made elsewhere."""

import re
from pathlib import Path
from typing import NamedTuple

import torch

from ease.loading import Place, load_model, load_tokenizer
from ease.lora import merge_lora
from ease.model import CausalLM
from ease.policies import POLICY, teacher_messages
from ease.records import Record, UserError, read_jsonl
from ease.run import changed_code
from ease.tokenizer import Tokenizer
from ease.tokenizer_files import read_json

OUTPUTS = "responses:"  # in the place of a model: its responses were made elsewhere


class System(NamedTuple):
    """A model, with an adapter or none (""), shown the policy or not."""

    model: str
    adapter: str
    policy: bool = False

    def messages(self, prompt: str) -> list[dict]:
        """The conversation that it is asked to answer."""
        if self.policy:
            return teacher_messages(prompt, tuple(POLICY.texts))
        return [{"role": "user", "content": prompt}]

    @property
    def outputs(self) -> str:
        """The file of "responses:FILE", "" of a model."""
        return self.model.removeprefix(OUTPUTS) if self.model.startswith(OUTPUTS) else ""


def parse_systems(specs: list[str]) -> dict[str, System]:
    """NAME=MODEL[+ADAPTER] or NAME=responses:FILE -> {name: system}. A '+' inside a path that
    exists is part of it.
    """
    systems = {}
    for spec in specs or [""]:
        name, equals, where = spec.partition("=")
        if not (equals and where.removeprefix(OUTPUTS) and re.fullmatch(r"[\w.-]+", name)):
            raise UserError(f"--systems {spec!r}: expected NAME=MODEL, NAME=MODEL+ADAPTER or "
                            "NAME=responses:FILE, the name of letters, digits, '_', '.', '-'")
        if name in systems:
            raise UserError(f"--systems: the name {name!r} stands twice")
        cuts = [i for i, c in enumerate(where) if c == "+" and Path(where[:i]).exists()]
        whole = Path(where).exists() or where.startswith(OUTPUTS)
        cut = len(where) if whole else cuts[-1] if cuts else where.find("+")
        cut = cut if cut >= 0 else len(where)
        systems[name] = System(where[:cut], where[cut + 1 :])
    return systems


def load_system(system: System, place: Place) -> tuple[CausalLM, Tokenizer]:
    """Model and tokenizer. In fp32 the adapter is merged: exact to rounding, and faster; in bf16
    that would round the update away.
    """
    model = load_model(system.model, system.adapter, *place)
    model = merge_lora(model) if place.dtype == torch.float32 else model
    return model, load_tokenizer(system.model)


def training_of(adapter_or_model: str) -> tuple[dict, list[Record]]:
    """What a run folder says of its training, with phase 1's where it started there: ({steps,
    supervised_tokens}, records). Other code than today's is said.
    """
    totals, records, where = {}, [], adapter_or_model
    while where and (Path(where).parent / "done").exists():
        run = Path(where).parent
        manifest, done = read_json(run / "manifest.json"), read_json(run / "done")
        if "steps" not in done:
            break
        if changed := changed_code(manifest):
            print(f"warning: {run} was trained by other code ({', '.join(changed)} changed since)")
        totals = {k: totals.get(k, 0) + done[k] for k in ("steps", "supervised_tokens")}
        records += read_jsonl(run / "trained_on.jsonl")
        where = manifest["config"].get("init", "")
    return totals, records
