"""Phase 1, safety reasoning capability implantation: distil the reasoning of a teacher into the small model (arXiv 2511.06512).

    python distill.py --model M_s --teacher M_t --prompts FILE --out DIR          traces from the teacher, cross-entropy + KL
    python distill.py --model M_s --traces FILE --kl_weight 0 --out DIR           stored traces, cross-entropy (official objective)
    python distill.py --model M_s --teachers A B C --prompts FILE --dev FILE --out DIR    which teacher? then as above with the chosen one

1. every prompt q has its safety categories c                       (records, or traces.classify)
2. (q, c, policy of c) -> M_t -> rejection sampling -> traces       (traces.rejection_sample, policies.accept_trace)
3. SFT of M_s on (q, CoT, answer), the policy left out -> M_reason  (the loop below; losses.cross_entropy_sum, teacher.py)
"""

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from ease.batching import Batch, Example, batches, collate, encode_records, preview
from ease.method import filler, split_reasoning
from ease.generate import generate
from ease.judge import judge_model, load_judge
from ease.loading import (load_model, load_tokenizer, load_trainable, load_weights, pick_device, pick_dtype, resolve, save_model,
                          save_weights)
from ease.lora import merge_lora
from ease.losses import cross_entropy_sum, sum_over_chunks
from ease.model import CausalLM
from ease.policies import load_policies
from ease.readers import read_named
from ease.records import Record, UserError, read_jsonl, read_lines, write_jsonl, write_text
from ease.report import teacher_report
from ease.run import (command_line, finish, is_done, learning_rate, log, make_optimizer, open_run, optimizer_step, resume, save_state, stage, stop_if_not_finite)
from ease.scoring import choose_teacher, operating_point
from ease.teacher import TeacherSide, from_cache, in_memory, shared_ids, teacher_view
from ease.tokenizer import Tokenizer
from ease.traces import check_categories, teacher_traces


@dataclass
class Config:
    """The flags of phase 1."""

    model: str  # M_s, the ORIGINAL small model (a Hugging Face folder)
    out: str  # the run folder; the same command goes on with a stopped run
    # data
    teacher: str = ""  # M_t; with --prompts it writes the traces, with --traces it only gives the KL its distribution
    teachers: list[str] = ()  # candidates for M_t: a short distillation from each, compared on --dev; the chosen one is then the teacher
    teacher_prompts: int = 64  # of --prompts, for the comparison
    teacher_steps: int = 20  # of each short distillation
    dev: str = ""  # adversarial prompts, harmful and benign, on which the teachers are compared
    prompts: str = ""  # phase-1 prompts with categories, for the teacher
    traces: str = ""  # stored traces instead (records with reasoning and response, or STAR-1)
    policies: str = ""  # JSON with the teacher's instruction and policy texts; default: policies.py
    categories: Literal["record", "teacher"] = "record"  # of --prompts: as they stand there, or asked of the teacher, one by one
    judge: str = "xstest"  # is a harmful prompt's answer safe? a guard model, target, or a refusal list (which drops safe answers that do not refuse)
    max_traces: int = 0  # use at most this many stored traces, drawn by the seed (0 = all)
    held_out: int = 0  # keep this many traces out of training and report their NLL before and after
    # the teacher's sampling (official: T 0.7, top_p 1, 2048 new tokens)
    attempts: int = 3  # samples a prompt before it is given up
    samples_per_prompt: int = 1  # accepted traces a prompt, different ones, each a row to train on; at most --attempts
    temperature: float = 0.7  # of the teacher
    top_p: float = 1.0  # of the teacher
    max_new_tokens: int = 2048  # of a trace with its answer
    slots: int = 64  # rows generated together
    # the objective
    kl_weight: float = 0.5  # (1 - w) CE + w KL; ours, the official objective is 0; needs a teacher with M_s's vocabulary
    kl_temperature: float = 1.0  # tau of the teacher-trace KL
    filler: bool = False  # true: traces of dots instead of words, a control; with --kl_weight 0
    cache_topk: int = 0  # keep the teacher's k likeliest tokens and their tail instead of the teacher (0 = the teacher itself, in memory)
    # training (official: full fine-tuning, lr 1e-5, 2 epochs, batch 32, weight decay 0.01, clip 1, warm-up 3%, cosine)
    lora_rank: int = 16  # 0 = train all weights
    lora_alpha: float = 32.0  # update scale = alpha / rank
    lora_targets: list[str] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # layer names
    lr: float = 2e-4  # peak; LoRA wants about 10x the rate of full fine-tuning
    epochs: float = 2.0  # passes over the traces
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
    seed: int = 0  # data order, adapter init, sampling


