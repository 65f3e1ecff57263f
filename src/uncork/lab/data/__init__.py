"""Text: where it comes from, its words, and batches of them."""
