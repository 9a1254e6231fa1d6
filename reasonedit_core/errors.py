"""The error tree of the package.

Every message says what was expected, what was found (file, line, key, value) and what to do about it.
"""

from __future__ import annotations


class ReasonEditError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ReasonEditError, ValueError):
    """A value given by the user (option, config entry, image, size) cannot be used."""


class CheckpointError(ReasonEditError):
    """Weights are missing, unreadable, unsafe, of the wrong shape, or of a layout that is not known."""


class ReasonerError(ReasonEditError):
    """The reasoner could not answer: an endpoint failed, a scripted list ran out, a budget is too small."""


class MalformedReply(ReasonerError):
    """A reply was received and could not be read after the bounded number of attempts.

    `raw` holds the last reply (cut to 2,000 characters) so that a caller can show or store it.
    """

    def __init__(self, message: str, raw: str = "") -> None:
        super().__init__(message)
        self.raw = raw[:2000]


class BackendUnavailable(ReasonEditError):
    """A backend that the user named (kernel, endpoint, library) cannot run here."""


class PackingError(ReasonEditError, ValueError):
    """Documents do not fit the pack they were planned into, or carry inconsistent positions."""


class DataError(ReasonEditError, ValueError):
    """A record or a picture of a data set is unusable; the message names file, line and field."""


class Interrupted(ReasonEditError):
    """The caller's `should_stop` asked to stop; whatever was finished before stays valid."""
