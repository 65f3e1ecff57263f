"""Writes an experiment's tables and figures as files, with their provenance."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from uncork.lab.report.style import to_png
from uncork.lab.run.files import atomic_write_text, os_errors, write_json


def publish(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    origin: Mapping[str, Any],
    figures: Mapping[str, Figure] | None = None,
    float_format: str | None = None,
) -> None:
    """Writes each table that has rows as FOLDER/NAME.csv, each figure as NAME.png, and provenance.json.

    Args:
        folder: made if it is missing. origin: see `uncork.lab.run.provenance`.
        figures: by name; older PNG files in the folder are removed. None: PNG files are left alone.
        float_format: of the numbers in the tables, as "%.6g". None: every digit.

    Raises:
        LabError: the folder cannot be made or written.
    """
    with os_errors(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)
    for name, frame in tables.items():
        if len(frame):
            atomic_write_text(folder / f"{name}.csv", frame.to_csv(index=False, float_format=float_format))
    write_json(folder / "provenance.json", origin)
    if figures is not None:
        for old in folder.glob("*.png"):
            old.unlink()
        for name, figure in figures.items():
            to_png(figure, folder / f"{name}.png")
