"""The loop nodes over a body of stand-ins (fake_body.py), on our graph runner and on a real ComfyUI when there is one.

What the tests of the loop share: two ways to run a prompt, the fixtures that give them, and the graphs.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from reasonedit.tests.comfy_server import ComfyServer
from reasonedit.tests.graph_runner import GraphRunner, RunError, install_host

TESTS = Path(__file__).resolve().parent
CLASSES = install_host()

from reasonedit.nodes import loop  # noqa: E402
from reasonedit.tests import fake_body as fakes  # noqa: E402

for kind in (loop.LoopOpen, loop.LoopClose, loop.Advance, *fakes.NODES):
    CLASSES[kind.GET_SCHEMA().node_id] = kind


# ---- two ways to run a prompt --------------------------------------------------------------------------------------------


class Outcome:
    """What a run did. runs: body classes in order; ids: their node ids; error: (artist's node, message) or None."""

    def __init__(self, runs, shown=None, error=None, interrupted=False, run=None):
        self.runs = [name for name, _ in runs if name != "Show"]
        self.ids = [node for name, node in runs if name != "Show"]
        self.shown, self.error, self.interrupted, self.run = shown or {}, error, interrupted, run


class Double:
    """Prompts on our runner."""

    real = False

    def __init__(self, mode):
        self.runner = GraphRunner(CLASSES, mode)

    def queue(self, prompt, interrupt_after=None) -> Outcome:
        """interrupt_after: number of steps after which the user cancels."""
        fakes.RUNS.clear()
        steps = 0

        def step():
            nonlocal steps
            if steps == interrupt_after:
                raise KeyboardInterrupt
            steps += 1

        fakes.ON_STEP[:] = [step]
        try:
            shown = self.runner.run(prompt)
            return Outcome(fakes.RUNS[:], shown)
        except RunError as error:
            return Outcome(fakes.RUNS[:], error=(error.node, str(error.cause)))
        except KeyboardInterrupt:
            return Outcome(fakes.RUNS[:], interrupted=True)


class Real:
    """Prompts on a server."""

    real = True

    def __init__(self, server):
        self.server = server

    def queue(self, prompt, interrupt_after=None) -> Outcome:
        """interrupt_after: number of previews after which the user cancels."""
        self.server.get("/reasonedit_test/runs")
        cancelled = []

        def watch(run):
            previews = [e for e in run.of("binary") if e["kind"] in (1, 4)]
            if interrupt_after is not None and not cancelled and len(previews) >= interrupt_after:
                cancelled.append(len(previews))
                self.server.post("/interrupt")

        run = self.server.run(prompt, on_event=watch)
        runs = self.server.get("/reasonedit_test/runs")
        error = (run.told["node_id"], run.told["exception_message"]) if run.end == "execution_error" else None
        if run.status != 200 or (run.reply or {}).get("node_errors"):
            error = ("", str(run.reply))
        return Outcome(runs, run.outputs, error, run.end == "execution_interrupted", run)


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    """Servers by cache mode, started when first asked for and ended with the module."""
    started = {}

    def get(*flags):
        if flags not in started:
            server = ComfyServer(tmp_path_factory.mktemp("comfy"), *flags, packs={"fake_body": TESTS / "fake_body.py"})
            started[flags] = server.__enter__()
        return started[flags]

    yield get
    for server in started.values():
        server.__exit__()


@pytest.fixture(params=["double-classic", "double-lru", "comfy-classic", "comfy-lru"])
def engine(request, servers):
    """One of the ways to run a prompt, with an empty cache of its own (a server's cache is emptied)."""
    which, mode = request.param.split("-")
    if which == "double":
        return Double(mode)
    server = servers(*(["--cache-lru", "50"] if mode == "lru" else []))
    server.post("/free", {"free_memory": True})
    time.sleep(1.2)  # the flag is read once a second
    return Real(server)


def prompt_of(*, close=None, edit=None, reflect=None, start=None, think=None, history=False) -> dict[str, dict]:
    """The test graph of the design: Think, Edit and Reflect in a loop, a preview on Edit, and what came out."""
    prompt = {
        "1": {"class_type": "Test_Paint", "inputs": {"value": 0.0, "count": 1, "channels": 3}},
        "2": {"class_type": "ReasonEdit_LoopOpen", "inputs": {"image": ["1", 0], "instruction": "words", "seed": 5}},
        "3": {"class_type": "Test_Think", "inputs": {"image": ["2", 1], "instruction": ["2", 2]}},
        "4": {"class_type": "Test_Edit", "inputs": {"image": ["2", 1], "instruction": ["3", 0], "seed": 1, "step_s": 0.0}},
        "5": {
            "class_type": "Test_Reflect",
            "inputs": {"source": ["1", 0], "edited": ["4", 0], "instruction": ["3", 0], "target": 0.7},
        },
        "6": {
            "class_type": "ReasonEdit_LoopClose",
            "inputs": {"flow": ["2", 0], "image": ["4", 0], "verdict": ["5", 0], "history": ["2", 3], **SETTINGS},
        },
        "7": {"class_type": "Test_Show", "inputs": {"image": ["4", 0]}},
        "8": {"class_type": "Test_Show", "inputs": {"image": ["6", 1], "text": ["6", 3], "number": ["6", 2]}},
        "9": {"class_type": "Test_Show", "inputs": {"image": ["6", 0]}},
    }
    if history:
        prompt["3"]["inputs"]["history"], prompt["6"]["inputs"]["goal"] = ["2", 3], ["3", 1]
        prompt["5"]["inputs"]["instruction"] = ["3", 1]
    for node, more in (("2", start), ("3", think), ("4", edit), ("5", reflect), ("6", close)):
        prompt[node]["inputs"].update(more or {})
    return prompt


SETTINGS = {
    "max_rounds": 8,
    "policy": "reasonedit",
    "pick": "best",
    "on_failed": "rethink",
    "revise": "chain",
    "accept": 9.0,
    "doubt": 3.0,
    "max_seconds": 0.0,
}
ROUND = ["Think", "Edit", "Reflect"]


def shown(outcome, node="8"):
    """(means, number, text) of a Show node."""
    told = outcome.shown[node]
    return told["means"], told["number"][0], told["text"][0]


def judged(verdicts, **more) -> dict[str, dict]:
    """The test graph with Think inside the loop, seeds from Loop Open, and verdicts from a list."""
    prompt = prompt_of(history=True, edit={"noisy": True, "seed": ["2", 5], "previous": ["2", 6]}, **more)
    prompt["5"] = {
        "class_type": "Test_Judge",
        "inputs": {"source": ["1", 0], "edited": ["4", 0], "goal": ["3", 1], "history": ["2", 3], "verdicts": verdicts},
    }
    prompt["6"]["inputs"]["edited"] = ["4", 1]
    return prompt


def brightness(*seeds):
    """What a chain of noisy edits of a black picture comes to."""
    total = sum(float(torch.rand((), generator=torch.Generator().manual_seed(seed))) / 2 for seed in seeds)
    return pytest.approx(min(total, 1.0), abs=2e-4)
