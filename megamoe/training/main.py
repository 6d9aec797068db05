"""The entry of one training rank: everything between a configuration and a finished run."""

import os
from pathlib import Path
from typing import Any

from megamoe.training import engine_warnings

engine_warnings.silence()  # before the engines are imported

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megamoe.checkpoint.commit import recover  # noqa: E402
from megamoe.config.schema import Config  # noqa: E402
from megamoe.config.validation import validate_for_training  # noqa: E402
from megamoe.data.datasets import Splits, open_splits  # noqa: E402
from megamoe.data.examples import ExampleSplits, open_examples  # noqa: E402
from megamoe.data.manifest import check_tokenizer  # noqa: E402
from megamoe.data.tokenizers import Tokenizer, build_tokenizer  # noqa: E402
from megamoe.errors import ConfigError, TrainingInterrupted, TrainingStopped  # noqa: E402
from megamoe.launch.environment import RankEnvironment, rank_environment  # noqa: E402
from megamoe.model import cpu_bridge  # noqa: E402

cpu_bridge.apply_before_import()

from megamoe.runs import run_folder  # noqa: E402
from megamoe.runs.stop_file import StopFile  # noqa: E402
from megamoe.training.agreement import first_ranks_numbers  # noqa: E402
from megamoe.training.build import Trainer, build_trainer  # noqa: E402
from megamoe.training.distributed import bound_waits, initialize_distributed  # noqa: E402
from megamoe.training.examples import BestKeeper, ExampleValidator  # noqa: E402
from megamoe.training.guard import LossGuard  # noqa: E402
from megamoe.training.hooks import ClockRestart, FinalTest, MemoryNote, Reporter, Saver, SkipGuard, Validator  # noqa: E402
from megamoe.training.interruption import stop_signals_heeded  # noqa: E402
from megamoe.training.loop import Hook, train  # noqa: E402
from megamoe.training.monitor import Monitor  # noqa: E402
from megamoe.training.optimizer import apex_state  # noqa: E402
from megamoe.training.replicas import ReplicaCheck  # noqa: E402
from megamoe.training.restore import Loaded, load_newest, load_weights  # noqa: E402
from megamoe.training.sampling import Sampler  # noqa: E402
from megamoe.training.saving import CheckpointSaver  # noqa: E402
from megamoe.training.supervision import StepMark, Supervision, supervised  # noqa: E402
from megamoe.training.throughput import run_details  # noqa: E402


def run_rank(payload: dict[str, Any]) -> None:
    """Train as one rank of the world that the environment describes. `payload` is {"config": resolved config}, and
    "attempt" if the launcher has numbered this start.

    Raises MegamoeError for what the user must mend.
    """
    config = Config.model_validate(payload["config"])
    environment = rank_environment()
    with supervised(config, environment, payload.get("attempt")) as supervision:
        _run(config, environment, supervision)


