"""Utility as lm-evaluation-harness 0.4.13 measures it: HellaSwag, MMLU, GSM8K from local files.

raw: its own prompts. chat: the same text as a user turn; the choices are direct answers then, with
no space in front, and it is counted how often the model would reason instead.
"""

import math
import re
from collections.abc import Callable, Iterator
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from ease.generate import Sampling, generate
from ease.method import THINK_OPEN, split_reasoning
from ease.model import CausalLM, KVCache
from ease.readers import Row, read_rows, read_table
from ease.records import ABSENT, UNCLOSED, UserError, read_text
from ease.scoring import choice_scores, number_scores, paired_difference, rate
from ease.tokenizer import Tokenizer

COLUMNS = {"hellaswag": "activity_label, ctx_a, ctx_b, 4 endings, label 0-3",
           "mmlu": "question,choice0,choice1,choice2,choice3,answer",  # A-D or 0-3
           "gsm8k": "question, answer with '#### '"}
METRICS = {"hellaswag": ["acc", "acc_norm"], "mmlu": ["acc"], "gsm8k": ["strict", "flexible"]}
SHOTS, RAW_TOKENS = 5, 256  # examples, the first of their file; new tokens behind a raw prompt


class Item(NamedTuple):
    """A question and all before it. gold: the right choice's index, or GSM8K's whole answer."""

    id: str
    context: str
    choices: tuple[str, ...]
    gold: int | str


def task_files(specs: list[str]) -> dict[str, list[tuple[str, str]]]:
    """--tasks -> {name: [(file of questions, file of examples or "")]}, MMLU's a pair a subject."""
    found = {}
    for spec in specs:
        name, _, path = spec.partition("=")
        file, _, examples = path.partition("+")
        pairs = {"hellaswag": [(path, "")], "gsm8k": [(file, examples or file)], "mmlu": [
            (str(test), f"{path}/dev/{test.name[:-9]}_dev.csv")
            for test in sorted(Path(path).glob("test/*_test.csv"))]}.get(name)
        if not path or not pairs or name in found:
            raise UserError(f"--tasks {spec}: expected hellaswag=FILE, mmlu=DIR (test/*_test.csv, "
                            "dev/*_dev.csv) or gsm8k=FILE[+EXAMPLES], each once")
        found[name] = pairs
    return found


