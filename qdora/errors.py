"""The errors a user can cause, and the exit statuses they end in.

A message says what failed, what was given, what is allowed and what to do. The command line prints it once, on rank 0,
without a traceback, and exits with `EXIT_USER_ERROR`.
"""

import difflib
from collections.abc import Iterable

EXIT_ERROR = 1  # what nobody foresaw
EXIT_USER_ERROR = 2
EXIT_NOT_VERIFIED = 3  # written, but not the model that was trained
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: saved and resumable, a scheduler may requeue
EXIT_KEYBOARD = 130  # what a shell shows for a Ctrl-C


class QdoraError(Exception):
    """Something the user can mend. Its text is the whole message."""


class OutOfMemoryError(QdoraError):
    """A step did not fit; on one rank, while the others know nothing of it."""


class ConfigError(QdoraError):
    """An option is unknown, of the wrong type, or contradicts another."""


class DataError(QdoraError):
    """A data set is missing, empty, malformed or has nothing to learn from."""


class ModelError(QdoraError):
    """The base model cannot be read, or does not fit what was asked of it."""


class AdapterError(QdoraError):
    """An adapter does not fit the model, or its patterns match no layer."""


class CheckpointError(QdoraError):
    """A training checkpoint is unusable or belongs to another run."""


class TrainingError(QdoraError):
    """Training itself went wrong, for example a loss that is not finite."""


def first_line(error: BaseException) -> str:
    """Of what an error of another library says, or its name where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def nearest(word: str, known: Iterable[str]) -> str:
    """Returns `", did you mean 'x'?"` for the known word closest to `word`, or an empty string."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {match[0]!r}?" if match else ""
