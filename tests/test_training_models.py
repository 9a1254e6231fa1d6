"""Loading, freezing, LoRA, low-bit bases, block swap: by name, on tiny checkpoints."""

from __future__ import annotations

import hashlib
import sys
import types

import pytest
import torch

from reasonedit.reasonedit_core.errors import BackendUnavailable, ConfigError
from reasonedit.reasonedit_core.fp8 import Fp8Linear
from reasonedit.tests.tiny import tiny_checkpoint
from reasonedit.training.config_file import make_config
from reasonedit.training.models import Base, fingerprint, quantise_nf4
from reasonedit.training.presets import choose
from reasonedit.training.swap import swap_blocks
from reasonedit.training.trainable import draw_weights, match, train_sets, trainable_table

SYSTEMS = {"reasonedit-s": "step1x-v1p1", "reasonedit-q": "qwen-edit-plus"}


def config(system="reasonedit-s", checkpoint=None, train=None, sets=()):
    raw = {
        "run": {"out": "unused", "device": "cpu"},
        "model": {"system": system, "weights": str(tiny_checkpoint(checkpoint or SYSTEMS[system], std=0.2))},
        "data": {"records": ["unused.jsonl"]},
        "stage": [{"name": "a", "step": "joint", "steps": 1, "train": train or {"mllm_lora": {"lr": 1e-3, "rank": 4}}}],
    }
    return make_config(raw, "test", sets)


def chosen_sets(made, part):
    rows = [choose(name, table, made.model.system) for name, table in made.stage[0].train.items()]
    return [row for row in rows if row.part == part]


def freed(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


# ---- trainable sets, name by name


def test_mllm_lora_trains_the_attention_linears_of_the_language_model_and_nothing_else():
    made = config()
    model = Base(made).mllm(need_lm_head=True).model
    before = set(dict(model.named_parameters()))
    (group,) = train_sets("mllm", model, chosen_sets(made, "mllm"), seed=0, weight_decay=0.01)
    wanted = {
        f"model.language_model.layers.{layer}.self_attn.{linear}_proj.lora_{half}.default.weight"
        for layer in range(2)
        for linear in "qkvo"
        for half in "AB"
    }
    assert freed(model) == wanted
    assert {name for name, _ in group.parameters} == {f"mllm.{name}" for name in wanted}
    assert (group.name, group.lr, group.weight_decay) == ("mllm_lora", 1e-3, 0.01)
    assert {name.replace(".base_layer", "") for name in set(dict(model.named_parameters())) - wanted} == before


@pytest.mark.parametrize("system", SYSTEMS)
def test_dit_and_connector_share_the_dit_between_them(system):
    made = config(system, train={"dit": {"lr": 1e-5}, "connector": {"lr": 2e-5, "weight_decay": 0.0}})
    dit = Base(made).dit()
    groups = {g.name: g for g in train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.01)}
    names = {name: {one for one, _ in group.parameters} for name, group in groups.items()}
    heads = ("dit.connector.", "dit.text_token_mapping.") if system == "reasonedit-s" else ("dit.txt_norm.", "dit.txt_in.")
    every = {f"dit.{name}" for name, _ in dit.named_parameters()}
    assert names["connector"] == {name for name in every if name.startswith(heads)} != set()
    assert names["dit"] == every - names["connector"]
    assert freed(dit) == {name.removeprefix("dit.") for name in every}
    assert (groups["connector"].lr, groups["connector"].weight_decay, groups["dit"].weight_decay) == (2e-5, 0.0, 0.01)


@pytest.mark.parametrize(
    ("system", "count"),
    # S: a double block has 8 attention and 4 feed-forward Linears, a single one 5; Q: 8 and 4. Two of each kind of block.
    [("reasonedit-s", 2 * (8 + 4) + 2 * 5), ("reasonedit-q", 2 * (8 + 4))],
)
def test_dit_lora_trains_the_linears_of_the_blocks_but_not_their_modulation(system, count):
    made = config(system, train={"dit_lora": {"lr": 1e-4, "rank": 4, "alpha": 8.0}})
    dit = Base(made).dit()
    train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    names = freed(dit)
    assert len(names) == 2 * count and all(".lora_" in name for name in names)
    assert all("transformer_blocks." in name for name in names)
    assert not [name for name in names if "norm" in name or "_mod" in name or "connector" in name]
    assert dit.peft_config["default"].lora_alpha == 8


