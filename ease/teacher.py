"""The teacher's side of the KL (our addition to phase 1): the same trace tokens in its context."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ease.batching import Example, collate, encode_record
from ease.loading import Place, load_model, load_tokenizer
from ease.losses import in_chunks, kl_divergence
from ease.model import CausalLM
from ease.policies import Policy, teacher_messages
from ease.records import Record, UserError
from ease.tokenizer import Tokenizer, shared_vocabulary


@dataclass
class Teacher:
    """The teacher in memory, beside the student."""

    model: CausalLM
    examples: list[Example]  # the student's examples as the teacher sees them
    shared: Tensor | None  # (S,): the ids over which the KL is taken; None: all
    tau: float

    @torch.no_grad()
    def hidden(self, indices: list[int]) -> Tensor:
        """The teacher's hidden states (N, D_t) at the N tokens of some traces, in order."""
        batch = collate([self.examples[i] for i in indices], self.model.device)
        return self.model.hidden(batch.inputs, batch.lengths)[batch.kl > 0]

    def kl(self, student: CausalLM, hidden: Tensor, indices: list[int]) -> Tensor:
        """losses.kl_divergence (N,) at the same N tokens, `hidden` (N, D) being the student's."""
        def loss(h: Tensor, z: Tensor) -> Tensor:
            return kl_divergence(self.model.logits(z), student.logits(h), self.tau, self.shared)

        return in_chunks(loss, hidden, self.hidden(indices))


def load_teacher(name: str, student: CausalLM, tokenizer: Tokenizer, records: list[Record],
                 examples: list[Example], policy: Policy, tau: float, place: Place) -> Teacher:
    """The teacher of some encoded traces; `tokenizer` is the student's."""
    model, own = load_model(name, "", *place), load_tokenizer(name)
    by_id = {r.id: r for r in records}
    seen = [in_teacher_context(own, by_id[e.id], e, policy) for e in examples]
    longest = max(seen, key=lambda e: len(e.ids))
    if len(longest.ids) > model.config.context:
        raise UserError(f"row {longest.id} has {len(longest.ids)} tokens with its policy, the "
                        f"teacher's context is {model.config.context}; lower --max_length")
    return Teacher(model, seen, shared_ids(tokenizer, own, student, model), tau)


def in_teacher_context(tokenizer: Tokenizer, record: Record, example: Example, policy: Policy
                       ) -> Example:
    """A trace behind the teacher's prompt (q, policy of c). Reasoning and answer must be the same
    ids on both sides; markers and end token may differ: they carry no KL.
    """
    messages = teacher_messages(record.prompt, record.categories, policy)
    seen = encode_record(tokenizer, record, messages)
    own, theirs = ([i for i, kl in zip(e.ids, e.kl) if kl] for e in (example, seen))
    if own != theirs:
        raise UserError(f"the tokenizers of --model and --teacher differ (row {record.id}): no KL "
                        "is defined; use --kl_weight 0")
    return seen


def shared_ids(own: Tokenizer, theirs: Tokenizer, student: CausalLM, teacher: CausalLM
               ) -> Tensor | None:
    """The ids over which the KL is taken, None for all: those that mean the same token on both
    sides. (R1-Distill-Qwen has Qwen2.5's ordinary vocabulary, but other turn and end tokens.)
    """
    sizes = {m.config.vocab_size for m in (student, teacher)}
    ids = [i for i in shared_vocabulary(own, theirs) if i < min(sizes)]
    if sizes == {len(ids)}:
        return None
    print(f"KL over the {len(ids)} ids that mean the same token in both vocabularies "
          f"({' and '.join(map(str, sorted(sizes)))} rows)")
    return torch.tensor(ids, device=student.device)
