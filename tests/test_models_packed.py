"""The packed DiTs: values and gradients of each document as in a forward of its own, and nothing across documents."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonedit.reasonedit_core.denoisers import packed
from reasonedit.reasonedit_core.denoisers.dit import Step1XDenoiser
from reasonedit.reasonedit_core.denoisers.packed import PackedQwenImage, PackedStep1X, text_half
from reasonedit.reasonedit_core.denoisers.qwen_image import QwenImageDenoiser
from reasonedit.reasonedit_core.errors import CheckpointError, ConfigError, PackingError
from reasonedit.reasonedit_core.fp8 import Fp8Linear, quantize_linears
from reasonedit.reasonedit_core.models.streams import document_numbers, pack_layout
from reasonedit.reasonedit_core.packing import ImagePack, PackMask
from reasonedit.reasonedit_core.types import Conditioning, LatentImage
from reasonedit.tests.peer import recipe

STEP1X = ("v1.0", "v1.1", "v1.2")
QWEN = ("2509", "2511")
SYSTEMS = (*STEP1X, *QWEN)
TEXT_WIDTH, CHANNELS = 64, {"s": 64, "q": 16}
BUDGET = 13
"""Text tokens that the DiT of v1.0 and v1.1 sees, padding included."""


@dataclass
class Document:
    """What a denoiser is called with, as leaves that gradients are asked of."""

    grids: tuple[tuple[int, int], ...]
    conditioning: Conditioning
    sigma: float
    clean: torch.Tensor
    noise: torch.Tensor
    leaves: tuple[torch.Tensor, ...] = field(default=())


def draw(name: str, *shape: int) -> torch.Tensor:
    return recipe.draw(name, shape)


@cache
def config_of(system: str) -> dict:
    if system in STEP1X:
        return dict(recipe.TINY, enable_text_token_mapping=system == "v1.2")
    return dict(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=system == "2511",
    )


def make_transformer(system: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    if system in STEP1X:
        from reasonedit.reasonedit_core.models.step1x_transformer import Step1XEditTransformer2DModel as cls
    else:
        from diffusers import QwenImageTransformer2DModel as cls
    model = recipe.randomise(cls(**config_of(system)), seed=4, std=0.15)
    return (model if dtype == torch.float32 else model.to(dtype)).eval()


def make_unit(system: str, transformer: torch.nn.Module | None = None, **options) -> torch.nn.Module:
    transformer = make_transformer(system) if transformer is None else transformer
    if system in STEP1X:
        return PackedStep1X(transformer, system, **options)
    return PackedQwenImage(transformer, **options)


def grids_of(system: str) -> list[tuple[tuple[int, int], ...]]:
    """Edit, text to image, and documents of other sizes; for Qwen several references, one larger than the target."""
    grids = [((3, 4), (3, 4)), ((2, 5),), ((4, 2), (4, 2))]
    return grids if system in STEP1X else [*grids, ((3, 3), (2, 7), (5, 3))]


def make_documents(system: str, name: str = "") -> list[Document]:
    return [make_document(system, f"{name}{number}", grids, number) for number, grids in enumerate(grids_of(system))]


def make_document(system: str, name: str, grids: tuple, number: int) -> Document:
    length = 5 + 2 * number
    tokens = draw(f"{name} tokens", 1, length, TEXT_WIDTH).requires_grad_()
    n_all = sum(height * width for height, width in grids)
    n_target = grids[0][0] * grids[0][1]
    channels = CHANNELS["s" if system in STEP1X else "q"]
    noise = torch.cat([draw(f"{name} noise", n_target, channels), torch.zeros(n_all - n_target, channels)])
    clean = draw(f"{name} clean", n_all, channels).requires_grad_()
    conditioning, leaves = Conditioning(tokens), (tokens, clean)
    if system == "v1.2":
        place = draw(f"{name} place", length, 3) * 3
        embeds = draw(f"{name} embeds", 1, length, TEXT_WIDTH).requires_grad_()
        quoted = (torch.arange(length) % 3 == number % 2)[None]
        quoted &= torch.tensor(number != 1)  # one document without quoted text
        conditioning = Conditioning(tokens, positions=place, text_embeds=embeds, text_mask=quoted)
        leaves = (tokens, clean, embeds)
    elif system in STEP1X:
        filled = torch.cat([tokens, torch.zeros(1, BUDGET - length, TEXT_WIDTH)], dim=1)
        mask = (torch.arange(BUDGET) < length)[None]
        conditioning = Conditioning(filled, mask=mask, positions=torch.zeros(BUDGET, 3))
    return Document(grids, conditioning, 0.9 - 0.25 * number, clean, noise, leaves)


def pack_of(documents: list[Document], padding: int = 0) -> ImagePack:
    sizes = [[height * width for height, width in document.grids] for document in documents]
    runs = [(number, role, n) for number, counts in enumerate(sizes) for role, n in enumerate(counts)]
    runs.append((-1, -1, padding))
    spread = torch.tensor([n for *_, n in runs])
    doc, role = (torch.tensor([run[i] for run in runs]).repeat_interleave(spread) for i in (0, 1))
    filler = torch.full((padding, documents[0].clean.shape[1]), 7.0)
    return ImagePack(
        **text_half([document.conditioning for document in documents]),
        clean=torch.cat([*(document.clean for document in documents), filler]),
        noise=torch.cat([*(document.noise for document in documents), filler]),
        sigma=torch.tensor([document.sigma for document in documents]),
        image_doc=doc,
        role=role,
        loss_weight=(role == 0).float(),
        grids=tuple(document.grids for document in documents),
    )


def alone(system: str, transformer: torch.nn.Module, document: Document) -> torch.Tensor:
    """The velocity of the target by the denoiser that inference uses, with a graph."""
    n_target = document.grids[0][0] * document.grids[0][1]
    clean, noise = document.clean.to(transformer.dtype), document.noise.to(transformer.dtype)
    latents = ((1 - document.sigma) * document.clean + document.sigma * document.noise).to(transformer.dtype)[None, :n_target]
    references, at = [], n_target
    for height, width in document.grids[1:]:
        references.append(LatentImage(clean[None, at : at + height * width], height, width))
        at += height * width
    denoiser = Step1XDenoiser(transformer, system) if system in STEP1X else QwenImageDenoiser(transformer)
    text = document.conditioning
    if system in QWEN:
        text = Conditioning(text.tokens.to(transformer.dtype))
    call = type(denoiser).__call__.__wrapped__  # without its no_grad
    assert noise.shape == clean.shape
    return call(denoiser, latents, torch.tensor([document.sigma]), text, grid=document.grids[0], references=references)[0]


def target_parts(pack: ImagePack, velocity: torch.Tensor) -> list[torch.Tensor]:
    return [velocity[(pack.image_doc == number) & (pack.role == 0)] for number in range(pack.n_documents)]


def weigh(parts: list[torch.Tensor]) -> torch.Tensor:
    """A loss that is not the same for any two numbers."""
    return sum((part * draw(f"weight {number}", *part.shape)).sum() for number, part in enumerate(parts))


def leaves_of(documents: list[Document]) -> list[torch.Tensor]:
    return [leaf for document in documents for leaf in document.leaves]


def zeros_for_none(grad: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor:
    if grad is None:
        return torch.zeros(()) if other is None else torch.zeros_like(other)
    return grad


def close(found: torch.Tensor, expected: torch.Tensor, what: str = "") -> None:
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * scale, msg=lambda text: f"{what}: {text}")


# ---------------------------------------------------------------- streams


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=4),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_a_layout_joins_parts_and_modulates_by_document(documents, padding):
    texts, pictures = ([pair[i] for pair in documents] for i in (0, 1))
    layout = pack_layout(texts, pictures, padding=padding)
    number = [document_numbers(lengths, padding=n) for lengths, n in zip((texts, pictures), padding, strict=True)]
    text, image = (torch.arange(100.0 * i, 100 * i + len(n))[None, :, None] for i, n in enumerate(number))
    joint = layout.join(text, image)
    back = layout.part(joint, text.shape[1])
    assert torch.equal(back[0], text) and torch.equal(back[1], image)
    doc = layout.join(*(n[None] for n in number))[0]
    real = doc[doc >= 0]
    assert (real.diff() >= 0).all() and (doc[len(real) :] == -1).all()
    assert layout.mask is None if len(documents) == 1 and padding == (0, 0) else torch.equal(layout.mask.doc_id, doc)
    scale, shift, x = draw("scale", 4, 3), draw("shift", 4, 3), draw("x", 1, len(doc), 3)
    seen = (doc >= 0)[:, None]
    assert torch.equal(layout.joint.modulate(x, scale, shift)[0], torch.where(seen, x[0] * (1 + scale[doc]) + shift[doc], x[0]))
    assert torch.equal(layout.joint.gated(x, scale, 2 * x)[0], torch.where(seen, x[0] + scale[doc] * (2 * x[0]), x[0]))


# ---------------------------------------------------------------- packed == unpacked


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("system", SYSTEMS)
def test_values_and_gradients_are_those_of_each_document_alone(system, padding):
    documents, unit = make_documents(system), make_unit(system)
    expected = [alone(system, unit.transformer, document) for document in documents]
    loss = weigh(expected)
    parameters = dict(unit.transformer.named_parameters())
    wanted = torch.autograd.grad(loss, [*parameters.values(), *leaves_of(documents)], allow_unused=True)

    pack = pack_of(documents, padding)
    found = target_parts(pack, velocity := unit(pack))
    assert velocity.shape == (len(pack.clean), documents[0].clean.shape[1])
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert other.std() > 0.05
        close(one, other, f"document {number}")
    got = torch.autograd.grad(weigh(found), [*parameters.values(), *leaves_of(documents)], allow_unused=True)
    names = [*parameters, *(f"leaf {index}" for index in range(len(leaves_of(documents))))]
    for name, one, other in zip(names, got, wanted, strict=True):
        close(zeros_for_none(one, other), zeros_for_none(other, one), name)
    assert sum(grad is not None and bool(grad.any()) for grad in wanted) > 0.85 * len(wanted)


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_pack_of_one_document_is_that_document(system):
    unit = make_unit(system)
    for document in make_documents(system):
        pack = pack_of([document])
        close(target_parts(pack, unit(pack))[0], alone(system, unit.transformer, document))


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_bfloat16_rounds_the_timestep_as_inference_does(system):
    documents, unit = make_documents(system), make_unit(system, make_transformer(system, torch.bfloat16))
    for document in documents:
        document.sigma = 0.9163
    pack = pack_of(documents)
    velocity = unit(pack)
    assert velocity.dtype == torch.bfloat16
    for document, one in zip(documents, target_parts(pack, velocity), strict=True):
        torch.testing.assert_close(one, alone(system, unit.transformer, document), rtol=0, atol=0.06)
    seen = []
    part = unit.transformer.time_embed if system in STEP1X else unit.transformer.time_text_embed
    part.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    unit(pack)
    alone(system, unit.transformer, documents[0])
    assert torch.equal(seen[0][0], seen[1][0])


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of torch's RMSNorm
@pytest.mark.parametrize("system", ["v1.1", "v1.2", "2511"])
def test_autocast_computes_as_low_precision_weights_do(system):
    """Mixed precision keeps fp32 weights; the timestep must round as it will in the bf16 model that is sampled."""
    velocities, seen = [], []
    for dtype in (torch.bfloat16, torch.float32):
        unit = make_unit(system, make_transformer(system, dtype), checkpointing=True)
        part = unit.transformer.time_embed if system in STEP1X else unit.transformer.time_text_embed.timestep_embedder
        part.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
            velocities.append(unit(pack_of(make_documents(system))))
    assert velocities[1].dtype == torch.bfloat16 and torch.equal(*seen)
    torch.testing.assert_close(*velocities, rtol=0, atol=0.15)
    weigh([velocities[1]]).backward()
    grads = [p.grad for p in unit.parameters() if p.grad is not None]
    assert grads and all(grad.dtype == torch.float32 and torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("system", ["v1.2", "2511"])
@torch.no_grad()
def test_references_too_are_those_of_the_transformer(system):
    documents, unit, whole = make_documents(system), make_unit(system), []
    found = unit(pack_of(documents))
    unit.transformer.proj_out.register_forward_hook(lambda _module, _args, output: whole.append(output[0]))
    for document in documents:
        alone(system, unit.transformer, document)
    close(found, torch.cat(whole))


@pytest.mark.parametrize("system", ["v1.2", "2511"])
def test_states_of_the_call_stand_in_for_those_of_the_pack(system):
    """The rows may stand in any order and among others, and two documents may share them."""
    documents, unit = make_documents(system), make_unit(system)
    pack = pack_of(documents)
    expected = unit(pack)
    order = torch.randperm(len(pack.states), generator=torch.Generator().manual_seed(0))
    rows = order.argsort() + 4
    states = torch.cat([torch.full((4, TEXT_WIDTH), 9.0), pack.states.detach()[order]]).requires_grad_()
    moved = replace(pack, states=None, text_index=rows[pack.text_index])
    close(unit(moved, states), expected)
    weigh([unit(moved, states)]).backward()
    assert not states.grad[:4].any() and states.grad[4:].any(dim=1).all()

    shared = pack_of([documents[0], replace(documents[1], conditioning=documents[0].conditioning)])
    n = len(shared.text_index) // 2
    once = replace(shared, text_index=torch.arange(n).repeat(2), states=shared.states[:n])
    close(unit(once), unit(shared))


# ---------------------------------------------------------------- nothing across documents


@pytest.mark.parametrize("system", SYSTEMS)
def test_no_gradient_and_no_bit_crosses_documents(system):
    documents, unit = make_documents(system), make_unit(system)
    pack = pack_of(documents, padding=2)
    parts = target_parts(pack, unit(pack))
    for number, document in enumerate(documents):
        grads = torch.autograd.grad(parts[number].square().sum(), leaves_of(documents), retain_graph=True, allow_unused=True)
        own = {id(leaf) for leaf in document.leaves}
        for leaf, grad in zip(leaves_of(documents), grads, strict=True):
            if id(leaf) in own:
                assert grad is None or grad.any() or number == 1  # the quoted embeddings of a document without quotes
            else:
                assert grad is None or not grad.any()
    others = [documents[0], *make_documents(system, "other ")[1:]]
    others[1].sigma = 0.11
    changed = target_parts(again := pack_of(others, padding=2), unit(again))
    assert torch.equal(changed[0], parts[0]) and not torch.equal(changed[1], parts[1])


@pytest.mark.parametrize("system", SYSTEMS)
@torch.no_grad()
def test_padding_touches_nothing(system):
    documents, unit = make_documents(system), make_unit(system)
    pack = pack_of(documents, padding=5)
    expected = unit(pack)
    spoilt = pack.clean.clone()
    spoilt[-5:] = 1e3
    assert torch.equal(unit(replace(pack, clean=spoilt))[:-5], expected[:-5])
    n_text = len(pack.text_index)
    extra = torch.full((3,), -1)
    wide = {"text_index": torch.cat([pack.text_index, extra]), "text_doc": torch.cat([pack.text_doc, extra])}
    if pack.text_place is not None:
        wide["text_place"] = torch.cat([pack.text_place, torch.ones(3, 3)])
    if pack.quoted is not None:
        wide["quoted"] = torch.cat([pack.quoted, torch.zeros(3, dtype=torch.bool)])
    close(unit(replace(pack, **wide))[:-5], expected[:-5])
    assert len(wide["text_index"]) == n_text + 3


@torch.no_grad()
def test_attention_is_asked_for_documents_and_for_nothing_where_there_is_one(monkeypatch):
    asked = []

    def spy(q, k, v, mask=None, **options):
        asked.append(mask)
        return torch.zeros_like(q)

    monkeypatch.setattr(packed, "attention", spy)
    for system, blocks in (("v1.2", 2 + 4), ("2511", 2)):
        documents, unit = make_documents(system), make_unit(system)
        asked.clear()
        unit(pack_of(documents, padding=4))
        assert len(asked) == blocks and all(isinstance(mask, PackMask) and not mask.causal for mask in asked)
        lengths = [
            document.conditioning.tokens.shape[1] + sum(height * width for height, width in document.grids)
            for document in documents
        ]
        assert asked[-1].lengths == tuple(lengths) and (asked[-1].doc_id[-4:] == -1).all()
        if system == "v1.2":  # the connector's, over text alone
            assert asked[0].lengths == tuple(document.conditioning.tokens.shape[1] for document in documents)
        asked.clear()
        unit(pack_of(documents[:1]))
        assert asked == [None] * blocks


# ---------------------------------------------------------------- how training wraps it


@pytest.mark.parametrize("system", ["v1.1", "v1.2", "2511"])
def test_checkpointing_changes_no_gradient_and_enters_blocks_by_their_call(system):
    grads, entered = [], []
    for checkpointing in (False, True):
        documents, unit = make_documents(system), make_unit(system, checkpointing=checkpointing)
        for block in unit.blocks:
            block.register_forward_pre_hook(lambda module, _args: entered.append(type(module).__name__))
        weigh([unit(pack_of(documents))]).backward()
        grads.append([p.grad for p in (*unit.parameters(), *leaves_of(documents))])
        n_blocks = len(unit.blocks)
    assert len(entered) == 3 * n_blocks
    names = {"DoubleBlock", "SingleBlock"} if system in STEP1X else {"QwenImageTransformerBlock"}
    assert set(entered) == names
    for one, other in zip(*grads, strict=True):
        assert (one is None) == (other is None) and (one is None or torch.equal(one, other))


@pytest.mark.parametrize("system", ["v1.2", "2511"])
def test_lora_adapters_learn_through_a_pack(system):
    peft = pytest.importorskip("peft")
    transformer = make_transformer(system).requires_grad_(False)
    linears = ["to_q", "to_out.0", "proj_mlp", "self_attn_qkv", "norm1.linear", "img_mod.1"]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=2, target_modules=linears), transformer)
    trained = {name: p for name, p in transformer.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(draw(name, *parameter.shape) * 0.3)
    documents, unit = make_documents(system), make_unit(system, transformer, checkpointing=True)
    expected = [alone(system, transformer, document) for document in documents]
    wanted = torch.autograd.grad(weigh(expected), list(trained.values()))
    found = target_parts(pack := pack_of(documents), unit(pack))
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    assert len(trained) > 8
    for name, one, other in zip(trained, torch.autograd.grad(weigh(found), list(trained.values())), wanted, strict=True):
        assert other.any(), name
        close(one, other, name)


@pytest.mark.parametrize("system", ["v1.2", "2511"])
def test_fp8_weights_answer_packs(system):
    transformer = make_transformer(system).requires_grad_(False)
    assert quantize_linears(transformer)
    assert any(isinstance(module, Fp8Linear) for module in transformer.modules())
    documents, unit = make_documents(system), make_unit(system, transformer)
    expected = [alone(system, transformer, document) for document in documents]
    found = target_parts(pack := pack_of(documents), unit(pack))
    for one, other in zip(found, expected, strict=True):
        close(one, other)
    leaves = [leaf for document in documents for leaf in document.leaves[:2]]
    pairs = zip(torch.autograd.grad(weigh(found), leaves), torch.autograd.grad(weigh(expected), leaves), strict=True)
    for one, other in pairs:
        close(one, other)


def test_blocks_of_diffusers_stay_what_they_are():
    transformer = make_transformer("2511")
    before = [type(block) for block in transformer.transformer_blocks]
    unit = make_unit("2511", transformer)
    after = [type(block) for block in make_unit("2511", transformer).blocks]
    assert unit.blocks == list(transformer.transformer_blocks) and len(set(after)) == 1
    assert (
        issubclass(after[0], before[0])
        and after[0].__name__ == before[0].__name__
        and len(after[0].__mro__) == 2 + len(before[0].__mro__)
    )
    assert set(unit.state_dict()) == {f"transformer.{key}" for key in make_transformer("2511").state_dict()}


@pytest.fixture
def one_rank(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("system", ["v1.2", "2511"])
def test_fsdp2_shards_block_by_block(system, one_rank):
    """One rank proves that the wrapped calls are the ones that are made: sharded weights outside their block would fail."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    results = []
    for sharded in (False, True):
        documents, unit = make_documents(system), make_unit(system, checkpointing=True)
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh

            mesh = init_device_mesh("cpu", (1,))
            for block in unit.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(unit, mesh=mesh)
            assert all(isinstance(p, DTensor) for p in unit.parameters())
        velocity = unit(pack_of(documents))
        weigh([velocity]).backward()
        grads = {name: p.grad.full_tensor() if sharded else p.grad for name, p in unit.named_parameters() if p.grad is not None}
        results.append((velocity.detach(), grads, [leaf.grad for leaf in leaves_of(documents)]))
    (plain, plain_grads, plain_leaves), (found, grads, leaves) = results
    close(found, plain)
    assert set(grads) >= set(plain_grads)
    for name, grad in plain_grads.items():
        close(grads[name], grad, name)
    for one, other in zip(leaves, plain_leaves, strict=True):
        close(zeros_for_none(one, other), zeros_for_none(other, one))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_parameter_gets_a_gradient_in_every_pack(system):
    """Else a rank would leave the others waiting: quoted text may be missing, the text of Qwen's last block is never read."""
    unit = make_unit(system)
    weigh([unit(pack_of(make_documents(system)[1:2]))]).backward()
    silent = {name.removeprefix("transformer.") for name, p in unit.named_parameters() if not p.grad.any()}
    if system in STEP1X:
        assert silent == ({"text_token_mapping.weight", "text_token_mapping.bias"} if system == "v1.2" else set())
    else:
        unread = ("txt_mlp.", "attn.to_add_out.", "attn.add_q_proj.", "attn.norm_added_q.")
        assert silent and all(name.startswith(tuple(f"transformer_blocks.1.{part}" for part in unread)) for name in silent)


