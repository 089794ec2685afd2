"""NSA's branches beside the selected one: attention over the means of blocks, attention over a sliding window, and the gated sum of all three."""
