"""What every script needs and no paper describes: flags, the run folder, the optimizer step, exact resume."""

import argparse
import dataclasses
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ease.records import Record, UserError, read_jsonl, read_lines, write_jsonl, write_text


AT_MOST_1, ABOVE_0 = {"kl_weight", "top_p", "warmup"}, {"top_p", "kl_temperature"}
AT_LEAST_1 = {"batch_size", "batch_tokens", "slots", "save_every", "max_new_tokens", "probe_tokens", "attempts", "max_length"}


def parse_config(cls: type, argv: list[str] | None = None, description: str = ""):
    """A dataclass -> command-line flags of the same names -> an instance. The comment behind a field is its help text.

    str, int, float and bool fields take one value (float | None: none unless given), list[str] fields one or more, Literal
    fields one of theirs. A field without default is required; an unknown flag and a number out of range are errors.
    """
    comments = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(cls), re.MULTILINE))
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        default = None if required else f.default if f.default is not dataclasses.MISSING else f.default_factory()
        options = {"help": comments.get(f.name, "").replace("%", "%%") + ("" if required else f" [{default}]".replace("%", "%%"))}
        if f.type is bool:
            options |= {"type": boolean, "metavar": "true|false"}
        elif typing.get_origin(f.type) is typing.Literal:
            options |= {"choices": typing.get_args(f.type)}
        elif typing.get_origin(f.type) is list:
            options |= {"nargs": "+", "metavar": f.name.upper()}
        else:
            options |= {"type": float if f.type == float | None else f.type, "metavar": f.name.upper()}
        parser.add_argument(f"--{f.name}", default=default, required=required, **options)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if not isinstance(value, int | float):
            continue
        least = 1 if name in AT_LEAST_1 else 0
        if not value >= least:  # nor is nan
            parser.error(f"argument --{name}: {value} is below {least}")
        if name in ABOVE_0 and not value or name in AT_MOST_1 and value > 1:
            parser.error(f"argument --{name}: {value} is {'above 1' if value else 'not above 0'}")
    return cls(**values)


def boolean(text: str) -> bool:
    """"true" or "false"; bool("false") would be True."""
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text == "true"


def command_line(main: Callable, cls: type) -> None:
    """Run main(config) for the flags given; a mistake that the user can mend is one line on stderr and exit status 2."""
    cfg = parse_config(cls, description=sys.modules[main.__module__].__doc__.strip().split("\n")[0])
    try:
        main(cfg)
    except UserError as e:
        sys.exit(fail(str(e)))
    except torch.cuda.OutOfMemoryError:
        sys.exit(fail("the GPU is out of memory; lower --batch_tokens (training) or --slots (generation)"))
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


def sha256(path: str | Path) -> str:
    """Hash of a file; of a model or adapter folder: of all that decides what it says (weights, JSON, chat template)."""
    path, digest = Path(path), hashlib.sha256()
    for file in [path] if path.is_file() else sorted(f for end in ("json", "jinja", "safetensors") for f in path.glob(f"*.{end}")):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def git_hash() -> str:
    """The commit of the code that runs, "" where there is none."""
    here = Path(__file__).parent
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here, check=False)
    return found.stdout.strip()


def open_run(cfg, inputs: list[str], device: str, dtype: str) -> Path:
    """Make the run folder cfg.out and write manifest.json first; or go on with a run that was stopped.

    The folder of another configuration is never written to: the error names the field that differs.
    """
    for p in inputs:
        if not Path(p).exists():
            raise UserError(f"{p}: no such file or folder")
    out, config = Path(cfg.out), dataclasses.asdict(cfg)
    manifest = {
        "script": Path(inspect.getsourcefile(type(cfg))).name, "config": config, "device": device, "dtype": dtype,
        "inputs": {str(p): sha256(p) for p in inputs}, "git": git_hash(), "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "safetensors", "tokenizers", "numpy")},
    }
    manifest = json.loads(json.dumps(manifest))  # tuples -> lists, as the file has them
    file = out / "manifest.json"
    if file.exists():
        old = json.loads(file.read_text(encoding="utf-8"))
        for part in ("script", "config", "inputs", "dtype"):
            before, now = ({part: d[part]} if isinstance(d[part], str) else d[part] for d in (old, manifest))
            changed = [k for k in now | before if before.get(k) != now.get(k)]
            if changed:
                raise UserError(f"{out} holds a run with another {changed[0]} ({before.get(changed[0])!r}, now "
                                f"{now.get(changed[0])!r}); choose another --out or delete the folder")
        return out
    write_text(file, json.dumps(manifest, indent=2) + "\n")
    return out


