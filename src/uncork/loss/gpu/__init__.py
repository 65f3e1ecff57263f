"""The tile's kernels in Triton: primitives of a logit function, and passes over rows of scores."""
