"""The language-model study: which output layer ends best on real text, tuned and trained to convergence."""