def _run(config: Config, environment: RankEnvironment, supervision: Supervision) -> None:
    validate_for_training(config, environment.world_size)
    splits = _open(config)
    wants_sample = config.monitor.sample_prompt is not None and config.monitor.num_sample_tokens > 0
    tokenizer = build_tokenizer(config.data.tokenizer) if wants_sample else None
    for corpus in config.data.train if tokenizer is not None else ():
        check_tokenizer(corpus.path, tokenizer.describe())
    device = initialize_distributed(environment, config.parallel.timeout_seconds)
    supervision.start(device)
    is_first = environment.rank == 0
    stop_file = StopFile(config.run.dir)
    _refuse_while_there(stop_file, device)
    resumable = _checkpoints_to_resume(config, is_first=is_first, device=device)
    trainer = build_trainer(config, device, launched_ranks_per_node=environment.ranks_per_node)
    bound_waits(config.parallel.timeout_seconds)
    supervision.progress.stage = "load"
    loaded = _load(trainer, resumable)
    if is_first:
        run_folder.prepare(config)  # not before: a refused resume leaves the folder's record as it was
    dist.barrier()
    monitor = Monitor(config, is_first=is_first, resume_step=trainer.step, run_id=trainer.monitoring_run_id,
                      details=run_details(config, environment.world_size))  # fmt: skip
    trainer.monitoring_run_id = monitor.run_id
    _say_start(trainer, monitor, splits, loaded)
    supervision.start_event(trainer.step, device)
    saver = CheckpointSaver(trainer, config.run.dir, monitor.say, monitor.note)
    if loaded is not None and loaded.is_whole:
        steps = (run_folder.step_of(folder.name) for folder in resumable)
        saver.own_steps.update(step for step in steps if step <= trainer.step)
    if is_first:
        trainer.engine.finalizer.sees_stop_file = stop_file.was_there
    progress = supervision.progress
    hooks = [StepMark(progress, 0), *_hooks(config, monitor, splits, tokenizer, saver), StepMark(progress, 1)]
    with stop_signals_heeded(trainer.engine.finalizer):
        interruption = _train(trainer, splits, hooks, saver, monitor, stop_file, supervision)
        # Not after a failure: a rank that took its connections down would make its peers fail before it is heard.
        dist.barrier()
        trainer.close()
        dist.destroy_process_group()
    if interruption is not None:
        raise interruption


def _open(config: Config) -> Splits | ExampleSplits:
    if config.finetune.objective is not None:
        return open_examples(config)
    return open_splits(
        config.data, seq_length=config.model.seq_length, vocab_size=config.model.vocab_size, seed=config.run.seed
    )


def _train(
    trainer: Trainer,
    splits: Splits | ExampleSplits,
    hooks: list[Hook],
    saver: CheckpointSaver,
    monitor: Monitor,
    stop_file: StopFile,
    supervision: Supervision,
) -> TrainingInterrupted | None:
    """Train to the end, or until somebody asks for another; returns what that is to be raised as, on every rank."""
    is_sound = True
    try:
        train(trainer, splits.train, hooks)
        _set_aside(stop_file, monitor)
    except TrainingInterrupted as error:
        monitor.note("interrupted", str(error), step=trainer.step, reason=error.reason)
        if error.reason == "stop file":
            _set_aside(stop_file, monitor)
        return error
    except TrainingStopped as error:  # on every rank, too: what is being written is still worth having
        monitor.alert("Training stopped itself", str(error), "ERROR")
        saver.wait()
        raise
    except BaseException:
        is_sound = False  # peers wait for this rank's word: nobody waits for a service first
        raise
    finally:
        supervision.progress.stage = "close" if is_sound else supervision.progress.stage
        monitor.close(waits=is_sound)
    end = "stopped early after step {}" if trainer.has_stopped_early else "all {} steps are done"
    supervision.event("end", end.format(trainer.step), step=trainer.step)
    return None


def _set_aside(stop_file: StopFile, monitor: Monitor) -> None:
    failure = stop_file.set_aside() if monitor.is_first else None
    if failure is not None:
        monitor.say(failure)


def _checkpoints_to_resume(config: Config, *, is_first: bool, device: torch.device) -> list[Path]:
    """The first rank's choice, on every rank: a shared folder may show them different things. Collective."""
    root = run_folder.checkpoints_path(config.run.dir)
    steps: list[int] = []
    if is_first:
        recover(root)  # also where nothing is resumed: what a crash left must not get in the way of a save
        found = run_folder.resumable_checkpoints(config.run.dir) if config.checkpoint.resume else []
        steps = [run_folder.step_of(folder.name) for folder in found]
    return [root / run_folder.checkpoint_name(step) for step in first_ranks_numbers(steps, device=device)]


def _refuse_while_there(stop_file: StopFile, device: torch.device) -> None:
    """Raises ConfigError on all ranks where the first one sees the stop file. Collective."""
    if first_ranks_numbers([int(stop_file.is_there())], device=device) == [1]:
        raise ConfigError(f"{stop_file.path} asks this run not to train: remove that file to start it")


