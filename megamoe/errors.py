"""What megamoe raises when something is the user's to mend.

The command line prints the message of any `MegamoeError` as one sentence and exits with `exit_code`; everything
else is a defect of ours and keeps its traceback.
"""


class MegamoeError(Exception):
    """A problem the user can mend: the message says what, where, and what would be valid."""

    exit_code = 2
    is_failure = True


class ConfigError(MegamoeError):
    """A setting is unknown, of the wrong type, or impossible together with the others."""


class DataError(MegamoeError):
    """A corpus, tokenizer or indexed dataset is missing, damaged, or does not fit the model."""


class CheckpointError(MegamoeError):
    """A checkpoint is missing, incomplete, damaged, or of another model; or it could not be written."""


class SaveError(CheckpointError):
    """A checkpoint could not be written; earlier ones are whole."""


class TopologyError(MegamoeError):
    """The ranks that exist do not form the grid that the configuration asks for."""


class TrainingStopped(MegamoeError):
    """Training ended itself: too many skipped steps, a hang, a rank that died."""

    exit_code = 3


class TrainingInterrupted(MegamoeError):
    """A signal asked the run to stop: it finished its step, saved, and the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
    is_failure = False
