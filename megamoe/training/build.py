"""From a configuration to a trainer: groups, model, engine, schedule, wired once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from megamoe.config.schema import Config
from megamoe.model import cpu_bridge
from megamoe.model.gpt import GPT, build_model_chunks
from megamoe.model.naming import LocalParameter, fill_initial, local_parameters
from megamoe.model.parallel import ParallelGroups
from megamoe.model.random import seed_generators
from megamoe.moe.balance_bias import BalanceBias
from megamoe.moe.layer import EvaluationMode
from megamoe.moe.losses import LossScale
from megamoe.moe.statistics import LoadStatistics
from megamoe.phases import phase
from megamoe.topology.parameters import param_table
from megamoe.topology.updates import check_all_train
from megamoe.training.best import BestValidation
from megamoe.training.engine import ScheduleEngine, create_engine
from megamoe.training.freezing import freeze
from megamoe.training.groups import create_groups, destroy_groups
from megamoe.training.lr_schedule import learning_rate
from megamoe.training.optimizer import build_optimizer
from megamoe.training.spikes import SpikeJudge
from megamoe.training.step import Batch, Schedule, StepResult, train_step


@dataclass
class Trainer:
    """All that a run needs on one rank. `step` counts optimizer steps, skipped ones too; `samples`
    consumed sequences, those of skipped and rolled-back steps too; `skipped_steps` steps whose update was not applied;
    `judge` guards against spikes, if that is on; `best` remembers the best validation of a fine-tuning, and when to
    stop for want of better ones; `monitoring_run_id` is the tracking service's, if one is used."""

    config: Config
    groups: ParallelGroups
    chunks: list[GPT]
    parameters: list[LocalParameter]
    engine: ScheduleEngine
    schedule: Schedule
    aux_loss_scale: LossScale
    statistics: LoadStatistics
    evaluation: EvaluationMode
    balance_bias: BalanceBias
    step: int = 0
    samples: int = 0
    skipped_steps: int = 0
    judge: SpikeJudge | None = None
    best: BestValidation | None = None
    monitoring_run_id: str | None = None

    @property
    def device(self) -> torch.device:
        return self.schedule.device

    def train_step(self, batch: Batch, global_batch_size: int) -> StepResult:
        """Advance by one optimizer step over `batch`, this rank's share of global_batch_size sequences."""
        rate = learning_rate(self.config.optimizer, self.step + 1, self.config.run.num_steps)
        result = train_step(self.schedule, self.engine, self.aux_loss_scale, batch, rate)
        with phase("update"):
            self.balance_bias.update((self.groups.tensor, self.groups.data), was_applied=result.was_applied)
        self.step += 1
        self.samples += global_batch_size
        return result

    @property
    def has_stopped_early(self) -> bool:
        return self.best is not None and self.best.has_stopped

    def close(self) -> None:
        """Let go of the engine and of the groups in both engines' module state; the process may build another trainer.

        The hooks DeepSpeed hangs on parameters keep model, engine and the threads of every process group alive.
        """
        self.engine.destroy()
        destroy_groups()

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> torch.Tensor | None:
        """Language losses [num_micro_batches, b] of `batch`'s sequences, on the last stage; weights and statistics stay
        as they are."""
        with self.evaluating():
            return self.schedule.losses(batch, engine=None)

    @contextmanager
    def evaluating(self, *, drop_tokens: bool = True) -> Iterator[None]:
        """Inside, the model is in evaluation mode and nothing counts as training; afterwards all is as it was."""
        kept = self.statistics.take()
        self.evaluation.drop_tokens = drop_tokens
        for chunk in self.chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in self.chunks:
                chunk.train()
            self.evaluation.drop_tokens = True
            self.statistics.take()
            self.statistics.restore(kept)


def build_trainer(config: Config, device: torch.device, *, launched_ranks_per_node: int | None = None) -> Trainer:
    """Set everything up for this rank. torch.distributed must be initialised; collective over all ranks.

    `launched_ranks_per_node`, if the launcher said it, counts where parallel.ranks_per_node is not set.
    Raises TopologyError or ConfigError where the layout does not fit the ranks or the machine.
    """
    check_all_train(config)
    cpu_bridge.apply()
    groups = create_groups(config.parallel, launched_ranks_per_node=launched_ranks_per_node)
    seed_generators(config.run.seed, groups, router_jitter=config.moe.num_experts > 0 and config.moe.input_jitter > 0.0)
    aux_loss_scale, statistics = LossScale(), LoadStatistics()
    evaluation = EvaluationMode()
    balance_bias = BalanceBias(
        config.moe.balance_bias_update_rate, device, is_frozen="routers" in config.finetune.freeze
    )
    chunks = build_model_chunks(
        config,
        groups,
        device,
        loss_scale=aux_loss_scale,
        statistics=statistics,
        evaluation=evaluation,
        balance_bias=balance_bias,
    )
    for chunk in chunks:
        chunk.to(device)
    parameters = local_parameters(chunks, param_table(config.model, config.moe), groups)
    fill_initial(parameters, config.run.seed)
    trained = freeze(parameters, config)
    engine = create_engine(chunks, trained, build_optimizer(trained, config), config, groups)
    schedule = Schedule(chunks, groups, config.model.seq_length, config.run.micro_batch_size, device)
    trainer = Trainer(
        config, groups, chunks, parameters, engine, schedule, aux_loss_scale, statistics, evaluation, balance_bias
    )
    if config.finetune.objective is not None:
        trainer.best = BestValidation(config.finetune)
    if config.guard.action != "disabled":
        trainer.judge = judge = SpikeJudge(config)
        engine.finalizer.refuse = lambda loss, norm: judge.refuses(trainer.step + 1, loss, norm)
    return trainer
