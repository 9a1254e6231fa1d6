"""Makes tests/golden/step1x_model.safetensors with the released transformer.

    PYTHONPATH=<released diffusers fork>/src python tests/peer/golden_models.py

The released code is imported from the user's own copy and is no part of this repository. Outputs only: weights and
inputs come from recipe.py on both sides.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
import recipe

TARGET = Path(__file__).resolve().parent.parent / "golden" / "step1x_model.safetensors"


def released(mapping: bool, std: float = 0.05) -> torch.nn.Module:
    """The released transformer, tiny. It fixes the mapping's size in code, so the layer is exchanged in memory."""
    from diffusers.models.transformers.transformer_step1x_edit import Step1XEditTransformer2DModel

    model = Step1XEditTransformer2DModel(**recipe.TINY, enable_text_token_mapping=mapping)
    if mapping:
        model.text_token_mapping = torch.nn.Linear(recipe.TINY["connector_in_channels"], recipe.TINY["joint_attention_dim"])
    return recipe.randomise(model, std=std).eval()


def cast(values: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Floats to `dtype`, positions kept in fp32."""
    return {
        key: value.to(dtype) if value.is_floating_point() and not key.endswith("_ids") else value
        for key, value in values.items()
    }


def run_model(model: torch.nn.Module, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The released forward under its own argument names; masks are the int64 of its pipelines."""
    return model(
        hidden_states=values["hidden_states"],
        encoder_hidden_states=values["encoder_hidden_states"],
        prompt_embeds_mask=values["encoder_mask"].long(),
        timestep=values["timestep"],
        img_ids=values["img_ids"],
        txt_ids=values["txt_ids"],
        text_embeddings=values["text_embeds"],
        text_mask=values["text_mask"].long(),
        return_dict=False,
    )[0]


def run_connector(model: torch.nn.Module, layout: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """v1.1 has padding, v1.2 has none."""
    values = cast(recipe.inputs(layout, 11), dtype)
    return model.connector(values["encoder_hidden_states"], values["timestep"], values["encoder_mask"].long())


@torch.no_grad()
def main() -> None:
    """Run every case and write the file."""
    torch.set_num_threads(1)
    out: dict[str, torch.Tensor] = {}
    for mapping in (False, True):
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            model = released(mapping).to(dtype)
            for layout in recipe.LAYOUTS:
                for length in recipe.LENGTHS:
                    key = f"dit/{name}/{'mapping' if mapping else 'plain'}/{layout}/{length}"
                    out[key] = run_model(model, cast(recipe.inputs(layout, length), dtype))
            if not mapping and name == "fp32":
                for case, layout in (("padded", "v1.1"), ("full", "v1.2")):
                    tokens, pooled = run_connector(model, layout, dtype)
                    out[f"connector/{case}/tokens"], out[f"connector/{case}/pooled"] = tokens, pooled
            if name == "fp32":
                text_ids, image_ids = recipe.ids("v1.2", 11)
                out["rope/cos"], out["rope/sin"] = model.pos_embed(torch.cat([text_ids, image_ids]))
    out["dit/fp32/strong"] = run_model(released(True, recipe.STRONG), recipe.inputs("v1.2", 11))
    TARGET.parent.mkdir(exist_ok=True)
    save_file({key: value.contiguous() for key, value in sorted(out.items())}, TARGET)
    sys.stdout.write(f"{TARGET.name}: {len(out)} tensors, {TARGET.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
