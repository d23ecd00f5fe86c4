"""Phase 2, safety reasoning boundary calibration, and the two baselines (arXiv 2511.06512).

    python train.py --method ease --model M_s --init PHASE1/adapter --teacher M_t \\
        --diagnostic FILE --refusals FILE --general FILE --out DIR

1. D_diag -> responses of the ORIGINAL M_s -> verdicts               (probe)
2. the prompts answered unsafely -> D_vuln, the vulnerable region    (vulnerable_region)
3. D_vuln and the benign look-alikes -> traces -> D_reason           (with_traces)
4. all else -> D_direct: harmful -> refusal, general tasks -> answer (direct_records)
5. SFT of M_reason on D_reason + D_direct -> the adaptive model      (fit)

--method refusal: every harmful prompt -> a direct refusal, all else -> a direct answer.
--method deliberative: a trace on every prompt. Both start at M_s, see phase 1's prompts as well
(--prompts) and should get the steps of both phases (--steps). --method refusal on --refusals and
--general alone is the shallow baseline.

--method finetune: SFT on --general, a later task (ease/anchor.py).

--held_out N: choose --lr and --steps by the loss on N rows kept out of training.
"""

import random
from collections import Counter
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from tqdm import tqdm

from ease.anchor import FinetuneFlags, make_anchor, poisoned
from ease.batching import collate, count_steps, encode_data, held_out_loss, plan_batches
from ease.checkpoint import resume, save_checkpoint
from ease.generate import Sampling
from ease.judge import judge_model, load_judge, note_verdicts
from ease.loading import (Place, base_and_adapter, load_model, load_tokenizer, load_trainable,
                          pick_place, resolve, save_trained)
from ease.losses import gated_cross_entropy, in_chunks
from ease.memory import announce
from ease.method import ROLES, filler, hold_out, mix, select_region
from ease.optim import learning_rate, make_optimizer, optimizer_step
from ease.policies import load_policy
from ease.ranks import RANK, my_share, sum_over_ranks, wait_for
from ease.readers import read_named, read_records
from ease.records import (SAFE, Record, Response, UserError, read_responses, response_to_dict,
                          read_jsonl, write_jsonl, write_text)
from ease.respond import respond
from ease.run import TrainingFlags, command_line, finish, is_done, log, open_run
from ease.scoring import is_refusal
from ease.stability import region_report
from ease.traces import (TraceFlags, check_categories, join_traces, teacher_traces,
                         with_categories)


@dataclass(kw_only=True)
class Config(TrainingFlags, TraceFlags, FinetuneFlags):
    """The flags of phase 2 and the baselines."""

    method: Literal["ease", "refusal", "deliberative", "finetune"] = "ease"  # finetune: later SFT
    model: str  # M_s, the ORIGINAL small model (a Hugging Face folder, or a hub id)
    init: str = ""  # M_reason: phase 1's adapter (it keeps its rank, alpha and targets) or a model
    # the data
    diagnostic: str = ""  # D_diag: adversarial prompts, harmful and benign; baselines need none
    refusals: str = ""  # plainly harmful prompts with a direct refusal each
    general: str  # general tasks with direct answers
    prompts: str = ""  # phase 1's prompts, for the baselines: every method sees the same ones
    teacher: str = ""  # M_t, writes the traces
    traces: str = ""  # stored traces instead, joined on the underlying request (group)
    # the vulnerable region
    region: Literal["vulnerable", "random", "all"] = "vulnerable"  # the others are controls
    probe: Literal["base", "phase1"] = "base"  # whose failures: M_s's, as in the paper, or --init's
    lookalikes: Literal["reason", "direct", "drop"] = "reason"  # benign rows of D_diag; our choice
    probe_tokens: int = 512  # longest answer of the probe (official: 512, T 0.7; ours is greedy)
    probe_samples: int = 0  # further responses at --temperature, for region.md only
    # the mixture and the objective
    direct: bool = True  # false: no D_direct, a control
    harmful_direct: int = 0  # harmful rows of D_direct, drawn by the seed (0 = all)
    benign_direct: int = 0  # benign rows of D_direct (0 = all)
    gate_weight: float = 1.0  # weight of the tokens that decide whether to reason; 1 = the paper


class Sets(NamedTuple):
    """The input files."""

    diagnostic: list[Record]
    refusals: list[Record]
    general: list[Record]
    prompts: list[Record]
    poison: list[Record]

    @property
    def all(self) -> list[Record]:
        """Every prompt that a method may train on."""
        return self.diagnostic + self.refusals + self.general + self.prompts


