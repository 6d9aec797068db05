"""What works together and what is refused, as data: the one table behind the checks and behind docs/support_matrix.md.

After a change write the page anew:
    python -c "from megamoe.config.support import write_page; write_page()"
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megamoe.config.schema import Config, MoEConfig, ParallelConfig, RunConfig
from megamoe.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
PAGE = Path(__file__).parents[2] / "docs" / "support_matrix.md"
_WRITE_COMMAND = 'python -c "from megamoe.config.support import write_page; write_page()"'


@dataclass(frozen=True)
class Refusal:
    """A combination that the engines corrupt or refuse."""

    name: str
    applies: Callable[[Config], bool]
    reason: str
    instead: str

    @property
    def message(self) -> str:
        return f"{self.name} is not supported: {self.reason}; {self.instead}"


@dataclass(frozen=True)
class Feature:
    """Something that works: its key, the values it takes, and what it needs or goes with."""

    name: str
    key: str
    values: str
    notes: str


REFUSALS = (
    Refusal(
        "zero_stage 3 with experts",
        lambda c: c.parallel.zero_stage == 3 and c.moe.num_experts > 0,
        "DeepSpeed refuses its own MoE layers under ZeRO-3",
        "use zero_stage 1 or 2",
    ),
    Refusal(
        "zero_stage 3 with pipeline_parallel_size above 1",
        lambda c: c.parallel.zero_stage == 3 and c.parallel.pipeline_parallel_size > 1,
        "ZeRO-3 would gather the weights of a stage anew for every micro-batch of the pipeline schedule",
        "use zero_stage 1 or 2",
    ),
    Refusal(
        "zero_stage 3",
        lambda c: c.parallel.zero_stage == 3,
        "Megatron's schedules need the weights of a rank whole: they are cut by tensor, pipeline and expert already",
        "use zero_stage 1 or 2",
    ),
    Refusal(
        "zero_stage 0 with precision bf16 or fp16",
        lambda c: c.parallel.zero_stage == 0 and c.run.precision != "fp32",
        "DeepSpeed's optimizer for that case leaves the experts out of the gradient norm (DeepSpeed issue 8613)",
        "use zero_stage 1 or 2, or precision fp32",
    ),
)

FEATURES = (
    Feature(
        "Tensor parallel",
        "parallel.tensor_parallel_size",
        "1, 2, 4, …",
        "divides heads, query groups, FFN, padded vocabulary; with experts also the sequence length, since each tensor "
        "rank routes its own part of the sequence",
    ),
    Feature(
        "Sequence parallel",
        "parallel.sequence_parallel",
        "false, true",
        "needs tensor parallel above 1; divides the sequence length",
    ),
    Feature(
        "Pipeline parallel",
        "parallel.pipeline_parallel_size",
        "1, 2, 4, …",
        "divides the layers; stages without any MoE layer are fine; schedule 1F1B",
    ),
    Feature(
        "Virtual pipeline (interleaved 1F1B)",
        "parallel.virtual_pipeline_parallel_size",
        "1, 2, …",
        "needs pipeline parallel above 1; pipeline x virtual divides the layers; micro-batches per step are a multiple "
        "of the pipeline size",
    ),
    Feature(
        "Expert parallel",
        "parallel.expert_parallel_size",
        "1, 2, 4, …",
        "divides the experts; expert x expert tensor divides tensor x data",
    ),
    Feature(
        "Expert tensor parallel",
        "parallel.expert_tensor_parallel_size",
        "1 or the tensor parallel size",
        "divides the FFN of an expert",
    ),
    Feature(
        "Hierarchical all-to-all",
        "parallel.all_to_all",
        "flat, hierarchical",
        "an expert group has equally many ranks on each of its nodes; `parallel.ranks_per_node` where the launcher "
        "does not say; the same bits as flat",
    ),
    Feature(
        "Overlapped all-to-all",
        "parallel.all_to_all_chunks",
        "1 (off), 2, …",
        "divides the experts of a rank; flat and hierarchical; the same bits as off",
    ),
    Feature(
        "Data parallel",
        "(what remains)",
        "ranks / (tensor x pipeline)",
        "the global batch is a multiple of micro-batch x data",
    ),
    Feature(
        "ZeRO", "parallel.zero_stage", "0, 1, 2", "with any tensor, pipeline, virtual and expert size; see the grid"
    ),
    Feature("Precision", "run.precision", "fp32, bf16, fp16", "fp16 only where the accelerator computes in it"),
    Feature("Recompute", "parallel.recompute", "none, selective, full", "with every layout"),
    Feature(
        "Tied embeddings",
        "model.tie_embeddings",
        "true, false",
        "with every layout, across first and last pipeline stage too",
    ),
    Feature(
        "Experts",
        "moe.num_experts",
        "0 (dense) or more",
        "in every p-th layer or in listed layers; capacity or dropless",
    ),
    Feature(
        "Pyramid",
        "moe.num_experts_by_layer",
        "null, or a list",
        "as many entries as layers with experts; expert parallel and expert groups divide each; top_k at most the "
        "smallest",
    ),
    Feature(
        "Shared expert",
        "moe.shared_expert_ffn_hidden_size",
        "null, or its FFN size",
        "tensor parallel divides it; joined by `moe.shared_expert_mix` add, sigmoid_gate or residual",
    ),
    Feature(
        "Classifier",
        "model.num_labels",
        "0 (a language model), 2, 3, …",
        "with every layout; its head is on the last stage, whole on each tensor rank",
    ),
    Feature(
        "Frozen parts",
        "finetune.freeze",
        "a list of parts",
        "with every layout; each pipeline stage has something left to train",
    ),
    Feature(
        "Gradient clipping", "optimizer.clip_grad", "0 (off) or a norm", "counts each parameter once over all ranks"
    ),
    Feature("Optimizers", "optimizer.name", "adamw, sgd", "NVIDIA apex's fused Adam where it is installed"),
)


def refusals(config: Config) -> Iterator[Refusal]:
    """The refusals that apply to `config`, the most telling first."""
    return (refusal for refusal in REFUSALS if refusal.applies(config))


def check_supported(config: Config) -> None:
    """Raise ConfigError with reason and remedy if the engines cannot train `config` rightly."""
    for refusal in refusals(config):
        raise ConfigError(refusal.message)


def support_page() -> str:
    """The text of docs/support_matrix.md."""
    lines = [
        "# Support matrix",
        "",
        "This page is made from `megamoe/config/support.py`, which is also what refuses a configuration before",
        "anything starts. A test holds the two equal; after a change, write it anew with",
        f"`{_WRITE_COMMAND}`.",
        "",
        "## What works",
        "Every row goes with every other, in the sizes given, save what the next two tables refuse.",
        "",
        "| feature | key | values | needs |",
        "|---|---|---|---|",
        *(f"| {f.name} | {f'`{f.key}`' if '.' in f.key else f.key} | {f.values} | {f.notes} |" for f in FEATURES),
        "",
        "## ZeRO stage and precision",
        "The grid is the same for dense models and mixtures of experts, with and without a pipeline.",
        "",
        "| zero_stage | fp32 | bf16 | fp16 |",
        "|---|---|---|---|",
        *_zero_rows(),
        "",
        "## What is refused, and why",
        "",
        "| combination | reason | instead |",
        "|---|---|---|",
        *(f"| {r.name} | {r.reason} | {r.instead} |" for r in REFUSALS),
        "",
        "Sizes that do not fit each other are refused too, and the message names the sizes that would:",
        "see `megamoe/config/validation.py`.",
    ]
    return "\n".join(lines) + "\n"


def _zero_rows() -> Iterator[str]:
    """Rows computed from the refusals, over dense and expert models, one stage and two: yes is where all may train."""
    for stage in range(4):
        cells = []
        for precision in get_args(Precision):
            answers = {_trains(stage, precision, experts, stages) for experts in (0, 8) for stages in (1, 2)}
            cells.append("yes" if answers == {True} else "no" if answers == {False} else "in part")
        yield f"| {stage} | {' | '.join(cells)} |"


def _trains(zero_stage: int, precision: Precision, num_experts: int, num_stages: int) -> bool:
    config = Config(
        moe=MoEConfig(num_experts=num_experts),
        parallel=ParallelConfig(zero_stage=zero_stage, pipeline_parallel_size=num_stages),
        run=RunConfig(precision=precision),
    )
    return next(refusals(config), None) is None


def write_page() -> None:
    """Write docs/support_matrix.md of this source tree."""
    PAGE.write_text(support_page(), encoding="utf-8")
