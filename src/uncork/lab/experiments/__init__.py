"""What the laboratory measures, a module or a folder each."""
