"""Phase 2, safety reasoning boundary calibration, and the two baselines (arXiv 2511.06512).

    python train.py --method ease --model M_s --init PHASE1/adapter --teacher M_t --diagnostic FILE --refusals FILE --general FILE --out DIR

1. probe: D_diag -> responses of the ORIGINAL M_s -> verdicts        (generate, judge)
2. D_vuln, the vulnerable region: the prompts answered unsafely      (method.select_region)
3. traces of D_vuln (and of the benign look-alikes) -> D_reason      (traces.rejection_sample or join_traces)
4. D_direct: plain harmful -> refusal, general tasks -> answer       (direct_records, method.mix)
5. SFT of M_reason on D_reason + D_direct -> the adaptive model      (the loop below; losses.gated_cross_entropy)

--method refusal: every harmful prompt -> direct refusal, all else -> direct answer. --method deliberative: a trace on every
prompt. Both start at M_s, see phase 1's prompts as well (--prompts) and should get the steps of both phases (--steps).
"""

import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ease.batching import batches, collate, encode_records, preview
from ease.method import ANSWER, GATE, REASONING, UNCLOSED, filler, mix, select_region, split_reasoning
from ease.generate import generate
from ease.judge import judge_model, load_judge
from ease.loading import (base_and_adapter, load_model, load_tokenizer, load_trainable, load_weights, pick_device, pick_dtype,
                          resolve, save_model, save_weights)
from ease.lora import merge_lora
from ease.losses import gated_cross_entropy, sum_over_chunks
from ease.model import CausalLM
from ease.readers import read_named, read_records
from ease.records import Record, UserError, read_lines, unique, write_jsonl, write_text
from ease.report import region_report
from ease.run import (command_line, finish, is_done, learning_rate, log, make_optimizer, open_run, optimizer_step, resume, save_state, stage, stop_if_not_finite)
from ease.scoring import SAFE, UNPARSED, is_refusal
from ease.traces import check_categories, join_traces, teacher_traces


