"""A size of the latent video grid, or of a block of it."""

Sizes3 = tuple[int, int, int]
"""Frames, height and width, in tokens."""
