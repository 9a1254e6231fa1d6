"""Networks and functions that pictures are scored by: CLIP, DINO, LPIPS, and any callable of the user's.

All weights are files that the user names; nothing is downloaded, and each scorer has a name and a sha256 for every result (two
CLIPs give two different scales). Features are rows of unit length.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...reasonedit_core.errors import CheckpointError, ConfigError, DataError


class Encoder(Protocol):
    """name, sha256: of the folder and its weights, for every result."""

    name: str
    sha256: str

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        ...


class TextEncoder(Encoder, Protocol):
    """One that reads words as well."""

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D), unit rows. What is longer than the model reads is cut off at its end."""
        ...


class Scorer(Protocol):
    """A number of one picture, more for better ones. name, sha256: for every result."""

    name: str
    sha256: str

    def score(self, path: Path) -> float:
        """The number."""
        ...


class PairScorer(Protocol):
    """A distance of two pictures, 0 for equal ones. name, sha256: for every result."""

    name: str
    sha256: str

    def distance(self, a: Path, b: Path) -> float:
        """b is brought to the size of a."""
        ...


class Clip:
    """A CLIP folder. Raises CheckpointError where it is none."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import CLIPModel, CLIPProcessor

        self.name, self.sha256, self._device = folder.resolve().name, digest_of(folder), device
        self._model = _loaded(CLIPModel, folder).to(device).eval()
        self._processor = _loaded(CLIPProcessor, folder)

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        inputs = self._processor(images=_opened(paths), return_tensors="pt").to(self._device)
        return _unit(self._call(self._model.get_image_features, inputs))

    def words(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D), unit rows."""
        inputs = self._processor(text=list(texts), padding=True, truncation=True, return_tensors="pt").to(self._device)
        return _unit(self._call(self._model.get_text_features, inputs))

    def _call(self, function: Any, inputs: Any) -> np.ndarray:
        import torch

        with torch.inference_mode():
            found = function(**inputs)
        # transformers 4 gives the projected features, 5 an output that holds them
        return (found if isinstance(found, torch.Tensor) else found.pooler_output).float().cpu().numpy()


class Dino:
    """A DINO or DINOv2 folder; the feature is the class token after the last norm. Raises CheckpointError where it is none."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        self.name, self.sha256, self._device = folder.resolve().name, digest_of(folder), device
        self._model = _loaded(AutoModel, folder).to(device).eval()
        self._processor = _loaded(AutoImageProcessor, folder)

    def pictures(self, paths: Sequence[Path]) -> np.ndarray:
        """(N, D), unit rows."""
        import torch

        inputs = self._processor(images=_opened(paths), return_tensors="pt").to(self._device)
        with torch.inference_mode():
            found = self._model(**inputs).last_hidden_state[:, 0]
        return _unit(found.float().cpu().numpy())


LPIPS_NETS = ("alex", "squeeze", "vgg")
LPIPS_SIDE = 32
"""The shortest side, in pixels, that all three networks can look at."""


class Lpips:
    """LPIPS (Zhang et al. 2018) by the package `lpips`, version 0.1 of its linear heads, which lie in the package.

    weights: the network under the heads, a state dict of torchvision's (alexnet, squeezenet1_1, vgg16) on this disk; net: one
    of LPIPS_NETS. Raises ConfigError where the package is absent or net is another, CheckpointError for other weights.
    """

    def __init__(self, weights: Path, net: str = "alex", device: str = "cpu") -> None:
        if net not in LPIPS_NETS:
            raise ConfigError(f"LPIPS: expected a network of {', '.join(LPIPS_NETS)}, found {net!r}. Correct it.")
        try:
            import lpips
        except ImportError as error:
            raise ConfigError("LPIPS: expected the package lpips, found none. pip install lpips.") from error
        self.name, self.sha256, self._device = f"lpips-{net}:{weights.name}", _digest_of_file(weights), device
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the package calls torchvision in an older way
            # pnet_rand: without it the package downloads a network
            self._model = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
        self._model.net.load_state_dict(_backbone(weights, self._model.net.state_dict()))
        self._model.to(device)

    def distance(self, a: Path, b: Path) -> float:
        """0 for equal pictures. DataError for sides under LPIPS_SIDE."""
        import torch

        from .benchmarks.pixels import read_picture

        one = read_picture(a)
        two = read_picture(b, (one.shape[1], one.shape[0]))
        if min(one.shape[:2]) < LPIPS_SIDE:
            raise DataError(f"{a}: expected sides of {LPIPS_SIDE} pixels for LPIPS, found {one.shape[1]} x {one.shape[0]}.")
        pair = [torch.from_numpy(each).permute(2, 0, 1)[None].float().to(self._device) for each in (one, two)]
        with torch.inference_mode():
            return float(self._model(*pair, normalize=True))


def lpips_of(text: str, device: str = "cpu") -> Lpips:
    """LPIPS by [NET=]FILE; the network is alex where none is named."""
    net, equals, path = text.partition("=")
    return Lpips(Path(path), net, device) if equals and net in LPIPS_NETS else Lpips(Path(text), device=device)


def _backbone(path: Path, own: dict[str, Any]) -> dict[str, Any]:
    """torchvision's state dict under the names that the package has cut it into: features.N.* -> sliceK.N.*."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        found = {name: state[f"features.{name.partition('.')[2]}"] for name in own}
        wrong = [name for name, value in found.items() if value.shape != own[name].shape]
        if wrong:
            raise ValueError(f"{wrong[0]} has shape {tuple(found[wrong[0]].shape)}")
    except Exception as error:  # a damaged file raises whatever its reader likes
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{path}: expected the state dict of the network that was named, as torchvision hands it out, found another "
            f"({type(error).__name__}: {first}). Name its file."
        ) from error
    return found