def stage(path: Path, make: Callable[[], list[Record]]) -> list[Record]:
    """One step of the method: its rows stand in a file. A file that is there is complete (writes are atomic): it is read."""
    if path.exists():
        return read_jsonl(path) if path.stat().st_size else []
    records = make()
    write_jsonl(path, records)
    return records


def log(run: Path, **values) -> None:
    """Append one line to metrics.jsonl."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(values) + "\n")


def finish(run: Path, started: float, **values) -> None:
    """Write `done` last, with the seconds, the peak memory and the tokens trained on, and say where the results are."""
    metrics = [row for _, row in read_lines(run / "metrics.jsonl")] if (run / "metrics.jsonl").exists() else []
    values["supervised_tokens"] = sum(row.get("tokens", 0) for row in metrics)
    write_text(run / "done", json.dumps({**values, "seconds": round(time.time() - started, 1), "peak_gib": peak_memory_gib()}) + "\n")
    print(f"done in {time.time() - started:.0f} s, peak memory {peak_memory_gib():.2f} GiB; results in {run}")


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


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then a cosine to zero. step counts from 0."""
    ramp = max(1, round(warmup * steps))
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def make_optimizer(model: nn.Module, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over what is trainable; matrices decay, norms and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.999))


def optimizer_step(optimizer: torch.optim.Optimizer, lr: float, clip: float) -> float:
    """Clip the gradient's norm (0: leave it), set the learning rate, step, clear. Returns the norm before clipping."""
    parameters = [p for g in optimizer.param_groups for p in g["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf).item()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def stop_if_not_finite(loss: float, step: int, ids: list[str]) -> None:
    """A NaN or infinite loss ends the run before the step is taken; the last checkpoint stays."""
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss} at step {step}; lower --lr, or look at the rows {', '.join(ids[:8])}")


def save_state(run: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, save_weights: Callable[[Path], None]) -> None:
    """checkpoints/step-N/: the weights (by save_weights), and trainer.safetensors: optimizer state by parameter name, the
    random state as uint8, the step in the metadata. Written beside and renamed: a folder that is there is complete.
    """
    folder, part = run / "checkpoints" / f"step-{step}", run / "checkpoints" / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save_weights(part)
    state = {f"{name}/{key}": value.detach().cpu().contiguous() for name, p in model.named_parameters() if p in optimizer.state
             for key, value in optimizer.state[p].items()}
    save_file({**state, "rng": torch.get_rng_state()}, part / "trainer.safetensors", metadata={"step": str(step)})
    os.replace(part, folder)
    for old in newest_first(run)[1:]:
        shutil.rmtree(old)


def newest_first(run: Path) -> list[Path]:
    """The complete checkpoints of a run."""
    return sorted((run / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]), reverse=True)


def resume(run: Path, model: nn.Module, optimizer: torch.optim.Optimizer, load_weights: Callable[[Path], None]) -> int:
    """The step to start at: that of the newest complete checkpoint, restored, or 0 with an empty log."""
    if checkpoints := newest_first(run):
        load_weights(checkpoints[0])
        return load_state(checkpoints[0], model, optimizer)
    (run / "metrics.jsonl").unlink(missing_ok=True)
    return 0


def load_state(checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Restore optimizer and random state; returns the step to go on with and drops the log lines written after it."""
    with safe_open(checkpoint / "trainer.safetensors", framework="pt") as f:
        step, tensors = int(f.metadata()["step"]), {k: f.get_tensor(k) for k in f.keys()}
    torch.set_rng_state(tensors.pop("rng"))
    parameters = dict(model.named_parameters())
    for name, value in tensors.items():
        parameter, key = name.rsplit("/", 1)
        # AdamW keeps its step count on the CPU
        optimizer.state[parameters[parameter]][key] = value if key == "step" else value.to(parameters[parameter].device)
    metrics = checkpoint.parent.parent / "metrics.jsonl"
    if metrics.exists():
        lines = [line for line in metrics.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
        write_jsonl(metrics, [row for row in map(json.loads, lines) if row.get("step", 0) < step])
    return step
