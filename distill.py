"""Phase 1, safety reasoning capability implantation: distil a teacher's safety reasoning into the
small model (arXiv 2511.06512).

    python distill.py --model M_s --teacher M_t --prompts FILE --out DIR
        traces from the teacher, cross-entropy + KL
    python distill.py --model M_s --traces FILE --kl_weight 0 --out DIR
        stored traces, cross-entropy (the official objective)
    python distill.py --model M_s --teachers A B --prompts FILE --dev FILE --out DIR
        which teacher? then as above with the chosen one

1. every prompt q -> its safety categories c                        (traces.with_categories)
2. (q, c, policy of c) -> M_t -> rejection sampling -> traces       (traces.teacher_traces)
3. SFT of M_s on (q, CoT, answer), the policy left out -> M_reason  (fit)

--held_out N: choose --lr and --steps by the loss on N rows kept out of training.
"""

import json
import random
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ease.batching import (Example, collate, count_steps, encode_data, encode_records,
                           held_out_loss, plan_batches)
from ease.checkpoint import resume, save_checkpoint
from ease.contest import Candidate, choose_teacher, teacher_report
from ease.generate import Sampling
from ease.judge import judge_model, load_judge, note_verdicts
from ease.loading import (Place, load_model, load_tokenizer, load_trainable, pick_place, resolve,
                          save_trained)
from ease.losses import cross_entropy, in_chunks
from ease.memory import announce
from ease.method import filler, hold_out
from ease.model import CausalLM
from ease.optim import learning_rate, make_optimizer, optimizer_step
from ease.policies import load_policy
from ease.ranks import RANK, my_share, sum_over_ranks, wait_for
from ease.readers import read_named
from ease.records import (Record, UserError, read_jsonl, read_lines, write_jsonl,
                          write_text)
from ease.respond import respond
from ease.run import TrainingFlags, command_line, finish, is_done, log, open_run
from ease.teacher import Teacher, load_teacher
from ease.tokenizer import Tokenizer
from ease.topk import CachedTeacher, cache_teacher
from ease.traces import (NoTraceAccepted, TraceFlags, check_categories, teacher_traces,
                         with_categories)


@dataclass(kw_only=True)
class Config(TrainingFlags, TraceFlags):
    """The flags of phase 1."""

    model: str  # M_s, the ORIGINAL small model (a Hugging Face folder, or a hub id)
    teacher: str = ""  # M_t: writes the traces of --prompts; with --traces only for the KL
    prompts: str = ""  # phase-1 prompts with categories, for the teacher
    traces: str = ""  # stored traces instead (records with reasoning and response, or STAR-1)
    max_traces: int = 0  # use at most this many stored traces, drawn by the seed (0 = all)
    # the objective
    kl_weight: float = 0.5  # (1 - w) CE + w KL; ours, the official objective is 0
    kl_temperature: float = 1.0  # tau of the teacher-trace KL
    cache_topk: int = 0  # keep the teacher's k likeliest tokens in a file (0 = itself in memory)
    # which teacher?
    teachers: list[str] = ()  # candidates: a short distillation from each, compared on --dev
    dev: str = ""  # adversarial prompts, harmful and benign, on which they are compared
    teacher_prompts: int = 64  # of --prompts, for the comparison
    teacher_steps: int = 20  # of each short distillation


def check_flags(cfg: Config) -> None:
    """The mistakes that can be seen before anything is loaded or written."""
    any_teacher = cfg.teacher or cfg.teachers
    for wrong, message in (
        (bool(cfg.traces) == bool(cfg.prompts) or cfg.prompts and not any_teacher,
         "give --traces FILE, or --teacher MODEL and --prompts FILE"),
        (cfg.teachers and (cfg.teacher or cfg.traces or not cfg.dev),
         "--teachers A B ... needs --prompts and --dev, and neither --teacher nor --traces"),
        (cfg.kl_weight and not any_teacher,
         "--kl_weight above 0 needs a --teacher that shares the model's tokenizer; stored traces "
         "alone need --kl_weight 0"),
        (cfg.max_traces and cfg.prompts,
         "--max_traces is for stored --traces: here it would do nothing"),
        (cfg.dev and not cfg.teachers, "--dev is for --teachers: here it would do nothing"),
        (cfg.teacher and cfg.traces and not cfg.kl_weight,
         "--teacher beside --traces is for the KL, which --kl_weight 0 leaves out"),
        (cfg.categories == "teacher" and not cfg.prompts,
         "--categories teacher classifies --prompts; stored --traces have been written under the "
         "categories they carry"),
        (cfg.filler and cfg.kl_weight,
         "--filler leaves nothing of the teacher's distribution: it needs --kl_weight 0"),
        (cfg.cache_topk and not cfg.kl_weight,
         "--cache_topk keeps the teacher's distribution for the KL: it needs --kl_weight above 0"),
        (not 1 <= cfg.samples_per_prompt <= cfg.attempts,
         f"--samples_per_prompt {cfg.samples_per_prompt} must be from 1 to --attempts "
         f"{cfg.attempts}"),
    ):
        if wrong:
            raise UserError(message)
    if cfg.teachers:
        kinds = {r.kind for r in read_named(cfg.dev)[0]}
        if not {"adversarial_harmful", "adversarial_benign"} <= kinds:
            raise UserError(f"--dev {cfg.dev}: the teachers are compared on adversarial prompts, "
                            "harmful and benign; both must be there")
    load_policy(cfg.policies)
    if cfg.categories == "record" and (cfg.prompts or cfg.kl_weight):  # the teacher sees a policy
        check_categories(read_named(cfg.prompts or cfg.traces)[0])


