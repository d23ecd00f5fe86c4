"""python -m tests.kills [--kills 20] [--seed 0] [--disk]: kill -9 at random moments, half of them
in the middle of a write; the same command then ends with the very files of an unbroken run.

The three scripts and the recipe, on a small toy world. After every kill: no file is corrupt, and
nothing finished is made again. --disk: a full disk instead (a tmpfs where one may be mounted, else
a limit of the file size). One line a run; exit status 1 if anything failed.

    python -m tests.kills DOOM SCRIPT [flags]   the child: SCRIPT with its doom

PATH: dies when that file or folder has got its name; !PATH: right before. +S: dies S seconds after
its first write, +S~: within the next write then. full:PATH:N:BYTES: at the Nth write of PATH the
disk has BYTES left, limit:...: no file may grow beyond BYTES.
"""

import argparse
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import safetensors.torch
from safetensors import safe_open

from ease import records

ROOT = Path(__file__).resolve().parent.parent
# Measured, or not the run's doing (inputs: digests of adapters, which name their base's folder).
MEASURED = ("seconds", "peak_gib", "tokens_per_second", "p50", "p95", "git", "inputs")


# --------------------------------------------------------------------------------------- the child
def on_write(out: str, act) -> None:
    """act(path) right before everything that is written below the run folder."""
    kinds = {"open": 0, "os.mkdir": 0, "os.rename": 1, "os.remove": 0}

    def hook(event: str, args: tuple) -> None:
        if event in kinds and str(args[kinds[event]]).startswith(out):
            if event != "open" or args[2] & (os.O_WRONLY | os.O_RDWR):
                act(str(args[kinds[event]]))

    sys.addaudithook(hook)


def die_at(path: str) -> None:
    """Every write that counts ends in os.replace, so nothing need be watched from outside."""
    replace = os.replace

    def replace_and_die(source, target) -> None:
        here = str(target).endswith("/" + path.removeprefix("!"))
        if not (here and path.startswith("!")):
            replace(source, target)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace_and_die


def die_after(out: str, seconds: float, in_write: bool) -> None:
    """Die so long after the first write: at once, or when a part of the next file is written."""
    began = []

    def act(path: str) -> None:
        if not began:
            began.append(time.time())
            if not in_write:
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
                timer.daemon = True
                timer.start()

    on_write(out, act)
    if in_write:
        tear(lambda: began and time.time() - began[0] >= seconds)


