"""A small graph runner of our own, to test the loop nodes in milliseconds. A test double, not the host.

It knows what the loop relies on: links, lazy inputs, raw links, expansion with levels and display ids, output nodes inside
an expansion, hidden inputs, and a cache that finds a node by class, fingerprint, constants and ancestry. `install_host`
puts stand-ins for the host's modules into sys.modules, with just enough of the node schema for our nodes to be defined.
"""

from __future__ import annotations

import enum
import hashlib
import importlib
import importlib.util
import itertools
import sys
import types
from importlib.util import spec_from_loader
from types import SimpleNamespace
from typing import Any

# ---- the schema ----------------------------------------------------------------------------------------------------------


class Slot:
    """An input or an output of a node, with whatever options it was declared with."""

    def __init__(self, io_type: str, id: str | None = None, display_name: str | None = None, **options: Any) -> None:
        self.io_type, self.id, self.display_name, self.declared = io_type, id, display_name, options
        for name, value in options.items():
            setattr(self, name, value)
        self.raw = bool((options.get("extra_dict") or {}).get("rawLink"))
        self.lazy, self.optional = bool(options.get("lazy")), bool(options.get("optional"))
        self.tooltip = options.get("tooltip")


def socket(io_type: str) -> type:
    """A socket type with its Input and Output."""

    class Socket:
        """A type of socket."""

        Type = object

        class Input(Slot):
            """Takes a value of this type."""

            def __init__(self, id, *args, **options):
                super().__init__(io_type, id, *args, **options)

        class Output(Slot):
            """Gives a value of this type."""

            def __init__(self, id=None, *args, **options):
                super().__init__(io_type, id, *args, **options)

    Socket.io_type = io_type
    return Socket


class Schema:
    """A node's properties."""

    def __init__(self, node_id: str, **given: Any) -> None:
        self.node_id = node_id
        defaults = {"inputs": [], "outputs": [], "hidden": [], "is_output_node": False, "enable_expand": False, "category": ""}
        self.__dict__.update({**defaults, "not_idempotent": False, "is_experimental": False, "description": "", **given})

    def validate(self) -> None:
        """The host drops a whole pack for this."""
        ids = [slot.id for slot in (*self.inputs, *self.outputs)]
        twice = {i for i in ids if i is not None and ids.count(i) > 1}
        if twice:
            raise ValueError(f"{self.node_id}: ids of inputs and outputs must differ, found twice: {twice}")


class NodeOutput:
    """What a node returns."""

    def __init__(self, *args: Any, ui: Any = None, expand: dict | None = None, block_execution: str | None = None) -> None:
        self.args, self.ui, self.expand, self.block_execution = args, ui, expand, block_execution

    @property
    def result(self):
        """The outputs, or None."""
        return self.args or None


class _NodeType(type):
    @property
    def OUTPUT_NODE(cls) -> bool:
        """As the host's table of nodes is asked."""
        return cls.define_schema().is_output_node