def get_traces(cfg: Config, run: Path, teacher: CausalLM | None, tokenizer: Tokenizer | None, dtype, device) -> list[Record]:
    """Steps 1 and 2: accepted traces, from the file or from the teacher. Rejected samples stand in rejected.jsonl."""
    if cfg.traces:
        stored = read_named(cfg.traces)
        traces = [r for r in stored if r.reasoning and r.response]
        if len(traces) < len(stored):
            print(f"dropped {len(stored) - len(traces)} of {len(stored)} rows without a trace or an answer")
        wanted = cfg.max_traces + cfg.held_out if cfg.max_traces else len(traces)
        traces = random.Random(f"traces {cfg.seed}").sample(traces, min(wanted, len(traces)))
        print(f"{len(traces)} stored traces from {cfg.traces}")
        return traces

    return stage(run / "traces.jsonl", lambda: teacher_traces(cfg, run, teacher, tokenizer, load_judge(cfg.judge, dtype, device), read_named(cfg.prompts)))


def hold_out(cfg: Config, run: Path, records: list[Record]) -> tuple[list[Record], list[Record]]:
    """(what is trained on, what is kept out of it): no prompt stands in both. Kept in trained_on.jsonl and held_out.jsonl."""
    if cfg.held_out >= len(records):
        raise UserError(f"--held_out {cfg.held_out} leaves none of the {len(records)} traces to train on")
    if cfg.prompts and cfg.held_out:  # the teacher's traces come in the order of --prompts; stored ones have been drawn
        records = random.Random(f"held out {cfg.seed}").sample(records, len(records))
    kept_out = records[: cfg.held_out]
    records = [r for r in records[cfg.held_out :] if r.prompt not in {k.prompt for k in kept_out}]  # several traces a prompt
    write_jsonl(run / "held_out.jsonl", kept_out)
    write_jsonl(run / "trained_on.jsonl", records)
    return records, kept_out


def kl_side(cfg: Config, run: Path, model: CausalLM, tokenizer: Tokenizer, teacher: CausalLM, teacher_tokenizer: Tokenizer, records: list[Record],
            examples: list[Example], device: str) -> tuple[list[Example], TeacherSide]:
    """The examples as the teacher sees them, and what it says on them: live, or with --cache_topk from a file in the run folder."""
    views = teacher_view(teacher_tokenizer, {r.id: r for r in records}, examples, load_policies(cfg.policies))
    shared = shared_ids(tokenizer, teacher_tokenizer, model, teacher, device)
    side = in_memory(model, teacher, views, shared, cfg.kl_temperature, device)
    if cfg.cache_topk:
        side = from_cache(run / "teacher_topk.safetensors", side, teacher, model, len(views), cfg.cache_topk, shared, cfg.kl_temperature, device)
    return views, side


