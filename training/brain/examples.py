"""What training reads of a record: what the frozen encoders see of it, and its latents. Computed once and kept.

An entry follows from the picture's bytes, the words, the objects, the sizes and the weights alone, so runs share a cache and
nothing stale is read. It is made with every branch on: models with parts switched off read the same entries.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ...reasonedit_core.errors import DataError
from ...reasonedit_core.extractors.rules import RuleExtractor
from ...reasonedit_core.images import load_image
from ...reasonedit_core.models.reasonbrain.frce import Features
from ...reasonedit_core.types import Regions
from ..data.cache import Cache
from ..noise import digest

if TYPE_CHECKING:
    from ...reasonedit_core.brain.model import BrainModel
    from ...reasonedit_core.interfaces import RegionFinder
    from ...reasonedit_core.latents import Moments
    from ..data.manifest import Manifest, PictureEntry
    from ..data.records import Record
    from .base import BrainBase

log = logging.getLogger(__name__)

FEATURES, REGIONS, MOMENTS = "brain-features", "brain-regions", "moments"
VERSION = "1"
HELD_FILES = 256

Size = tuple[int, int]
Example = dict[str, Tensor]
"""The features of one record: image (N, d_v), taps (N, .), text (L, d_t) of its own tokens, objects (O, d_t); with regions
masks (R, g, g) uint8 and geometry (R, 8); with FLUX pooled (P,)."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a record says to ReasonBrain: the user's words, and the names of the objects in them."""

    instruction: str
    objects: tuple[str, ...]


def told(record: Record) -> Told:
    """The words of a record: the hypothetical instruction where it is one, else what the user wrote, else what the editor is
    told. Objects: the record's own, else found by rules, else the instruction as the one object. DataError without words."""
    own = record.reason50k
    words = own.hypothetical if own else record.instruction.raw if record.instruction else record.editor_instruction
    if words is None or not words.strip():
        raise record.error("missing-field", "instruction.raw", "an instruction", "none", "add it to the record.")
    objects = tuple(own.objects) if own else ()
    return Told(words, objects or tuple(RuleExtractor().extract(words)) or (words.strip(),))