def test_the_bases_train_everything():
    made = config(train={"mllm_base": {"lr": 1e-4}, "dit_base": {"lr": 1e-4}})
    base = Base(made)
    for part, module in (("mllm", base.mllm(need_lm_head=True).model), ("dit", base.dit())):
        train_sets(part, module, chosen_sets(made, part), seed=0, weight_decay=0.0)
        assert freed(module) == set(dict(module.named_parameters()))
    assert chosen_sets(made, "dit")[0].random and not chosen_sets(made, "mllm")[0].random


def test_a_set_of_ones_own_and_what_is_wrong_with_sets():
    own = {"lr": 1e-4, "part": "dit", "mode": "full", "include": [r"norm_out\..*"], "exclude": [r".*bias"]}
    made = config(train={"mine": own})
    dit = Base(made).dit()
    train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    assert freed(dit) == {"norm_out.linear.weight"}
    made = config(train={"mine": own, "dit": {"lr": 1e-4}})
    with pytest.raises(ConfigError, match="norm_out.linear.weight in mine and dit"):
        train_sets("dit", Base(made).dit(), chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    made = config(train={"mine": own | {"include": ["nothing"]}})
    with pytest.raises(ConfigError, match="train.mine: expected a weight of the DiT that matches nothing, found none"):
        train_sets("dit", Base(made).dit(), chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    made = config(train={"mine": own | {"include": [".*norm_out"], "mode": "lora"}})
    with pytest.raises(ConfigError, match="expected a Linear of the DiT"):
        train_sets("dit", Base(made).dit(), chosen_sets(made, "dit"), seed=0, weight_decay=0.0)


def test_include_and_exclude_match_whole_names():
    assert match(["a.b", "a.bc", "xa.b"], ["a.b"], []) == ["a.b"]
    assert match(["a.b", "a.bc"], ["a.+"], [r".*c"]) == ["a.b"]
    assert match(["a|b", "a"], ["a", "b"], []) == ["a"]


def test_a_lora_starts_at_zero_and_its_draw_depends_on_the_seed_alone():
    made = config(train={"mllm_lora": {"lr": 1e-3, "rank": 4}})
    drawn = []
    for seed, spoil in ((0, 1), (0, 2), (1, 1)):
        model = Base(made).mllm(need_lm_head=True).model
        torch.manual_seed(spoil)  # the global generator has no say
        state = torch.get_rng_state()
        train_sets("mllm", model, chosen_sets(made, "mllm"), seed=seed, weight_decay=0.0)
        assert torch.equal(torch.get_rng_state(), state)
        halves = {name: p for name, p in model.named_parameters() if p.requires_grad}
        assert all(not p.any() for name, p in halves.items() if "lora_B" in name)
        drawn.append(torch.cat([p.flatten() for name, p in halves.items() if "lora_A" in name]))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_trained_weights_are_kept_in_full_beside_a_bf16_base():
    made = config(train={"dit_lora": {"lr": 1e-4, "rank": 4}}, sets=["run.precision=bfloat16"])
    dit = Base(made).dit()
    train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    assert {p.dtype for p in dit.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in dit.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize(("option", "kind"), [("rslora", "use_rslora"), ("dora", "use_dora")])
def test_rslora_and_dora_are_pefts_own(option, kind):
    made = config(train={"mllm_lora": {"lr": 1e-3, "rank": 4, option: True, "dropout": 0.1}})
    model = Base(made).mllm(need_lm_head=True).model
    train_sets("mllm", model, chosen_sets(made, "mllm"), seed=0, weight_decay=0.0)
    stated = model.peft_config["default"]
    assert getattr(stated, kind) and stated.lora_dropout == 0.1
    assert any("magnitude" in name for name in freed(model)) == (option == "dora")


# ---- low-bit bases


def test_fp8_keeps_the_blocks_in_eight_bits_and_trains_a_lora_beside_them():
    made = config(train={"dit_lora": {"lr": 1e-4, "rank": 4}}, sets=["model.dit_weights=fp8"])
    dit = Base(made).dit()
    assert sum(isinstance(m, Fp8Linear) for m in dit.modules()) > 10
    assert not isinstance(dit.connector.global_proj_out, Fp8Linear)
    train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
    linear = dit.transformer_blocks[0].attn.to_q
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    linear(x).square().sum().backward()
    assert linear.lora_B["default"].weight.grad.abs().sum() > 0 and linear.base_layer.weight.grad is None
    full = config(train={"dit": {"lr": 1e-4}}, sets=["model.dit_weights=fp8"])
    with pytest.raises(ConfigError, match="found .* kept in torch.float8_e4m3fn"):
        train_sets("dit", Base(full).dit(), chosen_sets(full, "dit"), seed=0, weight_decay=0.0)
    dora = config(train={"dit_lora": {"lr": 1e-4, "dora": True}}, sets=["model.dit_weights=fp8"])
    with pytest.raises(ConfigError, match="DoRA needs their norms"):
        train_sets("dit", Base(dora).dit(), chosen_sets(dora, "dit"), seed=0, weight_decay=0.0)


def test_fp8_of_the_mllm_leaves_the_vision_tower_and_lm_head_alone():
    model = Base(config(sets=["model.mllm_weights=fp8"])).mllm(need_lm_head=True).model
    low = {name for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert low and all(name.startswith("model.language_model.layers.") for name in low)


def test_nf4_without_bitsandbytes_is_refused_with_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackendUnavailable, match="pip install bitsandbytes.*fp8"):
        Base(config(sets=["model.dit_weights=nf4"])).dit()


def test_nf4_replaces_the_linears_but_the_skipped_ones(monkeypatch):
    class Linear4bit(torch.nn.Linear):
        def __init__(self, n_in, n_out, bias, compute_dtype, quant_type):
            super().__init__(n_in, n_out, bias=bias)
            assert (compute_dtype, quant_type) == (torch.bfloat16, "nf4")

    fake = types.SimpleNamespace(
        nn=types.SimpleNamespace(
            Linear4bit=Linear4bit, Params4bit=lambda data, requires_grad, quant_type: torch.nn.Parameter(data, requires_grad)
        )
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)
    module = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 3), "skipped": torch.nn.Linear(3, 2, bias=False)})
    weight = module["a"].weight.clone()
    assert quantise_nf4(module, skip=("skipped",), dtype=torch.bfloat16) == ("a",)
    assert torch.equal(module["a"].weight, weight) and not module["a"].weight.requires_grad
    assert type(module["skipped"]) is torch.nn.Linear


