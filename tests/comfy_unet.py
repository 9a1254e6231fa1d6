"""Run by test_nodes_reasonbrain.py in a real ComfyUI's Python: its SD 1.5 class with tiny weights, patched by our node, against
the library. Prints the largest differences. Arguments: the ComfyUI, a tiny ReasonBrain, a folder for its output.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

COMFY, WEIGHTS, OUT = sys.argv[1:]
sys.argv = ["main.py", "--cpu", "--base-directory", OUT]
sys.path.insert(0, COMFY)
sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_base  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_custom_sampler import Guider_DualCFG  # noqa: E402

from reasonedit.nodes import brain_values, host, reasonbrain  # noqa: E402
from reasonedit.reasonedit_core.denoisers.three_pass import Scales, guided, three_conditions  # noqa: E402
from reasonedit.reasonedit_core.errors import ConfigError  # noqa: E402

TINY = {
    "image_size": 32,
    "in_channels": 8,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 0],
    "transformer_depth_output": [1, 1, 0, 0],
    "transformer_depth_middle": 1,
    "context_dim": 24,
    "num_heads": 8,
    "num_head_channels": -1,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "legacy": False,
    "dtype": torch.float32,
}


def make_model(channels: int):
    """ComfyUI's 8-channel SD 1.5 of our test's size, with nothing in it."""
    kind = comfy.supported_models.SD15_instructpix2pix if channels == 8 else comfy.supported_models.SD15
    config = kind({**TINY, "in_channels": channels})
    config.set_inference_dtype(torch.float32, None)
    base = comfy.model_base.SD15_instructpix2pix if channels == 8 else comfy.model_base.BaseModel
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(base(config, device=cpu), cpu, cpu)


class Encoder:
    """Our VAE as ComfyUI's: pixels (B, H, W, 3) -> the mode, without the scale."""

    def __init__(self, codec):
        self.codec = codec

    def encode(self, pixels):
        """The source's latents."""
        return self.codec.source(self.codec.encode(pixels.permute(0, 3, 1, 2) * 2 - 1))


def denoised(model, conds, x, sigma) -> torch.Tensor:
    """What the guider of a stock graph predicts at one sigma."""
    guider = Guider_DualCFG(model)
    guider.set_conds(*conds)
    guider.set_cfg(7.5, 1.5)
    found = {}

    class Sampler:
        """Calls the guided model once, at the first sigma."""

        def sample(self, model_wrap, sigmas, extra_args, *_args, **_options):
            """As ComfyUI asks a sampler."""
            found["x0"] = model_wrap(x, sigmas[:1].expand(len(x)), **extra_args)
            return x

        def max_denoise(self, model_wrap, sigmas):
            """Not asked for."""
            return False

    guider.sample(torch.zeros_like(x), torch.zeros_like(x), Sampler(), torch.tensor([sigma, 0.0]), seed=0)
    return found["x0"]


@torch.no_grad()
def main() -> None:
    """Compare at three noise levels, in a batch of two."""
    host.folder_paths.add_model_folder_path(host.MODELS, str(Path(WEIGHTS).parent))
    brain = reasonbrain.load_brain(f"{host.MODELS}/{Path(WEIGHTS).name}", "grid", "float32")
    unet = brain.generator.sampler.denoiser.unet
    model, state = make_model(8), unet.state_dict()
    names = comfy.utils.unet_to_diffusers({**TINY, "num_res_blocks": [1, 1], "transformer_depth_output": [1, 1, 0, 0]})
    theirs = {names[key]: value for key, value in state.items() if key in names}
    assert set(theirs) == set(model.model.diffusion_model.state_dict()), "the two layouts hold the same tensors"
    model.model.diffusion_model.load_state_dict(theirs)
    image = torch.rand(1, 48, 64, 3, generator=torch.Generator().manual_seed(0))
    guidance = brain_values.reason(brain, image, "melt the ice", "ice")
    apply = reasonbrain.Apply.execute
    patched, *conds, latent = apply(model, guidance, Encoder(brain.generator.codec), image, 0).result
    twice, *_ = apply(patched, guidance, Encoder(brain.generator.codec), image, 0).result
    shape = (2, *latent["samples"].shape[1:])
    source = conds[0][0][1]["concat_latent_image"]
    given = three_conditions(replace(guidance.conditioning, reference=source), guidance.null)
    sampling, worst, without = model.model.model_sampling, 0.0, 0.0
    for sigma in (0.2, 2.0, 10.0):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * (1 + sigma**2) ** 0.5
        t = sampling.timestep(torch.tensor([sigma])).long()
        z = x / (1 + sigma**2) ** 0.5
        ours = [
            guided(*brain.generator.sampler.denoiser.predict(row[None].expand(3, -1, -1, -1), t.expand(3), given).chunk(3),
                   Scales(7.5, 1.5))
            for row in z
        ]  # fmt: skip
        wanted = x - sigma * torch.cat(ours)
        for one in (patched, twice):
            worst = max(worst, float((denoised(one, conds, x, sigma) - wanted).abs().max() / wanted.abs().max()))
        without = max(without, float((denoised(model, conds, x, sigma) - wanted).abs().max() / wanted.abs().max()))
    print("difference", worst)
    print("without", without)
    try:
        apply(make_model(4), guidance, Encoder(brain.generator.codec), image, 0)
    except ConfigError as error:
        print("refused", str(error).partition("found ")[2][0])


main()