class UserScorer:
    """Any function of the user's from a picture's path to a number, more for better ones.

    text: `module:function` or `FILE.py:function`. Aesthetics come in this way, as no network for them has a licence that this
    package could lean on. Raises ConfigError where there is no such function.
    """

    def __init__(self, text: str) -> None:
        where, _, function = text.rpartition(":")
        if not where or not function.isidentifier():
            raise ConfigError(f"expected MODULE:FUNCTION or FILE.py:FUNCTION, found {text!r}. Correct it.")
        module = _module(where)
        self._call: Callable[[Path], float] | None = getattr(module, function, None)
        if not callable(self._call):
            raise ConfigError(f"{where}: expected a function {function!r} in it, found none. Correct the name.")
        self.name = f"{module.__name__}:{function}"
        self.sha256 = _digest_of_file(Path(module.__file__)) if getattr(module, "__file__", None) else ""

    def score(self, path: Path) -> float:
        """The number. DataError where the function gives none."""
        found = self._call(path)
        if isinstance(found, bool) or not isinstance(found, int | float | np.floating) or not math.isfinite(found):
            raise DataError(f"{self.name}: expected a finite number for {path}, found {found!r}. Correct the function.")
        return float(found)


def _module(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, SyntaxError) as error:
        raise ConfigError(f"{where}: expected Python that can be imported, found none ({error}). Check the name.") from error


# ---- parts -----------------------------------------------------------------------------------------------------------------


def digest_of(folder: Path) -> str:
    """sha256 over the names and contents of a folder's weights and settings. CheckpointError where it has no weights."""
    weights = [path for path in sorted(folder.glob("*")) if path.suffix in (".safetensors", ".json", ".bin", ".txt")]
    if not any(path.suffix in (".safetensors", ".bin") for path in weights):
        raise CheckpointError(
            f"{folder}: expected a transformers folder with weights, found none. Name one that lies on this disk."
        )
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.name}\0{_digest_of_file(path)}\n".encode())
    return digest.hexdigest()


def _digest_of_file(path: Path) -> str:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: expected a file of weights, found none ({error.strerror}). Check the path.") from error


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _opened(paths: Sequence[Path]) -> list[Any]:
    from PIL import Image

    from .benchmarks.pixels import read_picture

    return [Image.fromarray(np.rint(read_picture(path) * 255).astype(np.uint8)) for path in paths]


def _loaded(kind: Any, folder: Path) -> Any:
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise CheckpointError(
            f"{folder}: expected a folder that {kind.__name__} reads, found another ({first}). Name one."
        ) from error
