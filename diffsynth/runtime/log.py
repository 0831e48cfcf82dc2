"""Logging of the command line: this package's messages on stderr, between progress bars rather than through them."""

import logging
import os
import sys

PACKAGE = "diffsynth"


class ProgressSafeHandler(logging.Handler):
    """Writes to the current `sys.stderr`; a progress bar that stands there is cleared first and drawn again below."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one message, with its level in front from warnings upwards."""
        try:
            text = self.format(record)
            if record.levelno >= logging.WARNING:
                text = f"{record.levelname.capitalize()}: {text}"
            tqdm = sys.modules.get("tqdm")  # not imported, so no bar: --help must not pay for it
            if tqdm is None:
                sys.stderr.write(f"{text}\n")
            else:
                tqdm.tqdm.write(text, file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_logging(verbose: int) -> None:
    """Show messages of this package on stderr.

    Replaces what an earlier call set up. Handlers of other loggers stay as they are.

    Args:
        verbose: -1 errors only, 0 warnings, 1 information, 2 everything.
    """
    levels = (logging.ERROR, logging.WARNING, logging.INFO, logging.DEBUG)
    logger = logging.getLogger(PACKAGE)
    for handler in list(logger.handlers):
        if isinstance(handler, ProgressSafeHandler):
            logger.removeHandler(handler)
    logger.addHandler(ProgressSafeHandler())
    logger.setLevel(levels[min(max(verbose, -1), 2) + 1])
    if verbose < 2:
        # Read when the library is imported, which is later; one that is there already listens to its logger.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        if "transformers" in sys.modules:
            logging.getLogger("transformers").setLevel(logging.ERROR)
