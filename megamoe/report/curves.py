"""Which curves a report draws: the keys of metrics that go together, and how their values are told."""

from collections.abc import Sequence
from dataclasses import dataclass

from megamoe.report.record import Record, smooth_key
from megamoe.report.table import Table
from megamoe.report.values import plain

NUMBER, COUNT, PERCENT, BYTES, SECONDS, FLOPS = "number", "count", "percent", "bytes", "seconds", "flops"
MAX_CORPORA = 16
MAX_OTHERS = 24
DASHES = ("", "6 4", "2 3", "9 3 2 3")  # of the 1st, 2nd, … metric of a chart with several runs
PHASES = ("data", "forward", "backward", "all_to_all", "reduce", "update", "pipeline")
_PHASE = "seconds_"
_CORPUS, _CORPUS_PERPLEXITY = "valid_loss/", "valid_perplexity/"


@dataclass(frozen=True)
class Curve:
    """Keys of one picture, each with what the legend calls it."""

    name: str  # of its place on the page
    title: str
    unit: str
    keys: tuple[tuple[str, str], ...]
    kind: str = NUMBER
    is_log: bool = False
    from_zero: bool = False
    only_if_varied: bool = False


@dataclass(frozen=True)
class Group:
    name: str
    title: str
    curves: tuple[Curve, ...]


GROUPS = (
    Group("learning", "Learning", (
        Curve("loss", "Loss", "nats a token", (("lm_loss", "training, language"), ("loss", "training, whole"),
                                                ("valid_loss", "validation")), is_log=True),
        Curve("perplexity", "Perplexity", "", (("perplexity", "training"), ("valid_perplexity", "validation")),
              is_log=True),
        Curve("corpora", "Validation loss by corpus", "nats a token", (), is_log=True),
        Curve("grad_norm", "Gradient norm", "before clipping", (("grad_norm", "gradient norm"),), is_log=True),
        Curve("lr", "Learning rate", "", (("lr", "learning rate"),), from_zero=True),
        Curve("loss_scale", "Loss scale", "fp16", (("loss_scale", "loss scale"),), is_log=True),
        Curve("skipped", "Steps that did not count", "since the start",
              (("skipped_steps", "skipped"), ("rolled_back_steps", "rolled back"), ("spikes", "spikes")), COUNT,
              from_zero=True),
        Curve("batch", "Global batch", "sequences", (("global_batch_size", "sequences"),), COUNT, from_zero=True,
              only_if_varied=True),
    )),
    Group("speed", "Speed and memory", (
        Curve("tokens_per_second", "Throughput", "tokens/s, all ranks", (("tokens_per_second", "tokens/s"),), COUNT,
              from_zero=True),
        Curve("per_rank", "Throughput of a rank", "tokens/s", (("tokens_per_second_per_rank", "tokens/s a rank"),),
              COUNT, from_zero=True),
        Curve("utilization", "Model FLOP/s utilisation", "of the peak", (("flops_utilization", "utilisation"),),
              PERCENT, from_zero=True),
        Curve("flops", "FLOP/s", "all ranks", (("model_flops_per_second", "of the model"),
               ("hardware_flops_per_second", "what is computed again, too")), FLOPS, from_zero=True),
        Curve("step_seconds", "Time of a step", "seconds", (("step_seconds", "a step"),), SECONDS, from_zero=True),
        Curve("memory", "Peak memory", "fullest rank", (("memory_bytes", "memory"),), BYTES, from_zero=True),
    )),
    Group("balance", "Balance of experts", (
        Curve("aux_loss", "Balance loss", "summed over layers", (("aux_loss", "balance loss"),)),
        Curve("max_over_mean", "Fullest expert", "load over the mean, least even layer",
              (("expert_load_max_over_mean", "max/mean"),), is_log=True),
        Curve("entropy", "Entropy of the load", "1 is even", (("expert_load_entropy", "entropy"),)),
        Curve("dropped", "Dropped assignments", "over capacity",
              (("dropped_fraction", "all"), ("dropped_first_fraction", "first choices"),
               ("dropped_second_fraction", "second choices")), PERCENT, from_zero=True),
        Curve("fifths", "Share of the load", "of the fullest and the emptiest fifth",
              (("expert_load_top_fifth", "fullest fifth"), ("expert_load_bottom_fifth", "emptiest fifth")), PERCENT,
              from_zero=True),
        Curve("unused", "Experts without tokens", "all layers",
              (("unused_experts", "since the last line"), ("dead_experts", "in a longer interval")), COUNT,
              from_zero=True),
        Curve("router", "Router logits", "root mean square", (("router_logit_rms", "rms"),), from_zero=True),
        Curve("z_loss", "Router z-loss", "summed over layers", (("z_loss", "z-loss"),)),
    )),
)  # fmt: skip
_NO_CURVE = {"step", "tokens", "time", "samples", "test_loss", "test_perplexity"}


def groups_of(records: Sequence[Record]) -> list[Group]:
    """The groups with what these runs have: corpora by their names, and a group of metrics that we do not know."""
    corpora = names_with_prefix(records, _CORPUS)[:MAX_CORPORA]
    found = []
    for group in GROUPS:
        curves = []
        for curve in group.curves:
            if curve.name == "corpora":
                keys = tuple((_CORPUS + name, plain(name)) for name in corpora)
                curve = Curve(curve.name, curve.title, curve.unit, keys, is_log=True)
            if any(has_key(record, key) for record in records for key, _ in curve.keys):
                curves.append(curve)
        found.append(Group(group.name, group.title, tuple(curves)))
    others = tuple(
        Curve(f"other{index}", plain(key), "", ((key, plain(key)),)) for index, key in enumerate(other_keys(records))
    )
    return [group for group in (*found, Group("others", "Other metrics", others)) if group.curves]


def other_keys(records: Sequence[Record]) -> list[str]:
    """Keys of metrics that no group draws."""
    drawn = _NO_CURVE | {key for group in GROUPS for curve in group.curves for key, _ in curve.keys}
    found: dict[str, None] = {}
    for record in records:
        for table in (record.training, record.held_out):
            for key in table.keys:
                if key not in drawn and " " not in key and not key.startswith((_PHASE, _CORPUS, _CORPUS_PERPLEXITY)):
                    found[key] = None
    return sorted(found)[:MAX_OTHERS]


def names_with_prefix(records: Sequence[Record], prefix: str) -> list[str]:
    keys = {key for record in records for table in (record.held_out, record.training) for key in table.keys}
    names = {key.removeprefix(prefix) for key in keys if key.startswith(prefix) and not key.endswith(smooth_key(""))}
    return sorted(names - {""})


def table_of(record: Record, key: str) -> Table | None:
    """The table of a run that has the key: of training lines, or of those of validation."""
    for table in (record.training, record.held_out):
        if key in table.keys:
            return table
    return None


def has_key(record: Record, key: str) -> bool:
    return table_of(record, key) is not None


def phases_of(record: Record) -> list[str]:
    """Names of phases whose time its lines tell, in the order of a step."""
    found = [key.removeprefix(_PHASE) for key in record.training.keys if key.startswith(_PHASE) and " " not in key]
    known = [name for name in PHASES if name in found]
    return (known + sorted(set(found) - set(known)))[:8]


def phase_key(name: str) -> str:
    return _PHASE + name
