"""What limits an output layer: arrays in, results out."""
