"""The experiments of the laboratory, one module or folder each."""
