"""Memory that published runs report, beside what the planner's formulas make of it.

Other programs keep their states in other ways than megamoe's engines: `PROGRAMS` says how, bytes for each weight.
Everything else, what ranks hold, what layers save, how many micro-batches are in flight, what passes through, is the
planner's own. Nothing is fitted.

    python tools/benchmarks/plan_memory.py
"""

import statistics
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megamoe.config.loading import read_settings
from megamoe.config.schema import Config
from megamoe.plan.activations import chunk_bytes, layer_working_bytes, loss_working_bytes
from megamoe.plan.optimizer_groups import OptimizerGroup, optimizer_groups
from megamoe.plan.roles import Chunk, Role, chunks_of, role_of
from megamoe.plan.rows import expert_rows
from megamoe.plan.schedules import in_flight
from megamoe.plan.states import ELEMENT_BYTES, num_micro_batches
from megamoe.topology.grid import Grid
from megamoe.topology.parameters import dimensions

RUNS = Path(__file__).parents[2] / "docs" / "published_runs.yaml"
GIGABYTE = 10**9
GPU_BYTES = 80 * 2**30  # as the cluster files count it
CONTEXT_BYTES = int(2.5 * 2**30)  # context, libraries and fragmentation, beside what programs allocate


@dataclass(frozen=True)
class Program:
    """How states are kept, in bytes for each weight that a rank computes with."""

    weights: int
    gradients: int
    optimizer: int  # masters and moments, cut over the ranks that share the weight, if `cuts_optimizer`
    cuts_optimizer: bool = True
    cuts_all: tuple[str, ...] = ()  # of "dense", "expert": weights and gradients are cut, too, and gathered by layer
    fused_attention: bool = True
    keeps_activation: bool = True  # what leaves the experts' activation is saved beside what enters it


PROGRAMS = {
    # Megatron-core's distributed optimizer: 16-bit weights, fp32 gradients in one buffer, fp32 masters and moments.
    "megatron": Program(weights=2, gradients=4, optimizer=12),
    "megatron_16_bit_gradients": Program(weights=2, gradients=2, optimizer=12),
    "megatron_fully_sharded": Program(weights=2, gradients=4, optimizer=12, cuts_all=("dense", "expert")),
    # fairseq, memory-efficient fp16 with fp16 moments: no masters; experts are whole on their rank.
    "fairseq": Program(weights=2, gradients=2, optimizer=4, cuts_all=("dense",), fused_attention=False,
                       keeps_activation=False),
}  # fmt: skip


