"""Who answers: any OpenAI-compatible endpoint, or a speaker of the project (the MLLM of a loaded system).

`answer` blocks and is called in a thread of its own. What goes wrong is told by four exceptions, because the runner treats
them differently: `Passing` is tried again, `Refused` and `NotTaken` cost the item, `ReasonerError` ends the run.
"""

from __future__ import annotations

import base64
import hashlib
import io
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ....reasonedit_core.errors import ConfigError, ReasonerError
from ....reasonedit_core.reasoners.endpoint import (
    WRONG_ADDRESS,
    Endpoint,
    FatalFault,
    PassingFault,
    TimedOut,
    excerpt,
    json_body,
)
from ..pictures import PictureFault, upright_size
from .prompts import Prompt

if TYPE_CHECKING:
    from ....reasonedit_core.interfaces import Speaker

MAX_SIDE = 1024
"""Long side of a picture that is sent, as the reasoner is shown them."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A picture file. size: (width, height), upright."""

    path: Path
    sha256: str
    size: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Question:
    """One question about pictures and values. fault: what was wrong with the last answer to it."""

    prompt: Prompt
    inputs: Mapping[str, str]
    pictures: tuple[Shown, ...]
    seed: int = 0
    fault: str | None = None

    @property
    def words(self) -> str:
        """The text of the user's turn."""
        return self.prompt.words(self.inputs, self.fault)

    def again(self, attempt: int, fault: str | None) -> Question:
        """The question for a further attempt: another seed, and what was wrong."""
        return replace(self, seed=self.seed + attempt, fault=fault)


@dataclass(frozen=True, slots=True)
class Answer:
    """Raw text. tokens_in, tokens_out: as stated, 0 where they are not; cut: the room for it came to an end before it did."""

    text: str
    tokens_in: int = 0
    tokens_out: int = 0
    cut: bool = False


class Passing(Exception):
    """No answer, and the next try may bring one. pause: seconds that the annotator asks to wait."""

    def __init__(self, found: str, pause: float | None = None, *, everyone: bool = False) -> None:
        super().__init__(found)
        self.pause, self.everyone = pause, everyone


class Refused(Exception):
    """The annotator will not answer this."""


class NotTaken(Exception):
    """The annotator cannot take this question, for its length or form."""


class Annotator(Protocol):
    """name: the model's, which is part of every key and stands in every record; endpoint: where it runs."""

    name: str
    endpoint: str

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """Raw text. dropped: set when nobody waits any more. Raises Passing, Refused, NotTaken; ReasonerError ends the run."""
        ...


class EndpointAnnotator:
    """Asks `model` at a chat endpoint. timeout: seconds between two pieces of an answer; api_key: as `Endpoint` takes it;
    extra_tokens: room beyond that of the prompt, for models that think before they answer.

    Pictures go as data URLs: PNG and JPEG files of at most `max_side` pixels as they are, others upright and scaled down.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_side: int = MAX_SIDE,
        extra_tokens: int = 0,
    ) -> None:
        if not model.strip():
            raise ConfigError("--model: expected the name of a model at the endpoint, found none. Every record states it.")
        self._endpoint = Endpoint(url, api_key=api_key, timeout=timeout, pause=1.0, refused=set())
        self.name, self.endpoint, self._max_side, self._extra = model, self._endpoint.base, max_side, extra_tokens

    def payload(self, question: Question) -> dict[str, Any]:
        """What is sent."""
        prompt = question.prompt
        schema = {"name": prompt.step, "strict": True, "schema": prompt.schema}
        urls = [data_url(picture.path, self._max_side) for picture in question.pictures]
        content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return {
            "model": self.name,
            "messages": [
                {"role": "system", "content": prompt.system},
                {"role": "user", "content": [*content, {"type": "text", "text": question.words}]},
            ],
            "max_tokens": prompt.max_tokens + self._extra,
            "temperature": prompt.temperature,
            "seed": question.seed,
            "response_format": {"type": "json_schema", "json_schema": schema},
            "stream": False,
        }

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """Ask once."""
        try:
            payload = self.payload(question)
            body = self._endpoint.once("/chat/completions", payload, lambda response: json_body(response, dropped))
            return read_body(body)
        except TimedOut as fault:
            raise Passing(str(fault)) from None
        except PassingFault as fault:
            # A 429 is about all that is sent, a 500 may be about this question alone.
            raise Passing(self._endpoint.hidden(str(fault)), fault.pause, everyone=fault.status == 429) from None
        except FatalFault as fault:
            told = self._endpoint.hidden(str(fault))
            if fault.status in (400, 413, 422):
                raise NotTaken(told) from None
            raise ReasonerError(f"{self.endpoint}: expected an answer, found {told}. {fault.advice}") from None


def read_body(body: Mapping[str, Any]) -> Answer:
    """The first choice of a chat completion. A message that is only half there is no answer."""
    usage = body.get("usage")
    usage = usage if isinstance(usage, Mapping) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    tokens = [count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else 0 for count in counts]
    try:
        choice = body["choices"][0]
        message, reason = choice["message"], choice.get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (KeyError, IndexError, TypeError, AttributeError):
        # Some services say 200 and put an error into the body, or nothing; where all do, the runner gives up soon enough.
        raise PassingFault(f"no choices[0].message: {excerpt(str(body))}", WRONG_ADDRESS) from None
    if refusal:
        raise Refused(str(refusal)[:500])
    if reason == "content_filter":
        raise Refused("the service's filter kept the answer back")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
    return Answer(content if isinstance(content, str) else "", *tokens, cut=reason == "length")


def data_url(path: Path, max_side: int) -> str:
    """A picture file as a data URL, the longer side at most `max_side`."""
    from PIL import Image, ImageOps

    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as image:
        kind = image.format
        if kind not in ("PNG", "JPEG") or max(image.size) > max_side or image.getexif().get(0x0112, 1) != 1:
            upright = ImageOps.exif_transpose(image).convert("RGB")
            upright.thumbnail((max_side, max_side))
            buffer, kind = io.BytesIO(), "PNG"
            upright.save(buffer, format=kind)
            data = buffer.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def shown(path: Path) -> Shown:
    """A picture file with its hash and size. PictureFault where it is none."""
    size = upright_size(path)
    try:
        with open(path, "rb") as stream:
            return Shown(path, hashlib.file_digest(stream, "sha256").hexdigest(), size)
    except OSError as error:
        raise PictureFault("unreadable-picture", f"{path} ({error})", "check its permissions.") from error


class SpeakerAnnotator:
    """Asks a speaker of the project, one question at a time: the MLLM that a system has loaded, `PackReasoner.speaker`."""

    def __init__(self, speaker: Speaker, name: str, endpoint: str = "local") -> None:
        self.name, self.endpoint, self._speaker, self._lock = name, endpoint, speaker, threading.Lock()

    def answer(self, question: Question, dropped: threading.Event) -> Answer:
        """Ask once. The speaker is told to stop when nobody waits any more."""
        from ....reasonedit_core.images import load_image
        from ....reasonedit_core.interfaces import Query

        prompt = question.prompt
        query = Query(
            task=prompt.step,
            system=prompt.system,
            parts=(*range(len(question.pictures)), question.words),
            images=tuple(load_image(picture.path).rgb for picture in question.pictures),
            max_new_tokens=prompt.max_tokens,
            temperature=prompt.temperature,
            seed=question.seed,
        )
        with self._lock:
            (text,) = self._speaker.answer([query], should_stop=dropped.is_set)
        return Answer(text)
