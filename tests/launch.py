"""Programs of the package in processes of their own, also from a checkout that is not installed.

Use: `from reasonedit.tests.launch import BOOT, program`.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

BOOT = f"""
import importlib.util, sys
if importlib.util.find_spec("reasonedit") is None:
    spec = importlib.util.spec_from_file_location(
        "reasonedit", {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}]
    )
    sys.modules["reasonedit"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["reasonedit"])
"""
"""Python code after which `import reasonedit` works."""

TRAIN = BOOT + "from reasonedit.training.cli import main\nsys.exit(main())\n"


def program(*arguments: str) -> list[str]:
    """The command `reasonedit-train ARGUMENTS`."""
    return [sys.executable, "-c", TRAIN, *arguments]


def script(folder: Path) -> Path:
    """The same as a file, for launchers that take one."""
    path = folder / "train_script.py"
    path.write_text(TRAIN, encoding="utf-8")
    return path