def stored_traces(cfg: Config) -> list[Record]:
    """--traces: the rows that have a trace and an answer; --max_traces of them, by the seed."""
    [stored] = read_named(cfg.traces)
    traces = [r for r in stored if r.reasoning and r.response]
    if len(traces) < len(stored):
        print(f"dropped {len(stored) - len(traces)} of {len(stored)} rows without a trace or an "
              "answer")
    wanted = cfg.max_traces + cfg.held_out if cfg.max_traces else len(traces)
    traces = random.Random(f"traces {cfg.seed}").sample(traces, min(wanted, len(traces)))
    print(f"{len(traces)} stored traces from {cfg.traces}")
    return traces


def kl_teacher(cfg: Config, run: Path, student: CausalLM, tokenizer: Tokenizer,
               traces: list[Record], examples: list[Example], place: Place
               ) -> tuple[Teacher | CachedTeacher, list[int]]:
    """The teacher of the KL, in memory or (--cache_topk) in a file; its lengths of the examples."""
    teacher = load_teacher(cfg.teacher, student, tokenizer, traces, examples,
                           load_policy(cfg.policies), cfg.kl_temperature, place)
    lengths = [len(e.ids) for e in teacher.examples]
    if cfg.cache_topk:
        teacher = cache_teacher(run / "teacher_topk.safetensors", teacher, cfg.cache_topk)
    return teacher, lengths


