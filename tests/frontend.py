"""ComfyUI's own frontend in a headless Chromium, for tests and for the pictures of the template browser.

Needs the package playwright and a Chromium (REASONEDIT_CHROMIUM, or one on the PATH); without them the tests skip, aloud.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

from reasonedit.tests.comfy_server import ComfyServer

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
READY_MS = 120_000

NODES = """() => window.app.graph._nodes.map(node => ({
    id: node.id, type: node.type, broken: !!node.has_errors,
    values: Object.fromEntries((node.widgets || []).map(w => [w.name, w.value === undefined ? null : w.value])) }))"""
MESSAGES = "() => [...document.querySelectorAll('.p-dialog, .p-toast-message')].map(box => box.innerText)"
PROMPT = "async () => (await window.app.graphToPrompt()).output"
SHOWN = "kinds => window.app.graph._nodes.every(node => !kinds.includes(node.type) || (node.imgs || []).length)"
LISTEN = """() => { window.ended = []; for (const kind of ['execution_success', 'execution_error', 'execution_interrupted'])
    window.app.api.addEventListener(kind, () => window.ended.push(kind)) }"""
PLACE = """([x, y]) => { const view = window.app.canvas.ds; view.scale = 1; view.offset = [x, y];
    window.app.canvas.setDirty(true, true);
    const box = document.querySelector('#graph-canvas').getBoundingClientRect(); return [box.x, box.y] }"""
HIDE = ".p-toast, .p-dialog-mask, .minimap-main-container, .litegraph-minimap { display: none !important }"


class Frontend:
    """The frontend of a running server, in a page of its own."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def open(self, workflow: Mapping[str, Any]) -> list[str]:
        """Load a workflow as if it had been dropped on the page. Gives what the frontend then complains about."""
        self.page.evaluate("async graph => { await window.app.loadGraphData(graph) }", dict(workflow))
        self.page.evaluate(PLACE, [100, 200])  # pictures are fetched for what is in view
        self.page.wait_for_timeout(1000)
        return self.page.evaluate(MESSAGES)

    def nodes(self) -> list[dict[str, Any]]:
        """id, type, broken and values by widget of every node."""
        return self.page.evaluate(NODES)

    def prompt(self) -> dict[str, Any]:
        """What the frontend would send."""
        return self.page.evaluate(PROMPT)

    def run(self) -> tuple[str, list[str]]:
        """Press Run. Gives how the run ended ("" when it was refused) and what the frontend said."""
        self.page.evaluate("() => { window.ended.length = 0 }")
        self.page.evaluate("async () => { await window.app.queuePrompt(0) }")
        said = "() => window.ended.length || document.querySelector('.p-dialog')"
        self.page.wait_for_function(said, timeout=READY_MS)
        self.page.wait_for_timeout(1000)
        return next(iter(self.page.evaluate("() => window.ended")), ""), self.page.evaluate(MESSAGES)

    def wait_for_pictures(self, kinds: Collection[str]) -> None:
        """Until every node of these classes shows a picture."""
        self.page.wait_for_function(SHOWN, arg=list(kinds), timeout=30_000)

    def picture(self, left: int, top: int, width: int, height: int) -> bytes:
        """PNG of a part of the graph, in the graph's own coordinates, at one pixel per unit."""
        self.page.add_style_tag(content=HIDE)
        x, y = self.page.evaluate(PLACE, [100 - left, 100 - top])
        self.page.wait_for_timeout(1000)
        return self.page.screenshot(clip={"x": x + 100, "y": y + 100, "width": width, "height": height})


@contextmanager
def chromium() -> Iterator[Any]:
    """A browser."""
    api = pytest.importorskip("playwright.sync_api", reason="NOT TESTED in a browser: the package playwright is not installed")
    path = os.environ.get("REASONEDIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if not path:
        pytest.skip("NOT TESTED in a browser: no Chromium found; set REASONEDIT_CHROMIUM")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@contextmanager
def frontend(browser: Any, server: ComfyServer) -> Iterator[Frontend]:
    """The frontend of a running server."""
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # or the template browser opens by itself, at some moment
    page = browser.new_page(viewport={"width": 3200, "height": 1800})
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=READY_MS)
    page.wait_for_timeout(3000)  # extensions add themselves
    page.evaluate(LISTEN)
    yield Frontend(page)
    page.close()
