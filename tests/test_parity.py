"""Live parity with transformers and peft, fp32, tiny random models of unequal sizes."""

import json
from dataclasses import fields

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as FastTokenizer

from ease.config import DEFAULTS, ROPE_TYPES, ModelConfig
from ease.generate import Sampling, generate
from ease.loading import load_model, load_tokenizer, save_model
from ease.lora import add_lora, load_adapter, lora_state, matching, merge_lora, save_adapter
from ease.losses import cross_entropy
from ease.records import UserError
from ease.tokenizer import Tokenizer, as_parts
from tests.templates import TEMPLATES
from tests.margins import TIE, gap
from tests.tiny import SIZES, TOKENIZER, VOCAB, tiny_folder, tiny_model, tiny_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "llama-llama3-rope": ("llama", {"rope_scaling": LLAMA3}),
    "llama-derived-head-dim-no-groups": (
        "llama",
        {"head_dim": None, "hidden_size": 36, "num_key_value_heads": None},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied-biases": ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    "mistral": ("mistral", {}),
    "mistral-window": ("mistral", {"sliding_window": 90}),
    "qwen2-linear-rope": ("qwen2", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
}
FAMILIES = ["llama", "qwen2", "qwen3", "mistral"]
IDS = torch.randint(0, VOCAB, (3, 90), generator=torch.Generator().manual_seed(2))


def oracle(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits(tmp_path, case):
    """Our folder in transformers, and the folder that transformers writes of it in ours."""
    tiny_folder(tmp_path / "ours", CASES[case][0], **CASES[case][1])
    theirs, ours = oracle(tmp_path / "ours"), load_model(str(tmp_path / "ours"))
    wanted = theirs(IDS).logits
    assert (
        ours(IDS) - wanted
    ).abs().max() < 1e-4 and wanted.std() > 0.3  # not a comparison of zeros
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_model(str(tmp_path / "theirs"))
    assert torch.equal(back(IDS), ours(IDS))
    assert "rope_parameters" in json.loads(
        (tmp_path / "theirs/config.json").read_text()
    )  # the new form was read


def traits_of_theirs(path) -> dict:
    """What transformers makes of a config.json: its values, and what it builds as a layer."""
    c = transformers.AutoConfig.from_pretrained(path)
    layers, types = c.num_hidden_layers, getattr(c, "layer_types", None)
    c.num_hidden_layers = 1
    with torch.device("meta"):
        layer = transformers.AutoModelForCausalLM.from_config(c).model.layers[0]
    slides = c.model_type != "llama" and "sliding_attention" in (types or ["sliding_attention"])
    rope, always = c.rope_parameters, ("rope_type", "rope_theta")
    return {
        **{n: getattr(c, n) for n in ("vocab_size", "hidden_size", "intermediate_size",
                                      "num_attention_heads", "num_key_value_heads", "rms_norm_eps",
                                      "max_position_embeddings", "tie_word_embeddings")},
        "num_hidden_layers": layers, "head_dim": layer.self_attn.head_dim,
        "rope": {k: v for k, v in rope.items() if k in (*ROPE_TYPES[rope["rope_type"]], *always)},
        "sliding_window": c.sliding_window if slides else None,
        "qkv_bias": layer.self_attn.q_proj.bias is not None,
        "o_bias": layer.self_attn.o_proj.bias is not None,
        "mlp_bias": layer.mlp.up_proj.bias is not None,
        "qk_norm": hasattr(layer.self_attn, "q_norm")}


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 9.0}
FULL_CONFIG = SIZES | {  # sizes that still fit together when one of them is the default
    "hidden_size": 128, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 6,
    "rms_norm_eps": 1e-4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
    "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
OPTIONAL = {"layer_types": ["full_attention"] * 2, "rope_parameters": LINEAR,
            "rope_scaling": {"type": "linear", "factor": 3.0}, "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 32}


@pytest.mark.parametrize("kind", FAMILIES)
def test_keys_that_config_json_leaves_out(tmp_path, kind):
    """Every key, left out and null, against transformers: the same model or a refusal by both."""
    names, compared = {f.name for f in fields(ModelConfig)} - {"model_type", "raw"}, 0
    whole = FULL_CONFIG | {"model_type": kind}
    cases = [(None, whole), ("both rope forms", whole | OPTIONAL | {"layer_types": None})]
    for key in FULL_CONFIG:
        cases += [(key, {k: v for k, v in whole.items() if k != key}), (key, whole | {key: None})]
    for key, value in OPTIONAL.items():
        cases += [(key, whole | {key: value}), (key, whole | {key: None})]
    cases.append(("llama3", whole | {"rope_scaling": {k: v for k, v in LLAMA3.items()
                                                      if not k.startswith("original")}}))
    for key, c in cases:
        (tmp_path / "config.json").write_text(json.dumps(c))
        try:
            wanted = traits_of_theirs(tmp_path)
        except Exception:  # its own validation, or a model that cannot be built
            if (kind, key) not in (("qwen2", "head_dim"), ("mistral", "num_key_value_heads"),
                                   ("mistral", "layer_types")):  # ours takes null here too
                with pytest.raises(UserError):
                    ModelConfig.from_json(c)
            continue
        ours = ModelConfig.from_json(c)
        assert {n: getattr(ours, n) for n in names} == {n: wanted[n] for n in names}, (key, c)
        compared += 1
    assert compared > 30 and set(DEFAULTS[kind]) <= set(FULL_CONFIG) | set(OPTIONAL)


@pytest.mark.parametrize("kind, changes", [
    ("qwen2", {"max_window_layers": 1}), ("qwen3", {"max_window_layers": 2}),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}),
    ("mistral", {"layer_types": ["full_attention", "full_attention"]}), ("llama", {})])
@torch.no_grad()
def test_within_its_context_a_window_changes_nothing(tmp_path, kind, changes):
    changes = {"sliding_window": 20, "use_sliding_window": True, **changes}
    model = tiny_folder(tmp_path, kind, **changes)
    theirs, limit = oracle(tmp_path), model.config.context
    ids = IDS[:, : min(limit, 90)]
    assert (theirs(ids).logits - model(ids)).abs().max() < 1e-4
    if limit == 20:  # and one more would change it: the limit is not too small
        loose = tiny_model(kind, **changes | {"sliding_window": 90})
        differs = (theirs(IDS[:, :30]).logits - loose(IDS[:, :30])).abs().amax(dim=(0, 2)) > 1e-3
        assert differs.nonzero()[0] == 20


@pytest.mark.parametrize("kind", FAMILIES)
@torch.no_grad()
def test_tied_only_if_the_stored_tensors_are_equal(tmp_path, capsys, kind):
    """tie_word_embeddings, and the file has a head of its own, the same head, or no embedding."""
    tiny_folder(tmp_path, kind, tie_word_embeddings=True)
    plain = load_file(tmp_path / "model.safetensors")
    embedding = plain["model.embed_tokens.weight"]
    only_head = {k: v for k, v in plain.items() if v is not embedding}
    only_head["lm_head.weight"] = embedding
    for tensors, tied in ((plain | {"lm_head.weight": embedding.flip(0)}, False),
                          (plain | {"lm_head.weight": embedding.clone()}, True), (only_head, True)):
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
        ours, theirs = load_model(str(tmp_path)), oracle(tmp_path)
        assert (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-4
        assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
        assert ("lm_head.weight is not the embedding" in capsys.readouterr().out) != tied
        save_model(ours, TOKENIZER, tmp_path / "saved")  # what is written says what it is
        written = json.loads((tmp_path / "saved/config.json").read_text())
        assert written["tie_word_embeddings"] == tied
        assert (oracle(tmp_path / "saved")(IDS).logits - ours(IDS)).abs().max() < 1e-4


@torch.no_grad()
def test_what_no_longer_holds_is_not_written(tmp_path):
    """transformers would want bitsandbytes, code of the hub or another dtype for the copy."""
    model = tiny_folder(tmp_path / "a", "qwen2")
    stale = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                                     "bnb_4bit_quant_type": "nf4"},
             "auto_map": {"AutoModelForCausalLM": "modeling.Other"}, "_name_or_path": "/home/x",
             "torch_dtype": "float16", "dtype": "float16", "pruned_heads": {"0": [1]},
             "transformers_version": "4.1", "partial_rotary_factor": 1.0}
    config = json.loads((tmp_path / "a/config.json").read_text())
    (tmp_path / "a/config.json").write_text(json.dumps(config | stale))
    save_model(load_model(str(tmp_path / "a")), TOKENIZER, tmp_path / "b")
    written = json.loads((tmp_path / "b/config.json").read_text())
    assert not stale.keys() & written.keys() - {"torch_dtype", "dtype"}
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert {k: written[k] for k in SIZES} == SIZES
    assert (oracle(tmp_path / "b")(IDS).logits - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("case", ["llama-llama3-rope", "qwen2-tied", "qwen3", "mistral"])
@torch.no_grad()
def test_what_save_model_writes(tmp_path, case):
    model = tiny_folder(tmp_path / "a", CASES[case][0], **CASES[case][1])
    save_model(load_model(str(tmp_path / "a")), TOKENIZER, tmp_path / "b")
    assert (oracle(tmp_path / "b")(IDS).logits - model(IDS)).abs().max() < 1e-4


@pytest.mark.parametrize("shard_size", ["1GB", "60KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_stored_forms(tmp_path, model_type, dtype, shard_size):
    """A folder that transformers wrote in one file or in several, in fp32 or in bf16."""
    tiny_folder(tmp_path / "whole", model_type)
    oracle(tmp_path / "whole").to(dtype).save_pretrained(
        tmp_path / "stored", max_shard_size=shard_size
    )
    files = sorted((tmp_path / "stored").glob("*.safetensors"))
    assert (len(files) > 2) == (shard_size == "60KB")
    # both read it anew and compute in fp32: .to(bfloat16) has rounded the rotary table of the model
    # that wrote it, which no file holds
    assert (
        load_model(str(tmp_path / "stored"))(IDS) - oracle(tmp_path / "stored")(IDS).logits
    ).abs().max() < 1e-4
    files[-1].unlink()
    with pytest.raises(UserError, match=f"{files[-1].name} is missing"):
        load_model(str(tmp_path / "stored"))


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_masked_loss(tmp_path, model_type):
    tiny_folder(tmp_path, model_type)
    ours, keep = (
        load_model(str(tmp_path)),
        torch.rand(IDS.shape, generator=torch.Generator().manual_seed(0)) < 0.3,
    )
    keep[:, 0] = False
    wanted = oracle(tmp_path)(IDS, labels=torch.where(keep, IDS, -100)).loss
    mask = keep[:, 1:]
    logits = ours(IDS[:, :-1])[mask]
    loss = cross_entropy(logits, IDS[:, 1:][mask]).sum() / mask.sum()
    assert abs(loss - wanted) < 1e-5 * wanted


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_continuations(tmp_path, model_type):
    """20 prompts x 32 tokens, batched in refilled slots, batched whole and one by one, against
    generate(). Prompts whose path meets a near tie of two logits are left out.
    """
    tiny_folder(tmp_path, model_type)
    ours, theirs = load_model(str(tmp_path)), oracle(tmp_path)
    prompts = [IDS[i % 3, i : i + 2 + (i * 7) % 25].tolist() for i in range(20)]
    end = TOKENIZER.end_id
    config = transformers.GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=end,
                                           pad_token_id=end)
    wanted = []
    for p in prompts:
        ids = torch.tensor([p])
        new = theirs.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        new = new[0, len(p) :].tolist()
        wanted.append(new[: new.index(end)] if end in new else new)
    clear = []
    for i, (p, new) in enumerate(zip(prompts, wanted)):
        with torch.no_grad():
            logits = ours(torch.tensor([p + new]))[0, len(p) - 1 :]
        if gap(logits) > TIE:
            clear.append(i)
    assert len(clear) >= 15
    assert len({tuple(w[-4:]) for w in wanted}) > 5  # the model does not say one thing
    for slots in (1, 6, 20):
        found = generate(ours, prompts, Sampling(32), frozenset([end]), slots=slots)
        assert [found[i].ids for i in clear] == [wanted[i] for i in clear], slots
    alone = [generate(ours, [prompts[i]], Sampling(32), frozenset([end]))[0].ids for i in clear]
    assert alone == [wanted[i] for i in clear]


def trained_adapter(model, targets):
    add_lora(model, 4, 12.0, targets)
    for i, p in enumerate(lora_state(model).values()):
        p.data.normal_(0, 0.15, generator=torch.Generator().manual_seed(i))  # B is not zero


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_our_adapter_in_peft_and_our_merged_folder(tmp_path, model_type):
    model = tiny_folder(tmp_path / "base", model_type)
    plain = model(IDS)
    trained_adapter(model, ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "lm_head"])
    wanted = model(IDS)
    save_adapter(model, tmp_path / "adapter", "base")
    theirs = peft.PeftModel.from_pretrained(oracle(tmp_path / "base"), tmp_path / "adapter")
    assert (theirs(IDS).logits - wanted).abs().max() < 1e-4 < 1e-1 < (wanted - plain).abs().max()
    save_model(merge_lora(model), TOKENIZER, tmp_path / "merged")
    assert (oracle(tmp_path / "merged")(IDS).logits - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": r".*layers\.1\..*(k|v)_proj"},
        {"target_modules": "all-linear"},
        {"target_modules": ["k_proj"], "use_rslora": True},
    ],
)
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_pefts_adapter_here(tmp_path, model_type, settings):
    ours = tiny_folder(tmp_path / "base", model_type)
    plain = ours(IDS)
    theirs = peft.get_peft_model(
        oracle(tmp_path / "base"), peft.LoraConfig(r=5, lora_alpha=15, **settings)
    )
    for i, (name, p) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path / "adapter")
    load_adapter(ours, tmp_path / "adapter")
    assert (
        (ours(IDS) - theirs(IDS).logits).abs().max() < 1e-4 < 1e-1 < (ours(IDS) - plain).abs().max()
    )