def try_teacher(cfg: Config, name: str, folder: Path, dtype, device: str) -> dict:
    """A short distillation from one candidate (a run of this script in `folder`), and its row of the table."""
    probe = replace(cfg, teacher=name, teachers=(), dev="", prompts=str(folder.parent / "prompts.jsonl"), steps=cfg.teacher_steps, out=str(folder),
                    held_out=0, merged=False)
    try:
        main(probe)
    except UserError:
        if (folder / "traces.jsonl").exists() or not (folder / "rejected.jsonl").exists():
            raise  # else no trace was accepted: that is a result
    rejected = [row for _, row in read_lines(folder / "rejected.jsonl")] if (folder / "rejected.jsonl").stat().st_size else []
    traces = read_jsonl(folder / "traces.jsonl") if (folder / "traces.jsonl").exists() else []
    row = {"teacher": name, "prompts": len(read_jsonl(probe.prompts)), "accepted": len(traces), "rejected": dict(Counter(r["reason"] for r in rejected)),
           "tokens": 0.0, "nll": None, "kl": None, "asr": None, "over_refusal": None}
    if not traces:
        return row
    tokenizer, model = load_tokenizer(cfg.model), load_model(cfg.model, dtype=dtype, device=device)
    examples = encode_records(tokenizer, traces, cfg.max_length)
    side = None
    if cfg.kl_weight:
        teacher, theirs = load_model(name, dtype=dtype, device=device), load_tokenizer(name)
        _, side = kl_side(replace(cfg, cache_topk=0), folder, model, tokenizer, teacher, theirs, traces, examples, device)
    nll, kl = mean_losses(model, examples, side, device)
    row |= {"tokens": sum(e.supervised for e in examples) / len(examples), "nll": nll, "kl": kl if side else None}

    trained = (cfg.model, str(folder / "adapter")) if cfg.lora_rank else (str(folder / "model"), "")
    model, dev = load_model(*trained, dtype, device), [r for r in read_named(cfg.dev) if r.kind.startswith("adversarial")]
    found = generate(model, [tokenizer.encode_prompt([{"role": "user", "content": r.prompt}]) for r in dev], cfg.max_new_tokens, tokenizer.stop_ids,
                     slots=cfg.slots, progress="dev")
    parts = [split_reasoning(tokenizer.decode(g.ids)) for g in found]
    verdicts = load_judge(cfg.judge, dtype, device)(dev, [answer for _, answer, _ in parts])
    point = operating_point([{"kind": r.kind, "group": r.request, "answer": answer, "state": state, "verdicts": {"j": v}, "tokens": {"total": len(g.ids)}}
                             for r, g, (_, answer, state), v in zip(dev, found, parts, verdicts, strict=True)], "j")
    return row | {"asr": point["asr"], "over_refusal": point["over_refusal"]}


def select_teacher(cfg: Config, run: Path, dtype, device: str) -> str:
    """--teachers: the same prompts and steps for every candidate, then scoring.choose_teacher. A stage: teachers.json (and teachers.md)."""
    if (run / "teachers.json").exists():
        return json.loads((run / "teachers.json").read_text(encoding="utf-8"))["chosen"]
    prompts = read_named(cfg.prompts)
    picked = random.Random(f"teachers {cfg.seed}").sample(prompts, min(cfg.teacher_prompts, len(prompts)))
    write_jsonl(run / "teachers" / "prompts.jsonl", picked)
    rows = [try_teacher(cfg, name, run / "teachers" / str(i), dtype, device) for i, name in enumerate(cfg.teachers, start=1)]
    chosen = choose_teacher(rows)
    if chosen is None:
        raise UserError(f"no trace of any of the teachers was accepted; the reasons are in {run / 'teachers'}/*/rejected.jsonl")
    text = teacher_report(rows, chosen["teacher"])
    write_text(run / "teachers.md", text)
    write_text(run / "teachers.json", json.dumps({"chosen": chosen["teacher"], "rows": rows}, indent=2) + "\n")
    print(f"{text}the teacher is {chosen['teacher']}")
    return chosen["teacher"]