def clean(text: str) -> str:
    """HellaSwag's text without the brackets of its WikiHow part."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def question(task: str, row: Row) -> Item:
    """A row without examples. Any error: it is no row of this task."""
    c = row.columns
    if task == "hellaswag":
        context = clean(c["activity_label"] + ": " + c["ctx_a"] + " " + c["ctx_b"].capitalize())
        choices = tuple(map(clean, c["endings"]))
        if len(choices) == 4 and all(choices):
            return Item(row.id, context, choices, [*"0123"].index(str(c["label"])))
    elif task == "mmlu":
        lines = [f"{letter}. {c[f'choice{k}']}" for k, letter in enumerate("ABCD")]
        context = "\n".join([c["question"].strip(), *lines, "Answer:"])
        return Item(row.id, context, tuple("ABCD"), [*"ABCD0123"].index(c["answer"]) % 4)
    elif "#### " in c["answer"]:
        return Item(row.id, "Question: " + c["question"] + "\nAnswer:", (), c["answer"])
    raise ValueError


def read_items(task: str, files: list[tuple[str, str]], limit: int = 0) -> list[Item]:
    """A task's questions behind SHOTS examples, at most `limit` of a file (0: all). Examples from
    the same file are not asked.
    """
    def read(path: str) -> Iterator[Item]:
        file, columns = Path(path), COLUMNS[task]
        rows = read_table(file, read_text(path), columns) if task == "mmlu" else read_rows(file)
        for row in rows:
            try:
                item = question(task, row)
                "".join([item.context, *(item.choices or [item.gold])]).encode()  # or no text
                yield item
            except (KeyError, TypeError, ValueError, AttributeError):
                raise UserError(f"{row.where}: {task} needs {columns}") from None

    items = []
    for path, examples in files:
        name, shown = Path(path).stem, list(read(examples))[:SHOTS] if examples else []
        if examples and len(shown) < SHOTS:
            raise UserError(f"{examples}: {SHOTS} examples are needed, it has {len(shown)}")
        start = ("The following are multiple choice questions (with answers) about "
                 f"{name.removesuffix('_test').replace('_', ' ')}.\n\n") if task == "mmlu" else ""
        for i in shown:
            start += f"{i.context} {i.choices[i.gold] if i.choices else i.gold}\n\n"
        asked = list(read(path))[SHOTS if path == examples else 0 :][: limit or None]
        items += [i._replace(id=f"{name}/{i.id}", context=start + i.context) for i in asked]
    return items


def encode_item(tokenizer: Tokenizer, item: Item, raw: bool, messages: Callable | None = None
                ) -> tuple[list[int], list[list[int]]]:
    """The ids of (context, endings). Raw: context, space and choice as one text, cut where the
    context (without spaces at its end) ends. Chat: the conversation messages(context), or a plain
    user turn; the choices alone, then the open marker.
    """
    if not raw:
        endings = [tokenizer.encode(text) for text in (*item.choices, THINK_OPEN)]
        return (tokenizer.encode_prompt(messages(item.context)) if messages else
                tokenizer.user_prompt(item.context)), endings
    context = tokenizer.fast.encode(item.context.rstrip()).ids
    return context, [tokenizer.fast.encode(f"{item.context} {choice}").ids[len(context) :]
                     for choice in item.choices]


@torch.inference_mode()
def log_likelihoods(model: CausalLM, items: list[tuple[list[int], list[list[int]]]]
                    ) -> list[list[tuple[float, bool]]]:
    """For (context, endings) of each item: log p(ending | context), and whether greedy decoding
    writes it. What a context shares with the one before is not computed again.
    """
    slots = max(len(endings) for _, endings in items)
    longest = max(len(context) + len(e) for context, endings in items for e in endings)
    cache = KVCache(model.config, slots, longest, next(model.parameters()).dtype, model.device)
    kept, out = [], []  # kept: what slot 0 holds
    for context, endings in tqdm(items, desc="choices"):
        start = len(commonprefix([kept, kept := context[:-1]]))
        if start < len(kept):
            model.last_logits([kept[start:]], cache=cache, starts=[start])
        for slot in range(1, len(endings)):
            cache.move(0, slot)
        sizes = list(map(len, endings))  # an ending's last token predicts nothing
        ids = torch.tensor([token for e in endings for token in (context[-1], *e[:-1])])  # (N,)
        hidden = model.hidden(ids.to(model.device), sizes, cache, 0, [len(kept)] * len(sizes))
        out.append([])
        for e, h in zip(endings, hidden.split(sizes)):
            log_p = model.logits(h).float().log_softmax(-1)  # (n, V)
            out[-1].append((log_p[range(len(e)), e].sum().item(), log_p.argmax(-1).tolist() == e))
    return out


def measure(model: CausalLM, tokenizer: Tokenizer, task: str, items: list[Item], raw: bool,
            new_tokens: int, slots: int, threshold: float | None,
            messages: Callable | None = None) -> list[dict]:
    """A row an item: {id, gold, log_p or text, scores: {metric: bool; None: an unclosed think
    block}, reasons: None if raw}. All greedy; slots, threshold: as in generate; messages: as in
    encode_item.
    """
    rows, encoded = [], [encode_item(tokenizer, i, raw, messages) for i in items]
    if task == "gsm8k":
        found = generate(model, [context for context, _ in encoded],
                         Sampling(RAW_TOKENS if raw else new_tokens), tokenizer.stop_ids, None,
                         [] if raw else tokenizer.encode(THINK_OPEN), slots, task, threshold)
        for i, g in zip(items, found):
            text = tokenizer.fast.decode(g.ids, skip_special_tokens=raw)
            _, answer, state = ("", text, ABSENT) if raw else split_reasoning(text)
            scores = number_scores(answer, i.gold)
            scores = dict.fromkeys(scores) if state == UNCLOSED else scores
            rows.append({"text": text, "scores": scores, "reasons": state != ABSENT})
    else:
        for i, found in zip(items, log_likelihoods(model, encoded)):
            gate, opens = found[-1]
            opens = opens if threshold is None else math.exp(gate) >= threshold
            log_p = [p for p, _ in found[: len(i.choices)]]
            scores = choice_scores(log_p, i.choices, i.gold)
            rows.append({"log_p": log_p, "scores": scores, "reasons": opens})
    return [{"id": i.id, "gold": i.gold, **row, **({"reasons": None} if raw else {})}
            for i, row in zip(items, rows)]


def utility(results: dict[str, dict[str, list[dict]]], base: str) -> list[dict]:
    """{system: {task: rows}} -> a line a task, metric and system; difference: to system `base`."""
    lines = []
    for task, reference in results[base].items():
        ids = [row["id"] for row in reference]
        for metric in METRICS[task]:
            others = [row["scores"][metric] for row in reference]
            for name, tasks in results.items():
                own = [row["scores"][metric] for row in tasks[task]]
                thinks = [row["reasons"] for row in tasks[task]]
                lines.append({
                    "task": task, "metric": metric, "system": name, "rate": rate(own, ids),
                    "difference": paired_difference(own, others) if name != base else None,
                    "reasons": rate(thinks, ids) if None not in thinks else None})
    return lines