class ComfyNode(metaclass=_NodeType):
    """Base of every node."""

    hidden = None

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The checked schema."""
        schema = cls.define_schema()
        schema.validate()
        return schema


class Hidden(enum.StrEnum):
    """What a node may ask the host for."""

    unique_id, prompt, dynprompt, extra_pnginfo = "UNIQUE_ID", "PROMPT", "DYNPROMPT", "EXTRA_PNGINFO"


class _Sockets(types.ModuleType):
    Custom, Schema, NodeOutput, ComfyNode, Hidden = staticmethod(socket), Schema, NodeOutput, ComfyNode, Hidden

    def __getattr__(self, name: str):
        if name.startswith("_"):
            raise AttributeError(name)
        made = socket("*" if name == "AnyType" else name.upper())
        setattr(self, name, made)
        return made


class _Anything(types.ModuleType):
    """A module of the host that has every name: classes without behaviour, enough to be imported and subclassed."""

    __path__: list[str] = []

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        made = type(name, (), {"__init__": lambda self, *args, **options: None})
        setattr(self, name, made)
        return made


class _Finder:
    """Finds every module of the host that our nodes might import."""

    names = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "latent_preview", "nodes", "server")

    def find_spec(self, name, path=None, target=None):
        """A stand-in for the host's modules only."""
        return spec_from_loader(name, self, is_package=True) if name.partition(".")[0] in self.names else None

    def create_module(self, spec):
        """An empty one."""
        return _Anything(spec.name)

    def exec_module(self, module):
        """What our nodes read at import or ask while they run."""
        if module.__name__ == "comfy_api.latest":
            module.io, module.ComfyExtension = _Sockets("io"), type("ComfyExtension", (), {})
        elif module.__name__ == "comfy.cli_args":
            module.args = SimpleNamespace(cache_none=False, disable_metadata=False, preview_size=64, preview_method=None)
            module.LatentPreviewMethod = SimpleNamespace(NoPreviews=None)
        elif module.__name__ == "comfy.model_management":
            module.processing_interrupted = lambda: False
            module.is_device_cpu = lambda device: getattr(device, "type", "cpu") == "cpu"
            module.InterruptProcessingException = type("InterruptProcessingException", (Exception,), {})
        elif module.__name__ == "comfy.utils":
            module.ProgressBar = lambda total: SimpleNamespace(update_absolute=lambda *args: None)
        elif module.__name__ == "comfy.ldm.modules.attention":
            module.attention_pytorch = module.optimized_attention = module.optimized_attention_masked = attention_pytorch
        elif module.__name__ == "comfy_execution.caching":
            module.__class__ = types.ModuleType  # is asked what it does not have
        elif module.__name__ == "comfy_execution.utils":
            module.get_executing_context = lambda: None
        elif module.__name__ == "nodes":
            module.NODE_CLASS_MAPPINGS = {}


def attention_pytorch(q, k, v, heads, mask=None, **_options):
    """ComfyUI's function of that name: q, k, v (B, N, H * D), mask as torch takes it or None -> (B, N, H * D)."""
    from torch.nn.functional import scaled_dot_product_attention

    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def install_host() -> dict[str, type]:
    """Make the host importable as stand-ins, unless it really is. Gives its table of node classes, to be filled."""
    if importlib.util.find_spec("comfy") is None:
        sys.meta_path.insert(0, _Finder())  # first: `nodes` may also be found in the folder that tests run from
    return importlib.import_module("nodes").NODE_CLASS_MAPPINGS


# ---- the runner ----------------------------------------------------------------------------------------------------------


class RunError(Exception):
    """A node failed; `node` is the artist's node that the failure is reported against."""

    def __init__(self, node: str, cause: Exception) -> None:
        super().__init__(f"node {node}: {cause}")
        self.node, self.cause = node, cause


class Graph:
    """The artist's nodes and what was expanded from them: `expand.Graph`."""

    def __init__(self, prompt: dict[str, dict]) -> None:
        self.prompt, self.made, self.parents, self.shown = prompt, {}, {}, {}

    def get_node(self, node: str) -> dict:
        """Class and inputs of a node."""
        return self.made.get(node) or self.prompt[node]

    def all_node_ids(self) -> set[str]:
        """Every node there is by now."""
        return set(self.prompt) | set(self.made)

    def get_parent_node_id(self, node: str) -> str | None:
        """The node that expanded into this one."""
        return self.parents.get(node)

    def get_display_node_id(self, node: str) -> str:
        """The node it is shown on."""
        while node in self.shown:
            node = self.shown[node]
        return node

    def real(self, node: str) -> str:
        """The artist's node that this one was expanded from."""
        while node in self.parents:
            node = self.parents[node]
        return node

    def add(self, node: str, info: dict, parent: str) -> None:
        """One more expanded node."""
        if node in self.made or node in self.prompt:
            raise ValueError(f"node {node} is there already")
        self.made[node], self.parents[node] = info, parent
        self.shown[node] = info.get("override_display_id", parent)


def is_link(value: Any) -> bool:
    """[node id, output index]."""
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))


