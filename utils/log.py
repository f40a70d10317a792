"""One logger, `darkslim`: plain lines on standard output, the same lines in a run's log file, and DataError."""

import logging
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from . import dist

log = logging.getLogger("darkslim")


class DataError(ValueError):
    """The user's mistakes in data, paths or flags, one line each."""


class Lines(logging.StreamHandler):
    """Writes log lines; a reader that has gone away ends the program instead of printing a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        if isinstance(sys.exception(), BrokenPipeError):
            raise
        super().handleError(record)


class LogFile(logging.FileHandler):
    """Appends log lines to a file; a disk that refuses ends the program instead of printing a traceback a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, self.baseFilename)
        super().handleError(record)

    def close(self) -> None:
        with suppress(OSError):  # told before: what could not be written is still in the buffer
            super().close()


def start_logging(file: Path | None = None, *, stream: TextIO | None = None, tells_cfg: bool = True) -> None:
    """Send log lines to `stream` (default: standard output) and, when `file` is given, append them there too.

    Of several processes the first alone does. Without `tells_cfg` only warnings about cfgs are told, not what is
    noticed and harmless.
    """
    log.setLevel(logging.INFO)
    log.getChild("cfg").setLevel(logging.INFO if tells_cfg else logging.WARNING)
    for handler in log.handlers[:]:
        log.removeHandler(handler)
        handler.close()
    if not dist.is_first():
        log.addHandler(logging.NullHandler())
        return
    handlers: list[logging.Handler] = [Lines(stream or sys.stdout)]
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        handlers.append(LogFile(file, encoding="utf-8"))
    for handler in handlers:
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
