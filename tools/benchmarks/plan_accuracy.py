"""Plans against published measurements: every row of docs/published_runs.yaml that is complete, predicted / measured.

The constants of `megamoe/plan/efficiency.yaml` are fitted here, six in all: two from the table of all-to-all alone,
four from the steps. Each step is predicted with constants that were fitted without its model, each point of the table
with constants that were fitted without its number of ranks. What the file holds is fitted to all.

    python tools/benchmarks/plan_accuracy.py              # the tables
    python tools/benchmarks/plan_accuracy.py --no-fit     # with the file's constants only, in a second
    python tools/benchmarks/plan_accuracy.py --write      # and the constants fitted to all into efficiency.yaml
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, product
from pathlib import Path
from typing import Any

from megamoe.config.loading import read_settings
from megamoe.config.schema import Config
from megamoe.plan.cluster import EFFICIENCY_FILE, Cluster, load_cluster
from megamoe.plan.network import Network, Placement
from megamoe.plan.quantities import Collective
from megamoe.plan.timing import StepTimer, Traits
from megamoe.topology.flops import model_flops_per_token

RUNS = Path(__file__).parents[2] / "docs" / "published_runs.yaml"
STEP_CONSTANTS = ("product_half_size", "memory", "layer_overhead_seconds", "overlap")
LINK_CONSTANTS = ("intra_node", "inter_node")
BOUNDS = {"product_half_size": (10.0, 2000.0), "memory": (0.1, 1.0), "layer_overhead_seconds": (1e-6, 5e-3),
          "overlap": (0.05, 1.0)}  # fmt: skip
Constants = Mapping[str, float]
CollectivesOf = Callable[[Config, int, int], Sequence[Collective]]  # configuration, ranks, pipeline rank


@dataclass(frozen=True)
class Run:
    """One measured step, ready to be replayed."""

    row: int
    model: str
    name: str
    config: Config
    cluster: Cluster
    gpus: int
    traits: Traits
    seconds: float
    picks_best: bool


def load_runs(path: Path = RUNS, *, inferred: bool = True) -> list[Run]:
    """Every run of the rows that are not excluded; with what was inferred, or with what sources state alone."""
    found = []
    for row in read_settings(path)["rows"]:
        if "excluded" in row:
            continue
        for run in row["runs"]:
            config = _config(row["config"], run.get("config", {}))
            more = {**row.get("inferred", {}), **run.get("inferred", {})} if inferred else {}
            traits = Traits(**{**row["traits"], **run.get("traits", {}), **more.get("traits", {})})
            cluster = _cluster(run.get("cluster", row["cluster"]), more.get("cluster_settings", {}))
            seconds = _seconds(run["unit"], run["measured"], config, cluster, run["gpus"])
            name = f"{row['title']}: {run['name']}" if "name" in run else row["title"]
            found.append(
                Run(row["row"], row["model"], name, config, cluster, run["gpus"], traits, seconds,
                    row.get("picks_best", False))
            )  # fmt: skip
    return found


def excluded_rows(path: Path = RUNS) -> list[tuple[int, str, str]]:
    """Row, title and reason of those that are not replayed."""
    return [(row["row"], row["title"], row["excluded"]) for row in read_settings(path)["rows"] if "excluded" in row]


def _cluster(name: str, settings: Mapping[str, Any]) -> Cluster:
    tree = load_cluster(name).model_dump()
    for key, value in settings.items():
        tree[key] = {**tree[key], **value} if isinstance(value, Mapping) else value
    return Cluster.model_validate(tree)


def _config(*trees: Mapping[str, Any]) -> Config:
    merged: dict[str, dict[str, Any]] = {}
    for tree in trees:
        for section, values in tree.items():
            merged[section] = {**merged.get(section, {}), **values}
    return Config.model_validate_json(json.dumps(merged), strict=True)


def _seconds(unit: str, measured: float, config: Config, cluster: Cluster, gpus: int) -> float:
    tokens = config.run.global_batch_size * config.model.seq_length
    if unit == "seconds":
        return measured
    if unit == "tokens_per_second":
        return tokens / measured
    flops = tokens * model_flops_per_token(config, attention="full")
    return flops / (gpus * cluster.peak(config.run.precision) * measured / 100)


class Replay:
    """Predicts steps, given constants; what does not depend on them is kept."""

    def __init__(self, runs: Sequence[Run], collectives: CollectivesOf | None = None) -> None:
        self.runs = list(runs)
        self._timers = [
            StepTimer(run.config, run.cluster, run.gpus,
                      partial(collectives, run.config, run.gpus) if collectives else None, traits=run.traits)
            for run in runs
        ]  # fmt: skip

    def predict(self, index: int, constants: Constants) -> float:
        return self._timers[index].on(with_constants(self.runs[index].cluster, constants)).time().seconds

    def loss(self, constants: Constants, indices: Sequence[int]) -> float:
        """Mean square of log(predicted / measured), every model counting the same."""
        by_model: dict[str, list[float]] = {}
        for index in indices:
            error = math.log(self.predict(index, constants) / self.runs[index].seconds)
            by_model.setdefault(self.runs[index].model, []).append(error * error)
        return statistics.fmean(statistics.fmean(errors) for errors in by_model.values())


def with_constants(cluster: Cluster, constants: Constants) -> Cluster:
    return cluster.model_copy(update={"efficiency": cluster.efficiency.model_copy(update=dict(constants))})


def fit_steps(replay: Replay, indices: Sequence[int], start: Constants, links: Constants) -> dict[str, float]:
    """The four constants of steps: a search in logarithms along every axis and every diagonal of two."""
    best = {name: start[name] for name in STEP_CONSTANTS}
    least = replay.loss({**best, **links}, indices)
    axes = [{name: 1} for name in STEP_CONSTANTS]
    diagonals = [{a: 1, b: sign} for a, b in combinations(STEP_CONSTANTS, 2) for sign in (1, -1)]
    stride = 1.6
    while stride > 1.02:
        improved = False
        for directions in (axes, diagonals):
            for direction, power in product(directions, (1, -1)):
                tried = dict(best)
                for name, sign in direction.items():
                    low, high = BOUNDS[name]
                    tried[name] = min(high, max(low, best[name] * stride ** (power * sign)))
                loss = replay.loss({**tried, **links}, indices)
                if loss < least - 1e-9:
                    best, least, improved = tried, loss, True
            if improved:
                break  # diagonals are for where no axis leads on
        if not improved:
            stride **= 0.5
    return best


def exchange_points(path: Path = RUNS) -> list[tuple[str, int, float, float]]:
    """Name, ranks, bytes and seconds of the table of all-to-all."""
    table = read_settings(path)["all_to_all"]
    return [
        (f"EP{point['ranks']} {way}", point["ranks"], float(table["num_bytes"]), point[way] * 1e-6)
        for point in table["points"] for way in ("dispatch", "combine")
    ]  # fmt: skip


def fit_links(cluster: Cluster, points: Sequence[tuple[str, int, float, float]]) -> dict[str, float]:
    """The two constants of links, by a search as `fit_steps`; the relative errors are what is squared."""
    best, stride = {"intra_node": 0.7, "inter_node": 0.7}, 1.3

    def loss(constants: Constants) -> float:
        return sum(math.log(exchange_seconds(cluster, constants, n, size) / t) ** 2 for _, n, size, t in points)

    while stride > 1.0005:
        tried = [{**best, name: min(1.0, best[name] * factor)} for name in best for factor in (stride, 1 / stride)]
        better = min(tried, key=loss)
        if loss(better) < loss(best) - 1e-15:
            best = better
        else:
            stride **= 0.5
    return best


def exchange_seconds(cluster: Cluster, constants: Constants, num_ranks: int, num_bytes: float) -> float:
    network = Network(with_constants(cluster, constants), Config().parallel, 1)
    at = Placement.of(range(num_ranks), 0, cluster.ranks_per_node)
    return network.call_seconds("all_to_all", num_bytes, at)


def exchange_table() -> Iterator[tuple[str, float, float]]:
    """Name, measured seconds, and the prediction of constants fitted without the point and its way back."""
    cluster = load_cluster(read_settings(RUNS)["all_to_all"]["cluster"])
    points = exchange_points()
    for name, num_ranks, num_bytes, seconds in points:
        others = [point for point in points if point[1] != num_ranks]
        yield name, seconds, exchange_seconds(cluster, fit_links(cluster, others), num_ranks, num_bytes)


def step_table(replay: Replay, start: Constants, links: Constants) -> list[tuple[Run, float]]:
    """Every run with its prediction by constants fitted without its model."""
    predictions: dict[int, float] = {}
    for model in dict.fromkeys(run.model for run in replay.runs):
        # All start from the file's constants, so that a fold's answer does not depend on the fold before it.
        others = [index for index, run in enumerate(replay.runs) if run.model != model]
        fitted = fit_steps(replay, others, start, links)
        print(f"  without {model}: {_words(fitted)}", file=sys.stderr, flush=True)
        for index, run in enumerate(replay.runs):
            if run.model == model:
                predictions[index] = replay.predict(index, {**fitted, **links})
    return [(run, predictions[index]) for index, run in enumerate(replay.runs)]


def picks(table: Sequence[tuple[Run, float]]) -> Iterator[tuple[int, str, str]]:
    """For each row of several layouts: row, the one measured best, and the one predicted best.

    Layouts whose measurements are equal are as good as each other.
    """
    for row in dict.fromkeys(run.row for run, _ in table if run.picks_best):
        rows = [(run, seconds) for run, seconds in table if run.row == row]
        chosen = min(rows, key=lambda each: each[1])[0]
        least = min(run.seconds for run, _ in rows)
        best = chosen if chosen.seconds == least else min(rows, key=lambda each: each[0].seconds)[0]
        yield row, best.name, chosen.name


def _words(constants: Constants) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in constants.items())


def file_constants() -> dict[str, float]:
    return dict(read_settings(EFFICIENCY_FILE)["efficiency"])


def write_constants(constants: Constants, path: Path = EFFICIENCY_FILE) -> None:
    """Put the values in the place of those that the file has."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        name = line.strip().partition(":")[0]
        lines.append(f"  {name}: {constants[name]:.6g}" if line.startswith("  ") and name in constants else line)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_steps(table: Sequence[tuple[Run, float]]) -> None:
    print("row  GPUs  measured s  predicted s  predicted/measured")
    for run, seconds in table:
        ratio = seconds / run.seconds
        print(f"{run.row:3}  {run.gpus:4}  {run.seconds:10.2f}  {seconds:11.2f}  {ratio:5.2f}  {run.name}")
    print_summary(table)


