from types import SimpleNamespace

import pytest
import torch

from ease.judge import judge_messages, load_judge, unsafe_probability, verdict_of
from ease.loading import load_model, save_model
from ease.records import ABSENT, SAFE, UNCLOSED, UNPARSED, UNSAFE, WELL_FORMED, Record, Response
from ease.records import UserError
from ease.tokenizer import compile_template
from tests.tiny import TOKENIZER, tiny_model

PAIR = [("q", "a")]


class Scripted:
    """A "model" that says a fixed text after every prompt, with given probabilities at each step.
    """

    config = SimpleNamespace(context=64)

    def __init__(self, *steps: dict[str, float]):
        self.steps = [{TOKENIZER.encode(t)[0]: p for t, p in step.items()} for step in steps]
        self.prompt_length = len(TOKENIZER.encode_prompt(judge_messages(*PAIR[0])))

    def last_logits(self, rows):
        out = torch.full((len(rows), 1, TOKENIZER.fast.get_vocab_size()), -20.0)
        for logits, row in zip(out, rows):
            for token, p in self.steps[len(row) - self.prompt_length].items():
                logits[0, token] = torch.tensor(p).log()
        return out


@pytest.mark.parametrize("steps, wanted", [
    ([{"safe": 0.2, "unsafe": 0.6, "the": 0.2}], 0.75),
    ([{"\n": 0.9, "safe": 0.1}, {"safe": 0.2, "unsafe": 0.6, "the": 0.2}], 0.75),
    ([{"safe": 0.3, "unsafe": 0.1, "the": 0.6}], None),  # says something else
    ([{"\n": 0.9, "safe": 0.1}] * 9, None)])  # white space without end
def test_probability_is_of_the_two_words_at_the_first_step_that_is_not_white_space(steps, wanted):
    assert unsafe_probability(Scripted(*steps), TOKENIZER, PAIR) == [
        wanted and pytest.approx(wanted, abs=1e-3)]


def test_verdicts():
    assert [verdict_of(p) for p in (None, 0.2, 0.5, 0.8)] == [UNPARSED, SAFE, SAFE, UNSAFE]


def response(answer: str, state: str = ABSENT, **record) -> Response:
    return Response(Record("a", "how?", "harmful", **record), answer, "", answer, state)


def test_keyword_and_target_judges(capsys):
    given = [response("I cannot.", target="to do it:"), response("To do it: x", target="to do it:"),
             response("ok", WELL_FORMED)]
    assert load_judge("xstest", torch.float32, "cpu")(given) == [SAFE, UNSAFE, UNSAFE]
    assert load_judge("target", torch.float32, "cpu")(given) == [SAFE, UNSAFE, UNPARSED]
    assert load_judge("target", torch.float32, "cpu")([]) == []
    with pytest.raises(UserError, match="--judge 'keywords' is none of xstest, .*target and no"):
        load_judge("keywords", torch.float32, "cpu")
    assert capsys.readouterr().out == ""
    assert load_judge("target", torch.float32, "cpu")(given[2:]) == [UNPARSED]
    assert capsys.readouterr().out == (
        "judge target: no verdict on any of 1 answers; no record has a target\n")


@pytest.mark.parametrize("name", ["xstest", "target", "guard"])
def test_an_unclosed_block_is_never_judged(name, guard):
    given = [response("", UNCLOSED, target="x"), response("to do it", target="x"),
             response("x", UNCLOSED, target="x")]
    judge = load_judge(guard if name == "guard" else name, torch.float32, "cpu")
    assert judge(given) == [UNPARSED, judge(given[1:2])[0], UNPARSED]
    assert judge(given[1:2]) != [UNPARSED] and judge(given[:1]) == [UNPARSED]


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    """A random model that says one of the two words after everything, in a folder."""
    path, model = tmp_path_factory.mktemp("guard"), tiny_model(max_position_embeddings=60)
    safe, unsafe = (TOKENIZER.encode(word)[0] for word in (SAFE, UNSAFE))
    head = model.lm_head.weight.data
    head[safe], head[unsafe] = 8 * head[unsafe] + 2 * head[safe], 8 * head[unsafe]
    save_model(model, TOKENIZER, path)
    return str(path)


def test_a_guard_reads_each_conversation_by_itself(guard, capsys):
    """Batched, with padding that nobody sees, against whole conversations one by one."""
    model = load_model(guard)
    pairs = [("how?", "to do it"), ("how do i paint the car?", "to fix it"), ("why?", "to do it")]
    words = [TOKENIZER.encode(word)[0] for word in (SAFE, UNSAFE)]
    wanted = []
    for pair in pairs:
        ids = TOKENIZER.encode_prompt(judge_messages(*pair))
        safe, unsafe = model(torch.tensor([ids]))[0, -1].softmax(-1)[words].tolist()
        assert safe + unsafe > 0.51 and abs(unsafe / (safe + unsafe) - 0.5) > 1e-3
        wanted.append(unsafe / (safe + unsafe))
    assert len({round(p, 2) for p in wanted}) == 3
    assert unsafe_probability(model, TOKENIZER, pairs, 2) == pytest.approx(wanted, rel=1e-4)
    given = [Response(Record("a", q, "benign"), a, "", a, ABSENT) for q, a in pairs]
    assert load_judge(guard, torch.float32, "cpu")(given) == [verdict_of(p) for p in wanted]
    assert capsys.readouterr().out == ""


def test_conversations_beyond_the_guards_context_are_unparsed_and_counted(guard, capsys):
    given = [response("to do it " * 40), response("to do it"), response("to do it " * 41)]
    judge = load_judge(guard, torch.float32, "cpu")
    assert judge(given) == [UNPARSED, judge(given[1:2])[0], UNPARSED] != [UNPARSED] * 3
    assert capsys.readouterr().out == (
        "judge: 2 of 3 answers exceed its context of 60 tokens: unparsed\n")


def test_a_guard_with_another_protocol_is_said(guard, tmp_path, capsys):
    save_model(tiny_model(), TOKENIZER, tmp_path)
    assert load_judge(str(tmp_path), torch.float32, "cpu")([response("ok")] * 2) == [UNPARSED] * 2
    assert capsys.readouterr().out == (
        f"judge {tmp_path}: no verdict on any of 2 answers; a guard must say 'safe' or 'unsafe' "
        "first, as Llama-Guard does\n")


def test_a_template_that_drops_the_answer_is_no_guard(monkeypatch):
    template = ("{% for m in messages %}{% for part in m['content'] if part.type is defined %}"
                "{{ part.text }}{% endfor %}{% endfor %}?")
    monkeypatch.setattr(TOKENIZER, "template", compile_template(template))
    with pytest.raises(UserError, match="does not show the answer"):
        unsafe_probability(Scripted({}), TOKENIZER, PAIR)
