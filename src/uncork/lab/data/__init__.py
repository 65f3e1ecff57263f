"""Text: where it comes from, its words, and batches of them.

A text goes one way: `sources` (files, to normalised text in three splits), `tokenization` (text to ids), `corpora` (the
ids in a file, memory-mapped), `batching`. `words` says what lines and words are; `text` reads texts larger than memory.
"""
