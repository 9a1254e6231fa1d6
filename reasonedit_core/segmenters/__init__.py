"""Regions of a picture: selected from masks, of a segmenter or the user's own, for ReasonBrain."""
