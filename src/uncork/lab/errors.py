"""The laboratory's error for a user's mistake, and which other errors are reported without a traceback."""


class LabError(Exception):
    """Bad input or a damaged file: the command line prints it as one line and exits with a non-zero code."""


def in_one_line(error: BaseException) -> str | None:
    """The line that the command line prints for an error; None for a bug of uncork, which is shown with its traceback.

    >>> in_one_line(ModuleNotFoundError("No module named 'pandas'", name="pandas"))
    "needs the laboratory: pip install 'uncork[lab]' (no module named pandas)"
    """
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        ours = missing in ("", "uncork")
        return None if ours else f"needs the laboratory: pip install 'uncork[lab]' (no module named {missing})"
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return f"the memory is too small for this: {str(error).splitlines()[0] if str(error) else 'smaller sizes fit'}"
    if isinstance(error, LabError | OSError):  # matplotlib's and the terminal's errors are OSErrors
        return " ".join(str(error).split("\n")) or type(error).__name__
    return None