def print_summary(table: Sequence[tuple[Run, float]]) -> None:
    errors = [abs(seconds / run.seconds - 1) for run, seconds in table]
    worst = table[errors.index(max(errors))][0]
    num_rows = len({run.row for run, _ in table})
    print(
        f"{len(errors)} runs of {num_rows} rows: mean {statistics.fmean(errors):.1%}, median "
        f"{statistics.median(errors):.1%}, worst {max(errors):.1%} (row {worst.row}, {worst.name})"
    )
    for row, best, chosen in picks(table):
        verdict = "picked" if best == chosen else f"not picked, but {chosen}"
        print(f"row {row}: the best measured layout, {best}, is {verdict}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-fit", action="store_true", help="the constants of efficiency.yaml for every run")
    parser.add_argument("--write", action="store_true", help="write the constants fitted to all runs")
    options = parser.parse_args(arguments)
    replay = Replay(load_runs())
    constants = file_constants()
    if options.no_fit:
        print_steps([(run, replay.predict(index, constants)) for index, run in enumerate(replay.runs)])
        return 0
    print("All-to-all, each point by constants fitted without its number of ranks")
    for name, measured, predicted in exchange_table():
        print(f"{name:14} {measured * 1e6:7.0f} us  predicted {predicted * 1e6:7.0f} us  {predicted / measured:5.3f}")
    links = fit_links(load_cluster("h100-80gb"), exchange_points())
    print(f"\nSteps, each by constants fitted without its model; of links: {_words(links)}")
    print_steps(step_table(replay, constants, links))
    fitted = fit_steps(replay, range(len(replay.runs)), constants, links)
    print(f"\nSix constants fitted to all: {_words({**fitted, **links})}")
    print_steps([(run, replay.predict(index, {**fitted, **links})) for index, run in enumerate(replay.runs)])
    stated = Replay(load_runs(inferred=False))
    print("\nWithout what was inferred (docs/published_runs.yaml), by the same constants:")
    print_summary([(run, stated.predict(index, {**fitted, **links})) for index, run in enumerate(stated.runs)])
    for row, title, reason in excluded_rows():
        print(f"row {row} is left out ({title}): {reason}")
    if options.write:
        write_constants({**fitted, **links})
    return 0


if __name__ == "__main__":
    sys.exit(main())