class Examples:
    """Makes and reads the entries of records. Works without weights in memory for what is there already.

    weights: hashes of LLaVA, the text encoders and the VAE. patch: pixels of a latent token.
    """

    def __init__(self, base: BrainBase, cache: Cache, manifest: Manifest, weights: str, patch: int) -> None:
        self.base, self.cache, self.weights = base, cache, weights
        self.entries = manifest.by_id
        self.geometry = base.geometry(patch)
        self.level = base.settings().size_level
        self.segmenter = base.parts.settings.segmenter if base.switches.region_branch else ""

    def size(self, record: Record) -> Size:
        """(width, height) in which VAE and denoiser see the pair: that of the picture, floored as in an edit."""
        return self.geometry.plan([self._picture(record, "input").size], self.level).vae[0]

    def _picture(self, record: Record, name: str) -> PictureEntry:
        try:
            return self.entries[record.id].pictures[name]
        except KeyError:
            raise record.error("missing-field", f"images.{name}", "a picture", "none", "add it to the record.") from None

    # keys

    def features_key(self, record: Record) -> str:
        """Of what the encoders see, with the regions that the segmenter finds."""
        words = told(record)
        sha = self._picture(record, "input").sha256
        return digest(
            FEATURES, VERSION, self.weights, sha, words.instruction, repr(words.objects), repr(self.base.spec.taps),
            str(self.base.dtype), self.segmenter,
        ).hex()  # fmt: skip

    def moments_key(self, record: Record, name: str) -> str:
        """Of the VAE's moments of a picture of the record."""
        size = self.size(record)
        return digest(MOMENTS, VERSION, self.cache.vae, self._picture(record, name).sha256, *size).hex()

    # reading

    def features(self, record: Record) -> Example:
        """The kept features of a record. DataError where they are not in the cache."""
        return self.cache.read(FEATURES, self.features_key(record), what=f"record {record.id!r}")

    def moments(self, record: Record, name: str) -> Moments:
        """Mean and log variance (1, C, h, w) of a picture. DataError where they are not in the cache."""
        found = self.cache.read(MOMENTS, self.moments_key(record, name), what=f"record {record.id!r}")
        return found["mean"], found["logvar"]

    # making

    def missing(self, records: Sequence[Record], *, features: bool) -> list[Record]:
        """Records of which the cache lacks something."""

        def lacks(record: Record) -> bool:
            keys = [(MOMENTS, self.moments_key(record, name)) for name in ("input", "target")]
            keys += [(FEATURES, self.features_key(record))] if features else []
            return not all(self.cache.has(*key) for key in keys)

        return [record for record in records if lacks(record)]

    @torch.no_grad()
    def fill(
        self,
        records: Sequence[Record],
        model: BrainModel,
        finder: RegionFinder | None,
        *,
        features: bool,
        on_progress: Callable[[str, int, int], None] | None = None,
    ) -> list[str]:
        """Make what is missing; -> what is wrong with records that cannot be used, a line each."""
        held: dict[str, dict[str, Example]] = {FEATURES: {}, MOMENTS: {}}
        failed = []
        try:
            for number, record in enumerate(records):
                try:
                    for name in ("input", "target"):
                        key = self.moments_key(record, name)
                        if not self.cache.has(MOMENTS, key) and key not in held[MOMENTS]:
                            held[MOMENTS][key] = self._encode(model, record, name)
                    if features and not self.cache.has(FEATURES, self.features_key(record)):
                        held[FEATURES][self.features_key(record)] = self.see(model, finder, record)
                except DataError as error:
                    failed.append(str(error))
                if sum(map(len, held.values())) >= HELD_FILES:
                    self._write(held)
                if on_progress is not None:
                    on_progress("features and latents", number, len(records))
        finally:  # what was made is kept, also where something stops this
            self._write(held)
        return failed

    def _write(self, held: dict[str, dict[str, Example]]) -> None:
        for kind, entries in held.items():
            self.cache.write(kind, entries)
            entries.clear()

    def _encode(self, model: BrainModel, record: Record, name: str) -> Example:
        picture = load_image(record.picture(name)).rgb
        mean, logvar = model.codec.encode(self.geometry.to_vae(picture, self.size(record)) * 2 - 1)
        return {"mean": mean.cpu(), "logvar": logvar.cpu()}

    def see(self, model: BrainModel, finder: RegionFinder | None, record: Record) -> Example:
        """What the frozen encoders see of a record, on the CPU. Raises what the finder raises."""
        words, picture = told(record), load_image(record.picture("input")).rgb.to(self.base.device)
        chain = model.conditioner
        look = chain.llava.look(picture, self.base.spec.taps)
        text, keep = chain.text.states([words.instruction])
        found = {"image": look.image[0], "taps": look.taps[0], "text": text[0][keep[0]]}
        found["objects"] = chain.text.names([words.objects])[0][0]
        pooled = chain.pooled([words.instruction])
        if pooled is not None:
            found["pooled"] = pooled[0]
        if finder is not None:
            regions = finder.regions(picture, chain.llava.grid)
            found |= {"masks": regions.masks, "geometry": regions.geometry}
        return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def batch_features(examples: Sequence[Example]) -> Features:
    """Examples of several records -> `Features` of the batch, padding behind what is valid."""
    from ...reasonedit_core.segmenters.regions import batch_regions

    def rows(name: str) -> tuple[Tensor, Tensor]:
        parts = [one[name] for one in examples]
        lengths = torch.tensor([len(part) for part in parts])
        padded = pad_sequence(parts, batch_first=True)
        return padded, torch.arange(padded.shape[1])[None] < lengths[:, None]

    regions = (None, None, None)
    if "masks" in examples[0]:
        regions = batch_regions([Regions(one["masks"], one["geometry"]) for one in examples])
    image, taps = (torch.stack([one[name] for one in examples]) for name in ("image", "taps"))
    return Features(image, taps, *rows("text"), *rows("objects"), *regions)
