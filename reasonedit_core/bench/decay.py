"""How a model's velocity changes along its path, fitted from edits of that model: the file that `--region-decay` takes.

    python -m reasonedit.reasonedit_core.bench.decay --system reasonedit-s --weights DIR \\
        --edit cat.png "make it snow" --edit dog.png "a red collar" --out decay.json

Every edit is made in full. Between each two timesteps the later velocity is approached by the earlier one times a factor:
gamma is the factor that comes nearest over all edits (least squares), drift the share of the later velocity that is then still
missing. RegionE fits ratios of lengths, by hand, for one schedule; a length says nothing of a direction that turns.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ReasonEditError
from ..files import write_json
from ..regions import Decay

if TYPE_CHECKING:
    import torch

    from ..generator import FlowGenerator
    from ..types import EditRequest

LEAST = 1e-6
"""A gamma where the later velocity turns away altogether: its drift is then 1, and no tolerance allows for that."""


class DecayFit:
    """Sums over edits of one schedule. Only the last velocity of an edit is held."""

    def __init__(self) -> None:
        self._sigmas: list[float] = []
        self._sums: list[list[float]] = []  # per stretch: earlier x later, earlier x earlier, later x later
        self._step, self._edits = 0, 0
        self._last: torch.Tensor | None = None

    def add(self, sigma: float, velocity: torch.Tensor) -> None:
        """The velocity (1, N, C) at the next timestep of the edit at hand. Raises ConfigError where edits differ in theirs."""
        velocity = velocity.double()
        if self._edits == 0:
            self._sigmas.append(sigma)
        elif self._step >= len(self._sigmas) or not math.isclose(sigma, self._sigmas[self._step], abs_tol=1e-6):
            raise ConfigError(
                f"expected edits with one schedule, found timestep {sigma:.4f} at step {self._step + 1} of edit "
                f"{self._edits + 1}, another than before. Take pictures of one size and one number of steps."
            )
        if self._last is not None:
            if self._edits == 0:
                self._sums.append([0.0, 0.0, 0.0])
            pairs = ((self._last, velocity), (self._last, self._last), (velocity, velocity))
            for k, (a, b) in enumerate(pairs):
                self._sums[self._step - 1][k] += float((a * b).sum())
        self._last, self._step = velocity, self._step + 1

    def end(self) -> None:
        """The edit at hand is done. Raises ConfigError where it was shorter than the first, or had less than two timesteps."""
        if self._step < max(2, len(self._sigmas)):
            raise ConfigError(
                f"expected edits of one number of steps, at least 2, found {self._step} after {len(self._sigmas)}. Use --steps."
            )
        self._edits, self._step, self._last = self._edits + 1, 0, None

    def decay(self, about: str = "") -> Decay:
        """The fit. Raises ConfigError without an edit."""
        if not self._edits:
            raise ConfigError("expected at least one edit to fit a decay from, found none. Give --edit IMAGE INSTRUCTION.")
        gammas, drifts = [], []
        for both, earlier, later in self._sums:
            gamma = max(both / earlier, LEAST) if earlier else LEAST
            rest = later - 2 * gamma * both + gamma * gamma * earlier
            gammas.append(gamma)
            drifts.append(math.sqrt(max(rest, 0.0) / later) if later else 0.0)
        return Decay(tuple(self._sigmas), tuple(gammas), tuple(drifts), about)


def fit_edits(
    generator: FlowGenerator, requests: Sequence[EditRequest], about: str = "", say: Callable[[str], None] = lambda text: None
) -> Decay:
    """The decay of `generator`'s model over `requests`, each made in full with its own seed, steps and guidance."""
    import torch

    fit = DecayFit()
    for number, request in enumerate(requests, 1):
        say(f"edit {number} of {len(requests)}: {request.instruction}")
        listening = _listening(generator, fit, guided=request.guidance > 1)
        rng = torch.Generator().manual_seed(request.seed)
        listening.edit(request, request.image, request.instruction, rng)
        fit.end()
    return fit.decay(about)


def _listening(generator: FlowGenerator, fit: DecayFit, *, guided: bool) -> FlowGenerator:
    """A copy that tells `fit` of every velocity that is followed; the modules are those of `generator`."""
    heard = copy.copy(generator)
    denoiser, combine = generator.denoiser, generator.combine

    def combined(cond: Any, uncond: Any, scale: float, sigma: Any) -> Any:
        velocity = combine(cond, uncond, scale, sigma)
        fit.add(float(sigma), velocity)
        return velocity

    def predicted(latents: Any, t: Any, *rest: Any, **options: Any) -> Any:
        velocity = denoiser(latents, t, *rest, **options)
        fit.add(float(t[0]), velocity)
        return velocity

    if guided:
        heard.combine = combined
    else:
        heard.denoiser = predicted  # type: ignore[assignment]
    return heard


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 after an error, told in a sentence."""
    args = _parser().parse_args(argv)
    try:
        _run(args)
    except ReasonEditError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace) -> None:
    from ..images import load_image
    from ..load import SystemSpec, load_system
    from ..types import EditRequest

    spec = SystemSpec(
        system=args.system,
        weights=args.weights,
        reasoner="none",
        dtype=args.dtype,
        device=args.device,
        loras=tuple((path, 1.0) for path in args.lora),
    )
    system = load_system(spec)
    asked = {
        "steps": args.steps or system.defaults["steps"],
        "guidance": system.defaults["guidance"] if args.guidance is None else args.guidance,
        "size_level": args.size or system.defaults["size_level"],
        "negative": system.defaults["negative"],
    }
    edits = [(load_image(Path(path)).rgb, words) for path, words in args.edit]
    requests = [
        EditRequest(image, words, seed=seed, think=False, reflect=False, **asked)
        for image, words in edits
        for seed in range(args.seeds)
    ]
    named = args.weights.name if args.weights else args.system
    about = f"{args.system}, {named}, {len(requests)} edits, {asked['steps']} steps, guidance {asked['guidance']:g}"
    decay = fit_edits(system.generator, requests, about, lambda text: print(text, file=sys.stderr, flush=True))
    print(f"written: {write_json(args.out, decay.record()) or args.out}")
    print("sigma   gamma   drift")
    for sigma, gamma, drift in zip(decay.sigmas[1:], decay.gammas, decay.drifts, strict=True):
        print(f"{sigma:.4f}  {gamma:.4f}  {drift:.4f}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.decay", description="Fit how a model's velocity changes, for --region-decay.")
    add = parser.add_argument
    add("--system", required=True, help="reasonedit-s, reasonedit-q or a miniature")
    add("--weights", type=Path, metavar="DIR", help="folder or file of the checkpoint (not needed for a miniature)")
    add("--edit", nargs=2, action="append", default=[], metavar=("IMAGE", "INSTRUCTION"), help="may be repeated; one size")
    add("--seeds", type=int, default=1, metavar="N", help="each edit with N seeds (1)")
    add("--steps", type=int, metavar="N", help="denoising steps (the checkpoint's)")
    add("--guidance", type=float, metavar="G", help="true CFG scale (the checkpoint's)")
    add("--size", type=int, metavar="LEVEL", help="square root of the generated area (the checkpoint's)")
    add("--lora", type=Path, action="append", default=[], metavar="FILE", help="of the model that is fitted; may be repeated")
    add("--dtype", default="auto")
    add("--device", default="auto")
    add("--out", type=Path, required=True, metavar="FILE", help="the JSON file that is written")
    return parser


if __name__ == "__main__":
    sys.exit(main())
