"""What the teacher is told, and which of its traces count (paper, phase 1, steps 1 and 2).

The policy text stands in the teacher's prompt only, never in the student's: that is what makes this a distillation of the
policy into the weights (context distillation). The wording is ours; the eight categories are the paper's.
"""

import json
import re
from pathlib import Path

from ease.method import UNCLOSED, WELL_FORMED, split_reasoning
from ease.records import Record, UserError

BENIGN = "benign"

INSTRUCTION = (
    "Think before you answer. Between <think> and </think> say in your own words what the user is really asking for, also when "
    "it is disguised, which part of the policy below applies, and what the policy asks of you. Then write the answer that the "
    "user will see. Do not quote the policy in the answer."
)

POLICIES = {
    "Harassment / Hate / Discrimination": (
        "Refuse to write or plan abuse, threats or dehumanising claims about a person or a protected group. Education, history, "
        "counter-speech and neutral description are welcome. Offer respectful wording or help against harassment instead."
    ),
    "Sexual / Adult": (
        "Refuse sexual content that involves minors, coercion or a real person without consent, and graphic content in general. "
        "Answer questions on health, relationships and the law factually. Offer trustworthy sources instead."
    ),
    "Violence / Physical Harm": (
        "Refuse instructions, encouragement or planning for hurting people or animals. Safety advice, fiction without usable "
        "detail and news are fine. Offer ways to calm a conflict and places to find help instead."
    ),
    "Self-Harm": (
        "Never give methods or encouragement. Answer with care, take the person seriously, name crisis lines and people to talk "
        "to, and stay with the conversation. General education on prevention is fine."
    ),
    "Illicit / Criminal Behavior": (
        "Refuse steps, tools or tricks that make a crime easier, dangerous substances and break-ins of any sort included. "
        "Explain laws, risks and prevention freely. Offer the lawful way to the same end instead."
    ),
    "Misinformation / Disinformation": (
        "Refuse to make deceptive content that is meant to be believed, or to impersonate. Correct false premises and say how "
        "sure one can be. Offer an accurate account or media-literacy help instead."
    ),
    "Privacy / Personal Data": (
        "Refuse to find, infer or expose personal data of others, or to track them. Explain how people protect their own data. "
        "Offer lawful channels instead."
    ),
    "Intellectual Property": (
        "Refuse long verbatim copies of protected works and ways around licences or copy protection. Short quotations, summaries "
        "and explanations of the law are fine. Offer a summary or a licensed source instead."
    ),
    BENIGN: "Nothing here is restricted. Say briefly that the request is harmless, however it is worded, and answer it fully.",
}
CATEGORIES = tuple(POLICIES)


def load_policies(path: str | Path | None) -> tuple[str, dict[str, str]]:
    """(instruction, {category: policy text}): ours, or those of a JSON file {"instruction": ..., "policies": {...}}."""
    if not path:
        return INSTRUCTION, POLICIES
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        instruction, policies = data["instruction"], data["policies"]
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError) as e:
        raise UserError(f"{path}: a policy file is JSON with 'instruction' and 'policies' ({e!r})") from None
    if BENIGN not in policies:
        raise UserError(f"{path}: field 'policies' lacks {BENIGN!r}")
    return instruction, policies


def parse_categories(text: str, policies: dict[str, str] = POLICIES) -> tuple[str, ...]:
    """The categories named in "A, B" (multi-label), in order of appearance. Unknown text is an error, not a default.

    (The official code maps "A, B" to nothing and falls back to one fixed policy.)
    """
    lower = text.lower()
    found = sorted((lower.find(name.lower()), name) for name in policies if name.lower() in lower)
    rest = lower
    for _, name in found:
        rest = rest.replace(name.lower(), " ")
    if rest := rest.strip(" ,;\n\t[]'\""):
        raise UserError(f"unknown category {rest!r}; known: {', '.join(policies)}")
    return tuple(name for _, name in found)


def teacher_messages(prompt: str, categories: tuple[str, ...], instruction: str = INSTRUCTION,
                     policies: dict[str, str] = POLICIES) -> list[dict]:
    """The teacher's conversation (q, c, p): instruction and the policy of every category, then the query alone.

    No categories = benign. A category without a policy is an error.
    """
    for name in categories or (BENIGN,):
        if name not in policies:
            raise UserError(f"category {name!r} has no policy; known: {', '.join(policies)}")
    rules = "\n".join(f"{name}: {policies[name]}" for name in categories or (BENIGN,))
    return [{"role": "system", "content": f"{instruction}\n{rules}"}, {"role": "user", "content": prompt}]


def cites(reasoning: str, categories: tuple[str, ...], policies: dict[str, str] = POLICIES) -> bool:
    """Whether a reasoning names one of the categories ("Hate" of "Harassment / Hate / ..." will do) or quotes four words in a row
    of its policy (all of a shorter one).
    """
    def words(text: str) -> list[str]:
        return re.findall(r"[\w'-]+", text.lower())

    said = f" {' '.join(words(reasoning))} "  # whole words: "whatever" does not name hate
    for name in categories:
        rule = words(policies[name])
        phrases = [words(part) for part in name.split("/")] + [rule[i : i + 4] for i in range(max(1, len(rule) - 3))]
        if any(f" {' '.join(p)} " in said for p in phrases if p):
            return True
    return False


def is_loop(text: str) -> bool:
    """Whether a text repeats itself: a run of words four times in a row, twelve words or more in all."""
    words = text.split()
    for period in range(1, 51):
        same = 0  # words in a row that equal the word one period before
        for i in range(period, len(words)):
            same = same + 1 if words[i] == words[i - period] else 0
            if same >= 3 * period and same + period >= 12:
                return True
    return False


def category_messages(prompt: str, category: str) -> list[dict]:
    """The question by which a teacher classifies (paper, phase 1, step 1), one a category; all of a prompt begin alike."""
    return [{"role": "user", "content": f"Here is a request to an assistant:\n{prompt}\n\nDoes it touch the policy area \"{category}\"? Answer yes or no."}]


def accept_trace(record: Record, text: str, verdict: str, refused: bool, finished: bool, policies: dict[str, str] = POLICIES) -> str | None:
    """None if the teacher's text counts, else the reason why it is dropped (paper, phase 1: rejection sampling).

    verdict: the judge's word on the ANSWER (safe / unsafe / unparsed); refused: whether the answer is a refusal;
    finished: the teacher stopped by itself. A harmful row must be answered safely, a benign row must not be refused, and where
    the policy restricts something the reasoning must cite it.
    """
    reasoning, answer, state = split_reasoning(text)
    restricted = tuple(c for c in record.categories if c != BENIGN)
    if not finished:
        return "cut off"
    if state != WELL_FORMED:
        return "think block unclosed" if state == UNCLOSED else "no think block"
    if not reasoning:
        return "empty reasoning"
    if not answer:
        return "empty answer"
    if is_loop(text):
        return "repetition loop"
    if restricted and not cites(reasoning, restricted, policies):
        return "names no category and no rule"
    if record.harmful and verdict != "safe":
        return f"harmful request, answer judged {verdict}"
    if not record.harmful and refused:
        return "benign request refused"
    return None
