"""The options of `reasonedit edit` for weights and devices, and what they ask of the loader."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .brain_options import brain_settings

if TYPE_CHECKING:
    from .load import SystemSpec

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("auto", "fp8", "fp8-compute")
VARIANTS = ("auto", "v1.0", "v1.1", "v1.2")
ATTENTION = ("auto", "interval", "sdpa", "flash", "sage", "kitchen", "reference")


def add_weight_options(parser: argparse.ArgumentParser, lora: Callable[[str], tuple[Path, float]]) -> None:
    """Add them. lora: reads FILE[:SCALE]."""
    add = parser.add_argument_group("weights and devices").add_argument
    add("--dtype", choices=DTYPES, default="auto", help="auto: bfloat16 on CUDA (float16 before Ampere), float32 on the CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    several = {"type": lora, "action": "append", "default": [], "metavar": "FILE[:SCALE]"}
    add("--lora", **several, help="LoRA file or peft folder for the DiT, the MLLM or both, as its keys say; may be repeated")
    add("--reasoner-lora", **several, help="the same for the MLLM of --reasoner qwen:DIR")
    add("--offload", choices=("none", "component", "block"), default="none", help="what waits in main memory until its turn")
    fp8 = "fp8: keep the DiT's weights in 8 bits; fp8-compute: multiply in them too, where the card can"
    add("--weights-dtype", choices=WEIGHTS, default="auto", help=fp8)
    add("--attention", choices=ATTENTION, default="auto", help="what computes the DiT's attention (auto: the best that can)")
    add("--compile", action="store_true", help="torch.compile for the DiT's blocks: a slow first edit, quicker ones after it")
    add("--batched-cfg", action="store_true", help="both guidance passes of a step as one forward")
    add("--variant", choices=VARIANTS, default="auto", help="of Step1X single files, whose keys do not tell v1.1 from v1.2")


def spec_of(args: argparse.Namespace, device: str, dtype: str) -> SystemSpec:
    """What `reasonedit edit` loads. device, dtype: as chosen for this machine."""
    from .load import SystemSpec

    return SystemSpec(
        system=args.system,
        weights=args.weights,
        reasoner=args.reasoner,
        dialogue=args.dialogue,
        policy=args.policy,
        dtype=dtype,
        device=device,
        loras=tuple(args.lora),
        reasoner_loras=tuple(args.reasoner_lora),
        draft_loras=(args.draft_lora,) if args.draft_lora else (),
        offload=args.offload,
        weights_dtype=args.weights_dtype,
        variant=args.variant,
        seed=args.seed,
        attention=args.attention,
        compiled=args.compile,
        batched_cfg=args.batched_cfg,
        brain=brain_settings(args),
    )
