"""An experiment's tables and pictures as files, with where they come from."""

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
        folder: made where it is not there. origin: see `uncork.lab.run.provenance`.
        figures: pictures of before that are not among them are removed; None leaves all pictures alone.
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