@pytest.mark.parametrize("name, value", [
    ("q_proj", ["q_proj"]), ("two", ["layers.1.mlp.up_proj", "lm_head"]), ("none", ["proj"]),
    ("whole", r"model\.layers\.\d+\.(mlp|self_attn)\.(up|k)_proj"), ("part", "q_proj"),
    ("look", r"(?!.*lm_head).*(?<=self_attn\.)[qv]_proj"),
    ("nested", r"(model\.(layers\.)*)+.*o_proj")])
def test_targets_are_pefts(name, value):
    """Against PEFT's own rule, for lists and for regular expressions of every syntax."""
    names = [n for n, m in tiny_model().named_modules() if isinstance(m, torch.nn.Linear)]
    config = peft.LoraConfig(target_modules=value)
    check = peft.tuners.tuners_utils.check_target_module_exists
    assert matching(names, value) == [n for n in names if check(config, n)]


def peft_adapter(base, folder, resize=0, **settings):
    """An adapter that PEFT made on a base folder and saved; returns PEFT's logits with it."""
    model = oracle(base)
    if resize:
        model.resize_token_embeddings(resize)
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **settings))
    for i, (name, p) in enumerate(theirs.named_parameters()):
        if "lora_" in name:
            p.normal_(0, 0.2, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(folder, save_embedding_layers=True if resize else "auto")
    return theirs(IDS).logits


@torch.no_grad()
def test_tensors_that_peft_stores_by_itself(tmp_path):
    """With the head adapted or the vocabulary resized, its file holds base tensors (peft#2092)."""
    base = str(tmp_path / "base")
    tiny_folder(tmp_path / "base")
    wanted = peft_adapter(base, tmp_path / "head", target_modules=["q_proj", "lm_head"])
    file = tmp_path / "head/adapter_model.safetensors"
    stored, copy = load_file(file), "base_model.model.lm_head.base_layer.weight"
    assert copy in stored
    assert (load_model(base, str(tmp_path / "head"))(IDS) - wanted).abs().max() < 1e-4
    load_model(base, str(tmp_path / "head"), torch.bfloat16)  # equal up to the coarser dtype
    save_file(stored | {copy: stored[copy].half()}, file)
    with pytest.raises(UserError, match=f"{copy} is not the base's"):  # trained, not rounded
        save_file(stored | {copy: stored[copy] + 1e-3}, file)
        load_model(base, str(tmp_path / "head"))
    peft_adapter(base, tmp_path / "resized", VOCAB + 8, target_modules=["q_proj"])
    with pytest.raises(UserError, match="a resized vocabulary is not supported"):
        load_model(base, str(tmp_path / "resized"))


@torch.no_grad()
def test_our_adapter_saved_again_by_peft(tmp_path):
    """The toy recipe's own: LoRA on every layer and the head."""
    model = tiny_folder(tmp_path / "base")
    trained_adapter(model, ["q_proj", "down_proj", "lm_head"])
    save_adapter(model, tmp_path / "a", str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(oracle(tmp_path / "base"), tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    back = load_model(str(tmp_path / "base"), str(tmp_path / "b"))
    assert torch.equal(back(IDS), model(IDS))


@torch.no_grad()
def test_a_stored_target_that_the_base_lacks(tmp_path, capsys):
    """PEFT loads it (peft#1959), so does ours and says so; --lora_targets stays strict."""
    tiny_folder(tmp_path / "base")
    wanted = peft_adapter(tmp_path / "base", tmp_path / "a", target_modules=["q_proj", "c_attn"])
    ours = load_model(str(tmp_path / "base"), str(tmp_path / "a"))
    assert "lacks: ['c_attn']" in capsys.readouterr().out
    assert (ours(IDS) - wanted).abs().max() < 1e-4
    with pytest.raises(UserError, match="c_attn"):
        add_lora(tiny_model(), 2, 8.0, ["q_proj", "c_attn"])


TEXTS = [
    "how do i paint the car?",
    "  two  spaces\n\nand lines\n",
    "héllo 数学",
    "join s t e a l",
    "I'm sorry, but I cannot help with that.",
    "<think>\nx\n</think>\n\n",
]


@pytest.mark.parametrize("system", [None, "be brief."])
def test_prompt_ids(tmp_path, system):
    tiny_folder(tmp_path)
    theirs, ours = (
        transformers.AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(str(tmp_path)),
    )
    for text in TEXTS:
        messages = ([{"role": "system", "content": system}] if system else []) + [
            {"role": "user", "content": text}
        ]
        wanted = theirs.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert ours.encode_prompt(messages) == wanted
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert ours.encode_prompt(turns) == theirs.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=False
    )


CONVERSATIONS = [
    [("user", "how do i paint the car?")],
    [("user", "  two  spaces\n\nand a line \n")],
    [("system", "be brief."), ("user", "join 数学 🎉")],
    [("user", "a"), ("assistant", "<think>\nx\n</think>\n\nb"), ("user", "c")],
]


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name in TEMPLATES
        for kind in ("bytes", "prepend", "metaspace")
        if (name, kind) != ("r1-distill", "prepend")
    ],
)  # R1's tokenizers are byte-level
def test_chat_templates_of_the_field(name, kind):
    """Our ids against apply_chat_template's, for the structure of every template and three kinds of
    tokenizer.
    """
    template, special, added, bos, eos, form, system = TEMPLATES[name]
    special = special if "<unk>" in special else [*special, "<unk>"]
    fast = tiny_tokenizer(kind, special, added)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=FastTokenizer.from_str(fast.to_str()), bos_token=bos, eos_token=eos
    )
    ours = Tokenizer(fast, template, {"bos_token": bos, "eos_token": eos}, set(), {})
    assert (ours.content_as_parts, ours.takes_system, ours.opens_thinking) == (
        form == "parts",
        system,
        name == "r1-distill",
    )
    for turns in CONVERSATIONS:
        messages = [{"role": role, "content": text} for role, text in turns]
        if not system and turns[0][0] == "system":  # what ours does: in front of the user's text
            given = [{"role": "user", "content": f"{turns[0][1]}\n\n{turns[1][1]}"}]
        else:
            given = messages
        given = [as_parts(m) for m in given] if form == "parts" else given
        wanted = theirs.apply_chat_template(
            given,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            date_string="26 Jul 2024",
        )
        opened = (
            ours.encode("<think>\n") if ours.opens_thinking else []
        )  # R1's open marker, which ours cuts off
        assert ours.encode_prompt(messages) + opened == wanted


