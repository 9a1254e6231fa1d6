"""The DiTs on the fused ops: equal to their plain path, nothing between matrix products but fused passes, one step of guidance.

A stand-in takes the place of the kernels: it computes by the plain form, and notes what it is given.
"""

from __future__ import annotations

import copy
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reasonedit.reasonedit_core import flow, generator
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.fp8 import quantize_linears
from reasonedit.reasonedit_core.kernels import custom_ops, guided_step, ops
from reasonedit.reasonedit_core.kernels import reference_ops as plain
from reasonedit.reasonedit_core.models import halves
from reasonedit.reasonedit_core.models.halves import project_halves, splits
from reasonedit.reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel
from reasonedit.reasonedit_core.types import Conditioning, LatentImage
from reasonedit.tests.peer import recipe

QWEN = dict(
    in_channels=16,
    out_channels=4,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=32,
    axes_dims_rope=(4, 6, 6),
)
GRID, TEXT = (4, 6), 11
SIZES = ((3, 5), (5, 3))
"""Of two references, for Qwen-Image."""


class StandIn:
    """What a module of kernels offers, by the plain form. calls: (op, number of streams or what is asked of it)."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []

    def qk_norm_rope(self, streams, cos, sin, rows, out, eps, *, compact=False):
        self.calls.append(("qk_norm_rope", len(streams)))
        assert all(x.stride(-1) == 1 for stream in streams for x in stream)
        text = streams[0] if len(streams) == 2 else None
        made = plain.qk_norm_rope(streams[-1], torch.complex(cos, sin), text, rows, eps)
        for place, x in zip(out, made, strict=True):
            if place is not None:
                place.copy_(x)

    def gate_norm_modulate(self, x, y, gate, scale, shift, rows, residual, normed, eps, clamp):
        kind = "both" if y is not None and scale is not None else "gate" if y is not None else "norm"
        self.calls.append(("gate_norm_modulate", kind))
        if y is not None:
            x = plain.gate_residual(x, y, gate, rows, clamp)
            residual.copy_(x)
        if scale is not None:
            normed.copy_(plain.norm_modulate(x, scale, shift, rows, eps))

    def guided_step(self, latents, cond, uncond, sigma, sigma_next, out, velocity, scale, rule, power, truncate):
        self.calls.append(("guided_step", rule))
        out.copy_(plain.guided_step(latents, cond, uncond, sigma, sigma_next, scale, rule, power, truncate)[0])


@pytest.fixture
def kernels(monkeypatch):
    """Kernels everywhere, the CPU included."""
    stand_in = StandIn()

    def pick(op, backend, device, refused=None):
        assert refused is None, refused
        return "triton"

    monkeypatch.setattr(ops, "pick", pick)
    monkeypatch.setattr(custom_ops, "_module", lambda backend: stand_in)
    monkeypatch.setattr(halves, "KERNEL_DEVICES", ("cpu", "cuda", "meta"))
    return stand_in


class Seen(TorchDispatchMode):
    """Names of the operators, other than views and matrix products, that touch a tensor of `least` numbers or more."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.names = least, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        free = ("_unsafe_view", "empty", "new_empty", "empty_like", "addmm", "mm", "bmm")
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)]
        name = func._schema.name
        if not func.is_view and name.removeprefix("aten::") not in free and any(x.numel() >= self.least for x in tensors):
            self.names[name] += 1
        return out


def draw(name: str, *shape: int) -> torch.Tensor:
    return recipe.draw(name, shape)


def close(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert wanted.std() > 0.02
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance * max(1.0, wanted.abs().max().item()))


def make_step1x(dtype: torch.dtype = torch.float32) -> Step1XEditTransformer2DModel:
    model = Step1XEditTransformer2DModel(**recipe.TINY, enable_text_token_mapping=True)
    return recipe.randomise(model, seed=4, std=0.15).to(dtype).eval()


