"""A speaker behind an OpenAI-compatible endpoint (vLLM, SGLang, Ollama, LM Studio, ...), with the standard library alone.

Pictures travel as PNG data URLs. What may heal by itself (429, 5xx, a lost connection, half a body) is tried once more;
everything else is a ReasonerError that names the address, what came back and what to do. The key is never logged or shown.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..dialogue.replies import SCHEMAS
from ..errors import Interrupted, ReasonerError
from ..interfaces import Query
from ..types import OnText, ShouldStop
from .endpoint import MAX_BODY, WRONG_ADDRESS, Endpoint, FatalFault, PassingFault, excerpt, json_body

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

MAX_CONCURRENT = 4
MAX_SIDE = 1024  # of a picture that is sent: what the released reasoner is shown
_POLL = 0.05  # seconds between looks at should_stop


class RemoteSpeaker:
    """Asks a chat endpoint. url: its base (`http://localhost:8000/v1`), the host alone, or the full chat address.

    model: None takes the first that the endpoint lists. api_key: None reads REASONEDIT_API_KEY; OPENAI_API_KEY is used only
    over https or on this machine. timeout: seconds for one request. schema: send a JSON schema with questions whose replies
    have one. pause: seconds before a second try when the endpoint names none.
    """

    takes_correction = True

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 120.0,
        schema: bool = True,
        pause: float = 1.0,
    ) -> None:
        refused = set() if schema else {"response_format"}
        self._endpoint = Endpoint(url, api_key=api_key, timeout=timeout, pause=pause, refused=refused)
        self._model = model
        self._lock = threading.Lock()

    @property
    def base(self) -> str:
        """The address that is asked, up to and with its version."""
        return self._endpoint.base

    def __repr__(self) -> str:
        return f"RemoteSpeaker({self.base!r}, model={self._model!r})"

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """Replies in order; several queries are asked at the same time. Text is streamed only when `on_text` is given.

        on_text is called in the caller's thread. When `should_stop` says so, or a query fails, the others are dropped.
        """
        pictures = {id(image): data_url(image) for query in queries for image in query.images}
        events: queue.SimpleQueue = queue.SimpleQueue()
        dropped = threading.Event()
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for index in range(len(queries)):
            todo.put(index)

        def work() -> None:
            while not dropped.is_set():
                try:
                    index = todo.get_nowait()
                except queue.Empty:
                    return
                query = queries[index]
                told = (lambda text, task=query.task: events.put(("text", task, text))) if on_text else None
                try:
                    events.put(("reply", index, self._ask(query, pictures, told, dropped)))
                except BaseException as error:  # raised again in the caller's thread
                    events.put(("error", index, error))
                    dropped.set()

        # Daemons: a request that was dropped may wait for its socket until the timeout, and must not keep the program alive.
        for _ in range(min(MAX_CONCURRENT, len(queries))):
            threading.Thread(target=work, daemon=True, name="reasonedit-remote").start()
        replies: dict[int, str] = {}
        try:
            while len(replies) < len(queries):
                if should_stop is not None and should_stop():
                    raise Interrupted(f"stopped while waiting for {self.base}, as asked.")
                try:
                    kind, key, value = events.get(timeout=_POLL)
                except queue.Empty:
                    continue
                if kind == "error":
                    raise value
                if kind == "text":
                    on_text(key, value)
                else:
                    replies[key] = value
        finally:
            dropped.set()
        return [replies[index] for index in range(len(queries))]

    # ---- one question ------------------------------------------------------------------------------------------------

    def _ask(self, query: Query, pictures: dict[int, str], told: Callable[[str], None] | None, dropped) -> str:
        payload = {"model": self._model_name(dropped), **_payload(query, pictures), "stream": told is not None}

        def read(response) -> str:
            if told is not None and "event-stream" in (response.headers.get("Content-Type") or ""):
                return _streamed(response, told, dropped)
            text = _content(json_body(response, dropped), query)
            if told is not None:
                told(text)
            return text

        return self._endpoint.ask("/chat/completions", payload, read, dropped)

    def _model_name(self, dropped) -> str:
        with self._lock:
            if self._model is None:
                listed = self._endpoint.ask("/models", None, lambda response: json_body(response, dropped), dropped)
                data = listed.get("data")
                names = [entry.get("id") for entry in data if isinstance(entry, dict)] if isinstance(data, list) else []
                if not names or not isinstance(names[0], str):
                    raise ReasonerError(
                        f"{self.base}/models: expected at least one model, found {str(listed)[:200]}. Load a model on the "
                        "endpoint, or name one."
                    )
                self._model = names[0]
                log.info("%s: model %r is used, the first of %d", self.base, self._model, len(names))
            return self._model


# ---- the question --------------------------------------------------------------------------------------------------------


def _payload(query: Query, pictures: dict[int, str]) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": pictures[id(query.images[part])]}}
        for part in query.parts
    ]
    messages = [{"role": "system", "content": query.system}] if query.system else []
    payload = {
        "messages": [*messages, {"role": "user", "content": content}],
        "max_tokens": query.max_new_tokens,
        "temperature": query.temperature,
        "top_p": query.top_p,
        "seed": query.seed,
    }
    if query.form in SCHEMAS:
        schema = {"name": query.form, "strict": True, "schema": SCHEMAS[query.form]}
        payload["response_format"] = {"type": "json_schema", "json_schema": schema}
    return payload


def data_url(image: torch.Tensor) -> str:
    """A picture (1, 3, H, W) in 0..1 as a PNG data URL, its longer side at most MAX_SIDE."""
    from PIL import Image

    pixels = (image[0].detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


# ---- the answer ----------------------------------------------------------------------------------------------------------


def _content(body: dict, query: Query) -> str:
    """The text of the first choice."""
    try:
        choice = body["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError) as error:
        raise FatalFault(f"no choices[0].message.content: {json.dumps(body)[:200]}", WRONG_ADDRESS) from error
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content if isinstance(part, dict))
    if isinstance(content, str):
        return content
    reason = choice.get("finish_reason") if isinstance(choice, dict) else None
    raise FatalFault(
        f"a message without text (finish_reason {reason!r})",
        f"A model that thinks first may have used up the {query.max_new_tokens} tokens of {query.task!r}: switch its thinking "
        "off, or raise max_new_tokens in the dialogue pack.",
    )


def _streamed(response, told: Callable[[str], None], dropped) -> str:
    """The text of a server-sent event stream; `told` gets the text so far after every piece."""
    text, ended = "", False
    while line := response.readline(1 << 20):
        if dropped.is_set():
            raise Interrupted("the question was dropped.")
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            ended = True
            break
        try:
            event = json.loads(data)
            if event.get("error"):
                raise FatalFault(f"an error in the stream: {excerpt(data)}", "Look at the endpoint's log.")
            choice = (event.get("choices") or [{}])[0]
            piece = (choice.get("delta") or {}).get("content")
            ended = ended or choice.get("finish_reason") is not None
        except (ValueError, AttributeError, TypeError, RecursionError) as error:
            raise PassingFault(f"half an event: {excerpt(data)}", "Look at the endpoint's log.") from error
        if isinstance(piece, str) and piece:
            text += piece
            if len(text) > MAX_BODY:
                raise FatalFault(f"a stream of more than {MAX_BODY} characters", "Set a token limit on the endpoint.")
            told(text)
    if not ended:
        raise PassingFault(f"a stream without an end after {len(text)} characters", "Look at the endpoint's log.")
    return text
