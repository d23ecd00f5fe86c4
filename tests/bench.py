"""Speed and memory beside transformers + peft, on the same token ids (pytest does not collect it):

    python -m tests.bench train|generate|skew|load|memory|floors|growth --model DIR
    python -m tests.bench train --shape qwen2.5-0.5b --device cuda --dtype bfloat16

Every measurement is a process of its own; the two sides take turns, round after round, and what is
compared is the ratio within a round. A line per measurement (JSON), then a table: medians, the
ratio and its range. `quiet` is false where other processes kept the cores busy meanwhile: with two
threads on two cores one foreign process slows torch 2 to 40 times, so such rounds are left out
where there are others.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STARTED = time.perf_counter()  # before torch is imported: loading counts from here

from ease.run import LORA_TARGETS  # noqa: E402

SHAPES = {
    "qwen2.5-0.5b": dict(hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
                         num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                         num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True)}
QWEN = dict(model_type="qwen2", architectures=["Qwen2ForCausalLM"], vocab_size=151936,
            max_position_embeddings=32768, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu",
            bos_token_id=0, eos_token_id=1)
VARIANTS = {"train": ["random", "grouped"], "generate": ["1", "8", "32"], "skew": ["16"],
            "load": ["model"], "memory": ["plain", "checkpointed"], "floors": ["matmul"],
            "growth": ["train", "generate"]}
UNITS = {"train": "useful tok/s", "generate": "tok/s", "skew": "useful tok/s", "load": "s",
         "memory": "peak MB", "floors": "tok/s", "growth": "times 1x"}


# ------------------------------------------------------------------------------------ the work
def token_rows(seed: int, lengths: list[int]) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(5, 40_000) for _ in range(n)] for n in lengths]


def training_rows(cfg: dict) -> list[list[int]]:
    """cfg["rows"] rows of 40 to 400 tokens, or of cfg["length"] each."""
    rng = random.Random(7)
    lengths = [rng.randint(40, 400) for _ in range(cfg["rows"])]
    rows = token_rows(7, [cfg["length"]] * cfg["rows"] if cfg["length"] else lengths)
    return sorted(rows, key=len) if cfg["variant"] == "grouped" else rows


def prompts_and_limits(count: int) -> tuple[list[list[int]], list[int]]:
    """Prompts of 16 to 200 tokens; for `skew` most answers stop early and a few run long."""
    lengths, limits = random.Random(8), random.Random(9)
    prompts = token_rows(8, [lengths.randint(16, 200) for _ in range(count)])
    return prompts, [min(192, max(4, round(limits.expovariate(1 / 48)))) for _ in range(count)]


# ------------------------------------------------------------------------------------- the sides
def our_model(cfg: dict, trained: bool):
    from ease.loading import load_model
    from ease.lora import add_lora

    model = load_model(cfg["model"], "", dtype_of(cfg), cfg["device"])
    if trained:
        add_lora(model, 16, 32.0, list(LORA_TARGETS))
        model.gradient_checkpointing = cfg["variant"] == "checkpointed"
    return model


def their_model(cfg: dict, trained: bool):
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(cfg["model"], dtype=dtype_of(cfg))
    model = model.to(cfg["device"])
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 2
    if trained:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM",
                                                 target_modules=list(LORA_TARGETS)))
        model.train()
        if cfg["variant"] == "checkpointed":
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable()
    return model


def dtype_of(cfg: dict):
    import torch

    return getattr(torch, cfg["dtype"])


def our_loss(model, rows: list[list[int]], device: str):
    import torch

    from ease.losses import cross_entropy, in_chunks

    ids = torch.tensor([t for r in rows for t in r[:-1]], device=device)
    targets = torch.tensor([t for r in rows for t in r[1:]], device=device)
    hidden = model.hidden(ids, [len(r) - 1 for r in rows])
    losses = in_chunks(lambda h, y: cross_entropy(model.logits(h), y), hidden, targets)
    return losses.sum() / len(targets)


def their_loss(model, rows: list[list[int]], device: str):
    import torch

    T = max(map(len, rows))
    ids = torch.tensor([r + [2] * (T - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (T - len(r)) for r in rows], device=device)
    labels = ids.masked_fill(mask == 0, -100)
    return model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss


def train(cfg: dict, side: str) -> dict:
    """LoRA (rank 16, seven matrices), AdamW, 4 rows a step; useful tokens a second and the loss."""
    import torch

    model = (our_model if side == "ours" else their_model)(cfg, True)
    loss_of = our_loss if side == "ours" else their_loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    rows = training_rows(cfg)
    batches = [rows[i : i + 4] for i in range(0, len(rows), 4)]
    losses = []
    for step, batch in enumerate([[r[:64] for r in batches[0]], *batches]):  # the first: warm-up
        if step == 1:
            start = clock(cfg)
        loss = loss_of(model, batch, cfg["device"])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    tokens = sum(map(len, rows))
    return {"value": tokens / (clock(cfg) - start), "last_loss": losses[-1]}


def generate(cfg: dict, side: str) -> dict:
    """Greedy, 128 new tokens each (64 prompts drawn, the first `variant` of them used)."""
    batch, new = int(cfg["variant"]), 128
    prompts = prompts_and_limits(64)[0][:batch]
    run = our_generator(cfg, new) if side == "ours" else their_generator(cfg, new)
    run(prompts[:1], [2])
    start = clock(cfg)
    run(prompts, [new] * batch)
    return {"value": batch * new / (clock(cfg) - start)}


def skew(cfg: dict, side: str) -> dict:
    """64 prompts through 16 slots, each with its own length; theirs in batches of 16."""
    prompts, limits = prompts_and_limits(64)
    run = our_generator(cfg, 192) if side == "ours" else their_generator(cfg, 192)
    run(prompts[:1], [2])
    start = clock(cfg)
    run(prompts, limits)
    return {"value": sum(limits) / (clock(cfg) - start)}


def our_generator(cfg: dict, most: int):
    import ease.generate as module

    model, write_token = our_model(cfg, False), module.write_token

    def run(prompts: list[list[int]], limits: list[int]) -> None:
        limit_of = {tuple(p): n for p, n in zip(prompts, limits)}

        def limited(rows, *rest):  # a row ends where it would have said its end token
            write_token(rows, *rest)
            for row in rows:
                row.done = row.done or len(row.out.ids) >= limit_of[tuple(row.prompt)]

        module.write_token = limited
        slots = {"skew": 16, "growth": 8}.get(cfg["work"], len(prompts))
        found = module.generate(model, prompts, module.Sampling(most), frozenset(), slots=slots)
        assert [len(g.ids) for g in found] == limits

    return run


def their_generator(cfg: dict, most: int):
    import torch
    from transformers import StoppingCriteriaList

    model = their_model(cfg, False).eval()

    def run(prompts: list[list[int]], limits: list[int]) -> None:
        size = 16 if cfg["work"] == "skew" else len(prompts)
        for i in range(0, len(prompts), size):
            rows, wanted = prompts[i : i + size], torch.tensor(limits[i : i + size])
            T = max(map(len, rows))
            ids = torch.tensor([[2] * (T - len(r)) + r for r in rows], device=cfg["device"])
            mask = torch.tensor([[0] * (T - len(r)) + [1] * len(r) for r in rows],
                                device=cfg["device"])

            def done(ids, scores, **_):
                return (ids.shape[1] - T >= wanted).to(ids.device)

            model.generate(input_ids=ids, attention_mask=mask, do_sample=False,
                           max_new_tokens=int(wanted.max()),
                           stopping_criteria=StoppingCriteriaList([done]))

    return run


def load(cfg: dict, side: str) -> dict:
    """Import, tokenizer, model, one forward pass: seconds from the start of the process."""
    import torch

    if side == "ours":
        from ease.loading import load_tokenizer

        load_tokenizer(cfg["model"])
        model = our_model(cfg, False)
    else:
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(cfg["model"])
        model = their_model(cfg, False)
    with torch.no_grad():
        model(torch.tensor([[5, 6, 7]], device=cfg["device"]))
    return {"value": clock(cfg) - STARTED}


def memory(cfg: dict, side: str) -> dict:
    """Peak memory of the training work: of the process, or of the allocator on a GPU."""
    return {"value": 0, "tok_s": train(cfg, side)["value"]}


def floors(cfg: dict, side: str) -> dict:
    """What the matrix products of training alone allow: forward and the input's gradient (none of a
    frozen weight) of 600 tokens. theirs: of decoding 32 rows, forward.
    """
    import torch

    model = our_model(cfg | {"variant": ""}, False)
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Linear)]
    tokens, backward = (600, True) if side == "ours" else (32, False)
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1]).to(w) for w in weights}
    outputs = {w.shape[0]: torch.randn(tokens, w.shape[0]).to(w) for w in weights}
    times = []
    with torch.no_grad():
        for _ in range(5):
            start = clock(cfg)
            for w in weights:
                torch.nn.functional.linear(inputs[w.shape[1]], w)
                if backward:
                    outputs[w.shape[0]] @ w
            times.append(clock(cfg) - start)
    return {"value": tokens / statistics.median(times)}


def growth(cfg: dict, side: str) -> dict:
    """Seconds of 1x, 2x and 4x the rows, and how far they are from a line through them."""
    import numpy as np

    sizes, seconds = [8, 16, 32], []
    run = our_generator(cfg, 64) if cfg["variant"] == "generate" else None
    for n in sizes:
        if cfg["variant"] == "train":
            rows = training_rows(cfg | {"rows": n, "variant": "random"})
            seconds.append(sum(map(len, rows)) / train(cfg | {"rows": n}, side)["value"])
        else:
            prompts = prompts_and_limits(64)[0][:n]
            start = clock(cfg)
            run(prompts, [64] * n)
            seconds.append(clock(cfg) - start)
    if cfg["variant"] == "train":  # per token: the rows' lengths differ
        sizes = [sum(map(len, training_rows(cfg | {"rows": n}))) for n in sizes]
    slope, intercept = np.polyfit(sizes, seconds, 1)
    off = max(abs(slope * n + intercept - s) / s for n, s in zip(sizes, seconds))
    return {"value": seconds[2] / seconds[0], "sizes": sizes, "seconds": seconds,
            "fit": f"{intercept:.2f} s + {1000 * slope:.2f} ms each, off by at most {off:.1%}"}


def clock(cfg: dict) -> float:
    if cfg["device"].startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------------------------- the processes
def child(cfg: dict) -> None:
    import torch

    torch.manual_seed(0)
    with open("/proc/stat") as f:
        before = busy(f.readline())
    began, own = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    found = globals()[cfg["work"]](cfg, cfg["side"])
    with open("/proc/stat") as f:
        spent = busy(f.readline()) - before
    own = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - own
    foreign = (spent - own) / (time.perf_counter() - began)  # cores that others kept busy
    peak = (torch.cuda.max_memory_allocated() / 2**20 if cfg["device"].startswith("cuda")
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    found["peak_mb"] = round(peak)
    if cfg["work"] == "memory":
        found["value"] = peak
    print(json.dumps(found | {"quiet": foreign < 0.15, "foreign_cores": round(foreign, 2)}))


def busy(line: str) -> float:
    user, nice, system, _, _, irq, soft = map(int, line.split()[1:8])
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def wait_until_quiet(limit: float) -> None:
    """Until less than a tenth of a core is busy, at most `limit` seconds."""
    end = time.time() + limit
    while time.time() < end:
        with open("/proc/stat") as f:
            before = busy(f.readline())
        time.sleep(1)
        with open("/proc/stat") as f:
            if busy(f.readline()) - before < 0.1:
                return


def measure(cfg: dict, wait: float) -> dict:
    wait_until_quiet(wait)
    done = subprocess.run([sys.executable, "-m", "tests.bench", "--child", json.dumps(cfg)],
                          capture_output=True, text=True)
    if done.returncode:
        return cfg | {"error": done.stderr.strip().rpartition("\n")[2][-300:]}
    return cfg | json.loads(done.stdout.strip().rpartition("\n")[2])


def random_model(shape: str) -> str:
    """A folder with the shape of a real model and random weights."""
    import torch
    from safetensors.torch import save_file

    from ease.config import ModelConfig
    from ease.model import CausalLM

    folder, raw = Path(tempfile.mkdtemp()), QWEN | SHAPES[shape]
    (folder / "config.json").write_text(json.dumps(raw))
    with torch.device("meta"):
        model = CausalLM(ModelConfig.from_json(raw, shape))
    generator = torch.Generator().manual_seed(0)
    weights = {n: (torch.randn(p.shape, generator=generator) * 0.02).bfloat16()
               if p.dim() > 1 or n.endswith("bias") else torch.ones(p.shape).bfloat16()
               for n, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def table(lines: list[dict]) -> str:
    """Medians, ratio ours / theirs and its range over the rounds."""
    out = ["| work | dtype | ours | transformers + peft | ratio (range) | peak MB |",
           "|---|---|---|---|---|---|"]
    for work, variant, dtype in dict.fromkeys((r["work"], r["variant"], r["dtype"]) for r in lines):
        found = [r for r in lines if (r["work"], r["variant"], r["dtype"]) ==
                 (work, variant, dtype) and "value" in r]
        quiet = [r["round"] for r in found if r["quiet"]]
        good = [n for n in set(quiet) if quiet.count(n) == 2]
        pairs = {}
        for r in found:
            if r["round"] in good or not good:
                pairs.setdefault(r["round"], {})[r["side"]] = r
        pairs = [p for p in pairs.values() if len(p) == 2]
        if not pairs:
            out.append(f"| {work} {variant} | {dtype} | no round of both sides | | | |")
            continue
        ours, theirs = ([p[s]["value"] for p in pairs] for s in ("ours", "theirs"))
        ratios = [a / b for a, b in zip(ours, theirs)]
        peaks = "{:.0f} / {:.0f}".format(*(statistics.median(p[s]["peak_mb"] for p in pairs)
                                           for s in ("ours", "theirs")))
        out.append(
            f"| {work} {variant}, {UNITS[work]} | {dtype} | {statistics.median(ours):.4g} | "
            f"{statistics.median(theirs):.4g} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f}-{max(ratios):.2f}){'' if good else ', busy'} | {peaks} |")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", nargs="+", choices=list(VARIANTS))
    parser.add_argument("--model", help="a model folder")
    parser.add_argument("--shape", choices=list(SHAPES), help="random weights of this shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variant", nargs="+", help="only these (default: all of the work)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=40, help="training rows")
    parser.add_argument("--length", type=int, default=0, help="tokens of every training row")
    parser.add_argument("--wait", type=float, default=60, help="at most so many seconds")
    args = parser.parse_args()
    if bool(args.model) == bool(args.shape):
        parser.error("give --model DIR or --shape NAME")
    model, lines = args.model or random_model(args.shape), []
    for n in range(args.rounds):
        for work in args.work:
            for variant in args.variant or VARIANTS[work]:
                for dtype in args.dtype:
                    sides = ("ours", "theirs") if n % 2 == 0 else ("theirs", "ours")
                    for side in sides if work != "growth" else ["ours"]:
                        cfg = {"work": work, "variant": variant, "dtype": dtype, "side": side,
                               "round": n, "model": model, "device": args.device,
                               "rows": args.rows, "length": args.length}
                        lines.append(measure(cfg, args.wait))
                        print(json.dumps(lines[-1]), flush=True)
    print(table(lines))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(json.loads(sys.argv[2]))
    else:
        main()