def step1x_inputs(batch: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two timesteps; the second sample has padding that it may not see."""
    values = recipe.inputs("v1.2", TEXT)
    for key in ("hidden_states", "encoder_hidden_states", "text_embeds"):
        values[key] = draw(f"batch of {key}", batch, *values[key].shape[1:]).to(dtype)
    for key in ("encoder_mask", "text_mask"):
        values[key] = values[key].expand(batch, -1).clone()
    values["encoder_mask"][1:, 7:] = False
    mask = torch.ones(batch, 1, 1, TEXT + values["hidden_states"].shape[1], dtype=torch.bool)
    mask[1:, ..., 7:TEXT] = False
    return values | {"timestep": torch.linspace(0.2, 0.9, batch).to(dtype), "joint_mask": mask}


def make_qwen(zero_cond_t: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    from diffusers import QwenImageTransformer2DModel

    return recipe.randomise(QwenImageTransformer2DModel(**QWEN, zero_cond_t=zero_cond_t), std=0.2).to(dtype).eval()


def qwen_inputs(batch: int = 2, dtype: torch.dtype = torch.float32):
    """latents, t and conditioning of a batch with two timesteps and, in its second sample, padding; then the references."""
    mask = torch.ones(batch, TEXT, dtype=torch.bool)
    mask[1:, 7:] = False
    latents = draw("latents", batch, GRID[0] * GRID[1], 16).to(dtype)
    conditioning = Conditioning(draw("tokens", batch, TEXT, 32).to(dtype), mask if batch > 1 else None)
    references = [LatentImage(draw(f"reference {h}", 1, h * w, 16).to(dtype), h, w) for h, w in SIZES]
    return (latents, torch.linspace(0.3, 0.8, batch), conditioning), references


@torch.no_grad()
def stock(transformer: nn.Module, call: tuple, references: list[LatentImage]) -> torch.Tensor:
    """What the transformer of diffusers makes of the same by its own forward."""
    latents, t, conditioning = call
    made = transformer(
        hidden_states=torch.cat([latents, *(r.tokens.expand(len(latents), -1, -1) for r in references)], dim=1),
        timestep=(t * 1000).to(latents.dtype) / 1000,
        encoder_hidden_states=conditioning.tokens,
        encoder_hidden_states_mask=conditioning.mask,
        img_shapes=[[(1, *GRID), *((1, r.height, r.width) for r in references)]] * len(latents),
        return_dict=False,
    )[0]
    return made[:, : latents.shape[1]]


# ---------------------------------------------------------------- fused == plain


@torch.no_grad()
def test_step1x_on_kernels_equals_its_plain_path(request):
    model, values = make_step1x(), step1x_inputs()
    wanted = model(**values)
    kernels = request.getfixturevalue("kernels")
    close(model(**values), wanted)
    # Double blocks join two streams, single ones turn one. Each stream of a double block has its norm, its gate with the norm
    # behind it and its last gate; a single block and the last layer have their norm; gates of the connector have none.
    assert Counter(kernels.calls) == {
        ("qk_norm_rope", 2): 2,
        ("qk_norm_rope", 1): 2,
        ("gate_norm_modulate", "norm"): 2 * 2 + 2 + 1,
        ("gate_norm_modulate", "both"): 2 * 2,
        ("gate_norm_modulate", "gate"): 2 * 2 + 2 + 2 * 2,
    }


@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_qwen_image_on_kernels_equals_the_stock_transformer(kernels, zero_cond_t):
    """With zero_cond_t the references of each sample take a row of modulation of their own."""
    denoiser = QwenImageDenoiser(make_qwen(zero_cond_t))
    call, references = qwen_inputs()
    wanted = stock(denoiser.transformer, call, references)
    assert not kernels.calls
    close(denoiser(*call, grid=GRID, references=references), wanted)
    assert Counter(kernels.calls) == {
        ("qk_norm_rope", 2): 2,
        ("gate_norm_modulate", "norm"): 2 * 2 + 1,
        ("gate_norm_modulate", "both"): 2 * 2,
        ("gate_norm_modulate", "gate"): 2 * 2,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero_cond_t", [False, True], ids=["2509", "2511"])
def test_without_kernels_every_bit_is_that_of_the_stock_transformer(zero_cond_t, dtype):
    denoiser = QwenImageDenoiser(make_qwen(zero_cond_t, dtype))
    call, references = qwen_inputs(dtype=dtype)
    found = denoiser(*call, grid=GRID, references=references)
    assert found.dtype == dtype and torch.equal(found, stock(denoiser.transformer, call, references))


def test_a_state_for_one_prompt_meets_a_batch_of_timesteps(kernels, monkeypatch):
    """The gates of the connector then have more rows than it has samples."""
    model, values = make_step1x(), step1x_inputs()
    state = model.prepare_text(values["encoder_hidden_states"][:1], None)
    with torch.no_grad():
        found = model.connector.refine(state.connector, torch.tensor([0.2, 0.7]))
        monkeypatch.undo()
        close(found, model.connector.refine(state.connector, torch.tensor([0.2, 0.7])))


@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.06), (torch.float16, 8e-3)])
@torch.no_grad()
def test_half_precision_on_kernels_follows_fp32(kernels, dtype, tolerance):
    wanted = make_step1x()(**step1x_inputs())
    found = make_step1x(dtype)(**step1x_inputs(dtype=dtype))
    assert found.dtype == dtype
    close(found.float(), wanted, tolerance)


@pytest.mark.parametrize("stream", ["text", "joint"])
@torch.no_grad()
def test_fp16_overflow_of_step1x_is_clamped_by_kernels_too(kernels, stream):
    model = make_step1x(torch.float16)
    if stream == "joint":
        block = model.single_transformer_blocks[0]
        block.norm.linear.bias[64:] = 2.0  # the gate
        block.proj_out.bias[:16] = 6e4
    else:
        block = model.transformer_blocks[0]
        block.norm1_context.linear.bias[160:] = 2.0  # the gate of the MLP
        block.ff_context.net[2].bias[:16] = 6e4
    assert torch.isfinite(model(**step1x_inputs(dtype=torch.float16))).all()


@pytest.mark.parametrize("stream", ["img", "txt"])
@torch.no_grad()
def test_fp16_overflow_of_qwen_image_is_clamped_by_kernels_too(kernels, stream):
    denoiser = QwenImageDenoiser(make_qwen(dtype=torch.float16))
    block = denoiser.transformer.transformer_blocks[0]
    getattr(block, f"{stream}_mod")[1].bias[160:] = 2.0
    getattr(block, f"{stream}_mlp").net[2].bias[:16] = 6e4
    call, references = qwen_inputs(1, torch.float16)
    assert torch.isfinite(denoiser(*call, grid=GRID, references=references)).all()


def test_gradients_on_kernels_are_those_of_the_plain_path(request):
    values, grads = step1x_inputs(), []
    for on in (False, True):
        if on:
            kernels = request.getfixturevalue("kernels")
        model = make_step1x().train()
        values["hidden_states"] = values["hidden_states"].detach().requires_grad_()
        (model(**values) * draw("weight", 2, 48, 64)).sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()} | {"input": values["hidden_states"].grad})
    assert kernels.calls and all(grad is not None for grad in grads[0].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(
            grads[1][name], grad, rtol=0, atol=1e-5 * max(1.0, grad.abs().max().item()), msg=f"gradient of {name}"
        )


@pytest.mark.parametrize("system,alone", [("v1.2", 2), ("2511", 0)])
def test_packs_keep_their_own_form_beside_kernels(request, system, alone):
    """But for the single blocks, whose one stream is as good as a sample."""
    from reasonedit.tests import test_models_packed as packs

    unit = packs.make_unit(system)
    pack = packs.pack_of(packs.make_documents(system), padding=3)
    wanted = unit(pack)
    kernels = request.getfixturevalue("kernels")
    found = unit(pack)
    close(found, wanted)
    assert kernels.calls == [("qk_norm_rope", 1)] * alone
    grads = [torch.autograd.grad(packs.weigh([x]), list(unit.parameters()), allow_unused=True) for x in (wanted, found)]
    for (name, _), one, other in zip(unit.named_parameters(), *grads, strict=True):
        packs.close(packs.zeros_for_none(other, one), packs.zeros_for_none(one, other), name)


# ---------------------------------------------------------------- what moves


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def stand_in_attention(q, k, v, mask):
    assert mask is None
    return q.new_empty(q.shape)


WIDE = dict(attention_head_dim=128, num_attention_heads=2, axes_dims_rope=(16, 56, 56), num_layers=2)


def run_on_meta(system: str) -> Counter:
    """Operators that touch a whole stream of 2048 tokens and 256 channels in a forward after the first."""
    with torch.device("meta"):
        if system == "step1x":
            net = Step1XEditTransformer2DModel(**{**recipe.TINY, **WIDE}).to(torch.bfloat16)
            denoiser = Step1XDenoiser(net, "v1.2", host=stand_in_attention)
            text = Conditioning(meta(1, 16, 64), positions=torch.empty(16, 3))
        else:
            from diffusers import QwenImageTransformer2DModel

            net = QwenImageTransformer2DModel(**{**QWEN, **WIDE, "in_channels": 64}, zero_cond_t=system == "2511")
            denoiser = QwenImageDenoiser(net.to(torch.bfloat16), host=stand_in_attention)
            text = Conditioning(meta(1, 16, 32))
    call = (meta(1, 1024, 64), meta(1, dtype=torch.float32), text)
    run = dict(grid=(32, 32), references=[LatentImage(meta(1, 1024, 64), 32, 32)])
    denoiser(*call, **run)
    with Seen(2048 * 256) as seen:
        denoiser(*call, **run)
    return seen.names


@pytest.mark.parametrize("system", ["step1x", "2509", "2511"])
def test_between_matrix_products_only_fused_passes_touch_a_stream(system):
    names = run_on_meta(system)
    singles, joins = (2, 1) if system == "step1x" else (0, 0)
    wanted = {
        "aten::gelu": 2 + singles,
        "reasonedit::qk_norm_rope": 2,
        "reasonedit::norm_modulate": 2 + singles + 1,
        "reasonedit::gate_norm_modulate": 2,
        "reasonedit::gate_residual": 2 + singles,
    }
    if singles:
        wanted |= {"reasonedit::qk_norm_rope_pair": singles, "aten::cat": joins}
    assert names == wanted


def test_tables_and_masks_are_made_once_per_size(monkeypatch):
    denoiser, made = QwenImageDenoiser(make_qwen()), []
    denoiser.transformer.pos_embed.register_forward_hook(lambda *_: made.append(1))
    (latents, t, text), references = qwen_inputs(1)
    valid = Conditioning(text.tokens, torch.ones(1, TEXT, dtype=torch.bool))
    masks = []
    denoiser.host = lambda q, k, v, mask: masks.append(mask) or torch.zeros_like(q)
    for _ in range(3):
        for conditioning in (text, valid):
            denoiser(latents, t, conditioning, grid=GRID, references=references)
    assert len(made) == 2
    assert masks == [None] * 12, "a mask that hides nothing only slows attention down"
    denoiser(latents, t, text, grid=GRID[::-1], references=references)
    denoiser(latents, t, text, grid=GRID, references=references[:1])
    assert len(made) == 4


# ---------------------------------------------------------------- around the blocks


def test_hooks_adapters_and_streamed_blocks_of_qwen_image_take_part(kernels):
    from peft import LoraConfig

    denoiser = QwenImageDenoiser(make_qwen())
    call, references = qwen_inputs()
    before, order = denoiser(*call, grid=GRID, references=references), []
    names = set(denoiser.transformer.state_dict())
    for number, block in enumerate(denoiser.transformer.transformer_blocks):
        assert type(block).__name__ == "QwenImageTransformerBlock"
        block.register_forward_pre_hook(lambda _block, _args, number=number: order.append(("in", number)))
        block.register_forward_hook(lambda _block, _args, _out, number=number: order.append(("out", number)))
    close(denoiser(*call, grid=GRID, references=references), before, 1e-7)
    assert order == [("in", 0), ("out", 0), ("in", 1), ("out", 1)]
    assert set(denoiser.transformer.state_dict()) == names == set(make_qwen().state_dict())
    targets = ["to_k", "add_v_proj", "to_out.0", "img_mod.1"]
    denoiser.transformer.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False))
    found = denoiser(*call, grid=GRID, references=references)
    assert (found - before).abs().max() > 1e-3
    close(found, stock(denoiser.transformer, call, references))


def test_blocks_of_qwen_image_compile_without_a_graph_break():
    denoiser = QwenImageDenoiser(make_qwen(True))
    call, references = qwen_inputs()
    wanted = denoiser(*call, grid=GRID, references=references)
    denoiser.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    close(denoiser(*call, grid=GRID, references=references), wanted, 1e-6)


@pytest.mark.parametrize("kind", ["plain", "adapter", "fp8"])
@torch.no_grad()
def test_an_output_projection_of_any_kind_takes_both_halves(kernels, monkeypatch, kind):
    model, values = make_step1x(), step1x_inputs()
    if kind == "adapter":
        from peft import LoraConfig

        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["proj_out"], init_lora_weights=False))
    if kind == "fp8":
        quantize_linears(model.single_transformer_blocks, skip=())
    found = model(**values)
    with Seen(2 * 59 * 32) as seen:
        close(model(**values), found, 1e-7)
    assert seen.names["aten::cat"] == 1, "of text and pictures before the single blocks"
    assert seen.names["aten::copy_"] == (0 if kind == "plain" else 2), "one half, once per block"
    joined = lambda layer, first, mlp, x: layer(  # noqa: E731
        torch.cat([first, nn.functional.gelu(mlp(x), approximate="tanh")], dim=-1)
    )
    monkeypatch.setattr("reasonedit.reasonedit_core.models.step1x_transformer.project_halves", joined)
    close(found, model(**values))


@torch.no_grad()
def test_two_products_make_one_projection(kernels):
    layer, mlp, first, x = nn.Linear(20, 7), nn.Linear(6, 12), draw("first", 2, 5, 8), draw("second", 2, 5, 6)
    inner = nn.functional.gelu(mlp(x), approximate="tanh")
    wanted, kept = layer(torch.cat([first, inner], dim=-1)), copy.deepcopy(layer.state_dict())
    assert splits(layer, first)
    torch.testing.assert_close(project_halves(layer, first, mlp, x), wanted)
    layer.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(project_halves(layer, first, mlp, x), wanted)
    layer.bias = None
    torch.testing.assert_close(project_halves(layer, first, mlp, x), wanted - kept["bias"], rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.weight, kept["weight"])


class Other(nn.Linear):
    """As a host's Linear, whose weights may be elsewhere."""


@torch.no_grad()
def test_weights_that_something_stands_before_are_left_alone(kernels, monkeypatch):
    x = torch.zeros(1, 3, 8)
    assert splits(nn.Linear(20, 7), x) and splits(nn.Linear(20, 7, bias=False), x)
    wrapped, hooked, before = nn.Linear(20, 7), nn.Linear(20, 7), nn.Linear(20, 7)
    wrapped.forward = wrapped.forward
    hooked.register_forward_hook(lambda *_: None)
    before.register_forward_pre_hook(lambda *_: None)
    halved, elsewhere = nn.Linear(20, 7).bfloat16(), nn.Linear(20, 7, device="meta")
    assert not any(splits(layer, x) for layer in (Other(20, 7), wrapped, hooked, before, halved, elsewhere))
    assert not splits(nn.Linear(20, 7).half(), x.half()), "the sum of one half may overflow"
    with torch.enable_grad():
        assert not splits(nn.Linear(20, 7), x)
    monkeypatch.undo()
    assert not splits(nn.Linear(20, 7), x), "on the CPU streamed and resident weights agree in every bit"


# ---------------------------------------------------------------- guidance and step


COMBINES = {
    "step1x": flow.Step1XGuidance(),
    "truncated": flow.Step1XGuidance(power=0.7, truncate=0.6),
    "never": flow.step1x_guidance("v1.0"),
    "qwen": flow.combine_qwen,
}


def guided(combine, *, pairs: str = "sequential", step=None, scale: float = 3.0) -> flow.Guided:
    cond, uncond = (Conditioning(draw(name, 1, 1, 4)) for name in ("cond", "uncond"))
    joined = Conditioning(torch.cat([cond.tokens, uncond.tokens])) if pairs == "joined" else None

    def predict(x, sigma, conditioning):
        return x * conditioning.tokens - sigma[:, None, None] * conditioning.tokens.roll(1, -1)

    cond_only = pairs == "alone"
    return flow.guided_velocity(
        predict, cond, None if cond_only else uncond, scale=scale, combine=combine, joined=joined, step=step
    )


@pytest.mark.parametrize("pairs", ["sequential", "joined", "alone"])
@pytest.mark.parametrize("name", COMBINES)
def test_a_fused_step_is_guidance_and_step(kernels, name, pairs):
    sigmas, start = flow.sigmas(5, 64, flow.STEP1X), draw("start", 1, 6, 4)
    wanted, found = [], []
    for step, kept in ((None, wanted), (guided_step, found)):
        velocity = guided(COMBINES[name], pairs=pairs, step=step)
        last = flow.euler(velocity, start, sigmas, on_step=lambda i, n, x, kept=kept: kept.append(x))
        assert last is kept[-1]
    assert len(wanted) == 5 and [op for op, _ in kernels.calls] == ["guided_step"] * 5
    rule = "plain" if pairs == "alone" else "qwen" if name == "qwen" else "step1x"
    assert {what for _, what in kernels.calls} == {rule}
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_nothing_waits_for_sigma():
    """On the meta device a value that Python asks for raises."""
    velocity = guided(COMBINES["truncated"], step=guided_step)
    on_meta = [Conditioning(c.tokens.to("meta")) for c in (velocity.cond, velocity.uncond)]
    velocity = flow.guided_velocity(velocity.predict, *on_meta, scale=3.0, combine=velocity.combine, step=guided_step)
    latents, sigma = meta(1, 6, 4, dtype=torch.float32), meta(dtype=torch.float32)
    assert velocity.advance(latents, sigma, sigma).shape == latents.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        velocity(latents, sigma)


def test_a_rule_that_the_kernel_does_not_have_is_stepped_plainly(kernels):
    sigmas, start = flow.sigmas(3, 64, flow.STEP1X), draw("start", 1, 6, 4)

    def combine(cond, uncond, scale, sigma):
        return cond + scale * uncond

    found = flow.euler(guided(combine, step=guided_step), start, sigmas)
    assert torch.equal(found, flow.euler(guided(combine), start, sigmas)) and not kernels.calls
    with pytest.raises(TypeError, match="SimpleNamespace"):
        flow.euler(guided(combine, step=SimpleNamespace(), pairs="alone"), start, sigmas)


@pytest.mark.parametrize("released", [False, True])
def test_the_released_policy_keeps_the_released_order_of_roundings(monkeypatch, released):
    steps = []
    monkeypatch.setattr(generator, "guided_step", lambda *args, **kw: steps.append(kw.get("rule")) or guided_step(*args, **kw))
    from reasonedit.tests import test_generator as edits

    made = edits.run(edits.make(), edits.request(), released=released)
    assert torch.isfinite(made.latents).all()
    assert steps == ([] if released else ["step1x"] * 2)
