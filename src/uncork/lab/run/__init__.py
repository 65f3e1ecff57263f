"""What every experiment rests on: a run's key, its folder, files, signals, variables."""