# ---- loading


def test_the_mllm_is_loaded_once(monkeypatch):
    from reasonedit.reasonedit_core.mllm import load

    calls, plain = [], load.load_mllm
    monkeypatch.setattr(load, "load_mllm", lambda *a, **k: calls.append(k["need_lm_head"]) or plain(*a, **k))
    base = Base(config())
    first = base.mllm(need_lm_head=True)
    assert base.mllm(need_lm_head=False) is first is base.mllm(need_lm_head=True)
    assert calls == [True]
    base.release()
    assert base.mllm(need_lm_head=False) is not first and calls == [True, False]


@pytest.mark.parametrize(
    ("checkpoint", "system", "variant"),
    [
        ("step1x-v1p0-files", "reasonedit-s", "v1.0"),
        ("step1x-v1p1", "reasonedit-s", "v1.1"),
        ("step1x-v1p2", "reasonedit-s", "v1.2"),
        ("qwen-edit", "reasonedit-q", "edit"),
        ("qwen-edit-plus", "reasonedit-q", "edit-plus"),
    ],
)
def test_every_layout_yields_dit_conditioner_and_codec(checkpoint, system, variant):
    base = Base(config(system, checkpoint))
    assert base.variant == variant
    assert not freed(base.dit()) and base.dit().training is False
    conditioner = base.conditioner(base.mllm(need_lm_head=False))
    assert conditioner.mllm is base.mllm(need_lm_head=False)
    assert base.codec() is not None
    assert base.settings().size_level == 1024


def test_parts_that_lie_in_single_files_are_put_together():
    files, folder = tiny_checkpoint("comfy-qwen-files", std=0.2), tiny_checkpoint("qwen-edit-plus", std=0.2)
    places = {
        "weights": files / "diffusion_models" / "qwen_image_edit_2509.safetensors",
        "text_encoder": folder / "text_encoder",
        "vae": files / "vae" / "qwen_image_vae.safetensors",
        "tokenizer": folder / "tokenizer",
    }
    made = config("reasonedit-q", "qwen-edit-plus", sets=[f"model.{name}={path}" for name, path in places.items()])
    base = Base(made)
    assert base.plus and base.shell().tokenizer is not None
    dit, shell = base.dit(), base.dit_shell()
    assert {n: p.shape for n, p in dit.named_parameters()} == {n: p.shape for n, p in shell.named_parameters()}
    assert all(p.is_meta for p in shell.parameters()) and base.codec(shell=True) is base.codec(shell=True)
    wrong = config("reasonedit-s", "step1x-v1p1", sets=[f"model.{name}={path}" for name, path in places.items()])
    with pytest.raises(ConfigError, match="expected a DiT of reasonedit-s, found one of reasonedit-q"):
        Base(wrong)


