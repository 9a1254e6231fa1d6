"""What the loop does to the graph: find the body between Loop Open and Loop Close, and write it down once more.

Imports no ComfyUI. `graph` is the host's dynamic prompt (`get_node`, `all_node_ids`, `get_parent_node_id`,
`get_display_node_id`); a link is a list [node id, output index], as in a prompt in API format.

One round follows another by expansion: Loop Close returns a copy of the body, ending in a copy of itself. Everything that
changes from round to round travels on links, or is a plain string or number, because the host finds a finished round in its
cache by class, constants and links of the whole ancestry. A picture written into the copy as a value would never be found.

Links are followed among nodes of one level only: the artist's nodes in round 1, the copies of one expansion afterwards.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..reasonedit_core.errors import ConfigError

OPEN, CLOSE, ADVANCE, THINK = "ReasonEdit_LoopOpen", "ReasonEdit_LoopClose", "ReasonEdit_Advance", "ReasonEdit_Think"

Link = list
"""[node id, output index]."""


class Graph(Protocol):
    """The part of the host's dynamic prompt that is read here."""

    def get_node(self, node_id: str) -> Mapping[str, Any]:
        """{"class_type": ..., "inputs": {name: constant or link}}."""
        ...

    def all_node_ids(self) -> Iterable[str]:
        """Ids of the artist's nodes and of everything expanded so far."""
        ...

    def get_parent_node_id(self, node_id: str) -> str | None:
        """The node whose expansion made this one; None for the artist's own."""
        ...

    def get_display_node_id(self, node_id: str) -> str:
        """The artist's node that a copy shows its progress on."""
        ...


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop as it is wired at one level. start: id of its Loop Open; end: id of its Loop Close; links: node -> upstream nodes.

    root: the artist's Loop Close that this round descends from; source: the link that feeds the very first Loop Open;
    decided: the inputs of the Advance node in front of this round, None in the first one.
    """

    start: str
    end: str
    links: Mapping[str, frozenset[str]]
    root: str
    source: Any
    decided: Mapping[str, Any] | None = None


def is_link(value: Any) -> bool:
    """Whether an input's value is a link rather than a constant; the host's own rule."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))


def find_loop(graph: Graph, end: str) -> Loop:
    """The loop that the Loop Close `end` closes. ConfigError says what is wired wrongly and how to mend it."""
    inputs = graph.get_node(end)["inputs"]
    links = _level(graph, end)
    start = _loop_open(graph, inputs, links)
    _check_history(graph, inputs, start)
    if not is_link(inputs.get("image")) or start not in _closure(links, inputs["image"][0]):
        raise ConfigError(
            f"Loop Close: expected an image that depends on {_named(graph, start)}, found one that does not: every round would "
            "make the same picture. Wire the image and the instruction of Loop Open into the nodes that edit."
        )
    decided = decided_for(graph, start)
    if decided is not None:
        return Loop(start, end, links, decided["loop"], decided["source"], decided)
    return Loop(start, end, links, end, graph.get_node(start)["inputs"].get("image"))


def decided_for(graph: Graph, start: str) -> Mapping[str, Any] | None:
    """The inputs of the Advance node in front of the Loop Open `start`; None in the first round of its loop."""
    before = graph.get_node(start)["inputs"].get("history")
    found = graph.get_node(before[0]) if is_link(before) else None
    return found["inputs"] if found and found["class_type"] == ADVANCE else None


def closing(graph: Graph, start: str) -> list[str]:
    """Ids of the Loop Close nodes that take the flow of the Loop Open `start`."""
    return sorted(
        node
        for node in _level(graph, start)
        if graph.get_node(node)["class_type"] == CLOSE
        and is_link(flow := graph.get_node(node)["inputs"].get("flow"))
        and flow[0] == start
    )


def body_of(loop: Loop, is_output: Callable[[str], bool]) -> set[str]:
    """Ids of the nodes that a round repeats, Loop Open and Loop Close among them.

    What lies between the two, and side branches that end in an output node (a preview of each round) without passing
    through Loop Close.
    """
    below, past = _descendants(loop.links, loop.start), _descendants(loop.links, loop.end)
    body = below & _closure(loop.links, loop.end)
    for node in below - past:
        if is_output(node):
            body |= below & _closure(loop.links, node)
    return body


def body_has(graph: Graph, loop: Loop, kind: str) -> bool:
    """Whether the body holds a node of class `kind` that is given the loop's history."""
    below = _descendants(loop.links, loop.start) & _closure(loop.links, loop.end)
    found = (graph.get_node(node) for node in below)
    return any(
        node["class_type"] == kind and is_link(link := node["inputs"].get("history")) and link[0] == loop.start
        for node in found
    )