# ---------------------------------------------------------------- the text half of a pack


def test_text_half_of_v12():
    documents = make_documents("v1.2")
    half = text_half([document.conditioning for document in documents])
    assert half["text_index"].tolist() == list(range(5 + 7 + 9))
    assert half["text_doc"].tolist() == [0] * 5 + [1] * 7 + [2] * 9
    assert torch.equal(half["states"], torch.cat([document.conditioning.tokens[0] for document in documents]))
    assert torch.equal(half["text_place"], torch.cat([document.conditioning.positions for document in documents]))
    masks = [document.conditioning.text_mask[0] for document in documents]
    assert torch.equal(half["quoted"], torch.cat(masks))
    embeds = [document.conditioning.text_embeds[0][mask] for document, mask in zip(documents, masks, strict=True)]
    assert torch.equal(half["quoted_embeds"], torch.cat(embeds)) and len(half["quoted_embeds"]) == half["quoted"].sum() > 0
    assert text_half([documents[1].conditioning])["quoted"] is None


def test_text_half_keeps_the_padding_that_is_seen():
    documents = make_documents("v1.1")
    half = text_half([document.conditioning for document in documents[:2]])
    assert half["text_index"].tolist() == [*range(5), *[-1] * 8, *range(5, 12), *[-1] * 6]
    assert half["text_doc"].tolist() == [0] * BUDGET + [1] * BUDGET
    assert half["states"].shape == (12, TEXT_WIDTH) and not half["text_place"].any() and half["quoted"] is None