def read_sets(cfg: Config) -> Sets:
    """The input files, checked for what each must hold."""
    sets = Sets(*read_named(cfg.diagnostic, cfg.refusals, cfg.general, cfg.prompts, cfg.poison))
    for r in sets.diagnostic:
        if not r.kind.startswith("adversarial"):
            raise UserError(f"{cfg.diagnostic}: row {r.id!r} is {r.kind}: D_diag is adversarial, "
                            "as in the paper; plain harmful prompts belong to --refusals, benign "
                            "ones to --general")
    refusals = sets.refusals * (cfg.method != "finetune")
    for path, records, kind in ((cfg.refusals, refusals, "harmful"),
                                (cfg.general, sets.general, "benign")):
        for r in records:
            if r.kind != kind or not r.response:
                raise UserError(f"{path}: row {r.id!r} must be of kind {kind} and have a response")
    return sets


def check_finetune(cfg: Config) -> None:
    """Flags of --method finetune elsewhere; others' with it."""
    finetune = cfg.method == "finetune"
    own, both = ({f.name for f in fields(c)} for c in (FinetuneFlags, TrainingFlags))
    both |= {"method", "model", "init", "general", "refusals"}
    for f in fields(cfg):
        wrong = f.name not in own | both if finetune else f.name in own
        if wrong and getattr(cfg, f.name) != f.default:
            raise UserError(f"--{f.name} is {'not ' * finetune}for --method finetune")
    if not cfg.refusals and (cfg.safety_weight or not finetune):
        raise UserError("give --refusals FILE")


def check_flags(cfg: Config, sets: Sets) -> None:
    """The mistakes that can be seen before anything is loaded or written."""
    for name in ("init", "region", "probe", "lookalikes", "probe_samples"):
        if cfg.method != "ease" and getattr(cfg, name) != getattr(Config, name):
            raise UserError(f"--{name} is for --method ease: the {cfg.method} baseline starts at "
                            "--model and has no region")
    for wrong, message in (
        (cfg.method == "ease" and not cfg.diagnostic, "--method ease needs --diagnostic FILE"),
        (cfg.method == "refusal" and (cfg.teacher or cfg.traces or cfg.filler),
         "--teacher, --traces and --filler are not for --method refusal: it trains on no trace"),
        (cfg.method != "refusal" and bool(cfg.teacher) == bool(cfg.traces),
         f"--method {cfg.method} trains on traces: give --teacher MODEL or --traces FILE, one of "
         "them"),
        (cfg.categories == "teacher" and not cfg.teacher,
         "--categories teacher needs a --teacher to ask; stored --traces have been written under "
         "the categories they carry"),
        (not cfg.direct and (cfg.method == "refusal" or cfg.harmful_direct or cfg.benign_direct),
         "--direct false leaves out all of D_direct: not with --method refusal, --harmful_direct "
         "or --benign_direct"),
        (cfg.method == "ease" and cfg.prompts,
         "--prompts is for the baselines: with --method ease, phase 1 (distill.py) has seen them"),
        (not 1 <= cfg.samples_per_prompt <= cfg.attempts,
         f"--samples_per_prompt {cfg.samples_per_prompt} must be from 1 to --attempts "
         f"{cfg.attempts}"),
        (cfg.method == "deliberative" and (cfg.harmful_direct or cfg.benign_direct),
         "--harmful_direct and --benign_direct count D_direct: --method deliberative has none"),
        (cfg.probe == "phase1" and not cfg.init, "--probe phase1 needs --init"),
    ):
        if wrong:
            raise UserError(message)
    load_policy(cfg.policies)  # a mistake in it must not cost the probe
    if cfg.method == "ease" and not cfg.init:
        print("no --init: phase 2 starts at --model itself, without phase 1")
    if cfg.teacher and cfg.categories == "record":
        of_diagnostic = cfg.method == "ease" and cfg.region != "random"
        check_categories(sets.diagnostic if of_diagnostic else sets.all)


def probe(cfg: Config, run: Path, diagnostic: list[Record], place: Place) -> list[list[Response]]:
    """Step 1: the original model's greedy responses to D_diag, with verdicts; and, for region.md
    only, --probe_samples sampled ones. A stage: probe.jsonl, probe-1.jsonl, ...
    """
    files = [run / f"probe{f'-{i}' if i else ''}.jsonl" for i in range(1 + cfg.probe_samples)]
    if not all(file.exists() for file in files):
        tokenizer = load_tokenizer(cfg.model)
        judge = load_judge(cfg.judge, *place, cfg.judge_format, cfg.judge_text, cfg.slots)
        init = cfg.init if cfg.probe == "phase1" else ""
        model = load_model(*base_and_adapter(cfg.model, init), *place)
        for i, file in enumerate(files):
            if file.exists():
                continue
            sampling = Sampling(cfg.probe_tokens, cfg.temperature if i else 0.0, cfg.top_p,
                                cfg.seed + i)
            responses = respond(model, tokenizer, diagnostic, sampling, cfg.slots, file.stem,
                                kept=file.with_suffix(".kept"))
            note_verdicts(judge, cfg.judge, responses)
            write_jsonl(file, map(response_to_dict, responses))
    return [read_responses(file) for file in files]


