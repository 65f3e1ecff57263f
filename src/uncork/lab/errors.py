"""The one error that the laboratory raises for a user's mistake, and the others that no traceback explains better."""


class LabError(Exception):
    """Bad input or a damaged file: the command line prints it as one line and exits with a non-zero code."""


def in_one_line(error: BaseException) -> str | None:
    """What the command line says of an error, in place of a traceback. None: it is a mistake of ours, with one.

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
