"""What a study will cost, before it begins: tokens, FLOPs, time, disk. No torch, unless this machine is measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megamoe.errors import DataError, MegamoeError
from megamoe.plan.cluster import Cluster, load_cluster
from megamoe.plan.lifetime import checkpoint_bytes
from megamoe.plan.plan import Plan, make_plan
from megamoe.report.values import bytes_text, count_text, duration
from megamoe.study.ladder import StudyRun
from megamoe.study.schema import StudySettings
from megamoe.study.states import costs_of, is_trained

THIS_MACHINE = "cpu"
_ZFLOP = 1e21


@dataclass(frozen=True)
class Forecast:
    """One model. FLOPs and seconds are of one run of it; there is one for each seed."""

    model: str
    family: str
    num_seeds: int
    num_parameters: int
    num_active_parameters: int
    paper_flops: float
    model_flops: float
    seconds: float | None  # of training steps; None: no cluster was named
    is_measured: bool  # of runs that are complete, not planned
    missing_bytes: int  # of memory, on the fullest GPU of the cluster; 0: it fits, or none was named
    disk_bytes: int  # of all its seeds' checkpoints

    def all_seeds(self, value: float) -> float:
        return self.num_seeds * value


def forecast(
    study: StudySettings, runs: Sequence[StudyRun], *, cluster_name: str | None, num_gpus: int
) -> list[Forecast]:
    """By model, in their order. Raises ConfigError for an unknown cluster, or where a model cannot run on it."""
    cluster = None if cluster_name is None else _cluster(cluster_name, num_gpus)
    found = []
    for model in study.models:
        own = [run for run in runs if run.model.name == model.name]
        first, last = own[0], own[0].config.run.num_steps
        measured = [costs_of(run, (last,))[last].seconds for run in own if is_trained(run)]
        seconds = [value for value in measured if value is not None]
        planned, missing_bytes = None, 0
        if cluster is not None and not seconds:
            plan = _plan(first, cluster, num_gpus)
            planned, missing_bytes = plan.step.seconds * last, max(0, -plan.free_bytes)
        found.append(
            Forecast(
                model.name, model.family, len(own), first.num_parameters, first.num_active_parameters,
                first.paper_flops(first.num_tokens, study.analysis.compute_vocab_size),
                first.model_flops(first.num_tokens), sum(seconds) / len(seconds) if seconds else planned, bool(seconds),
                missing_bytes, len(own) * _num_saved(first) * checkpoint_bytes(first.config),
            )
        )  # fmt: skip
    return found


def _plan(run: StudyRun, cluster: Cluster, num_gpus: int) -> Plan:
    try:
        return make_plan(run.config, cluster, num_gpus)
    except MegamoeError as error:
        raise type(error)(f"model {run.model.name}: {error}") from None


def _cluster(name: str, num_gpus: int) -> Cluster:
    if name != THIS_MACHINE:
        return load_cluster(name)
    from megamoe.dry_run.this_machine import measure_cpu

    return measure_cpu(num_gpus)


def _num_saved(run: StudyRun) -> int:
    return run.config.run.num_steps // run.config.checkpoint.save_interval_steps


def epochs_of(run: StudyRun) -> float | None:
    """How often a run reads its text, by the headers of its datasets; None where they are not there, or are blended."""
    from megamoe.data.indexed import IndexedDataset

    corpora = run.config.data.train
    if len(corpora) != 1:
        return None
    try:
        size = IndexedDataset(corpora[0].path).num_tokens
    except (DataError, MegamoeError, OSError):
        return None
    share = 1.0 if run.config.data.valid else run.config.data.split[0] / sum(run.config.data.split)
    return run.num_tokens / max(1.0, size * share)


def forecast_tree(study: StudySettings, forecasts: Sequence[Forecast], runs: Sequence[StudyRun]) -> dict[str, Any]:
    """For JSON."""
    return {
        "name": study.name, "dir": str(study.folder), "num_runs": len(runs), "num_tokens_per_run": study.num_tokens,
        "epochs": epochs_of(runs[0]), "compute_vocab_size": study.analysis.compute_vocab_size,
        "models": [asdict(each) for each in forecasts],
        "total": {
            "paper_flops": sum(each.all_seeds(each.paper_flops) for each in forecasts),
            "model_flops": sum(each.all_seeds(each.model_flops) for each in forecasts),
            "seconds": _total_seconds(forecasts), "disk_bytes": sum(each.disk_bytes for each in forecasts),
        },
    }  # fmt: skip


def _total_seconds(forecasts: Sequence[Forecast]) -> float | None:
    seconds = [each.seconds for each in forecasts]
    if None in seconds:
        return None
    return sum(each.all_seeds(each.seconds or 0.0) for each in forecasts)


def forecast_text(
    study: StudySettings, forecasts: Sequence[Forecast], runs: Sequence[StudyRun], *, where: str
) -> str:
    """For readers. `where`: what the time is of."""
    run, epochs = runs[0], epochs_of(runs[0])
    sizes = f"{run.config.run.global_batch_size} x {run.config.model.seq_length}"
    read = "" if epochs is None else f", {epochs:.2f} of the text"
    lines = [
        f"{study.name}: {len(forecasts)} models, {len(runs)} runs of {count_text(study.num_tokens)} tokens in batches "
        f"of {sizes}{read}",
        "", _row("model", "family", "seeds", "parameters", "active", "paper FLOPs", "model FLOPs", "a run", "disk"),
    ]  # fmt: skip
    for each in forecasts:
        took = "–" if each.seconds is None else duration(each.seconds) + ("*" if each.is_measured else "")
        lines.append(
            _row(
                each.model, each.family, str(each.num_seeds), count_text(each.num_parameters),
                count_text(each.num_active_parameters), f"{each.paper_flops:.3g}", f"{each.model_flops:.3g}", took,
                bytes_text(each.disk_bytes),
            )
        )  # fmt: skip
    total = forecast_tree(study, forecasts, runs)["total"]
    seconds = total["seconds"]
    lines += [
        "",
        f"in all: {total['paper_flops']:.3g} FLOPs as the paper counts ({total['paper_flops'] / _ZFLOP:.3g} ZFLOPs), "
        f"{total['model_flops']:.3g} of the models alone, {bytes_text(total['disk_bytes'])} of checkpoints",
        _formula(study),
    ]
    for each in forecasts:
        if each.missing_bytes:
            lines.append(
                f"{each.model} DOES NOT FIT: {bytes_text(each.missing_bytes)} are missing on the fullest GPU; give it "
                "more --gpus, or a layout in its settings that `megamoe plan --search` finds"
            )
    if seconds is not None:
        measured = " (* measured)" if any(each.is_measured for each in forecasts) else ""
        lines.append(f"time of training steps {where}: {duration(seconds)}{measured}; starts, saves, evaluation apart")
    if epochs is not None and epochs > 1:
        lines.append("the text is read more than once: models of a study should not meet it again")
    return "\n".join(lines) + "\n"


def _formula(study: StudySettings) -> str:
    size = study.analysis.compute_vocab_size
    vocabulary = "the models' own vocabulary" if size is None else f"a vocabulary of {size:,}"
    return (
        f"paper FLOPs: layers four times their forward pass, as if activations were recomputed, and {vocabulary}; "
        "model FLOPs: what forward and backward take, no recompute, own vocabulary"
    )


def _row(*cells: str) -> str:
    widths = (16, 8, 5, 11, 9, 12, 12, 10, 10)
    texts = [cell.ljust(width) if place < 2 else cell.rjust(width) for place, (cell, width) in
             enumerate(zip(cells, widths, strict=True))]  # fmt: skip
    return "  ".join(texts).rstrip()
