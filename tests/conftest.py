"""Makes `import reasonedit` work from a bare checkout, keeps tests off the network, and seeds nothing globally."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

ROOT = Path(__file__).resolve().parent.parent

if importlib.util.find_spec("reasonedit") is None:
    spec = importlib.util.spec_from_file_location("reasonedit", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["reasonedit"] = module
    spec.loader.exec_module(module)

# No example has a deadline of its own: tests say what is right, never how fast it is.
settings.register_profile("reasonedit", deadline=None)
settings.load_profile("reasonedit")
