"""What every script needs and no paper describes: flags and the run folder."""

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
from safetensors import SafetensorError

from ease.ranks import RANK
from ease.records import UserError, put, read_lines, write_text
from ease.tokenizer_files import read_json

ROOT = Path(__file__).resolve().parent.parent
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class RunFlags:
    """The flags of every script."""

    out: str  # the run folder; the same command goes on with a stopped run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of frozen weights and activations
    device: str = "auto"  # cuda if there is one, else cpu; mps is untried
    slots: int = 64  # rows generated, or judged, together; lower it when memory is short
    seed: int = 0  # data order, adapter init, sampling
    other_code: bool = False  # go on with a run of other code all the same; the manifest says so


@dataclass(kw_only=True)
class TrainingFlags(RunFlags):
    """The flags of both training scripts. Official: full fine-tuning, lr 1e-5, 2 epochs, batch 32,
    weight decay 0.01, clip 1, warm-up 3%, cosine.
    """

    lora_rank: int = 16  # 0 = train all weights
    lora_alpha: float = 32.0  # update scale = alpha / rank
    lora_targets: list[str] = LORA_TARGETS  # names of linear layers
    lr: float = 2e-4  # peak; LoRA wants about 10x the rate of full fine-tuning
    epochs: float = 2.0  # passes over the data
    steps: int = 0  # optimizer steps instead (0 = by epochs)
    batch_size: int = 32  # rows of an optimizer step
    batch_tokens: int = 4096  # tokens of a micro-batch; the result is the same with fewer
    max_length: int = 4096  # longer rows are dropped whole and counted
    gradient_checkpointing: Literal["auto", "on", "off"] = "auto"  # keep a layer's input alone and
    #   compute it again: less memory, a third more time; auto: on a GPU
    weight_decay: float = 0.01  # of matrices, none on norms and biases
    clip: float = 1.0  # of the gradient norm
    warmup: float = 0.03  # share of the steps
    save_every: int = 100  # steps between checkpoints
    held_out: int = 0  # keep this many rows out of training: their loss before, at saves and after
    merged: bool = False  # also write out/model, the adapter merged (float32 keeps all of it)


# What cannot change a result may change when a run goes on.
FREE = {"out", "slots", "batch_tokens", "save_every", "device", "other_code",
        "gradient_checkpointing"}
# The least and the greatest value of a number; all others are from 0 on.
RANGES = {"kl_weight": (0, 1), "warmup": (0, 1), "poison_share": (0, 0.5), "top_p": (1e-6, 1),
          "kl_temperature": (1e-6, math.inf)} | dict.fromkeys(
    ("batch_size", "batch_tokens", "slots", "save_every", "max_new_tokens", "probe_tokens",
     "attempts", "max_length"), (1, math.inf))


