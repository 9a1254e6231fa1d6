"""A speaker that hands out recorded replies: for tests, for replaying a run, and for a human in the loop."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigError, Interrupted, ReasonerError
from ..interfaces import Query
from ..types import OnText, ShouldStop

TASKS = ("think", "describe", "score", "reflect", "edit_score", "quality_score", "objects")


class ScriptedSpeaker:
    """Answers each task with its recorded replies, in order. `asked` holds the queries so far.

    in_order: replies belong to rounds by their order, so scores are asked for with every verdict and never later.
    Replies that are left over are no error; a list that runs out is a ReasonerError naming its key.
    """

    in_order = True

    def __init__(self, replies: Mapping[str, Sequence[str]], *, name: str = "scripted replies") -> None:
        expected = f"expected an object with lists of texts under some of the keys {', '.join(TASKS)}"
        for key, texts in replies.items():
            if key not in TASKS:
                raise ConfigError(f"{name}: {expected}; found the key {key!r}. Remove it or correct its spelling.")
            if isinstance(texts, str) or not isinstance(texts, Sequence):
                raise ConfigError(f"{name}: {key}: {expected}; found {type(texts).__name__}. Put the replies in a list.")
            for index, text in enumerate(texts):
                if not isinstance(text, str):
                    found = f"{type(text).__name__} at place {index}"
                    raise ConfigError(f"{name}: {key}: {expected}; found {found}. Put the raw reply in as a text.")
        self.name = name
        self.asked: list[Query] = []
        self._replies = {task: tuple(replies.get(task, ())) for task in TASKS}
        self._used = dict.fromkeys(TASKS, 0)

    @classmethod
    def from_file(cls, path: str | Path) -> ScriptedSpeaker:
        """Read a JSON file: `{"think": [...], "describe": [...], "score": [...], "reflect": [...], ...}`."""
        try:
            replies = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ConfigError(f"{path}: expected a JSON file of scripted replies, found: {error}. Check the path.") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: expected JSON, found a fault: {error}. Correct it in a text editor.") from error
        if not isinstance(replies, dict):
            raise ConfigError(f"{path}: expected an object with the keys {', '.join(TASKS)}, found {type(replies).__name__}.")
        return cls(replies, name=str(path))

    def answer(
        self, queries: Sequence[Query], *, on_text: OnText | None = None, should_stop: ShouldStop | None = None
    ) -> list[str]:
        """The next recorded reply of each query's task."""
        answers = []
        for query in queries:
            if should_stop is not None and should_stop():
                raise Interrupted(f"stopped before the reply to {query.task!r}, as asked.")
            self.asked.append(query)
            used, replies = self._used[query.task], self._replies[query.task]
            if used >= len(replies):
                raise ReasonerError(
                    f"{self.name}: expected another reply under the key {query.task!r}, found {len(replies)}, all used. "
                    "Add a reply there (unreadable ones are asked for again, which uses one each time)."
                )
            self._used[query.task] += 1
            if on_text is not None:
                on_text(query.task, replies[used])
            answers.append(replies[used])
        return answers
