"""BlockMasks: from maps of tiles and choices of groups to FlexAttention's index tensors."""
