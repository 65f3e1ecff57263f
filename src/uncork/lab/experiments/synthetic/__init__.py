"""The synthetic experiment: categorical distributions whose contexts are free vectors, so that only the head limits."""
