"""Everything the pack takes from ComfyUI goes through this module."""

from comfy_api.latest import ComfyExtension, io


class ReasonEditExtension(ComfyExtension):
    """Registers the pack's nodes with ComfyUI."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes of the pack."""
        return []
