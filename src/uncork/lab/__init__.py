"""The laboratory: corpora, models, training and the comparison of output layers (needs `pip install uncork[lab]`)."""
