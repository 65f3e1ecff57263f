"""The synthetic experiment: heads fitted to given distributions over free context vectors, so that only heads limit."""