# ---- random weights, block swap, table, fingerprint


def test_drawn_weights_start_the_dit_as_the_identity_and_do_not_depend_on_the_order():
    made = config(train={"dit_base": {"lr": 1e-4}})
    first, second = Base(made).dit(), Base(made).dit()
    names = [name for name, _ in first.named_parameters()]
    draw_weights(first, names, seed=3, std=0.02)
    draw_weights(second, names[::-1], seed=3, std=0.02)
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    assert not state["proj_out.weight"].any() and not state["transformer_blocks.0.norm1.linear.weight"].any()
    assert not state["single_transformer_blocks.0.norm.linear.weight"].any() and not state["norm_out.linear.weight"].any()
    drawn = state["single_transformer_blocks.0.proj_out.weight"]
    assert 0.015 < drawn.std() < 0.025
    assert (state["transformer_blocks.0.attn.norm_q.weight"] == 1).all()
    draw_weights(second, names, seed=4, std=0.1)
    again = second.state_dict()["single_transformer_blocks.0.proj_out.weight"]
    assert 0.075 < again.std() < 0.125 and not torch.allclose(again / 5, drawn)


def test_a_swapped_block_gives_the_same_values_and_gradients(monkeypatch):
    def build():
        made = config(train={"dit_lora": {"lr": 1e-4, "rank": 4}})
        dit = Base(made).dit()
        train_sets("dit", dit, chosen_sets(made, "dit"), seed=0, weight_decay=0.0)
        return dit

    def run(dit):
        g = torch.Generator().manual_seed(0)
        x, temb = torch.randn(1, 5, 32, generator=g), torch.randn(1, 32, generator=g)
        block = dit.single_transformer_blocks[1]
        mlp = block.proj_mlp
        y = torch.utils.checkpoint.checkpoint(lambda v: block(v), x.requires_grad_(), use_reentrant=False)
        y.square().sum().backward()
        return y.detach(), x.grad.clone(), {n: p.grad for n, p in block.named_parameters() if p.requires_grad}, mlp, temb

    def simple(block):  # the block's own forward needs rotary tables; one Linear of it is enough here
        block.forward = lambda v: block.proj_mlp(v)

    plain, swapped = build(), build()
    blocks = [*swapped.transformer_blocks, *swapped.single_transformer_blocks]
    parked = swap_blocks(blocks, 1, torch.device("cpu"))
    frozen = [p for p in blocks[-1].parameters() if not p.requires_grad]
    assert parked >= sum(p.numel() * p.element_size() for p in frozen) > 0
    homes = dict(blocks[-1].named_parameters())
    for dit in (plain, swapped):
        simple(dit.single_transformer_blocks[1])
    one, two = run(plain), run(swapped)
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    graded = {name: grad for name, grad in one[2].items() if grad is not None}
    assert graded and all(torch.equal(grad, two[2][name]) for name, grad in graded.items())
    assert all(after is homes[name] for name, after in blocks[-1].named_parameters())
    with pytest.raises(ConfigError, match="at most 4"):
        swap_blocks(blocks, 5, torch.device("cpu"))


def test_a_swapped_block_computes_on_lent_copies_and_gives_them_back_when_it_fails():
    block = torch.nn.Sequential(torch.nn.Linear(2, 2))
    block.requires_grad_(False)
    home, seen = block[0].weight, []
    swap_blocks([block], 1, torch.device("cpu"))
    block[0].register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    block(torch.zeros(1, 2))
    assert seen[0] is not home and block[0].weight is home
    with pytest.raises(RuntimeError):
        block(torch.zeros(1, 3))
    assert block[0].weight is home


def test_the_table_counts_what_is_trained():
    made = config()
    model = Base(made).mllm(need_lm_head=True).model
    groups = train_sets("mllm", model, chosen_sets(made, "mllm"), seed=0, weight_decay=0.01)
    text = trainable_table(groups, {"mllm": model})
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"mllm: {trained:,} of {sum(p.numel() for p in model.parameters()):,} weights trained" in text
    assert "mllm_lora" in text and "dit: not loaded" in text


def test_a_fingerprint_changes_with_any_byte(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    before = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == before
    (tmp_path / "a.safetensors").write_bytes(b"1235")
    assert fingerprint(tmp_path) != before
    assert fingerprint(tmp_path / "a.safetensors") != hashlib.sha256(b"1235").hexdigest()