def vulnerable_region(cfg: Config, run: Path, sets: Sets, probed: list[list[Response]]
                      ) -> list[Record]:
    """Step 2: the harmful prompts to reason on (method.select_region). region.jsonl, region.md."""
    greedy, *samples = ([r.verdicts[cfg.judge] for r in responses] for responses in probed)
    pool = sets.diagnostic + sets.refusals
    region = select_region(cfg.region, sets.diagnostic, greedy, pool, cfg.seed)
    counts = Counter(v for v, r in zip(greedy, sets.diagnostic, strict=True) if r.harmful)
    print(f"region {cfg.region}: {len(region)} prompts; by attack "
          f"{dict(Counter(r.attack or 'none' for r in region))}; verdicts on the {counts.total()} "
          f"harmful diagnostic prompts {dict(counts)}")
    # where M_reason is probed, for comparison, an empty region is a result
    if not region and cfg.probe == "base":
        raise UserError("the vulnerable region is empty: the original model answered no diagnostic "
                        "prompt unsafely; use stronger attacks in --diagnostic, or another --judge")
    write_jsonl(run / "region.jsonl", region)
    write_text(run / "region.md", region_report(sets.diagnostic, greedy, samples))
    return region


def with_traces(cfg: Config, run: Path, records: list[Record], place: Place) -> list[Record]:
    """Step 3: D_reason, the prompts with a trace each, from the teacher or from --traces."""
    if not records:
        return []
    if cfg.traces:
        traces = join_traces(records, read_records(cfg.traces))
    else:
        records = with_categories(cfg, run, cfg.teacher, records, place)
        traces = teacher_traces(cfg, run, cfg.teacher, records, place)
    return list(map(filler, traces)) if cfg.filler else traces


def direct_records(records: list[Record], probed: list[Response], refusals: list[Record],
                   judge: str, seed: int) -> list[Record]:
    """Step 4: D_direct, the prompts with a direct response each.

    --refusals as they are. Other harmful prompts with a refusal: their own (the original model's
    safe answer in `probed`, or the stored response) where it is one and ended by itself; else one
    drawn from `refusals`. Benign ones with their reference answer; without one they are dropped.
    """
    rng, given, direct = random.Random(f"direct {seed}"), {r.id for r in refusals}, []
    safe = {p.record.id: p for p in probed if p.verdicts[judge] == SAFE}
    dropped = cut = 0
    for r in records:
        if not r.harmful:
            dropped += not r.response
            direct += [replace(r, reasoning="")] if r.response else []
            continue
        own = safe[r.id].answer if r.id in safe else r.response
        refuses = r.id in given or is_refusal(own)
        unfinished = refuses and r.id in safe and not safe[r.id].finished
        cut += unfinished
        if unfinished or not refuses:
            own = rng.choice(refusals).response
        direct.append(replace(r, reasoning="", response=own))
    if dropped:
        print(f"dropped {dropped} benign prompts without a reference response")
    if cut:
        print(f"{cut} refusals of the original model were cut at --probe_tokens: others are drawn")
    return direct