def next_round(
    graph: Graph,
    loop: Loop,
    number: int,
    *,
    constants: Mapping[str, str | int],
    carry: Mapping[str, int],
    is_output: Callable[[str], bool],
) -> tuple[dict[str, dict[str, Any]], str]:
    """The nodes of round `number` and the id of their Loop Close.

    constants: inputs of the Advance node that is put in front of the copy; beside them it takes the round just finished
    (image, edited, verdict, history) and the source by link. carry: input of the Loop Open's copy -> output of Advance.
    """
    prefix = f"{loop.root}.round{number}."
    body = body_of(loop, is_output)
    names = _names(graph, body, prefix)
    copies: dict[str, dict[str, Any]] = {}
    for node in sorted(body):
        original = graph.get_node(node)
        inputs = {
            name: [names[value[0]], value[1]] if is_link(value) and value[0] in names else value
            for name, value in original["inputs"].items()
        }
        display = graph.get_display_node_id(node)
        copies[names[node]] = {"class_type": original["class_type"], "inputs": inputs, "override_display_id": display}
    finished = graph.get_node(loop.end)["inputs"]
    advance = prefix + "advance"
    copies[advance] = {
        "class_type": ADVANCE,
        "inputs": {
            **{name: finished[name] for name in ("image", "edited", "verdict", "history") if is_link(finished.get(name))},
            "source": loop.source,
            "loop": loop.root,
            **constants,
        },
        "override_display_id": graph.get_display_node_id(loop.end),
    }
    for name, output in carry.items():
        copies[names[loop.start]]["inputs"][name] = [advance, output]
    return copies, names[loop.end]


def round_of(node_id: str) -> int | None:
    """The round, counted from 1, that a copied node belongs to; None for one of the artist's nodes."""
    found = re.findall(r"\.round(\d+)\.", f".{node_id}")
    return int(found[-1]) if found else None


def name_round(error: Exception, node_id: str, title: str) -> None:
    """Put round and node in front of an error's message, in place: its type decides what the host does about it.

    The host reports what fails in round 2 and later against Loop Close, whose expansion the node is part of.
    """
    number = round_of(node_id)
    if number is not None and error.args and isinstance(error.args[0], str):
        shows = node_id.rpartition(f".round{number}.")[2]
        error.args = (f"round {number}, node {shows} ({title}): {error.args[0]}", *error.args[1:])


def _names(graph: Graph, body: set[str], prefix: str) -> dict[str, str]:
    # Named by what they display, not by their own id, so that ids stay short and equal from run to run. Nodes that another
    # pack's expansion made may share what they display.
    shown = Counter(graph.get_display_node_id(node) for node in body)
    return {n: prefix + (shows if shown[shows := graph.get_display_node_id(n)] == 1 else n) for n in body}


# ---- wiring --------------------------------------------------------------------------------------------------------------


def _loop_open(graph: Graph, inputs: Mapping[str, Any], links: Mapping[str, frozenset[str]]) -> str:
    flow = inputs.get("flow")
    if not is_link(flow) or flow[0] not in links or graph.get_node(flow[0])["class_type"] != OPEN or flow[1] != 0:
        found = _named(graph, flow[0]) if is_link(flow) else "nothing"
        raise ConfigError(
            f"Loop Close: expected `flow` to come from the flow output of a Loop Open node, found {found}. "
            "Connect the flow of the Loop Open that starts this loop."
        )
    return flow[0]


def _check_history(graph: Graph, inputs: Mapping[str, Any], start: str) -> None:
    history = inputs.get("history")
    if not is_link(history) or history[0] != start:
        found = _named(graph, history[0]) if is_link(history) else "nothing"
        raise ConfigError(
            f"Loop Close: expected `history` to come from {_named(graph, start)}, which gives the flow, found {found}. "
            "Connect the history output of the same Loop Open."
        )


def _named(graph: Graph, node: str) -> str:
    return f"node {graph.get_display_node_id(node)} ({graph.get_node(node)['class_type']})"


def _level(graph: Graph, node: str) -> dict[str, frozenset[str]]:
    parent = graph.get_parent_node_id(node)
    level = {n for n in graph.all_node_ids() if graph.get_parent_node_id(n) == parent}
    return {n: frozenset(v[0] for v in graph.get_node(n)["inputs"].values() if is_link(v) and v[0] in level) for n in level}


def _closure(links: Mapping[str, Iterable[str]], start: str) -> set[str]:
    seen, todo = set(), [start]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += links.get(node, ())
    return seen


def _descendants(links: Mapping[str, frozenset[str]], start: str) -> set[str]:
    turned: dict[str, list[str]] = {}
    for node, upstream in links.items():
        for above in upstream:
            turned.setdefault(above, []).append(node)
    return _closure(turned, start)
