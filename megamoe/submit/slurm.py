"""Calls of SLURM's own programs, each bounded in time, each failure one sentence."""

import shutil
import subprocess
from pathlib import Path

from megamoe.errors import SlurmError

CALL_SECONDS = 60.0


def is_up() -> bool:
    """Whether there is a SLURM here that answers."""
    if shutil.which("sbatch") is None:
        return False
    try:
        _call("sinfo", "--noheader")
    except SlurmError:
        return False
    return True


def submit_script(script: Path) -> str:
    """The job id of the script that was submitted."""
    return _call("sbatch", "--parsable", str(script)).split(";")[0].strip()


def test_only(text: str) -> str:
    """What sbatch says of a script that it does not submit: when and where it would start."""
    return _call("sbatch", "--test-only", input_text=text)


def job_state(job_id: str) -> str | None:
    """The state of a job that is in the queue, of an array the state of its first part; None where it has left it."""
    try:
        text = _call("squeue", "--noheader", f"--jobs={job_id}", "--format=%T")
    except SlurmError as error:
        if "Invalid job id" in str(error):  # forgotten
            return None
        raise
    return text.split()[0] if text.split() else None


def final_state(job_id: str) -> str | None:
    """The state in which a job ended; None where SLURM has forgotten it."""
    try:
        words = _call("scontrol", "--oneliner", "show", "job", job_id).split()
    except SlurmError:
        return None
    states = [word.removeprefix("JobState=") for word in words if word.startswith("JobState=")]
    return next((state for state in states if state != "COMPLETED"), "COMPLETED") if states else None


def knows_container_images() -> bool:
    """Whether this SLURM's srun has the plugin pyxis."""
    return "--container-image" in _call("srun", "--help")


def _call(program: str, *arguments: str, input_text: str | None = None) -> str:
    """Its output, of both streams where only that has words. Raises SlurmError."""
    try:
        done = subprocess.run(
            [program, *arguments], input=input_text, stdin=None if input_text is not None else subprocess.DEVNULL,
            capture_output=True, text=True, check=False, timeout=CALL_SECONDS,
        )  # fmt: skip
    except FileNotFoundError:
        raise SlurmError(
            f"{program} is not installed here: submit where SLURM is, or look at the script with --dry-run"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(
            f"{program} has not answered for {CALL_SECONDS:g} s: see with sinfo whether SLURM is up"
        ) from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split())
        raise SlurmError(f"{program} refused: {words.removeprefix(f'{program}: ').removeprefix('error: ')}")
    return done.stdout if done.stdout.strip() else done.stderr
