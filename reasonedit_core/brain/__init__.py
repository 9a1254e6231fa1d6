"""ReasonBrain as a system: its folder, its networks loaded and put together, and the generator that edits with them."""
