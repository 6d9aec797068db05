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
    """Training ended itself: too many skipped steps, copies that differ, a divergence."""

    exit_code = 3


class TrainingHung(MegamoeError):
    """A rank made no progress for too long, or its heartbeat stood still: the watchdog ended all ranks."""

    exit_code = 4


class PeerLost(MegamoeError):
    """This rank ended because another one did: what matters is what happened to that one."""

    exit_code = 1


class TrainingInterrupted(MegamoeError):
    """A signal or a stop file asked the run to stop: it finished its step, saved, and the same command goes on from
    there. `reason`: "signal" or "stop file"."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
    is_failure = False

    def __init__(self, message: str, *, reason: str = "signal") -> None:
        super().__init__(message)
        self.reason = reason


class PreflightFailed(MegamoeError):
    """Nodes were found bad before training began: the message names them; start again without them."""

    exit_code = 5


class ConversionError(MegamoeError):
    """A model cannot be converted, or a conversion was found wrong: nothing has its final name."""


class OutputError(MegamoeError):
    """The output of an offline command could not be written, or another process writes it: it has no name yet."""


class SlurmError(MegamoeError):
    """SLURM is not there, does not answer, or refused what was asked; its own words are in the message."""
