"""What a training will need, said before it begins."""

from ease.losses import CHUNK
from ease.model import CausalLM


def layer_bytes(model: CausalLM) -> int:
    """What a layer keeps of one token for the backward pass: the inputs and outputs of both norms,
    q, k, v, the attended values (before and after rows are joined); gate, silu, up, their product.
    """
    c, size = model.config, model.model.embed_tokens.weight.element_size()
    q, kv = (heads * c.head_dim for heads in (c.num_attention_heads, c.num_key_value_heads))
    kept = 4 * c.hidden_size + 3 * q + 2 * kv + 4 * c.intermediate_size
    return size * kept + (0 if size == 4 else 8 * c.hidden_size)  # the norms compute in fp32


def peak_bytes(model: CausalLM, tokens: int, teacher: CausalLM | None = None) -> int:
    """Estimated peak of a training step with micro-batches of `tokens` tokens.

    weights + 12 bytes a trained number (gradient and AdamW's two moments, fp32) + activations
    (every layer's; with gradient checkpointing every layer's input and one layer's) + a chunk of
    logits, four times (logits, log-probabilities, their gradients).
    """
    c, size = model.config, model.model.embed_tokens.weight.element_size()
    weights = sum(p.numel() * (p.element_size() + 12 * p.requires_grad)
                  for p in model.parameters())
    layers, layer = c.num_hidden_layers, layer_bytes(model)
    activations = layers * size * c.hidden_size + layer if model.gradient_checkpointing else (
        layers * layer)
    logits = min(tokens, CHUNK) * c.vocab_size * 16
    if teacher:  # no gradient: one layer at a time
        weights += sum(p.numel() * p.element_size() for p in teacher.parameters())
        logits += min(tokens, CHUNK) * teacher.config.vocab_size * 8
    return weights + tokens * activations + logits


def announce(model: CausalLM, lengths: list[int], plan: list[list[list[int]]],
             teacher: CausalLM | None = None) -> None:
    """Print rows, tokens, steps and the estimated peak of a plan of batches (Python and torch
    themselves take some 0.3 GiB more).
    """
    largest = max(sum(lengths[i] for i in micro) for step in plan for micro in step)
    gib = peak_bytes(model, largest, teacher) / 2**30
    print(f"{len(lengths)} rows, {sum(lengths)} tokens, {len(plan)} steps of micro-batches up to "
          f"{largest} tokens; estimated peak of its tensors {gib:.1f} GiB")