def tear(due) -> None:
    """Once it is due, a write ends somewhere within the bytes, and so does the process."""
    put, save = records.put, safetensors.torch.save_file

    def torn_put(path, text: str, mode: str = "a") -> None:
        if due():
            put(path, text[: random.randrange(1, max(2, len(text)))], mode)
            os.kill(os.getpid(), signal.SIGKILL)
        put(path, text, mode)

    def torn_save(tensors, file, metadata) -> None:
        if due():  # as a library that writes in place would leave it
            data = safetensors.torch.save(tensors, metadata)
            Path(file).write_bytes(data[: random.randrange(len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        save(tensors, file, metadata)

    records.put, safetensors.torch.save_file = torn_put, torn_save


def fill_at(out: str, kind: str, path: str, nth: int, left: int) -> None:
    """The disk of the run folder is full, but for `left` bytes; the file `filler` is in the way."""
    seen = []

    def act(where: str) -> None:
        if path not in where or len(seen) == nth:
            return
        seen.append(where)
        if len(seen) < nth:
            return
        if kind == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (left, resource.RLIM_INFINITY))
            return
        disk = os.statvfs(out)
        with open(Path(out).parent / "filler", "wb") as f:
            f.write(bytes(max(0, disk.f_bavail * disk.f_frsize - left)))

    on_write(out, act)


def child(doom: str, script: str, flags: list[str]) -> None:
    out = flags[flags.index("--out") + 1]
    if doom.startswith("+"):
        die_after(out, float(doom.strip("+~")), doom.endswith("~"))
    elif ":" in doom:
        kind, path, nth, left = doom.split(":")
        fill_at(out, kind, path, int(nth), int(left))
    else:
        die_at(doom)
    sys.argv = [script, *flags]
    module = importlib.import_module(script.removesuffix(".py"))
    importlib.import_module("ease.run").command_line(module.main, module.Config)


def recipe(folder: str) -> None:
    """The commands of `python -m ease --fast`, the world in the same folder."""
    from ease.__main__ import Toy, run_all

    run_all(Toy(0, f"{folder}/world", f"{folder}/runs", True).commands())


# -------------------------------------------------------------------------------------- the judges
def without(value):
    """A JSON value without what is measured."""
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if not k.startswith(MEASURED)}
    return list(map(without, value)) if isinstance(value, list) else value


def contents(folder: Path) -> dict:
    """{file: what it holds} of everything under a folder, but for times and the folder's name. The
    two reports print times among their numbers, which summary.json holds too.
    """
    found = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        name, data = str(file.relative_to(folder)), file.read_bytes()
        data = data.replace(str(folder).encode(), b"")
        if file.name in ("clock.json", "lock", "report.md", "report.html"):
            data = b""
        elif file.name.startswith(("rows", "probe", "metrics", "tasks")):
            data = [row for line in data.splitlines() if (row := without(json.loads(line)))]
        elif file.name in ("summary.json", "done", "manifest.json"):
            data = without(json.loads(data))
        found[name] = data
    return found


def differences(a: Path, b: Path) -> list[str]:
    """The files in which two folders differ."""
    a, b = contents(a), contents(b)
    return sorted(name for name in a | b if a.get(name) != b.get(name))


def stages(folder: Path) -> dict[str, tuple]:
    """{file: (inode, time of change)} of what must not be made again; the kept rows."""
    names = ("traces.jsonl", "categories.jsonl", "probe*.jsonl", "rows-*.jsonl", "tasks-*.jsonl",
             "done", "world.json")
    files = [p for name in names for p in folder.rglob(name) if ".part/" not in str(p)]
    found = {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
    for kept in folder.rglob("*.kept"):
        found[str(kept)] = tuple(kept.read_bytes().split(b"\n")[:-1])
    for checkpoints in folder.rglob("checkpoints"):
        steps = [int(p.name[5:]) for p in checkpoints.glob("step-*")]
        found[str(checkpoints)] = (max(steps, default=0),)
    return found


def lost(before: dict[str, tuple], now: dict[str, tuple]) -> list[str]:
    """What was finished before a kill and was made again, or is gone, after the next attempt."""
    wrong = []
    for name, was in before.items():
        here = now.get(name)
        if name.endswith(".kept"):  # whole rows stay until the run is done
            fine = here is None or here[: len(was)] == was
        elif name.endswith("checkpoints"):
            fine = here is not None and here >= was
        else:
            fine = here == was
        if not fine:
            wrong.append(name)
    return wrong


def corrupt(folder: Path) -> list[str]:
    """The files under their own names that do not parse."""
    wrong = []
    for file in folder.rglob("*"):
        if file.suffix not in (".json", ".jsonl", ".safetensors") or "part" in str(file):
            continue
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as f:
                    for name in f.keys():
                        f.get_tensor(name)
            elif file.suffix == ".json":
                json.loads(file.read_text())
            else:
                lines = file.read_text().split("\n")
                for line in lines[:-1] if file.name == "metrics.jsonl" else lines:
                    json.loads(line or "0")
        except Exception as e:
            wrong.append(f"{file}: {e}")
    return wrong


def torn(folder: Path) -> set[tuple]:
    """The parts of files, and the half rows, that kills have left: (name, time)."""
    parts = [p for p in folder.rglob("*") if p.name == "part" or p.suffix in (".part", ".tmp")]
    for name in ("*.kept", "metrics.jsonl"):
        parts += [p for p in folder.rglob(name) if p.read_bytes()[-1:] not in (b"\n", b"")]
    return {(str(p), p.stat().st_mtime_ns) for p in parts}


# -------------------------------------------------------------------------------------- the parent
def start(command: list[str], wait: float | None = None) -> tuple[int, str, float]:
    """Run it in a session of its own, killed as a whole after `wait` seconds: (exit status,
    stderr, seconds).
    """
    began = time.time()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=errors,
                                   stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        errors.seek(0)
        return process.returncode, errors.read(), time.time() - began


def batter(name: str, command: list[str], folder: Path, whole: Path, seconds: float, kills: int,
           rng: random.Random, world: float = 0.0) -> bool:
    """`kills` kills of one command, each at a moment drawn such that together they lie over its
    whole length; a run that ends too soon for its kill is compared, and the next one begins. The
    recipe's first `world` seconds cannot be resumed: one kill in them, the others behind.
    """
    done, rounds, broken, wrong = 0, 0, 0, []
    script = command[0].endswith(".py")  # the recipe's own children cannot be reached
    before, parts, began = {}, set(), time.time()

    def ended() -> list[str]:
        return lost(before, stages(folder)) + differences(whole, folder)

    while done < kills:
        wait = 2 * rng.random() * (seconds - world) / (kills + 1)
        if world and not (folder / "world").exists():
            wait = world + wait if done else world * rng.random()
        doom = f"+{wait:.3f}" + "~" * (done % 2)
        words = ["-m", "tests.kills", doom, *command] if script else command
        status, errors, _ = start(words, None if script else wait)
        if status == 0:
            rounds, wrong = rounds + 1, wrong + ended()
            shutil.rmtree(folder), before.clear()
            continue
        if status != -signal.SIGKILL:
            wrong.append(f"exit status {status}: {errors.strip().splitlines()[-1:]}")
            break
        done += 1
        broken += bool(torn(folder) - parts)
        parts = torn(folder)
        wrong += corrupt(folder)
        now = stages(folder)
        wrong += lost(before, now)
        before = now
    status, errors, _ = start(command)
    wrong += ended() if status == 0 else [f"exit status {status}: {errors[-300:]}"]
    print(f"{name:10} {done:3} kills, {broken} in the middle of a write, {rounds + 1} runs ended, "
          f"{time.time() - began:.0f} s (unbroken {seconds:.0f} s): "
          f"{'WRONG: ' + '; '.join(wrong) if wrong else 'as unbroken'}", flush=True)
    return not wrong


def scripts(world: Path, runs: Path) -> dict[str, list[str]]:
    """The command of every script, without --out; `runs` has the adapters of the recipe."""
    common = (f"--teacher {world}/teacher --policies {world}/policies.json --judge target "
              "--max_new_tokens 40 --batch_size 8 --lr 1e-3 --dtype float32 --steps 12 "
              "--save_every 3 --held_out 4 --merged")
    return {name: line.split() for name, line in {
        "distill": f"distill.py --model {world}/base --prompts {world}/prompts.jsonl {common}",
        "train": f"train.py --model {world}/base --init {runs}/phase1/adapter "
                 f"--diagnostic {world}/diagnostic.jsonl --refusals {world}/refusals.jsonl "
                 f"--general {world}/general.jsonl --probe_tokens 30 --probe_samples 1 {common}",
        "evaluate": f"evaluate.py --systems base={world}/base "
                    f"ease={world}/base+{runs}/ease/adapter --prompts {world}/test.jsonl --judge "
                    "target xstest --max_new_tokens 40 --base_system base --gate_sweep ease "
                    "--latency 3 --dtype float32"}.items()}


def unbroken(command: list[str], out: Path) -> float:
    """Run it to its end; the seconds it took."""
    status, errors, seconds = start(command)
    assert status == 0, f"{out}: {errors[-1000:]}"
    return seconds


# ------------------------------------------------------------------------------------ a full disk
# what is written, the script, a kill that leaves a previous file behind, the write that finds no
# space, the bytes left, what the one line names, what must stay as it was
FULL = {
    "a checkpoint": ("distill", "", "checkpoints/part/part:4", 20_000, "trainer.safetensors",
                     "checkpoints/step-3"),
    "kept rows": ("evaluate", "", "rows-ease.kept:1", 4096, "rows-ease.kept", "rows-base.jsonl"),
    "rows": ("evaluate", "summary.json", "/rows.jsonl.part:1", 4096, "rows.jsonl.part",
             "rows.jsonl"),
    "the merged model": ("train", "!done", "model/part:1", 20_000, "model/model.safetensors",
                         "model"),
}


def full_disk(name: str, command: list[str], folder: Path, whole: Path, kind: str) -> list[str]:
    """What is wrong: one line that names the file, exit status 2, the previous file as it was, and
    the same command goes on after space is made.
    """
    _, death, place, left, named, kept = FULL[name]
    out, wrong = folder / "run", []
    command = [*command, "--out", str(out)]
    if death:
        start(["-m", "tests.kills", death, *command])
    doom = f"{kind}:{place}:{left}"
    before = contents(out / kept) if (out / kept).is_dir() else {}
    data = (out / kept).read_bytes() if (out / kept).is_file() else b""
    status, errors, _ = start(["-m", "tests.kills", doom, *command])
    said = [line for line in errors.replace("\r", "\n").split("\n") if "rror" in line]
    if status != 2 or len(said) != 1 or not said[0].startswith("error: ") or named not in said[0]:
        wrong.append(f"exit status {status}, {said or errors[-300:]}")
    if not (out / kept).exists() or data and data != (out / kept).read_bytes() \
            or before and before != contents(out / kept):
        wrong.append(f"{kept} is not as it was")
    wrong += corrupt(out)
    (folder / "filler").unlink(missing_ok=True)
    status, errors, _ = start(command)
    wrong += differences(whole, out) if status == 0 else [errors[-300:]]
    print(f"{kind} in {name:16}: {said[0] if said else 'nothing said'}\n    "
          f"{'WRONG: ' + '; '.join(wrong) if wrong else f'{kept} as it was; then as unbroken'}",
          flush=True)
    return wrong


def disk(commands: dict[str, list[str]], folder: Path) -> bool:
    """Every case of FULL on a tmpfs of 64 MiB, or with a limit of the file size."""
    place, wrong = folder / "disk", []
    place.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, check=False, capture_output=True).returncode == 0
    kinds = ("full", "limit") if mounted else ("limit",)
    try:
        for kind in kinds:
            for name in FULL:
                command = commands[FULL[name][0]]
                wrong += full_disk(name, command, place, folder / f"whole-{FULL[name][0]}", kind)
                shutil.rmtree(place / "run")
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=False)
    print(f"{len(kinds) * len(FULL)} full disks, {'a tmpfs and ' * mounted}a limit of file size")
    return not wrong


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", action="store_true")
    parser.add_argument("--work", default="", help="a folder to keep (default: one that goes)")
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work or temporary).resolve()
        whole = work / "whole-recipe"
        line = ["-m", "tests.kills", "recipe"]
        took = {"recipe": unbroken([*line, str(whole)], whole)}
        built = (whole / "world/world.json").stat().st_mtime - began
        commands, fine = scripts(whole / "world", whole / "runs"), []
        for name, command in commands.items():
            out = work / f"whole-{name}"
            took[name] = unbroken([*command, "--out", str(out)], out)
            if not args.disk:  # the same command once more: the same bytes
                unbroken([*command, "--out", f"{work}/again-{name}"], out)
                wrong = differences(out, work / f"again-{name}")
                print(f"{name:10} twice: {wrong or 'the same files'}", flush=True)
                fine.append(not wrong)
        if args.disk:
            fine.append(disk(commands, work))
        else:
            shares = [(args.kills + i) // 4 for i in range(4)]
            for (name, seconds), kills in zip(took.items(), shares, strict=True):
                folder = work / f"parts-{name}"
                command = ([*line, str(folder)] if name == "recipe" else
                           [*commands[name], "--out", str(folder)])
                fine.append(batter(name, command, folder, work / f"whole-{name}", seconds, kills,
                                   rng, built if name == "recipe" else 0.0))
            print(f"{args.kills} kills, {'all as unbroken' if all(fine) else 'WRONG'}, "
                  f"{time.time() - began:.0f} s")
    return 0 if all(fine) else 1


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["recipe", folder]:
            recipe(folder)
        case [doom, script, *flags] if script.endswith(".py"):
            child(doom, script, flags)
        case _:
            sys.exit(main())
