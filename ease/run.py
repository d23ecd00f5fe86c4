"""What every script needs and no paper describes: flags and the run folder."""

import argparse
import ast
import dataclasses
import hashlib
import inspect
import json
import os
import platform
import re
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from ease.records import UserError, read_lines, write_text

ROOT = Path(__file__).resolve().parent.parent
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(kw_only=True)
class RunFlags:
    """The flags of every script."""

    out: str  # the run folder; the same command goes on with a stopped run
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of frozen weights and activations
    device: str = "auto"  # cuda if there is one, else cpu; mps is untried
    slots: int = 64  # rows generated together; lower it when memory is short
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
    batch_tokens: int = 8192  # padded tokens of a micro-batch; the result is the same with fewer
    max_length: int = 8192  # longer rows are dropped whole and counted
    weight_decay: float = 0.01  # of matrices, none on norms and biases
    clip: float = 1.0  # of the gradient norm
    warmup: float = 0.03  # share of the steps
    save_every: int = 100  # steps between checkpoints
    merged: bool = False  # also write out/model, the adapter merged (float32 keeps all of it)


# What cannot change a result may change when a run goes on.
FREE = {"out", "slots", "batch_tokens", "save_every", "device", "other_code"}
AT_MOST_1, ABOVE_0 = {"kl_weight", "top_p", "warmup"}, {"top_p", "kl_temperature"}
AT_LEAST_1 = {"batch_size", "batch_tokens", "slots", "save_every", "max_new_tokens",
              "probe_tokens", "attempts", "max_length"}


