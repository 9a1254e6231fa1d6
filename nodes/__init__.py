"""The ComfyUI side. Thin: sockets <-> core types. The only place that imports comfy, through `host`."""


def __getattr__(name: str):
    """Resolve the extension class on first use, so that importing this package needs no ComfyUI."""
    if name == "ReasonEditExtension":
        from .host import ReasonEditExtension

        return ReasonEditExtension
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