def losses(model: CausalLM, batch: Batch, teacher: TeacherSide | None, indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(cross-entropy sum over all response tokens, KL sum over the trace's own tokens) of one micro-batch, the examples `indices`."""
    hidden = model.hidden(batch.inputs)  # (B, T, D)
    keep = batch.roles > 0
    ce = sum_over_chunks(lambda h, y: cross_entropy_sum(model.logits(h), y), hidden[keep], batch.targets[keep])
    if teacher is None:
        return ce, torch.zeros((), device=hidden.device)
    # the same N tokens in the same order on both sides, though the prompts before them differ
    return ce, sum_over_chunks(teacher.kl, hidden[batch.body > 0], *teacher.rows(indices))


@torch.no_grad()
def mean_losses(model: CausalLM, examples: list[Example], teacher: TeacherSide | None, device: str) -> tuple[float, float]:
    """(negative log-likelihood per response token, KL per token of the traces themselves), in nats; 0 KL without a teacher."""
    sums = [losses(model, collate([e], device), teacher, [i]) for i, e in enumerate(examples)]
    n_ce, n_kl = sum(e.supervised for e in examples), max(1, sum(sum(e.body) for e in examples))
    return sum(ce.item() for ce, _ in sums) / n_ce, sum(kl.item() for _, kl in sums) / n_kl


def check_flags(cfg: Config) -> None:
    """The mistakes that can be seen before anything is loaded or written."""
    if bool(cfg.traces) == bool(cfg.prompts) or cfg.prompts and not (cfg.teacher or cfg.teachers):
        raise UserError("give --traces FILE, or --teacher MODEL and --prompts FILE")
    if cfg.teachers and (cfg.teacher or cfg.traces or not cfg.dev):
        raise UserError("--teachers A B ... needs --prompts and --dev, and neither --teacher nor --traces")
    if cfg.teachers and not {"adversarial_harmful", "adversarial_benign"} <= {r.kind for r in read_named(cfg.dev)}:
        raise UserError(f"--dev {cfg.dev}: the teachers are compared on adversarial prompts, harmful and benign; both must be there")
    if cfg.kl_weight and not (cfg.teacher or cfg.teachers):
        raise UserError("--kl_weight above 0 needs a --teacher that shares the model's tokenizer; stored traces alone need --kl_weight 0")
    for idle, why in ((cfg.max_traces and cfg.prompts, "--max_traces is for stored --traces"), (cfg.dev and not cfg.teachers, "--dev is for --teachers"),
                      (cfg.teacher and cfg.traces and not cfg.kl_weight, "--teacher beside --traces is for the KL, which --kl_weight 0 leaves out")):
        if idle:
            raise UserError(f"{why}: here it would do nothing")
    if cfg.categories == "teacher" and not cfg.prompts:
        raise UserError("--categories teacher classifies --prompts; stored --traces have been written under the categories they carry")
    if cfg.filler and cfg.kl_weight:
        raise UserError("--filler true leaves nothing of the teacher's distribution: it needs --kl_weight 0")
    if cfg.cache_topk and not cfg.kl_weight:
        raise UserError("--cache_topk keeps the teacher's distribution for the KL: it needs --kl_weight above 0")
    if not 1 <= cfg.samples_per_prompt <= cfg.attempts:
        raise UserError(f"--samples_per_prompt {cfg.samples_per_prompt} must be from 1 to --attempts {cfg.attempts}")
    for name in (cfg.model, cfg.teacher or cfg.model, *cfg.teachers):
        resolve(name)
    judge_model(cfg.judge)
    if cfg.prompts and cfg.categories == "record":
        check_categories(read_named(cfg.prompts))


def main(cfg: Config) -> None:
    check_flags(cfg)
    run = Path(cfg.out)
    started, device = time.time(), pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    dtype = pick_dtype(cfg.dtype, device)
    models = [str(resolve(m)) for m in (cfg.model, cfg.teacher, *cfg.teachers) if m]
    open_run(cfg, models + [p for p in (cfg.prompts, cfg.traces, cfg.policies, cfg.dev, judge_model(cfg.judge)) if p], device, str(dtype))
    if is_done(run):
        return
    if cfg.teachers:
        cfg = replace(cfg, teacher=select_teacher(cfg, run, dtype, device))
    tokenizer = load_tokenizer(cfg.model)
    model, base = load_trainable(cfg.model, "", cfg.lora_rank, cfg.lora_alpha, list(cfg.lora_targets), cfg.seed, dtype, device)
    teacher, teacher_tokenizer = None, None
    if cfg.teacher:
        teacher, teacher_tokenizer = load_model(cfg.teacher, dtype=dtype, device=device), load_tokenizer(cfg.teacher)

    records = get_traces(cfg, run, teacher, teacher_tokenizer, dtype, device)
    if cfg.filler:
        records = list(map(filler, records))
    records, kept_out = hold_out(cfg, run, records)
    examples = encode_records(tokenizer, records, cfg.max_length)
    held_out = encode_records(tokenizer, kept_out, cfg.max_length) if kept_out else []
    write_text(run / "preview.txt", "\n".join(preview(tokenizer, e) for e in examples[:2]))
    views, side = kl_side(cfg, run, model, tokenizer, teacher, teacher_tokenizer, records, examples, device) if cfg.kl_weight else (examples, None)
    del teacher  # with a cache, or without KL, nothing holds it any more

    optimizer = make_optimizer(model, cfg.weight_decay)
    lengths = [max(len(e.ids), len(v.ids)) for e, v in zip(examples, views)]
    per_epoch = -(-len(examples) // cfg.batch_size)
    steps = cfg.steps or max(1, round(cfg.epochs * per_epoch))
    before = mean_losses(model, held_out, None, device)[0] if held_out else None
    start = resume(run, model, optimizer, lambda folder: load_weights(model, folder))

    bar = tqdm(range(start, steps), desc="phase 1", initial=start, total=steps)
    for step in bar:
        epoch, position = divmod(step, per_epoch)
        micro_batches = batches(lengths, cfg.batch_size, cfg.batch_tokens, cfg.seed, epoch)[position]
        rows = [i for micro in micro_batches for i in micro]
        n_ce = sum(examples[i].supervised for i in rows)
        n_kl = max(1, sum(sum(examples[i].body) for i in rows))
        ce_sum = kl_sum = 0.0
        for micro in micro_batches:
            batch = collate([examples[i] for i in micro], device)
            ce, kl = losses(model, batch, side, micro)
            # sums, each divided once by its count over the whole step: micro-batches weigh every token alike
            ((1 - cfg.kl_weight) * ce / n_ce + cfg.kl_weight * kl / n_kl).backward()
            ce_sum, kl_sum = ce_sum + ce.item(), kl_sum + kl.item()
        stop_if_not_finite(ce_sum + kl_sum, step, [examples[i].id for i in rows])
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, lr, cfg.clip)
        log(run, step=step, ce=ce_sum / n_ce, kl=kl_sum / n_kl, lr=lr, grad_norm=norm, tokens=n_ce)
        bar.set_postfix(ce=f"{ce_sum / n_ce:.3f}", kl=f"{kl_sum / n_kl:.3f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_state(run, step + 1, model, optimizer, lambda folder: save_weights(model, tokenizer, base, folder))

    save_weights(model, tokenizer, base, run / ("adapter" if cfg.lora_rank else "model"))
    if held_out:
        after = mean_losses(model, held_out, None, device)[0]
        print(f"NLL per token on {len(held_out)} held-out traces: {before:.4f} before, {after:.4f} after")
        log(run, step=steps, held_out_nll_before=before, held_out_nll_after=after)
    if cfg.merged and cfg.lora_rank:
        save_model(merge_lora(model), tokenizer, run / "model")
    finish(run, started, steps=steps, rows=len(examples))


if __name__ == "__main__":
    command_line(main, Config)