def fit(cfg: Config, run: Path, traces: list[Record], held_out: list[Record], place: Place) -> dict:
    """Step 3: SFT of M_s on the traces, with the teacher-trace KL on the traces' own text:
    (1 - w) CE_sum / n_CE + w KL_sum / n_KL, the counts over an optimizer step. Returns the counts
    of the run.
    """
    tokenizer, (model, base) = load_tokenizer(cfg.model), load_trainable(cfg, cfg.model, "", place)
    examples, kept_out = encode_data(run, tokenizer, traces, held_out, cfg.max_length,
                                     model.config.context)
    w, teacher, lengths = cfg.kl_weight, None, [len(e.ids) for e in examples]
    if w:
        teacher, theirs = kl_teacher(cfg, run, model, tokenizer, traces, examples, place)
        lengths = list(map(max, lengths, theirs))
    steps = count_steps(len(examples), cfg.batch_size, cfg.steps, cfg.epochs)
    plan = plan_batches(lengths, cfg.batch_size, cfg.batch_tokens, cfg.seed, steps)
    announce(model, lengths, plan, getattr(teacher, "model", None))
    optimizer = make_optimizer(model, cfg.weight_decay)
    start = resume(run, model, optimizer)
    bar = tqdm(range(start, steps), desc="phase 1", initial=start, total=steps, disable=RANK > 0)
    for step in bar:
        if kept_out and step % cfg.save_every == 0:
            log(run, step=step, **held_out_loss(model, kept_out, place.device))
        rows = [examples[i] for micro in plan[step] for i in micro]
        n_ce, n_kl = sum(e.supervised for e in rows), max(1, sum(sum(e.kl) for e in rows))
        sums = torch.zeros(2, device=place.device)
        for micro in my_share(plan[step]):
            batch = collate([examples[i] for i in micro], place.device)
            keep = batch.roles > 0  # (T,): no prompt
            hidden = model.hidden(batch.inputs, batch.lengths)  # (T, D)
            ce = in_chunks(lambda h, y: cross_entropy(model.logits(h), y),
                           hidden[keep], batch.targets[keep])  # (N,)
            # the same M tokens in the same order on both sides, though the prompts differ
            kl = teacher.kl(model, hidden[batch.kl > 0], micro) if w else ce.new_zeros(0)  # (M,)
            # sums, each divided once by its count in the step: every token weighs alike
            ((1 - w) * ce.sum() / n_ce + w * kl.sum() / n_kl).backward()
            sums += torch.stack((ce.sum(), kl.sum())).detach()
        sum_over_ranks(optimizer, sums)
        ce_sum, kl_sum = sums.tolist()
        lr = learning_rate(step, steps, cfg.lr, cfg.warmup)
        norm = optimizer_step(optimizer, lr, cfg.clip, ce_sum + kl_sum,
                              f"step {step}, rows {', '.join(e.id for e in rows[:8])}")
        log(run, step=step, ce=ce_sum / n_ce, kl=kl_sum / n_kl, lr=lr, grad_norm=norm, tokens=n_ce)
        bar.set_postfix(ce=f"{ce_sum / n_ce:.3f}", kl=f"{kl_sum / n_kl:.3f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_checkpoint(run, step + 1, model, optimizer, tokenizer, base)
    if kept_out:
        log(run, step=steps, **held_out_loss(model, kept_out, place.device))
    save_trained(cfg, model, tokenizer, base, run)
    return {"steps": steps, "rows": len(examples)}


def try_teacher(cfg: Config, name: str, folder: Path, prompts: list[Record], place: Place
                ) -> Candidate:
    """A short distillation from one candidate, and what the student then does on --dev."""
    short = replace(cfg, teacher=name, steps=cfg.teacher_steps, held_out=0, merged=False)
    candidate = Candidate(name, len(prompts))
    try:
        prompts = with_categories(short, folder, name, prompts, place)
        traces = teacher_traces(short, folder, name, prompts, place)
    except NoTraceAccepted:
        traces = []  # that is a result
    rejected = folder / "rejected.jsonl"
    reasons = [row["reason"] for _, row in read_lines(rejected)] if rejected.stat().st_size else []
    candidate.accepted, candidate.rejected = len(traces), dict(Counter(reasons))
    if not traces:
        return candidate
    fit(short, folder, traces, [], place)
    tokenizer = load_tokenizer(cfg.model)
    examples = encode_records(tokenizer, traces, cfg.max_length, cfg.max_length)
    candidate.tokens = sum(e.supervised for e in examples) / len(examples)
    adapter = str(folder / "adapter") if cfg.lora_rank else ""
    model = load_model(cfg.model if adapter else str(folder / "model"), adapter, *place)
    dev = [r for r in read_named(cfg.dev)[0] if r.kind.startswith("adversarial")]
    responses = respond(model, tokenizer, dev, Sampling(cfg.max_new_tokens), cfg.slots, "dev")
    judge = load_judge(cfg.judge, *place, cfg.judge_format, cfg.judge_text, cfg.slots)
    note_verdicts(judge, cfg.judge, responses)
    return candidate.judged_by(responses, cfg.judge)


def select_teacher(cfg: Config, run: Path, place: Place) -> str:
    """--teachers: the same prompts and steps for every candidate, then contest.choose_teacher. A
    stage: teachers.json (and teachers.md).
    """
    file = run / "teachers.json"
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["chosen"]
    [prompts] = read_named(cfg.prompts)
    count = min(cfg.teacher_prompts, len(prompts))
    prompts = random.Random(f"teachers {cfg.seed}").sample(prompts, count)
    candidates = [try_teacher(cfg, name, run / "teachers" / str(i), prompts, place)
                  for i, name in enumerate(cfg.teachers, start=1)]
    chosen = choose_teacher(candidates)
    if chosen is None:
        raise UserError("no trace of any of the teachers was accepted; the reasons are in "
                        f"{run / 'teachers'}/*/rejected.jsonl")
    text = teacher_report(candidates, chosen.teacher)
    write_text(run / "teachers.md", text)
    found = {"chosen": chosen.teacher, "candidates": list(map(asdict, candidates))}
    write_text(file, json.dumps(found, indent=2) + "\n")
    print(f"{text}the teacher is {chosen.teacher}")
    return chosen.teacher


def main(cfg: Config) -> None:
    if RANK > 0:  # rank 0 does all before `fit`, and what is held out
        traces = wait_for(Path(cfg.out) / "to_train_on.jsonl")
        return fit(cfg, Path(cfg.out), read_jsonl(traces), [], pick_place(cfg))
    check_flags(cfg)
    models = [str(resolve(name)) for name in (cfg.model, cfg.teacher, *cfg.teachers) if name]
    files = [cfg.prompts, cfg.traces, cfg.policies, cfg.dev]
    place = pick_place(cfg)
    run = open_run(cfg, [*models, judge_model(cfg.judge), *files], place)
    if is_done(run):
        return

    if cfg.teachers:
        cfg = replace(cfg, teacher=select_teacher(cfg, run, place))
    if cfg.traces:
        traces = stored_traces(cfg)
    else:
        prompts = with_categories(cfg, run, cfg.teacher, read_named(cfg.prompts)[0], place)
        traces = teacher_traces(cfg, run, cfg.teacher, prompts, place)
    if cfg.filler:
        traces = list(map(filler, traces))
    if cfg.prompts and cfg.held_out:  # they come in the order of --prompts; stored ones were drawn
        traces = random.Random(f"held out {cfg.seed}").sample(traces, len(traces))
    trained_on, held_out = hold_out(traces, cfg.held_out)
    write_jsonl(run / "to_train_on.jsonl", trained_on)
    counts = fit(cfg, run, trained_on, held_out, place)
    finish(run, **counts)


if __name__ == "__main__":
    command_line(main, Config)