def _load(trainer: Trainer, resumable: list[Path]) -> Loaded | None:
    """Go on from the run's own checkpoint, else from the weights that checkpoint.load_from names, else from nothing."""
    settings = trainer.config.checkpoint
    if resumable:
        return load_newest(trainer, resumable, on_damage=settings.on_damage)
    if settings.load_from is not None:
        return load_weights(trainer, run_folder.checkpoint_at(settings.load_from))
    return None


def _hooks(
    config: Config,
    monitor: Monitor,
    splits: Splits | ExampleSplits,
    tokenizer: Tokenizer | None,
    saver: CheckpointSaver,
) -> list[Hook]:
    reporter = Reporter(
        config.monitor.log_interval_steps, monitor.record, monitor.show_step,
        load_interval_steps=config.monitor.expert_load_interval_steps, record_loads=monitor.record_loads,
    )  # fmt: skip
    guard = LossGuard(saver, monitor.note, after_roll_back=monitor.go_back_to)
    hooks: list[Hook] = [guard, SkipGuard(config.run.max_skipped_steps), reporter]
    if config.checkpoint.replica_check_interval_steps:  # before the saver: what differs must not be saved
        hooks.append(ReplicaCheck(config.checkpoint.replica_check_interval_steps))
    run = config.run
    if isinstance(splits, ExampleSplits) and splits.valid is not None:
        hooks.append(ExampleValidator(splits.valid, run.eval_interval_steps, monitor.record))
    elif isinstance(splits, Splits) and splits.valid is not None and run.num_eval_batches:
        hooks.append(Validator(splits.valid, run.eval_interval_steps, run.num_eval_batches, monitor.record))
    if splits.test is not None and config.run.num_eval_batches:
        hooks.append(FinalTest(splits.test, config.run.num_eval_batches, monitor.record))
    checkpoint = config.checkpoint
    hooks.append(Saver(saver, checkpoint.save_interval_steps, checkpoint.save_at_end))
    if isinstance(splits, ExampleSplits):
        hooks.append(BestKeeper(saver, monitor.note, is_first=monitor.is_first))
    if tokenizer is not None:
        hooks.append(
            Sampler(tokenizer, config.monitor.sample_prompt or "", config.monitor.num_sample_tokens, monitor.say)
        )
    return [*hooks, MemoryNote(monitor.say), ClockRestart(reporter)]


def _say_start(trainer: Trainer, monitor: Monitor, splits: Splits | ExampleSplits, loaded: Loaded | None) -> None:
    config, grid = trainer.config, trainer.groups.grid
    optimizer, is_resumed = config.optimizer, loaded is not None and loaded.is_whole
    if (optimizer.name, optimizer.implementation) == ("adamw", "auto") and apex_state() == "unrelated":
        monitor.say("the package apex that is installed is not NVIDIA's: torch's AdamW is used")
    monitor.say(
        f"{'resumed at' if is_resumed else 'training from'} step {trainer.step} of {config.run.num_steps} on "
        f"{grid.world} ranks: tensor {grid.tensor} x data {grid.data} x pipeline {grid.pipeline}, "
        f"experts over {grid.expert}, ZeRO-{config.parallel.zero_stage}, {config.run.precision}, process {os.getpid()}"
    )
    if loaded is not None:
        monitor.say(f"{'state' if is_resumed else 'weights'} from {loaded.folder}")
        for note in loaded.notes:
            monitor.say(f"  {note}")
    epoch = splits.train.num_samples
    if isinstance(splits, ExampleSplits):
        monitor.say(f"fine-tuning on {epoch} examples; run folder {config.run.dir}")
        for note in splits.notes:
            monitor.say(f"  {note}")
        return
    monitor.say(f"{epoch} training sequences of {config.model.seq_length} tokens an epoch; run folder {config.run.dir}")