def test_text_half_leaves_out_what_qwen_masks():
    tokens = draw("tokens", 1, 6, TEXT_WIDTH)
    mask = (torch.arange(6) < 4)[None]
    half = text_half([Conditioning(tokens, mask), Conditioning(tokens)])
    assert half["text_index"].tolist() == list(range(10)) and half["text_doc"].tolist() == [0] * 4 + [1] * 6
    assert half["text_place"] is None and torch.equal(half["states"][:4], tokens[0, :4])


def test_text_half_refuses_what_it_cannot_pack():
    tokens = draw("tokens", 1, 6, TEXT_WIDTH)
    with pytest.raises(PackingError, match="at least one conditioning"):
        text_half([])
    with pytest.raises(PackingError, match="conditioning 1: expected a batch of 1, found 2"):
        text_half([Conditioning(tokens), Conditioning(tokens.expand(2, -1, -1))])
    for mask in ([False, True, True], [False] * 3):
        with pytest.raises(PackingError, match="valid tokens first"):
            text_half([Conditioning(tokens[:, :3], torch.tensor([mask]))])
    with pytest.raises(PackingError, match="positions in all conditionings or in none, found them in 1 of 2"):
        text_half([Conditioning(tokens), Conditioning(tokens, positions=torch.zeros(6, 3))])


