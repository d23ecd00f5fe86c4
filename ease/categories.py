"""Safety policy classification: query q -> categories c (paper, phase 1, step 1)."""

from dataclasses import replace
from os.path import commonprefix

import torch
from tqdm import tqdm

from ease.model import CausalLM, KVCache
from ease.policies import BENIGN, Policy, category_messages
from ease.records import Record, UserError
from ease.scoring import category_agreement
from ease.tokenizer import Tokenizer


def first_tokens(tokenizer: Tokenizer, word: str) -> set[int]:
    """The ids an answer may begin a word with: its forms that are one token, else the first token
    of the word itself.
    """
    spellings = (word, word.title(), f" {word}", f" {word.title()}")
    forms = [tokenizer.encode(w) for w in spellings]
    return {f[0] for f in forms if len(f) == 1} or {forms[0][0]}


@torch.inference_mode()
def yes_probabilities(model: CausalLM, tokenizer: Tokenizer, questions: list[list[dict]]
                      ) -> list[float]:
    """P(yes) / (P(yes) + P(no)) as the answer's first token, for conversations that begin alike:
    what all of them share is computed once.
    """
    yes, no = (sorted(first_tokens(tokenizer, word)) for word in ("yes", "no"))
    if set(yes) & set(no):
        raise UserError("this teacher's tokenizer begins 'yes' and 'no' with one token: it cannot "
                        "classify")
    prompts = [tokenizer.encode_prompt(q) for q in questions]
    start = min(len(commonprefix(prompts)), min(map(len, prompts)) - 1)  # a token each is left
    n, longest = len(prompts), max(map(len, prompts))
    cache = KVCache(model.config, n, longest, next(model.parameters()).dtype, model.device)
    if start:
        model.last_logits([prompts[0][:start]], cache=cache)
        for slot in range(1, n):
            cache.move(0, slot)
    logits = model.last_logits([p[start:] for p in prompts], cache=cache, starts=[start] * n)
    p = logits[:, 0].softmax(-1)  # (n, V)
    p_yes, p_no = p[:, yes].sum(-1), p[:, no].sum(-1)  # (n,)
    return (p_yes / (p_yes + p_no)).tolist()


def classify(teacher: CausalLM, tokenizer: Tokenizer, records: list[Record], policy: Policy
             ) -> list[Record]:
    """Records with the teacher's categories: all whose P(yes) exceeds P(no), "benign" if none
    does. Where records carry categories already, the agreement is printed.
    """
    categories = [c for c in policy.texts if c != BENIGN]
    if not categories:
        raise UserError("the policy file has no category but benign: there is nothing to classify")
    classified = []
    for r in tqdm(records, desc="categories"):
        questions = [category_messages(r.prompt, c) for c in categories]
        p = yes_probabilities(teacher, tokenizer, questions)
        found = tuple(c for c, yes in zip(categories, p) if yes > 0.5) or (BENIGN,)
        classified.append(replace(r, categories=found))
    if wrong := sum(r.harmful and r.categories == (BENIGN,) for r in classified):
        print(f"the teacher calls {wrong} harmful prompts benign: it will see no policy for them")
    if labelled := [(new, old) for new, old in zip(classified, records) if old.categories]:
        a = category_agreement([new.categories for new, _ in labelled],
                               [old.categories for _, old in labelled])
        print(f"the teacher's categories against the {a['n']} labelled rows: accuracy "
              f"{a['accuracy']:.3f}, micro F1 {a['f1']:.3f}")
    return classified
