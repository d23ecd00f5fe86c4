"""Refusal lists, and a judge, against human labels (pytest does not collect it):

    python -m tests.scorers [--data DIR] [--judge MODEL [--limit N]]

DIR holds the files that this reads (SOURCES below says whose they are). Positive = a refusal, full
or partial. A judge says safe or unsafe: its "safe" is held against "refusal" on harmful prompts
only, since on harmless ones safe says nothing of it. Markdown tables on stdout.
"""

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ease.compare import sign_flip_test
from ease.readers import read_records
from ease.records import ABSENT, SAFE, UNPARSED, UNSAFE, Record, Response, digest, read_lines
from ease.report import table
from ease.scoring import CONVENTIONS, cohen_kappa, keyword_verdict

SOURCES = """\
xstest_response_labels.jsonl  XSTest-response (allenai): prompt, response, refusal; blanked rows
                              are answers to which the text was taken
xstest_anchors.jsonl          XSTest's completions of five models: file, id, completion, final_label
xstest.csv                    XSTest's prompts: which of them are harmful, and the completions' own
gptfuzz_labels_evaluate.jsonl GPTFuzz (evaluate.csv): response, label; only label 0, not jailbroken,
                              kept its text
"""


@dataclass
class Labelled:
    """An answer that a human called a refusal or not; `half` is a fixed split of the prompts."""

    source: str
    response: Response
    refusal: bool

    @property
    def half(self) -> str:
        odd = int(digest(self.response.record.prompt), 16) % 2
        return "held-out half" if odd else "tuning half"


def answer_to(record: Record, text: str) -> Response:
    return Response(record, text, "", text, ABSENT)


def read_labelled(folder: Path) -> list[Labelled]:
    """The rows with a refusal label and a text."""
    xstest = read_records(str(folder / "xstest.csv"))
    by_id, by_prompt = {r.id: r for r in xstest}, {r.prompt: r for r in xstest}
    found = []
    for _, row in read_lines(folder / "xstest_response_labels.jsonl"):
        if row["refusal"] and not row["blanked"]:
            record = by_prompt.get(row["prompt"]) or Record("other", row["prompt"], "benign")
            found.append(Labelled("XSTest-response", answer_to(record, row["response"]),
                                  row["refusal"] == "refusal"))
    for _, row in read_lines(folder / "xstest_anchors.jsonl"):
        model = row["file"].removeprefix("xstest_v2_completions_").removesuffix("_streval.csv")
        record = by_id[row["id"].removeprefix("v2-")]
        found.append(Labelled(f"XSTest, {model}", answer_to(record, row["completion"]),
                              row["final_label"] != "1_full_compliance"))
    return found


def confusion(rows: list[Labelled], verdicts: list[str]) -> dict[str, dict[str, int]]:
    """{SAFE, UNSAFE by the human: {by the scorer: count}}; SAFE = refusal. Unparsed left out."""
    pairs = Counter((SAFE if r.refusal else UNSAFE, v) for r, v in zip(rows, verdicts, strict=True))
    return {a: {b: pairs[a, b] for b in (SAFE, UNSAFE)} for a in (SAFE, UNSAFE)}


def line(source: str, scorer: str, rows: list[Labelled], verdicts: list[str]) -> list[str]:
    """One line of the table: the confusion and what follows from it."""
    counts = confusion(rows, verdicts)
    (tp, fn), (fp, tn) = (list(counts[a].values()) for a in (SAFE, UNSAFE))
    kappa = cohen_kappa(counts)
    shares = [(tp + tn, tp + fn + fp + tn), (tp, tp + fp), (tp, tp + fn)]
    return [source, scorer, *map(str, (tp, fn, fp, tn)),
            *(f"{hits / n:.3f}" if n else "-" for hits, n in shares),
            "-" if kappa is None else f"{kappa:.3f}", str(verdicts.count(UNPARSED))]


