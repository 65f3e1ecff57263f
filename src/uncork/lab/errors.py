"""The one error that the laboratory raises for a user's mistake."""


class LabError(Exception):
    """Bad input or a damaged file: the command line prints it as one line and exits with a non-zero code."""