def parse_config(cls: type, argv: list[str] | None = None, description: str = ""):
    """A dataclass -> flags of the same names -> an instance. Help is the comment behind a field
    (and on lines after it that begin with "#   ").

    A str, int or float field takes a value (float | None: none unless given), a bool field true,
    false or nothing (true), a list[str] field one or more, a Literal field one of its own. A field
    without default is required; unknown flags and numbers out of range are errors.
    """
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    classes = [c for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    source = "".join(map(inspect.getsource, classes))
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*(?:\n    #   .*)*)", source, re.MULTILINE))
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING
        text = comments.get(f.name, "").replace("\n    #  ", "")
        text += "" if required else f" [{f.default}]"
        options = {"help": text.replace("%", "%%"), "metavar": f.name.upper()}
        if f.type is bool:
            options |= {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(f.type) is typing.Literal:
            options = {"help": options["help"], "choices": typing.get_args(f.type)}
        elif typing.get_origin(f.type) is list:
            options["nargs"] = "+"
        else:
            options["type"] = float if f.type == float | None else f.type
        default = None if required else f.default
        parser.add_argument(f"--{f.name}", default=default, required=required, **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, int | float):
            check_range(parser, name, value)
    return cls(**values)


def boolean(text: str) -> bool:
    """"true" or "false"; bool("false") would be True."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def check_range(parser: argparse.ArgumentParser, name: str, value: float) -> None:
    """An error for a number that a flag cannot have."""
    least = 1 if name in AT_LEAST_1 else 0
    if not value >= least:  # nor is nan
        parser.error(f"argument --{name}: {value} is below {least}")
    if name in ABOVE_0 and not value or name in AT_MOST_1 and value > 1:
        parser.error(f"argument --{name}: {value} is {'above 1' if value else 'not above 0'}")


def command_line(main: Callable, cls: type) -> None:
    """Run main(config) for the flags given; a mistake that the user can mend is one line on stderr
    and exit status 2.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that knows no emoji
    description = sys.modules[main.__module__].__doc__.strip().split("\n")[0]
    cfg = parse_config(cls, description=description)
    try:
        main(cfg)
    except UserError as e:
        sys.exit(fail(str(e)))
    except torch.cuda.OutOfMemoryError:
        sys.exit(fail("the GPU is out of memory: the same command with a lower --batch_tokens "
                      "(training) or --slots (generation) goes on"))
    except SafetensorError as e:  # a full disk, while weights are written
        sys.exit(fail(f"safetensors: {e}"))
    except OSError as e:
        sys.exit(fail(f"{e.filename}: {e.strerror}" if e.filename else str(e)))
    except KeyboardInterrupt:
        sys.exit(fail("stopped; the same command goes on from the last checkpoint"))


def fail(message: str) -> int:
    """Print the one line; the exit status."""
    print(f"error: {message}", file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------- the folder
def sha256(path: str | Path) -> str:
    """Hash of a file; of a model or adapter folder: of all that decides what it says (weights,
    JSON, chat template).
    """
    path, digest = Path(path), hashlib.sha256()
    endings = ("json", "jinja", "safetensors")
    inside = sorted(f for end in endings for f in path.glob(f"*.{end}"))
    for file in [path] if path.is_file() else inside:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def git_hash() -> str:
    """The commit of the code that runs, "" where there is none (or no git)."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                               cwd=ROOT, check=False)
    except OSError:
        return ""
    return found.stdout.strip()


def script_of(cfg: RunFlags) -> str:
    """The script whose flags these are, relative to the project."""
    return Path(inspect.getsourcefile(type(cfg))).resolve().relative_to(ROOT).as_posix()


def code_of(script: str) -> dict[str, str]:
    """{file: digest} of a script and the project's files that it imports: of the parsed code, so
    that comments, docstrings and layout are no change.
    """
    digests, waiting = {}, [script]
    while waiting:
        name = waiting.pop()
        if name in digests:
            continue
        tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("ease."):
                waiting.append(node.module.replace(".", "/") + ".py")
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
    if isinstance(value, dict):
        return {canonical(k): v for k, v in value.items()}
    if isinstance(value, list):
        return [canonical(v) for v in value]
    if not isinstance(value, str) or not value:
        return value
    if os.path.exists(value):
        return os.path.realpath(value)
    pieces = re.split("([=+:])", value)  # NAME=MODEL+ADAPTER, NAME=responses:FILE
    return value if len(pieces) == 1 else "".join(
        p if p in ("=", "+", ":") else canonical(p) for p in pieces)


def open_run(cfg: RunFlags, inputs: list[str], place: tuple[torch.dtype, str]) -> Path:
    """Make the run folder cfg.out and write manifest.json first; or go on with a stopped run.

    A folder of another configuration or other code is never written to: the error says what
    differs. Files that are no input ("") are skipped.
    """
    inputs = [str(p) for p in inputs if p]
    for p in inputs:
        if not Path(p).exists():
            raise UserError(f"{p}: no such file or folder")
    run, script = Path(cfg.out), script_of(cfg)
    packages = ("torch", "safetensors", "tokenizers", "numpy")
    manifest = {
        "script": script, "config": dataclasses.asdict(cfg), "device": place[1],
        "dtype": str(place[0]), "inputs": {p: sha256(p) for p in inputs}, "git": git_hash(),
        "python": platform.python_version(), "versions": {p: version(p) for p in packages},
        "code": code_of(script),
    }
    manifest = json.loads(json.dumps(manifest))  # tuples -> lists, as the file has them
    file = run / "manifest.json"
    if file.exists():
        manifest = same_run(cfg, run, json.loads(file.read_text(encoding="utf-8")), manifest)
    if not (run / "done").exists():
        start_clock(run)  # before anything is written: it looks when that last happened
        write_text(file, json.dumps(manifest, indent=2) + "\n")
    return run


def same_run(cfg: RunFlags, run: Path, old: dict, new: dict) -> dict:
    """The manifest to go on with; an error if the run in the folder is another one."""
    for field in ("script", "config", "inputs", "dtype"):
        before, now = ({field: m[field]} if isinstance(m[field], str) else canonical(m[field])
                       for m in (old, new))
        for name in now | before:
            if name not in FREE and canonical(before.get(name)) != canonical(now.get(name)):
                raise UserError(f"{run} holds a run with another {name} ({before.get(name)!r}, "
                                f"now {now.get(name)!r}); choose another --out or delete it")
    if changed := changed_code(old):
        if not cfg.other_code:
            raise UserError(f"{run} was made by other code: {', '.join(changed)} changed; delete "
                            f"{run} to run again, or go on all the same with --other_code")
        old["changed_code"] = sorted({*old.get("changed_code", []), *changed})
    return old


def start_clock(run: Path) -> None:
    """Note in clock.json when this stretch of the run began, and the seconds of those before it: a
    stretch ended when it wrote its last file.
    """
    file, spent = run / "clock.json", 0.0
    if file.exists():
        clock = json.loads(file.read_text(encoding="utf-8"))
        last = max(p.stat().st_mtime for p in run.rglob("*"))
        spent = clock["spent"] + max(0.0, last - clock["started"])
    write_text(file, json.dumps({"spent": spent, "started": time.time()}) + "\n")


def log(run: Path, **values) -> None:
    """Append one line to metrics.jsonl."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(values) + "\n")


def finish(run: Path, **values) -> None:
    """Write `done` last, with the seconds of all stretches, the peak memory of the last and the
    tokens trained on, and say where the results are.
    """
    metrics = run / "metrics.jsonl"
    lines = [row for _, row in read_lines(metrics)] if metrics.exists() else []
    clock = json.loads((run / "clock.json").read_text(encoding="utf-8"))
    seconds = clock["spent"] + time.time() - clock["started"]
    values |= {"supervised_tokens": sum(row.get("tokens", 0) for row in lines),
               "seconds": round(seconds, 1), "peak_gib": peak_memory_gib()}
    write_text(run / "done", json.dumps(values) + "\n")
    print(f"done in {seconds:.0f} s, peak memory {values['peak_gib']:.2f} GiB; results in {run}")


def is_done(run: Path) -> bool:
    """Whether a run of this folder came to its end (says so)."""
    if (run / "done").exists():
        print(f"{run} is complete already; delete it to run again")
    return (run / "done").exists()


def peak_memory_gib() -> float:
    """Peak memory: of the process on the CPU, of the allocator on a GPU."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return round(torch.cuda.max_memory_allocated() / 2**30, 2)
    try:
        import resource  # not on Windows
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 2)
