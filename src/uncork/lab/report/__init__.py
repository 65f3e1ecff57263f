"""Runs as tables, figures, sentences and a page."""
