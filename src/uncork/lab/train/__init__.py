"""One language model trained with one output layer, evaluated and sampled."""
