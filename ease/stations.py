"""One example, traced: the scripts run on one row, and Python tells what their functions return."""

import sys
import textwrap
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from ease.loading import pick_place
from ease.records import UserError, read_jsonl
from ease.run import start_clock
from ease.tokenizer_files import read_json

FIT = "response_pieces encode_record preview collate CausalLM.hidden CausalLM.logits log "
STATIONS = {  # shown as often as they stand here
    "distill": FIT + "cross_entropy Teacher.kl", "train": FIT + "gated_cross_entropy",
    "evaluate": "Tokenizer.encode_prompt stream split_reasoning count_tokens attack_succeeded "
                "share refused" + 3 * " note_verdicts"}
# run, and its first row that is harmful or not, with a trace or without
ROWS = (("phase1", True, True), ("ease", True, True), ("ease", True, False),
        ("refusal", True, False), ("deliberative", False, True), ("test", True, False))


def shown(x) -> str:
    """A tensor is its shape, an Example its ids."""
    if isinstance(x, tuple):
        return ", ".join(map(shown, x))
    return str(tuple(x.shape) if isinstance(x, Tensor) else x.ids if hasattr(x, "roles") else x)


def say(text: str) -> None:
    """Print, at most 100 columns wide."""
    for line in text.splitlines():
        print(textwrap.fill(line, 100, subsequent_indent="    "))


def watch(stations: list[str], call, *arguments) -> None:
    """call(*arguments), silent but for "file: function: what it returned" of the stations."""
    def hook(frame, event, value, out=sys.stdout):
        name, module = frame.f_code.co_qualname, frame.f_globals.get("__name__", "")
        if event == "return" and name in stations and module.startswith("ease."):
            stations.remove(name)
            if value is None:  # what it was given; `fit` logs means: its sums and counts by role
                known = frame.f_back.f_locals | frame.f_locals
                value = {k: known[k] for k in ("sums", "count", "n_ce", "n_kl", "values", "name",
                                               "verdict") if k in known}
            with redirect_stdout(out):
                say(f"{module.replace('.', '/')}.py: {name}: {shown(value)}")

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        sys.setprofile(hook)
        try:
            call(*arguments)
        finally:
            sys.setprofile(None)


def trace_example(out: str) -> None:
    """A step of one row alone in each training, a test of one; from the finished runs in `out`."""
    for name, harmful, traced in ROWS:
        run = Path(out, name)
        if not (run / "done").exists():
            raise UserError(f"{run} is no finished run: `python -m ease` first")
        manifest = read_json(run / "manifest.json")
        script = import_module(manifest["script"].removesuffix(".py"))
        cfg, test = script.Config(**manifest["config"]), name == "test"
        file = cfg.prompts[0] if test else run / "trained_on.jsonl"
        r = next(r for r in read_jsonl(file) if (r.harmful, bool(r.reasoning)) == (harmful, traced))
        say(f"\n{file}: {r.id}, {r.kind}, attack {r.attack or 'none'}, group {r.group}: {r.prompt}")
        with TemporaryDirectory() as cfg.out:
            if test:
                cfg.systems, cfg.limit = cfg.systems[-1:], 1  # EASE is the last
                cfg.base_system = cfg.refusal_system = cfg.deliberative_system = ""
                call = script.main, cfg
            else:
                cfg.steps = 1
                start_clock(Path(cfg.out))
                call = script.fit, cfg, Path(cfg.out), [r], [], pick_place(cfg)
            watch(STATIONS[script.__name__].split(), *call)
