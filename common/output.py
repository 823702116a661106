"""What every command does to its output: no character ends a run, and lines that no user can act on stay away.

Imports nothing but the standard library: a command's errors must be shown even where a library cannot be imported.
"""

from __future__ import annotations

import io
import logging
import re
import sys
import warnings


class _Without(logging.Filter):
    """Lets no record pass whose message holds `pattern`."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is to be shown."""
        return not self._pattern.search(record.getMessage())


# Warnings by their beginning. Each is about a call from one library to another: nothing here or in a user's flags can
# change it, and every rank repeats it.
_WARNINGS = (
    # DeepSpeed calls torch's collectives by names that torch is about to change.
    r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
    # peft asks a model for this by the name that transformers had before.
    r"`is_gradient_checkpointing` is deprecated",
)

# What each logger is not to write.
_LOG_LINES = {
    # A table of weights that a folder lacks or has too many. A classifier gets a new head, and a critic takes a trunk
    # without its head: both by intention. A table with a numbered layer, or of a whole language model, shows; and those
    # who load look at what is missing themselves (`common.models`).
    "transformers.modeling_utils": _Without(
        r"(?s)(ForTokenClassification|(?<!LMHead)Model) LOAD REPORT[^\n]*\n(?!.*(CONVERSION|\.\{?\d))"
    ),
    # Checkpoints of tiny models are written within a second; their numbers, which are then asked, give the same order.
    "transformers.trainer_utils": _Without(r"^mtime may not be reliable on this filesystem"),
}


def prepare_output() -> None:
    """Call it once, before a command begins."""
    tolerate_characters()
    hide_known_noise()


def tolerate_characters() -> None:
    """Have standard output write a character that its encoding lacks as an escape, as standard error does anyway.

    A file name in Cyrillic must not end a run whose output goes to a latin-1 terminal, or to a file under LC_ALL=C.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # a test or a notebook may have put something else there
        sys.stdout.reconfigure(errors="backslashreplace")


def hide_known_noise() -> None:
    """Keep back exactly the warnings and log lines above; all others show."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    for name, unwanted in _LOG_LINES.items():
        logging.getLogger(name).addFilter(unwanted)
