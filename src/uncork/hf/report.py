"""transformers' report of a load, which would call the tensors of an attached head unexpected."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

_LOGGERS = ("transformers.modeling_utils", "transformers.utils.loading_report")
_MARK = "LOAD REPORT"


@contextmanager
def held_report() -> Iterator[Callable[[], None]]:
    """Within, transformers' report of a load is kept back; it is given at the end, unless the function is called.

    A report that is not known by its heading is given at once.
    """
    held: list[tuple[logging.Logger, logging.LogRecord]] = []
    with ExitStack() as stack:
        stack.callback(_give, held)  # the last to be called
        for logger in map(logging.getLogger, _LOGGERS):

            def keep(record: logging.LogRecord, logger: logging.Logger = logger) -> bool:
                if _MARK not in record.getMessage():
                    return True
                held.append((logger, record))
                return False

            logger.addFilter(keep)
            stack.callback(logger.removeFilter, keep)
        yield held.clear


def only_unexpected(info: dict[str, Any], own: set[str]) -> bool:
    """Whether all that a load has to report is that the tensors of these names were not used."""
    return set(info["unexpected_keys"]) <= own and not any(
        found for kind, found in info.items() if kind != "unexpected_keys"
    )


def _give(held: list[tuple[logging.Logger, logging.LogRecord]]) -> None:
    for logger, record in held:
        logger.handle(record)
