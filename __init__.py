"""comfyui-reasonedit: reasoning in image editing, as ComfyUI nodes, a library and a command line.

Imports nothing at module level: ComfyUI loads this folder at its start, and `import reasonedit` must stay cheap.
"""

WEB_DIRECTORY = "nodes/web"  # ComfyUI serves the nodes' help pages from here


async def comfy_entrypoint():
    """The V3 extension that ComfyUI asks for when it loads this folder."""
    from .nodes import ReasonEditExtension

    return ReasonEditExtension()