@dataclass(frozen=True)
class Rank:
    """One rank of a published run."""

    config: Config
    num_gpus: int
    pipeline_rank: int
    program: Program

    @cached_property
    def grid(self) -> Grid:
        return Grid.from_config(self.config.parallel, self.num_gpus)

    @cached_property
    def role(self) -> Role:
        return role_of(self.config, self.num_gpus, self.pipeline_rank)

    @cached_property
    def groups(self) -> tuple[OptimizerGroup, ...]:
        return optimizer_groups(self.role, self.config.optimizer, self.grid)

    @property
    def allocated_bytes(self) -> float:
        """Between steps: weights, gradients and optimizer."""
        return sum(self._group_bytes(group) for group in self.groups) + self._gathered_bytes

    @property
    def peak_bytes(self) -> float:
        """The most of a step: activations of all micro-batches in flight, and what passes through one layer."""
        return self.allocated_bytes + self._saved_bytes + self._working_bytes

    def _group_bytes(self, group: OptimizerGroup) -> float:
        program, shared = self.program, group.num_ranks
        is_cut = ("expert" if group.is_expert else "dense") in program.cuts_all
        whole = (program.weights + program.gradients) / (shared if is_cut else 1)
        return group.num_elements * (whole + program.optimizer / (shared if program.cuts_optimizer else 1))

    @property
    def _gathered_bytes(self) -> float:
        """Of what is cut: the embedding, which stays whole through a step, and the largest layer."""
        by_layer: dict[int | None, int] = {}
        for held in self.role.parameters:
            if ("expert" if held.is_expert else "dense") in self.program.cuts_all:
                layer = held.parameter.layer
                by_layer[layer] = by_layer.get(layer, 0) + held.num_elements
        layers = [size for layer, size in by_layer.items() if layer is not None]
        return (by_layer.get(None, 0) + max(layers, default=0)) * self.program.weights

    @property
    def _element(self) -> int:
        return ELEMENT_BYTES[self.config.run.precision]

    @property
    def _saved_bytes(self) -> float:
        chunks = chunks_of(self.config, self.pipeline_rank)
        sizes = [
            chunk_bytes(self.config, self.num_gpus, chunk) + self._more_saved_bytes(chunk) for chunk in chunks
        ]
        counts = in_flight(
            pipeline=self.config.parallel.pipeline_parallel_size, pipeline_rank=self.pipeline_rank,
            num_micro_batches=num_micro_batches(self.config, self.num_gpus), weights=sizes,
        )  # fmt: skip
        return sum(count * size for count, size in zip(counts, sizes, strict=True))

    def _more_saved_bytes(self, chunk: Chunk) -> int:
        """What the program's layers save that megamoe's do not."""
        if self.config.parallel.recompute == "full":
            return 0
        of_experts = sum(self._activation_bytes(count) for count in chunk.num_experts if count)
        return of_experts + len(chunk.num_experts) * self._scores_bytes(5)

    def _activation_bytes(self, num_experts: int) -> int:
        if not self.program.keeps_activation:
            return 0
        ffn = dimensions(self.config.model, self.config.moe).expert_ffn // self.grid.expert_tensor
        return expert_rows(self.config, self.grid, num_experts).received * ffn * self._element

    def _scores_bytes(self, bytes_per_score: int) -> int:
        """Attention that is not fused keeps a probability before and after dropout and a mask of one byte."""
        if self.program.fused_attention or self.config.parallel.recompute == "selective":
            return 0
        model, batch = self.config.model, self.config.run.micro_batch_size
        heads = model.num_attention_heads // self.grid.tensor
        return heads * model.seq_length**2 * batch * bytes_per_score

    @property
    def _working_bytes(self) -> int:
        """In the loss, or inside a layer: of a recomputed one its scores, too, and of scores two gradients in turn."""
        scores = self._scores_bytes(5 + 2 * self._element) if self.config.parallel.recompute == "full" else 0
        at = (self.config, self.num_gpus, self.pipeline_rank)
        return max(loss_working_bytes(*at), layer_working_bytes(*at) + scores)


def rank_of(entry: Mapping[str, Any], pipeline_rank: int) -> Rank:
    return Rank(Config.model_validate(entry["config"]), entry["gpus"], pipeline_rank, PROGRAMS[entry["program"]])


def figures() -> Iterator[tuple[int, str, str, float, float]]:
    """Row, name, "allocated" or "peak", measured and planned bytes."""
    for entry in read_settings(RUNS)["memory"]:
        if "excluded" in entry:
            continue
        rank = rank_of(entry, entry["stage"])
        for kind in ("allocated", "peak"):
            if kind in entry:
                planned = rank.allocated_bytes if kind == "allocated" else rank.peak_bytes
                yield entry["row"], entry["name"], kind, entry[kind] * GIGABYTE, planned


def verdicts() -> Iterator[tuple[int, str, bool, float]]:
    """Row, name, whether it fitted, and the planned bytes of the fullest stage."""
    for entry in read_settings(RUNS)["verdicts"]:
        if "excluded" not in entry:
            stages = Config.model_validate(entry["config"]).parallel.pipeline_parallel_size
            fullest = max(rank_of(entry, stage).peak_bytes for stage in range(stages))
            yield entry["row"], entry["name"], entry["fits"], fullest + CONTEXT_BYTES


def main() -> int:
    print("row  what       measured GB  planned GB  planned/measured")
    errors = []
    for row, name, kind, measured, planned in figures():
        errors.append(abs(planned / measured - 1))
        columns = f"{measured / GIGABYTE:11.2f}  {planned / GIGABYTE:10.2f}  {planned / measured:5.3f}"
        print(f"{row:3}  {kind:9}  {columns}  {name}")
    print(f"{len(errors)} figures: mean {statistics.fmean(errors):.1%}, worst {max(errors):.1%}\n")
    for row, name, fits, planned in verdicts():
        right = "right" if (planned <= GPU_BYTES) == fits else "WRONG"
        fitted = "fitted" if fits else "did not fit"
        print(f"{row:3}  {fitted}, planned {planned / 2**30:.1f} GiB of 80: {right}  {name}")
    for kind in ("memory", "verdicts"):
        for entry in read_settings(RUNS)[kind]:
            if "excluded" in entry:
                print(f"row {entry['row']} is left out: {entry['excluded']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
