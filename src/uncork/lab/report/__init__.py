"""Reports on runs: tables, figures, sentences and a page."""
