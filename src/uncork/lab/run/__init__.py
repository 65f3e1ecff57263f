"""How every experiment is run: keys and folders of runs, workers, files, signals, environment variables."""
