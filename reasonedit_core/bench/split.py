"""Where the time of an edit and of a reflection goes, told by hooks on modules. Needs only torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

PARTS = ("vision", "prefill", "decode", "images", "prefill + decode")


TRANSFORMER = "forwards of the transformer"
"""The part of an edit that is spent inside its DiT."""


class Inside:
    """Seconds spent inside calls of a module, or of what `around` returned, since `reset`. device: waited for at each mark."""

    def __init__(self, module: Any = None, device: str = "cpu") -> None:
        self._device, self.seconds, self._since = device, 0.0, 0.0
        if module is not None:
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave)

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, watched."""

        def watched(*args: Any, **options: Any) -> Any:
            self._enter()
            out = call(*args, **options)
            self._leave()
            return out

        return watched

    def reset(self) -> None:
        """Begin a new run."""
        self.seconds = 0.0

    def _enter(self, *given: Any) -> None:
        self._since = now(self._device)

    def _leave(self, *given: Any) -> None:
        self.seconds += now(self._device) - self._since


def now(device: str) -> float:
    """The clock, read when all that was asked of the device is done."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


class Split:
    """Watches a Qwen2.5-VL of transformers through hooks.

    vision: inside the vision tower. prefill: language model passes over more than one token, while `speaking`. decode: the
    rest of `speaking` from the first such pass on, which holds the choice of tokens too. images: all that remains of the
    total, where pictures are encoded, decoded and cut into patches and texts become tokens. device: waited for at each mark.
    """

    def __init__(self, model: Any, device: str = "cpu") -> None:
        self._device = device
        self._hooks = []
        for name, module in (("vision", model.model.visual), ("text", model.model.language_model)):
            self._hooks += [
                module.register_forward_pre_hook(lambda *given, name=name: self._enter(name, given[-1]), with_kwargs=True),
                module.register_forward_hook(lambda *given, name=name: self._leave(name)),
            ]
        self.reset()

    def reset(self) -> None:
        """Begin a new run."""
        self._spent = {"vision": 0.0, "prefill": 0.0, "speaking": 0.0}
        self._since = self._now()
        self._first: float | None = None
        self._now_in, self._part = 0.0, ""

    @contextmanager
    def speaking(self) -> Iterator[None]:
        """Around one call that prefills and decodes."""
        self._first, inside = None, dict(self._spent)
        yield
        if self._first is not None:
            passed = self._now() - self._first
            self._spent["speaking"] += passed - (self._spent["prefill"] - inside["prefill"])

    def parts(self) -> dict[str, float]:
        """Seconds since `reset`, by PARTS."""
        vision, prefill, decode = (self._spent[name] for name in ("vision", "prefill", "speaking"))
        images = self._now() - self._since - vision - prefill - decode
        return dict(zip(PARTS, (vision, prefill, decode, images, prefill + decode), strict=True))

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, name: str, kwargs: dict[str, Any]) -> None:
        self._now_in = self._now()
        embeds = kwargs.get("inputs_embeds")
        long = name == "text" and embeds is not None and embeds.shape[1] > 1
        self._part = "vision" if name == "vision" else "prefill" if long else ""
        if name == "text" and self._first is None:
            self._first = self._now_in

    def _leave(self, name: str) -> None:
        if self._part:
            self._spent[self._part] += self._now() - self._now_in
        self._part = ""

    def _now(self) -> float:
        return now(self._device)
