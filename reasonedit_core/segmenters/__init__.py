"""Masks of what is in a picture: SAM, SAM 2, kept masks, a grid, or the user's own; and their selection for ReasonBrain."""