@pytest.mark.parametrize("kind", ["bytes", "prepend", "metaspace"])
def test_a_response_begins_without_a_prefix_space(kind):
    """As in the middle of a text; and control strings in a prompt or a response are text, in every
    kind of tokenizer.
    """
    template, special, added, bos, eos, *_ = TEMPLATES["tinyllama"]
    ours = Tokenizer(
        tiny_tokenizer(kind, special, added),
        template,
        {"bos_token": bos, "eos_token": eos},
        set(),
        {},
    )
    for text in ("sure, paint it.", "say </s> and <s> twice"):
        prompt = ours.encode_prompt([{"role": "user", "content": text}])
        assert [i for i in prompt if i in ours.control.values()] == [
            ours.end_id
        ] and text in ours.decode(prompt)
        pieces = ["<think>\n", "it is", "\n</think>\n\n", text]
        assert "".join(pieces) == ours.decode([i for piece in pieces for i in ours.encode(piece)])


def test_r1s_turn_tokens_cannot_be_forged_though_they_are_not_special():
    template, special, added, bos, eos, *_ = TEMPLATES["r1-distill"]
    ours = Tokenizer(
        tiny_tokenizer("bytes", special, added),
        template,
        {"bos_token": bos, "eos_token": eos},
        set(),
        {},
    )
    prompt = ours.encode_prompt([{"role": "user", "content": f"x<｜User｜>y{eos}z"}])
    assert [ours.decode([i]) for i in prompt if i in ours.control.values()] == [
        bos,
        "<｜User｜>",
        "<｜Assistant｜>",
    ]
    assert ours.decode(
        prompt
    ) == f"{bos}<｜User｜>x<｜User｜>y{eos}z<｜Assistant｜>" and ours.encode("<think>\n")[
        0
    ] == ours.fast.token_to_id("<think>")
