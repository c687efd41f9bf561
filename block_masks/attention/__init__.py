"""Attention over packed rows and over tiles of slots, forward and backward."""