# ---------------------------------------------------------------- refusals


def broken(pack: ImagePack, name: str, at: int, value: int) -> ImagePack:
    changed = getattr(pack, name).clone()
    changed[at] = value
    return replace(pack, **{name: changed})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda pack: replace(pack, states=None), "found neither"),
        (lambda pack: replace(pack, sigma=pack.sigma[:2]), r"sigma: expected \(3,\)"),
        (lambda pack: replace(pack, grids=pack.grids[:2]), "token 34 has .2, 0., by the grids it has .-1, -1."),
        (lambda pack: replace(pack, grids=(((9, 9),), *pack.grids)), "grids have .* picture tokens, clean has"),
        (lambda pack: replace(pack, noise=pack.noise[:-1]), "noise: expected"),
        (lambda pack: broken(pack, "role", 3, 1), "token 3 has .0, 1., by the grids it has .0, 0."),
        (lambda pack: broken(pack, "image_doc", 3, 1), "token 3 has .1, 0."),
        (lambda pack: broken(pack, "text_index", 0, 99), "counts up to 99, but there are 21 states"),
        (lambda pack: broken(pack, "text_index", 0, -1), "fillers"),
        (lambda pack: broken(pack, "text_index", 20, -1), "only Step1X-Edit v1.0 and v1.1"),
        (lambda pack: broken(pack, "text_doc", 0, 2), "documents numbered"),
        (lambda pack: replace(pack, text_index=pack.text_index[:12], text_doc=pack.text_doc[:12]), "a text for each of 3"),
        (lambda pack: replace(pack, text_place=None), "text_place: expected positions"),
        (lambda pack: replace(pack, text_place=pack.text_place[1:]), "text_place: expected"),
        (lambda pack: replace(pack, quoted_embeds=pack.quoted_embeds[1:]), "quoted_embeds: expected the input embedding"),
        (lambda pack: replace(pack, quoted_embeds=None), "found 0. Take them from the MLLM's embedding table"),
    ],
)
def test_packs_that_do_not_fit_together_are_refused(change, words):
    pack = pack_of(make_documents("v1.2"))
    with pytest.raises(PackingError, match=words):
        make_unit("v1.2")(change(pack))


def test_units_of_other_models_are_refused():
    with pytest.raises(ConfigError, match="found 'v3'"):
        PackedStep1X(make_transformer("v1.2"), "v3")
    from diffusers import QwenImageTransformer2DModel

    with pytest.raises(CheckpointError, match="use_additional_t_cond"):
        PackedQwenImage(QwenImageTransformer2DModel(**config_of("2509"), use_additional_t_cond=True))
    unit = make_unit("2509")
    long = replace(make_documents("2509")[0], conditioning=Conditioning(torch.zeros(1, 4095, TEXT_WIDTH)))
    with pytest.raises(PackingError, match="document 0: the transformer has 4096 text positions; 4095 text tokens"):
        unit(pack_of([long]))