class GraphRunner:
    """Runs prompts in API format over `classes` and keeps results between runs.

    mode: `classic` forgets, at the start of a run, what the prompt does not hold any more; `lru` keeps everything.
    """

    def __init__(self, classes: dict[str, type], mode: str = "classic") -> None:
        self.classes, self.mode, self.cache, self.executed = classes, mode, {}, []

    def run(self, prompt: dict[str, dict]) -> dict[str, tuple]:
        """What the artist's output nodes show (their `ui`), by node. Raises RunError."""
        self.graph, self.results, self.keys, self.executed = Graph(prompt), {}, {}, []
        self._check_numbers()
        if self.mode == "classic":
            kept = {(None, self._key(node)) for node in prompt}
            self.cache = {key: value for key, value in self.cache.items() if key[0] is not None or key in kept}
        wanted = [node for node in prompt if self._schema(node).is_output_node]
        for node in wanted:
            self._need(node)
        return {node: self.results[node][1] for node in wanted}

    def _check_numbers(self) -> None:
        for node, info in self.graph.prompt.items():
            for slot in self._schema(node).inputs:
                value, most = info["inputs"].get(slot.id), slot.declared.get("max")
                if most is not None and not is_link(value) and value is not None and value > most:
                    raise RunError(node, ValueError(f"{slot.id}: value_bigger_than_max"))

    def _schema(self, node: str) -> Schema:
        return self.classes[self.graph.get_node(node)["class_type"]].GET_SCHEMA()

    def _output(self, link: list) -> Any:
        return self._need(link[0])[0][link[1]]

    def _need(self, node: str) -> tuple[tuple, Any]:
        if node in self.results:
            return self.results[node]
        place = (self.graph.get_parent_node_id(node), self._key(node))
        if place not in self.cache:
            try:
                self.cache[place] = self._execute(node)
            except RunError:
                raise
            except Exception as error:
                raise RunError(self.graph.real(node), error) from error
        self.results[node] = self.cache[place]
        return self.results[node]

    def _execute(self, node: str) -> tuple[tuple, Any]:
        kind, schema = self.classes[self.graph.get_node(node)["class_type"]], self._schema(node)
        inputs, slots = self.graph.get_node(node)["inputs"], {slot.id: slot for slot in schema.inputs}
        values = {}
        for name, value in inputs.items():
            slot = slots[name]
            if not is_link(value):
                values[name] = value
            elif slot.lazy:
                values[name] = None
            else:
                found = self._output(value)
                values[name] = value if slot.raw else found
        asked = {Hidden(h).name for h in schema.hidden}
        hidden = {"unique_id": node, "dynprompt": self.graph, "prompt": self.graph.prompt, "extra_pnginfo": None}
        clone = type(kind)(
            kind.__name__, (kind,), {"hidden": SimpleNamespace(**{k: v for k, v in hidden.items() if k in asked})}
        )
        if hasattr(kind, "check_lazy_status"):
            missing = {name for name, value in inputs.items() if is_link(value) and slots[name].lazy}
            while wanted := missing & set(clone.check_lazy_status(**values)):
                for name in wanted:
                    values[name] = self._output(inputs[name])
                missing -= wanted
        self.executed.append((node, self.graph.get_display_node_id(node)))
        output = clone.execute(**values)
        return (tuple(output.args) if output.expand is None else self._expand(node, schema, output)), output.ui

    def _expand(self, node: str, schema: Schema, output: NodeOutput) -> tuple:
        if not schema.enable_expand:
            raise ValueError(f"{schema.node_id} is not declared to expand")
        for name, info in output.expand.items():
            self.graph.add(name, info, node)
        if self.mode == "classic":
            kept = {(node, self._key(name)) for name in output.expand}
            self.cache = {key: value for key, value in self.cache.items() if key[0] != node or key in kept}
        for name in output.expand:
            if self._schema(name).is_output_node:
                self._need(name)
        return tuple(self._output(value) if is_link(value) else value for value in output.args)

    def _key(self, node: str) -> str:
        if node not in self.keys:
            info = self.graph.get_node(node)
            kind = self.classes[info["class_type"]]
            constants = {k: v for k, v in info["inputs"].items() if not is_link(v)}
            told = kind.fingerprint_inputs(**constants) if hasattr(kind, "fingerprint_inputs") else None
            parts: list[Any] = [info["class_type"], _plain(told)]
            for name, value in sorted(info["inputs"].items()):
                parts.append((name, self._key(value[0]), value[1]) if is_link(value) else (name, _plain(value)))
            self.keys[node] = hashlib.sha256(repr(parts).encode()).hexdigest()
        return self.keys[node]


_never = itertools.count()


def _plain(value: Any) -> str:
    """A constant as it enters a key; what cannot be compared never equals anything, itself included."""
    if value is None or isinstance(value, (str, int, float, bool)):
        return repr(value)
    if isinstance(value, (list, tuple)):
        return repr([_plain(v) for v in value])
    return f"unlike anything {next(_never)}"
