"""A clean clone of this repository and a shell that knows nothing of the environment that the tests run in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "nvcc")


def clone(destination: Path) -> None:
    """`git clone`, then what is changed here and not committed yet: ignored files never get there."""
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, destination], check=True, timeout=120)
    for name in _git("ls-files", "--deleted"):
        (destination / name).unlink(missing_ok=True)
    for name in _git("ls-files", "--modified", "--others", "--exclude-standard"):
        source = ROOT / name
        if source.is_file():
            (destination / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, destination / name)


def clean_environment(folder: Path) -> dict[str, str]:
    """The environment without an active Python environment, where every compiler fails (made in `folder`).

    DeepSpeed tries compilers to see what it could build, and must do without them.
    """
    compilers = folder / "compilers"
    compilers.mkdir()
    for name in COMPILERS:
        script = compilers / name
        script.write_text("#!/bin/sh\nexit 1\n")
        script.chmod(0o755)
    environment = dict(os.environ)
    for name in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH", "PYTHONHOME", "OMP_NUM_THREADS", "DS_ACCELERATOR"):
        environment.pop(name, None)
    path = environment["PATH"].split(os.pathsep)
    if sys.prefix != sys.base_prefix:  # the tests run in an environment of their own
        path = [part for part in path if Path(part) != Path(sys.prefix) / "bin"]
    environment["PATH"] = os.pathsep.join([str(compilers), *path])
    return environment


def _git(*arguments: str) -> list[str]:
    found = subprocess.run(
        ["git", *arguments, "-z"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )  # fmt: skip
    return [name for name in found.stdout.split("\0") if name]