def parse_config(cls: type, argv: list[str] | None = None):
    """A dataclass -> flags of the same names -> an instance. Help is the first line of the
    dataclass's file and the comment behind a field (and after it, on lines with "#   ").

    A bool field takes true, false or nothing (true), a list field one value or more, a Literal
    field one of its own, float | None a float. A field without default is required; unknown flags
    and numbers out of range are errors.
    """
    description = sys.modules[cls.__module__].__doc__.strip().split("\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    source = "".join(inspect.getsource(c) for c in reversed(cls.__mro__) if is_dataclass(c))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*(?:\n    #   .*)*)", source, re.MULTILINE))
    for f in fields(cls):
        required = f.default is MISSING
        text = comments.get(f.name, "").replace("\n    #  ", "")
        text += "" if required else f" [{f.default}]"
        if f.type is bool:
            options = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        elif get_origin(f.type) is Literal:
            options = {"choices": get_args(f.type)}
        elif get_origin(f.type) is list:
            options = {"nargs": "+", "type": get_args(f.type)[0]}
        else:
            options = {"type": float if f.type == float | None else f.type}
        parser.add_argument(f"--{f.name}", required=required, default=f.default,
                            help=text.replace("%", "%%"), **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        least, most = RANGES.get(name, (0, math.inf))
        if isinstance(value, int | float) and not least <= value <= most:  # nor is nan
            parser.error(f"argument --{name}: must be from {least} to {most}, is {value}")
    return cls(**values)


def boolean(text: str) -> bool:
    """"true" or "false"; bool("false") would be True."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def command_line(main: Callable, cls: type) -> None:
    """Run main(config) for the flags given; a mistake that the user can mend is one line on stderr
    and exit status 2.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no emoji
    if RANK:
        sys.stdout = open(os.devnull, "w")  # rank 0 says it all
    try:
        return main(parse_config(cls))
    except (UserError, OSError, SafetensorError) as e:  # the last two: a full disk
        message = str(e)
    except torch.cuda.OutOfMemoryError:
        message = ("the GPU is out of memory: the same command with a lower --batch_tokens "
                   "(training) or --slots (generation) goes on")
    except KeyboardInterrupt:
        message = "stopped; the same command goes on from the last checkpoint"
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    sys.exit(2)


def sha256(path: str | Path) -> str:
    """Hash of a file; of a model or adapter folder: of all that decides what it says (weights,
    JSON, chat template).
    """
    path, digest = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(
        f for f in path.iterdir() if f.suffix in (".json", ".jinja", ".safetensors"))
    for file in files:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def script_of(cfg: RunFlags) -> str:
    """The script whose flags these are, relative to the project."""
    return Path(inspect.getsourcefile(type(cfg))).resolve().relative_to(ROOT).as_posix()


def code_of(script: str) -> dict[str, str]:
    """{file: digest} of a script and the project's files that it imports: of the parsed code, so
    that comments, docstrings and layout are no change.
    """
    digests, names = {}, [script]
    for name in names:  # grows on the way
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ease."):
                names += {node.module.replace(".", "/") + ".py"}.difference(names)
            documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if documented and ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        digests[name] = hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    return digests


def changed_code(manifest: dict) -> list[str]:
    """The files that differ from those that made a run."""
    old, now = manifest.get("code", {}), code_of(manifest["script"])
    return sorted(name for name in old | now if old.get(name) != now.get(name))


def canonical(value):
    """A flag's value with every path in it resolved, so that x, x/ and an absolute x are one."""
    if isinstance(value, list | tuple):
        return [canonical(v) for v in value]
    if not isinstance(value, str):
        return value
    pieces = [value] if os.path.exists(value) else re.split("([=+:])", value)  # NAME=MODEL+ADAPTER
    return "".join(os.path.realpath(p) if os.path.exists(p) else p for p in pieces)


def open_run(cfg: RunFlags, inputs: list[str], place: tuple[torch.dtype, str]) -> Path:
    """Make the run folder cfg.out and write manifest.json first; or go on with a stopped run.

    A folder of another configuration or other code is never written to: the error says what
    differs. An input "" is none. Inputs are compared by hash; in a finished run, which shall say so
    at once, files only: gigabytes of model folders by their names.
    """
    inputs = [p for p in inputs if p]
    for p in inputs:
        if not Path(p).exists():
            raise UserError(f"{p}: no such file or folder")
    run, file, script = Path(cfg.out), Path(cfg.out, "manifest.json"), script_of(cfg)
    if not (run / "done").exists():
        hold(run)  # who held it before may have finished it meanwhile
    finished = (run / "done").exists()
    git = subprocess.run("git rev-parse HEAD", shell=True, cwd=ROOT, capture_output=True, text=True,
                         check=False)  # in a shell: no error where there is no git
    manifest = {
        "script": script, "config": asdict(cfg), "device": place[1], "dtype": str(place[0]),
        "inputs": {p: sha256(p) for p in inputs if not finished or Path(p).is_file()},
        "git": git.stdout.strip(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "safetensors", "tokenizers", "numpy")},
        "code": code_of(script),
    }
    if old := read_json(file):
        if finished:
            old["inputs"] = {p: d for p, d in old["inputs"].items() if not Path(p).is_dir()}
        manifest = same_run(cfg, old, manifest)
    if not finished:
        start_clock(run)  # before anything is written: it looks when that last happened
        write_text(file, json.dumps(manifest, indent=2) + "\n")
    return run


