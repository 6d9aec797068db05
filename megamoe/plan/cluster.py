"""What a plan knows of the machines: memory, rates, links, storage, failures, and how much of a peak is reached.

Shipped clusters are the files of `megamoe/plan/clusters`; a user's own file has the same keys, or names with the top
key `cluster` the one it starts from. Efficiencies that were fitted lie in `efficiency.yaml`, beside this module; a
cluster file may set any of them anew. Every figure of a shipped file has a source.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from megamoe.config.keys import accepted, section_of
from megamoe.config.loading import read_settings
from megamoe.config.schema import CountOrZero, NonNegative, PositiveInt, Section
from megamoe.errors import ConfigError

FOLDER = Path(__file__).parent / "clusters"
EFFICIENCY_FILE = Path(__file__).parent / "efficiency.yaml"

Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]
Precision = Literal["fp32", "bf16", "fp16"]


class PeakRates(Section):
    """Dense FLOP/s of one GPU's matrix units, by the type of the operands; None: it has none for that type."""

    fp32: Positive
    bf16: Positive | None
    fp16: Positive | None


class Link(Section):
    """One GPU's way to another: bytes a second in each direction, and seconds that a message takes at least."""

    bytes_per_second: Positive
    latency_seconds: NonNegative


class Efficiency(Section):
    """What is reached of the peaks. The first two belong to an accelerator; the others are fitted (`efficiency.yaml`).

    A product [m, k] x [k, n] takes the time of its FLOPs at `product` of the peak, times
    1 + product_half_size (1/m + 1/n + 1/k): the part of tiles, waves and pipelines that small sizes leave idle.
    """

    product: Share  # of the peak rate, by the largest matrix products
    attention: Share  # of the peak rate, by fused attention
    product_half_size: NonNegative  # one size at which a product, large in the others, reaches half of that
    memory: Share  # of the memory bandwidth, by what is bound by it
    layer_overhead_seconds: NonNegative  # of one layer's forward pass: launches, and waits of the host
    intra_node: Share  # of the link's bandwidth
    inter_node: Share
    overlap: Annotated[float, Field(ge=0.0, le=1.0)]  # of a transfer that runs beside computation, the part hidden


class Cluster(Section):
    """Nodes of one kind. Bandwidths are of one GPU in one direction unless the name says otherwise."""

    name: str
    accelerator: str
    ranks_per_node: PositiveInt
    memory_bytes: PositiveInt  # that a process can ask for
    overhead_bytes: CountOrZero  # of that, what context, communication libraries and fragmentation take
    peak_flops_per_second: PeakRates
    memory_bytes_per_second: Positive
    intra_node: Link
    inter_node: Link
    storage_bytes_per_second_per_node: Positive
    failures_per_node_day: NonNegative
    efficiency: Efficiency
    sources: Mapping[str, str]  # dotted key -> where the figure is from

    def peak(self, precision: Precision) -> float:
        """FLOP/s. Raises ConfigError where the accelerator does not compute in `precision`."""
        rate = getattr(self.peak_flops_per_second, precision)
        if rate is None:
            able = [name for name, value in self.peak_flops_per_second if value is not None]
            raise ConfigError(
                f"run.precision {precision} is not what the {self.accelerator} of cluster {self.name} computes in: "
                f"use {' or '.join(able)}"
            )
        return float(rate)


def cluster_names() -> list[str]:
    """Those that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_cluster(name_or_path: str) -> Cluster:
    """A shipped cluster by name, or a YAML file. Raises ConfigError, one sentence: which file, key, what is valid."""
    tree = _tree(name_or_path)
    where = str(tree.pop("_where"))
    _check_keys(tree, Cluster, where)
    try:
        return Cluster.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, where)) from None


def figures(cluster: Cluster) -> dict[str, Any]:
    """Every number of a cluster by dotted key: what should have a source."""
    flat: dict[str, Any] = {}
    for key, value in cluster.model_dump(exclude={"name", "accelerator", "sources"}).items():
        flat |= {f"{key}.{inner}": number for inner, number in value.items()} if isinstance(value, dict) else {
            key: value
        }
    return flat


def _tree(name_or_path: str) -> dict[str, Any]:
    """The merged settings, and under `_where` the file to name in messages."""
    shipped = FOLDER / f"{name_or_path}.yaml"
    if shipped.parent == FOLDER and shipped.exists():
        return {**_merged(read_settings(EFFICIENCY_FILE), read_settings(shipped)), "_where": shipped}
    path = Path(name_or_path)
    if not path.exists():
        near = difflib.get_close_matches(path.stem.lower(), cluster_names(), n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"?' if near else f"the clusters are {', '.join(cluster_names())}"
        raise ConfigError(f'no cluster or file "{name_or_path}": {hint}')
    own = read_settings(path)
    base, own_sources = own.pop("cluster", None), own.get("sources") or {}
    if not isinstance(own_sources, Mapping):
        raise ConfigError(f"sources is {json.dumps(own_sources)} in {path}: it must be texts by key")
    if base is None:
        below = read_settings(EFFICIENCY_FILE)
    elif base in cluster_names():
        below = _tree(base)
    else:
        raise ConfigError(f'cluster is "{base}" in {path}: it must be one of {", ".join(cluster_names())}')
    tree = _merged(below, own)
    # What the file sets is no longer from where the figure below it was.
    tree["sources"] = {**dict(below["sources"]), **dict.fromkeys(_leaves(own), f"set in {path}"), **own_sources}
    # A name that the user did not give is that of the file.
    tree["name"] = own.get("name", path.stem)
    return {**tree, "_where": path}


def _leaves(tree: Mapping[str, Any]) -> list[str]:
    """Dotted keys of the values that a file sets."""
    leaves = []
    for key, value in tree.items():
        if key not in ("name", "accelerator", "sources"):
            leaves += [f"{key}.{inner}" for inner in value] if isinstance(value, Mapping) else [str(key)]
    return leaves


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = {**old, **value} if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _check_keys(tree: Mapping[str, Any], section: type[Section], where: str, prefix: str = "") -> None:
    for key, value in tree.items():
        field = section.model_fields.get(key)
        if field is None:
            near = difflib.get_close_matches(str(key), section.model_fields, n=1, cutoff=0.6)
            keys = ", ".join(section.model_fields)
            hint = f'did you mean "{prefix}{near[0]}"?' if near else f"the keys are {keys}"
            raise ConfigError(f'unknown key "{prefix}{key}" in {where}: {hint}')
        nested = section_of(field.annotation)
        if nested is not None and isinstance(value, Mapping):
            _check_keys(value, nested, where, f"{prefix}{key}.")


def _explain(error: ValidationError, tree: Mapping[str, Any], where: str) -> str:
    """One sentence about the first thing that is wrong."""
    detail = error.errors(include_url=False)[0]
    section: type[Section] | None = Cluster
    annotation, metadata, value, path = Any, (), tree, []
    for part in detail["loc"]:
        field = section.model_fields.get(str(part)) if section is not None else None
        if field is None:
            break
        path.append(str(part))
        annotation, metadata = field.annotation, tuple(field.metadata)
        value = value.get(part) if isinstance(value, Mapping) else None
        section = section_of(annotation)
    key = ".".join(path)
    words = "texts by key" if key == "sources" else accepted(annotation, metadata)
    if detail["type"] == "missing":
        return f"{key} is missing in {where}: it must be {words}"
    return f"{key} is {json.dumps(value)} in {where}: it must be {words}"