def by_source(rows: list[Labelled]) -> dict[str, list[Labelled]]:
    """{source: its rows}, then the parts that cut across."""
    parts = {name: [r for r in rows if r.source == name] for name in dict.fromkeys(
        r.source for r in rows)}
    parts["XSTest, all five"] = [r for r in rows if r.source != "XSTest-response"]
    parts |= {half: [r for r in rows if r.half == half]
              for half in ("tuning half", "held-out half")}
    parts["harmful prompts"] = [r for r in rows if r.response.record.harmful]
    return parts


def list_table(rows: list[Labelled], judge: str, judged: list[tuple[Labelled, str]]) -> str:
    """Every list on every part, and on the rows that a judge was asked about, with its verdicts."""
    lines, parts = [], by_source(rows)
    if judged:
        parts["the judge's rows"] = [r for r, _ in judged]
    for part, found in parts.items():
        for name in CONVENTIONS:
            verdicts = [keyword_verdict(r.response.answer, name) for r in found]
            lines.append(line(part, name, found, verdicts))
    if judged:
        lines.append(line("the judge's rows", judge, parts["the judge's rows"],
                          [verdict for _, verdict in judged]))
    return table(["answers", "scorer", "TP", "FN", "FP", "TN", "accuracy", "precision", "recall",
                  "kappa", "unparsed"], lines)


def jailbreak_table(folder: Path) -> str:
    """Of answers labelled not jailbroken: the share that a list calls an attack's success."""
    rows = [row for _, row in read_lines(folder / "gptfuzz_labels_evaluate.jsonl")
            if row["label"] == 0 and not row["blanked"]]
    held_out = [row for row in rows if int(digest(str(row["question_id"])), 16) % 2]
    lines = []
    for name in CONVENTIONS:
        wrong = [[keyword_verdict(row["response"], name) == UNSAFE for row in found]
                 for found in (rows, held_out)]
        lines.append([name, *(f"{sum(w)} of {len(w)}: {sum(w) / len(w):.3f}" for w in wrong)])
    return table(["scorer", "all", "held-out questions"], lines)


def held_out_test(rows: list[Labelled]) -> str:
    """two_sentences against xstest on the half that it was not tuned on."""
    found = [r for r in rows if r.half == "held-out half"]
    right = [[(keyword_verdict(r.response.answer, name) == SAFE) == r.refusal for r in found]
             for name in ("two_sentences", "xstest")]
    differences = [a - b for a, b in zip(*right)]
    p = sign_flip_test(differences, [r.response.record.group for r in found], seed=0)
    return ("two_sentences against xstest, held-out half: right where the other is wrong "
            f"{differences.count(1)} and {differences.count(-1)} times of {len(found)}, "
            f"p = {p:.1g} (sign flips by prompt)")


def judge_rows(name: str, rows: list[Labelled], limit: int) -> list[tuple[Labelled, str]]:
    """A judge's verdicts on the answers to harmful prompts, every n-th if there is a limit."""
    from ease.judge import load_judge  # torch, for a judge only
    from ease.loading import pick_place
    from ease.run import RunFlags

    asked = [r for r in rows if r.response.record.harmful]
    asked = asked[:: -(-len(asked) // limit)] if limit else asked
    verdicts = load_judge(name, *pick_place(RunFlags(out="")))([r.response for r in asked])
    return list(zip(asked, verdicts, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__ + "\n" + SOURCES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--judge", default="", help="a guard model, as evaluate.py's --judge")
    parser.add_argument("--limit", type=int, default=0, help="only about so many of its rows")
    flags = parser.parse_args()
    rows = read_labelled(flags.data)
    judged = judge_rows(flags.judge, rows, flags.limit) if flags.judge else []
    print(list_table(rows, flags.judge, judged), held_out_test(rows), jailbreak_table(flags.data),
          sep="\n\n")


if __name__ == "__main__":
    main()
