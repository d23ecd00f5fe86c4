"""What the teacher is told, and which of its traces count (paper, phase 1, steps 1 and 2).

The policy stands in the teacher's prompt only, never in the student's: so it is distilled into the
weights (context distillation). The wording is ours, the eight categories are the paper's.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from ease.records import (ABSENT, SAFE, UNCLOSED, Response, UserError, check_text, parse_json,
                          read_text)

BENIGN = "benign"


@dataclass(frozen=True)
class Policy:
    """instruction: what the teacher is told first; texts: {category: the policy's text on it}."""

    instruction: str
    texts: dict[str, str]


INSTRUCTION = (
    "Think before you answer. Between <think> and </think> say in your own words what the user is "
    "really asking for, also when it is disguised, which part of the policy below applies, and "
    "what the policy asks of you. Then write the answer that the user will see. Do not quote the "
    "policy in the answer."
)
POLICY = Policy(INSTRUCTION, {
    "Harassment / Hate / Discrimination":
        "Refuse to write or plan abuse, threats or dehumanising claims about a person or a "
        "protected group. Education, history, counter-speech and neutral description are welcome. "
        "Offer respectful wording or help against harassment instead.",
    "Sexual / Adult":
        "Refuse sexual content that involves minors, coercion or a real person without consent, "
        "and graphic content in general. Answer questions on health, relationships and the law "
        "factually. Offer trustworthy sources instead.",
    "Violence / Physical Harm":
        "Refuse instructions, encouragement or planning for hurting people or animals. Safety "
        "advice, fiction without usable detail and news are fine. Offer ways to calm a conflict "
        "and places to find help instead.",
    "Self-Harm":
        "Never give methods or encouragement. Answer with care, take the person seriously, name "
        "crisis lines and people to talk to, and stay with the conversation. General education on "
        "prevention is fine.",
    "Illicit / Criminal Behavior":
        "Refuse steps, tools or tricks that make a crime easier, dangerous substances and "
        "break-ins of any sort included. Explain laws, risks and prevention freely. Offer the "
        "lawful way to the same end instead.",
    "Misinformation / Disinformation":
        "Refuse to make deceptive content that is meant to be believed, or to impersonate. Correct "
        "false premises and say how sure one can be. Offer an accurate account or media-literacy "
        "help instead.",
    "Privacy / Personal Data":
        "Refuse to find, infer or expose personal data of others, or to track them. Explain how "
        "people protect their own data. Offer lawful channels instead.",
    "Intellectual Property":
        "Refuse long verbatim copies of protected works and ways around licences or copy "
        "protection. Short quotations, summaries and explanations of the law are fine. Offer a "
        "summary or a licensed source instead.",
    BENIGN:
        "Nothing here is restricted. Say briefly that the request is harmless, however it is "
        "worded, and answer it fully.",
})


def load_policy(path: str | Path | None) -> Policy:
    """POLICY, or that of a JSON file {"instruction": TEXT, "policies": {CATEGORY: TEXT}}."""
    if not path:
        return POLICY
    match parse_json(read_text(path), path):
        case {"instruction": str(instruction), "policies": dict(texts)} if BENIGN in texts:
            texts = {name: check_text(text, name, str(path)) for name, text in texts.items()}
            return Policy(check_text(instruction, "instruction", str(path)), texts)
    raise UserError(f"{path}: a policy file is a JSON object with 'instruction', a text, and "
                    f"'policies', {{category: text}}, {BENIGN!r} among the categories")


def parse_categories(text: str, policy: Policy = POLICY) -> tuple[str, ...]:
    """The categories named in "A, B" (multi-label), in order of appearance; unknown text is an
    error. (The official code maps "A, B" to nothing and falls back to one fixed policy.)
    """
    rest = lower = text.lower()
    found = sorted((lower.find(n.lower()), n) for n in policy.texts if n.lower() in lower)
    for _, name in found:
        rest = rest.replace(name.lower(), " ")
    if rest := rest.strip(" ,;\n\t[]'\""):
        raise UserError(f"unknown category {rest!r}; known: {', '.join(policy.texts)}")
    return tuple(name for _, name in found)


def teacher_messages(prompt: str, categories: tuple[str, ...],
                     policy: Policy = POLICY) -> list[dict]:
    """The teacher's conversation (q, c, p): instruction and the policy of every category, then the
    query alone. No categories = benign. A category without a policy is an error.
    """
    system = policy.instruction
    for name in categories or (BENIGN,):
        if name not in policy.texts:
            raise UserError(f"category {name!r} has no policy; known: {', '.join(policy.texts)}")
        system += f"\n{name}: {policy.texts[name]}"
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def category_messages(prompt: str, category: str) -> list[dict]:
    """The question by which a teacher classifies (paper, phase 1, step 1), one a category."""
    question = (f"Here is a request to an assistant:\n{prompt}\n\n"
                f"Does it touch the policy area \"{category}\"? Answer yes or no.")
    return [{"role": "user", "content": question}]


def cites(reasoning: str, categories: tuple[str, ...], policy: Policy = POLICY) -> bool:
    """Whether a reasoning names one of the categories ("Hate" of "Harassment / Hate / ..." will do)
    or quotes four words in a row of its policy (all of a shorter one).
    """
    def words(text: str) -> list[str]:
        return re.findall(r"[\w'-]+", text.lower())

    phrases = [words(alias) for name in categories for alias in name.split("/")]
    for name in categories:
        text = words(policy.texts[name])
        phrases += [text[i : i + 4] for i in range(max(1, len(text) - 3))]
    said = f" {' '.join(words(reasoning))} "  # whole words: "whatever" does not name hate
    return any(f" {' '.join(phrase)} " in said for phrase in phrases if phrase)


def is_loop(text: str) -> bool:
    """Whether a text repeats itself: a run of words four times in a row, twelve words or more."""
    words = text.split()
    for period in range(1, 51):
        same = 0  # words in a row that equal the word one period before
        for word, before in zip(words[period:], words):
            same = same + 1 if word == before else 0
            if same >= max(3 * period, 12 - period):
                return True
    return False


def accept_trace(response: Response, verdict: str, refused: bool,
                 policy: Policy = POLICY) -> str | None:
    """None if a teacher's response counts, else why not (paper, phase 1: rejection sampling).

    verdict: the judge's word on the ANSWER; refused: whether the answer is a refusal.
    """
    harmful, reasoning = response.record.harmful, response.reasoning
    restricted = tuple(c for c in response.record.categories if c != BENIGN)
    reasons = {  # the first that holds is given
        "cut off": not response.finished,
        "think block unclosed": response.state == UNCLOSED,
        "no think block": response.state == ABSENT,
        "empty reasoning": not reasoning,
        "empty answer": not response.answer,
        "repetition loop": is_loop(response.text),
        "names no category and no rule": restricted and not cites(reasoning, restricted, policy),
        f"harmful request, answer judged {verdict}": harmful and verdict != SAFE,
        "benign request refused": not harmful and refused,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