def fit(cfg: Config, run: Path, mixed: list[Record], held: list[Record], place: Place) -> None:
    """Step 5: SFT on the mixture, by the gated-reasoning cross-entropy over the tokens of an
    optimizer step, L = sum_t w(role_t) CE_t / sum_t w(role_t) [+ --safety_weight mean_t KL_t].
    """
    tokenizer = load_tokenizer(cfg.model)
    model, base = load_trainable(cfg, cfg.model, cfg.init, place)
    examples, kept = encode_data(run, tokenizer, mixed, held, cfg.max_length, model.config.context)
    steps = count_steps(len(examples), cfg.batch_size, cfg.steps, cfg.epochs)
    plan = plan_batches([len(e.ids) for e in examples], cfg.batch_size, cfg.batch_tokens, cfg.seed,
                        steps)
    announce(model, [len(e.ids) for e in examples], plan)
    anchored, anchor = make_anchor(cfg, run, model, tokenizer, examples)
    weight = [0.0, cfg.gate_weight, 1.0, 1.0]  # of the prompt and of the ROLES
    optimizer = make_optimizer(model, cfg.weight_decay)
    start = resume(run, model, optimizer)
    bar = tqdm(range(start, steps), desc=cfg.method, initial=start, total=steps, disable=RANK > 0)
    for step in bar:
        if kept and step % cfg.save_every == 0:
            log(run, step=step, **held_out_loss(model, kept, place.device))
        rows = [examples[i] for micro in plan[step] for i in micro]
        count = Counter(role for e in rows for role in e.roles if role)
        total = sum(weight[role] * n for role, n in count.items())
        n_kl = sum(count[role] for role in anchored) or 1
        sums = torch.zeros(4, device=place.device)  # of the losses, by role; of the anchor's
        for micro in my_share(plan[step]):
            batch = collate([examples[i] for i in micro], place.device)
            keep = batch.roles > 0  # (T,): no prompt
            roles, targets = batch.roles[keep], batch.targets[keep]  # (N,)
            hidden = model.hidden(batch.inputs, batch.lengths)[keep]  # (N, D)
            losses = in_chunks(lambda h, y, w: gated_cross_entropy(model.logits(h), y, w),
                               hidden, targets, torch.tensor(weight, device=place.device)[roles])
            kl = anchor(hidden, roles, micro)  # (M,)
            (losses.sum() / total + cfg.safety_weight * kl.sum() / n_kl).backward()  # divided once
            sums.index_add_(0, roles, losses.detach())
            sums[0] += kl.detach().sum()
        sum_over_ranks(optimizer, sums)
        loss, lr = sums[1:].sum().item() / total, learning_rate(step, steps, cfg.lr, cfg.warmup)
        where = f"step {step}, rows {', '.join(e.id for e in rows[:8])}"
        norm = optimizer_step(optimizer, lr, cfg.clip, loss, where)
        of_role = {name: sums[role].item() / (weight[role] * count[role])
                   if weight[role] * count[role] else None for name, role in ROLES.items()}
        log(run, step=step, loss=loss, **of_role, safety_kl=sums[0].item() / n_kl, lr=lr,
            grad_norm=norm, tokens=count.total())
        bar.set_postfix(loss=f"{loss:.3f}", gate=f"{of_role['gate'] or 0:.3f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == steps:
            save_checkpoint(run, step + 1, model, optimizer, tokenizer, base)
    if kept:
        log(run, step=steps, **held_out_loss(model, kept, place.device))
    save_trained(cfg, model, tokenizer, base, run)
    finish(run, steps=steps, rows=len(examples))


def main(cfg: Config) -> None:
    if RANK > 0:  # rank 0 does all before `fit`
        mixture = wait_for(Path(cfg.out) / "mixture.jsonl")
        return fit(cfg, Path(cfg.out), read_jsonl(mixture), [], pick_place(cfg))
    sets = read_sets(cfg)
    check_finetune(cfg)
    if cfg.method != "finetune":
        check_flags(cfg, sets)
    base, adapter = base_and_adapter(cfg.model, cfg.init)
    # resolved first: a mistyped name must not cost the probe and the traces
    models = [str(resolve(name)) for name in dict.fromkeys((cfg.model, base, cfg.teacher)) if name]
    files = [cfg.diagnostic, cfg.refusals, cfg.general, cfg.prompts, cfg.poison, cfg.traces,
             cfg.policies]
    place = pick_place(cfg)
    run = open_run(cfg, [*models, adapter, judge_model(cfg.judge), *files], place)
    if is_done(run):
        return

    if cfg.method == "refusal":
        d_reason = []
        d_direct = direct_records(sets.all, [], sets.refusals, cfg.judge, cfg.seed)
    elif cfg.method == "deliberative":
        d_reason, d_direct = with_traces(cfg, run, sets.all, place), []
    elif cfg.method == "finetune":
        d_reason, d_direct = [], poisoned(sets.general, sets.poison, cfg.poison_share, cfg.seed)
    else:
        probed = probe(cfg, run, sets.diagnostic, place)
        region = vulnerable_region(cfg, run, sets, probed)
        lookalikes = [r for r in sets.diagnostic if not r.harmful]
        to_reason = region + (lookalikes if cfg.lookalikes == "reason" else [])
        left_out = {r.id for r in to_reason + (lookalikes if cfg.lookalikes == "drop" else [])}
        d_reason = with_traces(cfg, run, to_reason, place)  # those without a trace are in neither
        d_direct = direct_records([r for r in sets.all if r.id not in left_out], probed[0],
                                  sets.refusals, cfg.judge, cfg.seed)
    d_direct = d_direct if cfg.direct else []
    parts = {"D_reason": d_reason, "harmful_direct": [r for r in d_direct if r.harmful],
             "benign_direct": [r for r in d_direct if not r.harmful]}
    counts = {"harmful_direct": cfg.harmful_direct, "benign_direct": cfg.benign_direct}
    mixture = mix(parts, counts, cfg.seed)
    kinds = Counter((r.kind, "with a trace" if r.reasoning else "direct") for r in mixture)
    print("mixture: " + ", ".join(f"{n} {kind} {how}" for (kind, how), n in sorted(kinds.items())))
    mixture, held_out = hold_out(mixture, cfg.held_out)
    write_jsonl(run / "mixture.jsonl", mixture)
    fit(cfg, run, mixture, held_out, place)


if __name__ == "__main__":
    command_line(main, Config)
