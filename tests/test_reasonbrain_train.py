"""Thirty tiny steps, the gradients of L_DM alone, and a checkpoint that restores everything that was trained."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reasonedit.reasonedit_core.conditioners.brain_weights import build_brain, load_brain, save_brain, trained_tensors
from reasonedit.reasonedit_core.conditioners.reasonbrain import ReasonBrainConditioner, as_conditioning
from reasonedit.reasonedit_core.conditioners.text_states import load_text_states
from reasonedit.reasonedit_core.denoisers.unet import UNetDenoiser, widen_unet
from reasonedit.reasonedit_core.errors import CheckpointError
from reasonedit.reasonedit_core.mllm.llava import load_llava
from reasonedit.reasonedit_core.models.reasonbrain.losses import denoising_loss, mllm_loss, noised
from reasonedit.reasonedit_core.segmenters.regions import Regions
from reasonedit.tests.brains import tiny_brain, write_llava, write_text_encoder
from reasonedit.tests.test_reasonbrain_denoisers import draw, tiny_unet

WORDS = ["make it snow", "what if the sun set?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    return write_llava(folder / "llava"), write_text_encoder(folder / "sd")


class Bench:
    """One batch with fixed t and noise."""

    def __init__(self, folders):
        self.llava = load_llava(folders[0])
        self.llava.projector.requires_grad_(True)
        self.llava.add_lora(dropout=0.0)
        self.brain = tiny_brain().train()
        self.denoiser = UNetDenoiser(widen_unet(tiny_unet()))
        self.chain = ReasonBrainConditioner(self.brain, self.llava, load_text_states(*folders[1]))
        regions = [Regions((draw(n, 4, 4, seed=n) > 0).to(torch.uint8) * 255, draw(n, 8, seed=n)) for n in (3, 5)]
        pictures = draw(2, 3, 40, 40).sigmoid()
        self.features = self.chain.features(pictures, WORDS, objects=[["ice"], ["sun", "sky"]], regions=regions)
        self.clean, self.noise, self.source = (draw(2, 4, 8, 8, seed=n) for n in (7, 8, 9))

    def parameters(self):
        return [*trained_tensors(self.brain, self.llava, self.denoiser.unet).values(), *self.llava.trainable().values()]

    def losses(self):
        out = self.chain.run(self.features, WORDS, logits=True)
        t = torch.tensor([300, 700])
        latents, target = noised(self.clean, self.noise, torch.linspace(0.999, 0.01, 1000), t, "epsilon")
        predicted = self.denoiser.predict(latents, t, replace(as_conditioning(out.enhanced), reference=self.source))
        return mllm_loss(out.logits, torch.tensor(self.llava.img_ids)), denoising_loss(predicted, target)


def test_thirty_steps_lower_both_losses_and_the_checkpoint_restores_them(folders, tmp_path):
    bench = Bench(folders)
    optimizer = torch.optim.AdamW(bench.parameters(), lr=5e-3)
    first = [x.item() for x in bench.losses()]
    for _ in range(30):
        optimizer.zero_grad()
        sum(bench.losses()).backward()
        optimizer.step()
    last = [x.item() for x in bench.losses()]
    assert last[0] < first[0] / 2 and last[1] < 0.8 * first[1], (first, last)

    save_brain(tmp_path, bench.brain, bench.llava, bench.denoiser.unet)
    fresh = Bench(folders)
    fresh.brain = fresh.chain.brain = build_brain(tmp_path)
    assert fresh.losses()[0].item() != pytest.approx(last[0], rel=1e-2)
    load_brain(tmp_path, fresh.brain, fresh.llava, fresh.denoiser.unet)
    assert [x.item() for x in fresh.losses()] == pytest.approx(last, rel=1e-4)
    own, theirs = (trained_tensors(b.brain, b.llava, b.denoiser.unet) for b in (bench, fresh))
    assert own.keys() == theirs.keys() and all(torch.equal(own[key], theirs[key]) for key in own)
    with pytest.raises(CheckpointError, match="denoiser.conv_in.weight is unknown|denoiser.* is unknown"):
        load_brain(tmp_path, fresh.brain, fresh.llava)
    with pytest.raises(CheckpointError, match="is unknown"):
        load_brain(tmp_path, tiny_brain(id_controller=False), fresh.llava, fresh.denoiser.unet)


def test_the_denoising_loss_alone_moves_every_part(folders):
    bench = Bench(folders)
    optimizer = torch.optim.SGD(bench.parameters(), lr=0.1)
    start = {n: p.detach().clone() for n, p in (bench.llava.trainable() | dict(bench.brain.named_parameters())).items()}
    for _ in range(3):
        optimizer.zero_grad()
        bench.losses()[1].backward()
        optimizer.step()
    now = bench.llava.trainable() | dict(bench.brain.named_parameters())
    for part in ("lora_A", "lora_B", "frce.visual", "frce.textual", "assembler", "qformer", "cme.visual", "cme.textual"):
        mine = [n for n in now if part in n]
        assert mine and any(now[n].grad is not None and now[n].grad.any() for n in mine), part
        assert any(not torch.equal(now[n], start[n]) for n in mine), part
    for block in ("ca1", "ca2", "ca3", "ca4", "ca5", "latent"):
        assert any(p.grad.any() for p in getattr(bench.brain.cme.visual, block).parameters()), block