def hold(run: Path) -> None:
    """Keep other processes out of the run folder until this one ends, by kill -9 too."""
    run.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
        held = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o666)  # never closed
        fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{run}: another process is at work on this run") from None
    except (ImportError, OSError):  # Windows, or no locks there
        pass


def same_run(cfg: RunFlags, old: dict, new: dict) -> dict:
    """The manifest to go on with; an error if the run in the folder is another one."""
    new_flags = {f.name: f.default for f in fields(cfg)}  # that the older run did not have
    before, now = ({**{n: canonical(value) for n, value in (new_flags | m["config"]).items()},
                    **{canonical(path): digest for path, digest in m["inputs"].items()},
                    "script": m["script"], "dtype": m["dtype"]} for m in (old, new))
    for name in now | before:
        if name not in FREE and before.get(name) != now.get(name):
            raise UserError(f"{cfg.out} holds a run with another {name} ({before.get(name)!r}, now "
                            f"{now.get(name)!r}); choose another --out or delete it")
    if changed := changed_code(old):
        if not cfg.other_code:
            raise UserError(f"{cfg.out} was made by other code: {', '.join(changed)} changed; "
                            "delete it to run again, or go on all the same with --other_code")
        old["changed_code"] = sorted({*old.get("changed_code", []), *changed})
    return old


def start_clock(run: Path) -> None:
    """Note in clock.json when this stretch of the run began, and the seconds of those before it: a
    stretch ended when it wrote its last file.
    """
    file, spent = run / "clock.json", 0.0
    if clock := read_json(file):
        last = max(p.stat().st_mtime for p in run.rglob("*"))
        spent = clock["spent"] + max(0.0, last - clock["started"])
    write_text(file, json.dumps({"spent": spent, "started": time.time()}) + "\n")


def log(run: Path, **values) -> None:
    """Append one line to metrics.jsonl."""
    if RANK:
        return
    put(run / "metrics.jsonl", json.dumps(values) + "\n")


def finish(run: Path, **values) -> None:
    """Write `done` last, with the seconds of all stretches, the peak memory of the last and the
    tokens trained on, and say the held-out loss and where the results are.
    """
    for kept in run.rglob("*.kept"):
        kept.unlink(missing_ok=True)  # every rank comes here
    metrics, clock = run / "metrics.jsonl", read_json(run / "clock.json")
    lines = read_lines(metrics) if metrics.exists() else []
    seconds, peak = clock["spent"] + time.time() - clock["started"], round(peak_memory() / 2**30, 2)
    values |= {"supervised_tokens": sum(row.get("tokens", 0) for _, row in lines),
               "seconds": round(seconds, 1), "peak_gib": peak}
    write_text(run / "done", json.dumps(values) + "\n")
    if held_out := [row for _, row in lines if "held_out_gate" in row]:
        print("held-out loss a token: " + ", ".join(
            f"{name[9:]} {before:.4f} before, {held_out[-1][name]:.4f} after"
            for name, before in held_out[0].items() if before))  # neither step 0 nor None
    print(f"done in {seconds:.0f} s, peak memory {peak:.2f} GiB; results in {run}")


def is_done(run: Path) -> bool:
    """Whether a run of this folder came to its end (says so)."""
    if done := (run / "done").exists():
        print(f"{run} is complete already; delete it to run again")
    return done


def peak_memory() -> float:
    """Bytes: of the allocator on a GPU, else of the process."""
    if peak := torch.cuda.max_memory_allocated():  # 0 without a GPU
        return peak
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
