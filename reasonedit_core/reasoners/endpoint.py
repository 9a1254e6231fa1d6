"""An HTTP endpoint that speaks JSON: one retry for passing faults, clear errors for the others, a key that is never shown."""

from __future__ import annotations

import http.client
import json
import logging
import math
import os
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from typing import Any

from ..errors import ConfigError, Interrupted, ReasonerError

log = logging.getLogger(__name__)

MAX_PAUSE = 30.0  # seconds: the longest Retry-After that is honoured
MAX_BODY = 32 << 20
WRONG_ADDRESS = "Check the address: it is usually http://HOST:PORT/v1."
# Fields that some endpoints refuse with 400; without them the answer is still the one asked for, only less constrained.
_OPTIONAL = {"response_format": ("response_format", "json_schema", "guided"), "seed": ("seed",)}


class Endpoint:
    """The base address of an OpenAI-compatible service, and how it is asked.

    api_key: None reads REASONEDIT_API_KEY; OPENAI_API_KEY is used only over https or on this machine. timeout: seconds for
    one request. pause: seconds before a second try when the service names none. refused: fields that are not sent.
    """

    def __init__(self, url: str, *, api_key: str | None, timeout: float, pause: float, refused: set[str]) -> None:
        self.base = base_address(url)
        self._key = _key(self.base, api_key)
        self._timeout, self._pause, self._refused = timeout, pause, set(refused)
        handlers: list[Any] = [_NoRedirect()]
        if _is_local(self.base):
            handlers.append(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's own services
        self._open = urllib.request.build_opener(*handlers).open

    def ask(self, path: str, payload: dict | None, read: Callable[[Any], Any], dropped: threading.Event) -> Any:
        """Send a request (GET when `payload` is None) and `read` its response; once more if the fault may have passed.

        dropped: set by the caller when nobody waits for the answer any more.
        """
        tries = 0
        while True:
            try:
                return self.once(path, payload, read)
            except PassingFault as fault:
                tries += 1
                if tries > 1:
                    raise self._failed(path, f"{fault} (twice)", fault.advice) from None
                if not dropped.is_set():
                    log.warning("%s%s: %s; trying once more", self.base, path, self.hidden(str(fault)))
                if dropped.wait(self._pause if fault.pause is None else min(fault.pause, MAX_PAUSE)):
                    raise Interrupted(f"{self.base}: the question was dropped.") from fault
            except FatalFault as fault:
                raise self._failed(path, str(fault), fault.advice) from None

    def once(self, path: str, payload: dict | None, read: Callable[[Any], Any]) -> Any:
        """Send a request and `read` its response, for callers with a patience of their own: one try, but for fields that the
        service refuses. Raises PassingFault and FatalFault, whose text may repeat the key: show it through `hidden`."""
        while True:
            try:
                return self._once(path, payload, read)
            except _Refused as refused:
                self._refused.add(refused.field)
                log.info("%s does not take %r: it is left out from now on", self.base, refused.field)

    def _once(self, path: str, payload: dict | None, read: Callable[[Any], Any]) -> Any:
        fields = None if payload is None else {k: v for k, v in payload.items() if k not in self._refused}
        data = None if fields is None else json.dumps(fields).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            with self._open(urllib.request.Request(self.base + path, data, headers), timeout=self._timeout) as response:
                return read(response)
        except urllib.error.HTTPError as error:
            raise _http_fault(error, fields or {}) from error
        except urllib.error.URLError as error:
            raise _network_fault(error.reason, self._timeout) from error
        except (OSError, http.client.HTTPException) as error:
            raise _network_fault(error, self._timeout) from error

    def hidden(self, text: str) -> str:
        """`text` without the key."""
        return text.replace(self._key, "***") if self._key else text

    def _failed(self, path: str, found: str, advice: str) -> ReasonerError:
        # Raised `from None`: the fault behind it holds the answer as it came, and an answer may repeat the key.
        return ReasonerError(f"{self.base}{path}: expected an answer in JSON, found {self.hidden(found)}. {advice}")


def json_body(response, dropped) -> dict:
    """The JSON object of a response, read piece by piece so that a dropped question is noticed."""
    pieces, size = [], 0
    while piece := response.read1(1 << 16):
        size += len(piece)
        if size > MAX_BODY:
            raise FatalFault(f"a body of more than {MAX_BODY} bytes", WRONG_ADDRESS)
        if dropped.is_set():
            raise Interrupted("the question was dropped.")
        pieces.append(piece)
    body = b"".join(pieces)
    if response.length:
        raise PassingFault(f"half a body, {response.length} bytes short: {excerpt(body)}", "Look at the endpoint's log.")
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PassingFault(f"a body that is not JSON: {excerpt(body)}", WRONG_ADDRESS) from error
    if not isinstance(value, dict):
        raise FatalFault(f"JSON without an object: {excerpt(body)}", WRONG_ADDRESS)
    return value


# ---- faults --------------------------------------------------------------------------------------------------------------


class _Fault(Exception):
    """pause: seconds that the service asks for; status: of an HTTP answer."""

    def __init__(self, found: str, advice: str, pause: float | None = None, status: int | None = None) -> None:
        super().__init__(found)
        self.advice, self.pause, self.status = advice, pause, status


class PassingFault(_Fault):
    """May be gone at the next try."""


class FatalFault(_Fault):
    """Will be the same at the next try."""


class TimedOut(FatalFault):
    """No answer in time. Asking again would make a person wait as long once more; a queue of questions has the time."""


class _Refused(Exception):
    def __init__(self, field: str) -> None:
        super().__init__(field)
        self.field = field


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following would turn the question into a GET and carry the key to another host."""

    def redirect_request(self, *args, **kwargs):
        return None


def _http_fault(error: urllib.error.HTTPError, fields: dict) -> Exception:
    try:
        with error:
            body = error.read(MAX_BODY).decode("utf-8", "replace")
    except (OSError, http.client.HTTPException):
        body = ""
    found = f"HTTP {error.code} {error.reason}: {excerpt(body)}"
    if error.code in (400, 422):
        for field, words in _OPTIONAL.items():
            if field in fields and any(word in body for word in words):
                return _Refused(field)
        advice = "The endpoint does not take the question; look at its log (is it a model that takes pictures?)."
        return FatalFault(found, advice, status=error.code)
    if error.code == 429 or error.code >= 500:
        advice = "Wait, or raise the endpoint's limit." if error.code == 429 else "Look at the endpoint's log."
        return PassingFault(found, advice, _retry_after(error.headers.get("Retry-After")), error.code)
    if error.code in (401, 403):
        advice = "Put a valid key into the environment variable REASONEDIT_API_KEY."
        return FatalFault(found, advice, status=error.code)
    if 300 <= error.code < 400:
        return FatalFault(f"{found} to {error.headers.get('Location')}", "Give that address instead.")
    if error.code in (404, 405):
        return FatalFault(found, f"{WRONG_ADDRESS} Is the named model loaded there?", status=error.code)
    return FatalFault(found, "Look at the endpoint's log.", status=error.code)


def _network_fault(error: BaseException | str, timeout: float) -> _Fault:
    if isinstance(error, TimeoutError):
        return TimedOut(f"no answer within {timeout:g} s", "Raise the timeout, or see whether the endpoint is overloaded.")
    if isinstance(error, ConnectionRefusedError):
        return FatalFault("a refused connection", "Start the endpoint, or correct host and port.")
    if isinstance(error, ConnectionError | http.client.HTTPException):
        return PassingFault(f"a broken connection ({type(error).__name__})", "Look at the endpoint's log.")
    return FatalFault(f"no connection ({error})", "Check the address and the network.")


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; None when it is absent or a date."""
    try:
        seconds = float(value or "nan")
    except ValueError:
        return None
    return None if math.isnan(seconds) else max(seconds, 0.0)


def excerpt(body: bytes | str) -> str:
    """The beginning of what came back, for a message."""
    text = body.decode("utf-8", "replace") if isinstance(body, bytes) else body
    return repr(text[:200]) if text.strip() else "nothing"


# ---- the address ---------------------------------------------------------------------------------------------------------


def base_address(url: str) -> str:
    """The base that paths are put behind; `/v1` is supplied where the address is a host alone."""
    parts = urllib.parse.urlsplit(url.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"expected the http(s) address of an endpoint, such as http://localhost:8000/v1, found {url!r}.")
    if "@" in parts.netloc:
        raise ConfigError("expected an address without a password. Put the key into REASONEDIT_API_KEY instead.")
    path = parts.path.rstrip("/").removesuffix("/chat/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"


def _is_local(base: str) -> bool:
    host = urllib.parse.urlsplit(base).hostname or ""
    return host in ("localhost", "::1") or host.startswith("127.")


def _key(base: str, given: str | None) -> str:
    key = given or os.environ.get("REASONEDIT_API_KEY")
    # A key that was stored for another service does not go over an open line.
    if not key and (base.startswith("https://") or _is_local(base)):
        key = os.environ.get("OPENAI_API_KEY")
    key = (key or "").strip()
    if not key.isascii() or any(char.isspace() for char in key):
        raise ConfigError("expected an API key of plain characters, found blanks or others. Set REASONEDIT_API_KEY again.")
    return key