@dataclass
class Config:
    """The flags of phase 2 and the baselines."""

    model: str  # M_s, the ORIGINAL small model (a Hugging Face folder)
    diagnostic: str  # D_diag: adversarial prompts, harmful and benign
    refusals: str  # plainly harmful prompts with a direct refusal each
    general: str  # general tasks with direct answers
    out: str  # the run folder; the same command goes on with a stopped run
    method: Literal["ease", "refusal", "deliberative"] = "ease"  # the paper's method, or one of its two baselines
    init: str = ""  # start at phase 1's adapter (it keeps its rank, alpha and targets) or a model folder; not for the baselines
    prompts: str = ""  # phase 1's prompts, for the baselines: then every method has seen the same prompts
    teacher: str = ""  # M_t, writes the traces
    traces: str = ""  # stored traces instead, joined on the underlying request (group, else id)
    policies: str = ""  # JSON with the teacher's instruction and policy texts; default: policies.py
    categories: Literal["record", "teacher"] = "record"  # of the prompts to be traced: as they stand there, or asked of the teacher
    judge: str = "xstest"  # verdicts on the probe and on the traces: a guard model, target, or a refusal list
    # the region (paper: phase 2, step 1)
    region: Literal["vulnerable", "random", "all"] = "vulnerable"  # which harmful prompts get a trace; the others are controls
    probe: Literal["base", "phase1"] = "base"  # whose failures: the original model's, as in the paper, or --init's
    lookalikes: Literal["reason", "direct", "drop"] = "reason"  # benign adversarial prompts of D_diag; reason is our choice
    probe_samples: int = 0  # further responses at --temperature: region.md shows how the region moves; what is trained on stays greedy
    probe_tokens: int = 512  # longest answer of the probe (official: 512, T 0.7; ours is greedy, so that it is repeatable)
    # the teacher's sampling (official: T 0.7, top_p 1, 2048 new tokens)
    attempts: int = 3  # samples a prompt before it is given up
    samples_per_prompt: int = 1  # accepted traces a prompt, different ones, each a row to train on; at most --attempts
    temperature: float = 0.7  # of the teacher
    top_p: float = 1.0  # of the teacher
    max_new_tokens: int = 2048  # of a trace with its answer
    slots: int = 64  # rows generated together
    # the mixture and the objective
    direct: bool = True  # false: no D_direct, a control
    filler: bool = False  # true: traces of dots instead of words, a control
    harmful_direct: int = 0  # harmful rows of D_direct, drawn by the seed (0 = all)
    benign_direct: int = 0  # benign rows of D_direct (0 = all)
    gate_weight: float = 1.0  # weight of the tokens that decide whether to reason; 1 = plain SFT, the paper
    # training (official: full fine-tuning, lr 1e-5, 2 epochs, batch 32, weight decay 0.01, clip 1, warm-up 3%, cosine)
    lora_rank: int = 16  # 0 = train all weights
    lora_alpha: float = 32.0  # update scale = alpha / rank
    lora_targets: list[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layer names
    lr: float = 2e-4  # peak; LoRA wants about 10x the rate of full fine-tuning
    epochs: float = 2.0  # passes over the mixture
    steps: int = 0  # optimizer steps instead (0 = by epochs)
    batch_size: int = 32  # rows of an optimizer step
    batch_tokens: int = 8192  # padded tokens of a micro-batch; lower it when memory is short, the result stays the same
    max_length: int = 8192  # longer rows are dropped whole and counted
    weight_decay: float = 0.01  # of matrices, none on norms and biases
    clip: float = 1.0  # of the gradient norm
    warmup: float = 0.03  # share of the steps
    save_every: int = 100  # steps between checkpoints
    merged: bool = False  # also write out/model, a complete folder with the adapter merged (in --dtype: float32 keeps all of it)
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of frozen weights; what is trained is float32
    device: str = "auto"  # cuda if there is one, else cpu
    seed: int = 0  # data order, adapter init, sampling, random region


def read_inputs(cfg: Config) -> tuple[list[Record], list[Record], list[Record], list[Record]]:
    """D_diag, refusals, general tasks and phase-1 prompts, checked for what the method needs of each."""
    diagnostic, refusals, general = (read_named(p) for p in (cfg.diagnostic, cfg.refusals, cfg.general))
    prompts = read_named(cfg.prompts) if cfg.prompts else []
    for r in diagnostic:
        if not r.kind.startswith("adversarial"):
            raise UserError(f"{cfg.diagnostic}: row {r.id!r} is {r.kind}: D_diag is adversarial, as in the paper; plain harmful "
                            "prompts belong to --refusals, benign ones to --general")
    for path, records, wanted in ((cfg.refusals, refusals, "harmful"), (cfg.general, general, "benign")):
        for r in records:
            if r.kind != wanted or not r.response:
                raise UserError(f"{path}: row {r.id!r} must be of kind {wanted} and have a response")
    unique([("--diagnostic, --refusals, --general and --prompts need different file names", r) for r in diagnostic + refusals + general + prompts])
    for name in ("init", "region", "probe", "lookalikes", "probe_samples"):
        if cfg.method != "ease" and getattr(cfg, name) != getattr(Config, name):
            raise UserError(f"--{name} is for --method ease: the {cfg.method} baseline starts at --model and has no region")
    if cfg.method == "refusal" and (cfg.teacher or cfg.traces or cfg.filler):
        raise UserError("--teacher, --traces and --filler are not for --method refusal: it trains on no trace")
    if cfg.method != "refusal" and bool(cfg.teacher) == bool(cfg.traces):
        raise UserError(f"--method {cfg.method} trains on traces: give --teacher MODEL or --traces FILE, one of them")
    if cfg.categories == "teacher" and not cfg.teacher:
        raise UserError("--categories teacher needs a --teacher to ask; stored --traces have been written under the categories they carry")
    if not cfg.direct and (cfg.method == "refusal" or cfg.harmful_direct or cfg.benign_direct):
        raise UserError("--direct false leaves out all of D_direct: not with --method refusal, --harmful_direct or --benign_direct")
    if cfg.method == "ease" and cfg.prompts:
        raise UserError("--prompts is for the baselines: with --method ease, phase 1 (distill.py) has seen them")
    if not 1 <= cfg.samples_per_prompt <= cfg.attempts:
        raise UserError(f"--samples_per_prompt {cfg.samples_per_prompt} must be from 1 to --attempts {cfg.attempts}")
    if cfg.probe == "phase1" and not cfg.init:
        raise UserError("--probe phase1 needs --init")
    for name in (cfg.model, cfg.teacher, base_and_adapter(cfg.model, cfg.init)[0]):
        resolve(name or cfg.model)  # a mistyped name must not cost the probe and the traces
    judge_model(cfg.judge)
    if cfg.teacher and cfg.categories == "record":
        check_categories(diagnostic if cfg.method == "ease" and cfg.region != "random" else diagnostic + refusals + prompts)
    return diagnostic, refusals, general, prompts


def probe(cfg: Config, run: Path, diagnostic: list[Record], dtype, device: str) -> tuple[list[Record], list[str], list[list[str]]]:
    """Step 1: greedy responses of the original model to D_diag, the judge's verdicts on them, and those on --probe_samples sampled
    ones (for the report only). A stage: probe.jsonl.
    """
    file = run / "probe.jsonl"
    if not file.exists():
        tokenizer = load_tokenizer(cfg.model)
        model = load_model(*base_and_adapter(cfg.model, cfg.init if cfg.probe == "phase1" else ""), dtype, device)
        prompts = [tokenizer.encode_prompt([{"role": "user", "content": r.prompt}]) for r in diagnostic]
        judge, columns = load_judge(cfg.judge, dtype, device), []
        for i in range(1 + cfg.probe_samples):
            found = generate(model, prompts, cfg.probe_tokens, tokenizer.stop_ids, cfg.temperature if i else 0.0, cfg.top_p, cfg.seed + i,
                             slots=cfg.slots, progress=f"probe, sample {i}" if i else "probe")
            parts = [split_reasoning(tokenizer.decode(g.ids)) for g in found]
            verdicts = judge(diagnostic, [answer for _, answer, _ in parts])
            columns.append([(answer, UNPARSED if state == UNCLOSED else v) for (_, answer, state), v in zip(parts, verdicts, strict=True)])
        write_jsonl(file, [{"id": r.id, "kind": r.kind, "attack": r.attack, "prompt": r.prompt, "response": greedy[0], "verdict": greedy[1],
                            "samples": [v for _, v in samples]} for r, greedy, *samples in zip(diagnostic, *columns, strict=True)])
    rows = [row for _, row in read_lines(file)]
    return ([replace(r, response=row["response"]) for r, row in zip(diagnostic, rows, strict=True)], [row["verdict"] for row in rows],
            [row["samples"] for row in rows])


def direct_records(records: list[Record], answered: dict[str, Record], refusals: list[Record], seed: int) -> list[Record]:
    """D_direct: --refusals as they are; other harmful prompts with a refusal (their own: the original model's safe answer, or the stored
    one, where it is one; else one drawn from --refusals); benign ones with their reference answer. Benign prompts without one are dropped and counted.
    """
    rng, given, out, dropped = random.Random(f"direct {seed}"), {r.id for r in refusals}, [], 0
    for r in records:
        own = answered[r.id].response if r.id in answered else r.response
        if r.harmful:
            keep = r.id in given or is_refusal(own)
            out.append(replace(r, reasoning="", response=own if keep else rng.choice(refusals).response))
        elif r.response:
            out.append(replace(r, reasoning=""))
        else:
            dropped += 1
    if dropped:
        print(f"dropped {dropped} benign prompts without a reference response")
    return out


def traced_records(cfg: Config, run: Path, records: list[Record], dtype, device: str) -> list[Record]:
    """Step 3: D_reason, the given prompts with an accepted trace each, from the teacher or from the file. A stage: traces.jsonl."""

    def make() -> list[Record]:
        if cfg.traces:
            found = join_traces(records, read_records(cfg.traces))
            print(f"{len(found)} traces for {len({r.prompt for r in found})} of {len(records)} prompts; the others are dropped")
            if not found:
                raise UserError("no prompt has a trace: --traces has none of these requests")
            return found
        return teacher_traces(cfg, run, load_model(cfg.teacher, dtype=dtype, device=device), load_tokenizer(cfg.teacher),
                              load_judge(cfg.judge, dtype, device), records)

    return stage(run / "traces.jsonl", make)


def build_mixture(cfg: Config, run: Path, inputs: tuple[list[Record], ...], dtype, device: str) -> list[Record]:
    """Steps 1 to 4: what the method trains on. The parts are printed and stored (probe, region, traces, mixture)."""
    diagnostic, refusals, general, prompts = inputs
    everything = diagnostic + refusals + general + prompts
    answered: dict[str, Record] = {}
    if cfg.method == "refusal":
        reason = []
    elif cfg.method == "deliberative":
        reason = everything
    else:
        responses, verdicts, samples = probe(cfg, run, diagnostic, dtype, device)
        answered = {r.id: r for r, v in zip(responses, verdicts) if v == SAFE}
        region = select_region(cfg.region, diagnostic, verdicts, diagnostic + refusals, cfg.seed)
        print(f"region {cfg.region}: {len(region)} of {sum(r.harmful for r in diagnostic)} harmful diagnostic prompts; verdicts "
              f"{dict(Counter(v for v, r in zip(verdicts, diagnostic) if r.harmful))}; by attack {dict(Counter(r.attack for r in region))}")
        if not region and cfg.probe == "base":  # where M_reason is probed for comparison, that is a result: nothing to reason about
            raise UserError("the vulnerable region is empty: the original model answered no diagnostic prompt unsafely; use stronger "
                            "attacks in --diagnostic, or another --judge")
        write_jsonl(run / "region.jsonl", region)
        write_text(run / "region.md", region_report(diagnostic, verdicts, samples))
        lookalikes = [r for r in diagnostic if not r.harmful]
        reason = region + (lookalikes if cfg.lookalikes == "reason" else [])
        if cfg.lookalikes == "drop":
            everything = [r for r in everything if r.kind != "adversarial_benign"]
    reason_ids = {r.id for r in reason}
    direct = direct_records([r for r in everything if r.id not in reason_ids], answered, refusals, cfg.seed) if cfg.direct else []
    traces = traced_records(cfg, run, reason, dtype, device) if reason else []
    groups = {"D_reason": list(map(filler, traces)) if cfg.filler else traces,
              "harmful_direct": [r for r in direct if r.harmful], "benign_direct": [r for r in direct if not r.harmful]}
    mixture = mix(groups, {"harmful_direct": cfg.harmful_direct, "benign_direct": cfg.benign_direct}, cfg.seed)
    print("mixture: " + ", ".join(f"{n} {kind} {how}" for (kind, how), n in sorted(Counter(
        (r.kind, "with a trace" if r.reasoning else "direct") for r in mixture).items())))
    return mixture


def losses(model: CausalLM, batch, weights: dict[int, float]) -> dict[int, tuple[torch.Tensor, float]]:
    """role -> (weighted cross-entropy sum, weight sum) of one micro-batch; their totals make gated_cross_entropy of the step."""
    hidden, out = model.hidden(batch.inputs), {}  # (B, T, D)
    for role, weight in weights.items():
        keep = batch.roles == role
        if n := int(keep.sum()):
            out[role] = sum_over_chunks(
                lambda h, y, w=weight: gated_cross_entropy(model.logits(h), y, torch.full_like(y, w, dtype=torch.float32))[0],
                hidden[keep], batch.targets[keep]), weight * n
    return out


def main(cfg: Config) -> None:
    run = Path(cfg.out)
    started, device = time.time(), pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    dtype = pick_dtype(cfg.dtype, device)
    inputs = read_inputs(cfg)
    base, adapter = base_and_adapter(cfg.model, cfg.init)
    models = [str(resolve(m)) for m in dict.fromkeys((cfg.model, base, cfg.teacher)) if m]
    open_run(cfg, models + [p for p in (adapter, cfg.diagnostic, cfg.refusals, cfg.general, cfg.prompts, cfg.traces, cfg.policies,
                                    judge_model(cfg.judge)) if p], device, str(dtype))
    if is_done(run):
        return
    tokenizer = load_tokenizer(cfg.model)
    mixture = stage(run / "trained_on.jsonl", lambda: build_mixture(cfg, run, inputs, dtype, device))
    examples = encode_records(tokenizer, mixture, cfg.max_length)
    shown = [next((e for e in examples if (REASONING in e.roles) == how), None) for how in (True, False)]
    write_text(run / "preview.txt", "\n".join(preview(tokenizer, e) for e in shown if e))

    model, base = load_trainable(cfg.model, cfg.init, cfg.lora_rank, cfg.lora_alpha, list(cfg.lora_targets), cfg.seed, dtype, device)
    optimizer = make_optimizer(model, cfg.weight_decay)
    per_epoch = -(-len(examples) // cfg.batch_size)
    steps = cfg.steps or max(1, round(cfg.epochs * per_epoch))
    weights = {GATE: cfg.gate_weight, REASONING: 1.0, ANSWER: 1.0}
    start = resume(run, model, optimizer, lambda folder: load_weights(model, folder))

    bar = tqdm(range(start, steps), desc=cfg.method, initial=start, total=steps)
    for step in bar:
        epoch, position = divmod(step, per_epoch)
        micro_batches = batches([len(e.ids) for e in examples], cfg.batch_size, cfg.batch_tokens, cfg.seed, epoch)[position]
        rows = [i for micro in micro_batches for i in micro]
        total_weight = sum(weights[role] for i in rows for role in examples[i].roles if role)
        sums, counts = Counter(), Counter()
        for micro in micro_batches:
            parts = losses(model, collate([examples[i] for i in micro], device), weights)
            # sums over roles and micro-batches, divided once by the weight of the whole step
            (sum(ce for ce, _ in parts.values()) / total_weight).backward()
            for role, (ce, weight) in parts.items():
                sums[role] += ce.item()
                counts[role] += weight
        loss = sum(sums.values()) / total_weight
        stop_if_not_finite(loss, step, [examples[i].id for i in rows])
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, lr, cfg.clip)
        parts = {name: sums[role] / counts[role] if counts[role] else None
                 for name, role in (("gate", GATE), ("reasoning", REASONING), ("answer", ANSWER))}
        log(run, step=step, loss=loss, **parts, lr=lr, grad_norm=norm, tokens=sum(examples[i].supervised for i in rows))
        bar.set_postfix(loss=f"{loss:.3f}", gate=f"{parts['gate'] or 0:.3f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_state(run, step + 1, model, optimizer, lambda folder: save_weights(model, tokenizer, base, folder))

    save_weights(model, tokenizer, base, run / ("adapter" if cfg.lora_rank else "model"))
    if cfg.merged and cfg.lora_rank:
        save_model(merge_lora(model), tokenizer, run / "model")
    if base != cfg.model:
        print(f"this adapter belongs to {base}, not to --model")
    finish(run, started, steps=steps, rows=len(examples))


if __name__ == "__main__":
    command_line(main, Config)
