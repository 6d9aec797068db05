"""A save that dies anywhere: the newest complete checkpoint loads to the bit, the half one never, the next save works.

Each trial forks a child that saves and is killed: at a named point of the save, or by the kernel (SIGXFSZ) when a file
reaches an exact byte. MEGAMOE_KILL_POINTS=1200 asks for that many trials instead of the few hundred of CI.
"""

import os
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from megamoe.checkpoint import faults, manifest
from megamoe.checkpoint.folders import checkpoint_name, complete_checkpoints, recover
from megamoe.checkpoint.manifest import MANIFEST
from tests.unit.checkpoint_cases import Tensors, load, print_table, random_tensors, same, save

SEED = 4
NUM_TRIALS = int(os.environ.get("MEGAMOE_KILL_POINTS", "260"))
KINDS = ("weight", "exp_avg")
ROWS: list[tuple[str, int, int, int, int, int]] = []


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """A kill loses nothing that the kernel has; what a power failure loses is tested in test_checkpoint_power.py."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 256)
    yield
    faults.set_callback(None)


def tensors_of(step: int) -> Tensors:
    return {key: tensor for key, tensor in random_tensors(random.Random(1), step).items() if key[0] in KINDS}


class Scenario(NamedTuple):
    """A save over checkpoints of steps 1 and 2."""

    step: int
    keep_last: int

    def run(self, root: Path) -> None:
        save(root, self.step, tensors_of(30), seed=self.step, save_id="dying", keep_last=self.keep_last)


SCENARIOS = {
    "a new step": Scenario(step=3, keep_last=9),
    "a new step that prunes two": Scenario(step=3, keep_last=1),
    "the same step again": Scenario(step=2, keep_last=2),
}


@pytest.fixture
def template(tmp_path) -> Path:
    root = tmp_path / "template"
    for step in (1, 2):
        save(root, step, tensors_of(step), seed=step)
    return root


def points_of(scenario: Scenario, template: Path, root: Path) -> list[str]:
    """The points that an undisturbed save comes by, in order."""
    shutil.copytree(template, root)
    seen: list[str] = []
    faults.set_callback(seen.append)
    scenario.run(root)
    faults.set_callback(None)
    return seen


def die_at(number: int) -> Callable[[str], None]:
    """A callback that kills its own process at the `number`-th point."""
    left = iter(range(number, -1, -1))

    def callback(_point: str) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return callback


def die_at_byte(point: str, occurrence: int, num_bytes: int) -> Callable[[str], None]:
    """A callback that, from an occurrence of a point on, lets no file grow beyond `num_bytes`."""
    seen = [0]

    def callback(reached: str) -> None:
        if reached == point:
            seen[0] += 1
            if seen[0] == occurrence + 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))

    return callback


def run_and_die(scenario: Scenario, root: Path, callback: Callable[[str], None]) -> int | None:
    """Save in a forked child; the signal that ended it, or None if it got through."""
    child = os.fork()
    if child == 0:
        try:
            faults.set_callback(callback)
            scenario.run(root)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save failed instead of dying"
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else None


def check_survivors(root: Path, expected_step: int, truth: Tensors) -> None:
    """What a restart finds, then that saving goes on and nothing half-done stays."""
    before = {path.name: path for path in complete_checkpoints(root)}
    recover(root)
    newest, *older = complete_checkpoints(root)
    assert newest.name == f"step_{expected_step:08d}", (newest, before)
    assert (root / "latest").read_text().strip() == newest.name
    assert same(load(newest), truth)
    for path in older:
        assert same(load(path), tensors_of(int(path.name[-8:]))), path
    following = save(root, 4, tensors_of(4), seed=4, keep_last=2)
    assert same(load(following), tensors_of(4))
    left = set(os.listdir(root)) - {"latest"}
    assert len(left) == 2 and all(name.startswith("step_") for name in left), left


def trials(scenario: Scenario, points: list[str], rng: random.Random, number: int) -> list[tuple[str, Callable, int]]:
    """(what, callback, signal): every point once, then bytes of files until there are enough."""
    order = list(range(len(points)))
    rng.shuffle(order)
    # Every named point at least once, whatever the number; then repeated ones (blocks, files) as far as it goes.
    firsts = {points[i]: i for i in order}
    chosen = list(firsts.values()) + [i for i in order if firsts[points[i]] != i]
    at_points = chosen[: max(len(firsts), number // 2)]
    found = [(f"{points[i]}#{i}", die_at(i), signal.SIGKILL) for i in at_points]
    num_files = points.count("file-opened")
    while len(found) < number:
        occurrence, num_bytes = rng.randrange(num_files), rng.choice([rng.randrange(64), rng.randrange(1200)])
        found.append(
            (f"file {occurrence} byte {num_bytes}", die_at_byte("file-opened", occurrence, num_bytes), signal.SIGXFSZ)
        )
        if rng.random() < 0.3:
            num_bytes = rng.randrange(4000)
            found.append((f"manifest byte {num_bytes}", die_at_byte("commit-gathered", 0, num_bytes), signal.SIGXFSZ))
    return found


@pytest.mark.parametrize("name", SCENARIOS)
def test_killed_anywhere_a_save_loses_nothing(name, template, tmp_path):
    print(f"seed {SEED}")
    scenario = SCENARIOS[name]
    points = points_of(scenario, template, tmp_path / "dry")
    in_force = points.index("folder-renamed")
    root, recovered, injected = tmp_path / "root", 0, 0
    for what, callback, expected_signal in trials(scenario, points, random.Random(SEED), NUM_TRIALS // 3 + 1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        died_of = run_and_die(scenario, root, callback)
        if died_of is None:
            assert expected_signal == signal.SIGXFSZ, what  # no file reaches that byte: no fault
            continue
        assert died_of == expected_signal, what
        injected += 1
        number = int(what.partition("#")[2] or -1)
        if number >= in_force:
            check_survivors(root, scenario.step, tensors_of(30))
        else:
            check_survivors(root, 2, tensors_of(2))
        recovered += 1
    ROWS.append((f"kill -9: {name}", injected, recovered, 0, injected - recovered, 0))
    assert injected > NUM_TRIALS // 5


def test_every_named_point_is_passed(template, tmp_path):
    """A point that no save comes by would be tested by nobody."""
    seen = set()
    for number, scenario in enumerate(SCENARIOS.values()):
        seen |= set(points_of(scenario, template, tmp_path / str(number)))
    assert seen == set(faults.POINTS)


def test_a_second_death_during_recovery_loses_nothing(template, tmp_path):
    """Die between the two renames, then once more in the middle of what follows."""
    scenario = SCENARIOS["the same step again"]
    points = points_of(scenario, template, tmp_path / "dry")
    root, injected = tmp_path / "root", 0
    for second in range(0, len(points), 3):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        assert run_and_die(scenario, root, die_at(points.index("aside-renamed"))) == signal.SIGKILL
        assert not (root / "step_00000002").exists()
        again = Scenario(step=3, keep_last=2)
        died = run_and_die(again, root, die_at(second))
        in_force = died is None or (root / "step_00000003" / MANIFEST).exists()
        if in_force:
            check_survivors(root, 3, tensors_of(30))
        else:
            check_survivors(root, 2, tensors_of(2))
        injected += 1
    ROWS.append(("two deaths in a row", injected, injected, 0, 0, 0))


def test_killed_while_it_loads_a_process_has_changed_nothing(template):
    """At every read of a load; the folder is the same in names, bytes and times."""

    def fingerprint() -> dict[str, tuple[bytes, int]]:
        paths = (path for path in template.rglob("*") if path.is_file())
        return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}

    def deadly(preadv: Callable[..., int], number: int) -> Callable[..., int]:
        die = die_at(number)
        return lambda *arguments: (die("read"), preadv(*arguments))[1]

    before, deaths = fingerprint(), 0
    while True:
        child = os.fork()
        if child == 0:
            try:
                os.preadv = deadly(os.preadv, deaths)
                load(template / checkpoint_name(2))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert fingerprint() == before
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        deaths += 1
    assert deaths >= 20
    assert same(load(template / checkpoint_name(2)), tensors_of(2))
    ROWS.append(("killed while loading", deaths, deaths, 0, 0, 0))


def test_the_table_of_crashes():
    """Last on purpose: what the tests above have injected."""
    if not ROWS:
        pytest.skip("the tests that fill the table were not selected")
    print_table(f"Deaths during a save (seed {SEED})", ROWS)
