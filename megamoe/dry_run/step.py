"""One optimizer step of a rank, watched: what it calls, what it keeps for the backward pass, what it holds at its end.

The same watching serves a rank without memory and a real one. A trainer must be built inside `watched`, or its memory
is not seen.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from megamoe.data.batches import MicroBatch
from megamoe.dry_run.memory import MemoryMeter, storage_bytes
from megamoe.dry_run.recorder import Call, Recorder
from megamoe.training.build import Trainer
from megamoe.training.step import Batch


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a rank's state by what it is for: of whole storages, the engine's padding included."""

    weights: int
    gradients: int  # reduced or not, as they are when the update begins
    optimizer: int  # fp32 masters and moments
    buffers: int  # whatever else lives on from step to step


@dataclass(frozen=True)
class ForwardPass:
    """One forward pass of one chunk of the model over one micro-batch."""

    chunk: int
    in_flight: tuple[int, ...]  # by chunk: forward passes whose backward pass had not begun, this one included
    kept_bytes: int  # what it left alive, its output included where that is not sent on; without its input
    input_bytes: int  # hidden states that came in, which are kept, too


@dataclass(frozen=True)
class LastBackward:
    """The last backward pass of a step, when all gradients were there."""

    peak_bytes: int  # of everything alive
    in_flight: tuple[int, ...]  # by chunk: forward passes that were kept then, its own included


@dataclass(frozen=True)
class StepReality:
    """What one step of one rank was."""

    num_micro_batches: int
    calls: tuple[Call, ...]
    passes: tuple[ForwardPass, ...]
    states: StateBytes
    # Of everything alive, at its fullest moment between two operators.
    schedule_peak_bytes: int  # forward and backward passes
    update_peak_bytes: int
    last_backward: "LastBackward"

    @property
    def peak_bytes(self) -> int:
        return max(self.schedule_peak_bytes, self.update_peak_bytes)


class Watch:
    """What is watched through: see `watched`."""

    def __init__(self, *, without_memory: bool) -> None:
        self.recorder, self.memory = Recorder(), MemoryMeter(of_meta=without_memory)
        self._last_in_flight: list[int] = []

    def step(self, trainer: Trainer, batch: Batch, global_batch_size: int) -> StepReality:
        """Let `trainer` take one step over `batch` and say what it was."""
        self.recorder.take()
        self.memory.ignore(_shapes_alone(trainer))
        self.memory.reset_peak()
        passes: list[ForwardPass] = []
        in_flight = [0] * len(trainer.chunks)
        gradients, schedule_peak, last_backward = 0, 0, None
        apply_gradients = trainer.engine.apply_gradients

        def apply_watched(learning_rate: float) -> bool:
            nonlocal gradients, schedule_peak, last_backward
            schedule_peak = self.memory.peak_bytes
            last_backward = LastBackward(self.memory.recent_peak_bytes, tuple(self._last_in_flight))
            self.memory.reset_peak()
            gradients = storage_bytes(_gradients(trainer))
            update.enter_context(self.recorder.during("update"))  # biases of balance are updated after this
            return apply_gradients(learning_rate)

        hooks = [
            hook
            for number in range(len(trainer.chunks))
            for hook in self._watch_chunk(trainer, number, passes, in_flight)
        ]
        trainer.engine.apply_gradients = apply_watched
        try:
            with ExitStack() as update:
                trainer.train_step(batch, global_batch_size)
        finally:
            del trainer.engine.apply_gradients
            for hook in hooks:
                hook.remove()
        states = self._states(trainer, gradients)
        return StepReality(
            batch.num_micro_batches,
            self.recorder.take(),
            tuple(passes),
            states,
            schedule_peak,
            self.memory.peak_bytes,
            last_backward,
        )

    def _states(self, trainer: Trainer, gradients: int) -> StateBytes:
        weights, optimizer = storage_bytes(_weights(trainer)), storage_bytes(_optimizer(trainer))
        return StateBytes(weights, gradients, optimizer, self.memory.live_bytes - weights - optimizer)

    def _watch_chunk(
        self, trainer: Trainer, number: int, passes: list[ForwardPass], in_flight: list[int]
    ) -> Iterator[Any]:
        """Hooks that add each forward pass of a chunk to `passes`, and keep count of those `in_flight` by chunk."""
        at_begin: list[int] = []

        def begin(*_: Any) -> None:
            at_begin.append(self.memory.live_bytes)

        def begin_backward(_: Tensor) -> None:
            self._last_in_flight = list(in_flight)
            self.memory.reset_recent_peak()
            in_flight[number] -= 1

        def end(module: Any, _: Any, output: Tensor) -> None:
            in_flight[number] += 1
            kept, arrived = self.memory.live_bytes - at_begin.pop(), 0
            if not module.post_process:
                kept -= output.untyped_storage().nbytes()  # Megatron-core lets go of it once it is sent
            if not module.pre_process:
                arrived = module.decoder.input_tensor.untyped_storage().nbytes()
            passes.append(ForwardPass(number, tuple(in_flight), kept, arrived))
            output.register_hook(begin_backward)

        chunk = trainer.chunks[number]
        yield chunk.register_forward_pre_hook(begin)
        yield chunk.register_forward_hook(end)


@contextmanager
def watched(*, without_memory: bool) -> Iterator[Watch]:
    """Inside, every collective is recorded and all memory is measured: of a rank without, what it would have."""
    watch = Watch(without_memory=without_memory)
    with watch.recorder, watch.memory:
        yield watch


def empty_batch(trainer: Trainer, num_micro_batches: int) -> Batch:
    """Micro-batches of the right shape, all of token 0."""
    run, model = trainer.config.run, trainer.config.model
    ids = np.zeros((run.micro_batch_size, model.seq_length), dtype=np.int64)
    return Batch(iter([MicroBatch(ids, ids)] * num_micro_batches), num_micro_batches)


def _shapes_alone(trainer: Trainer) -> Iterator[Tensor]:
    """What DeepSpeed itself keeps on the meta device: the shapes of parameters. No rank has memory for them."""
    if trainer.engine.zero_stage > 0:
        for shapes in trainer.engine.optimizer.round_robin_bit16_meta:
            yield from shapes


def _weights(trainer: Trainer) -> Iterator[Tensor]:
    for local in trainer.parameters:
        yield local.tensor


def _gradients(trainer: Trainer) -> Iterator[Tensor]:
    """Of parameters, and of their partitions where ZeRO stage 2 has reduced them by now."""
    for local in trainer.parameters:
        for name in ("grad", "grad_accum"):
            gradient = getattr(local.tensor, name, None)
            if gradient is not None:
                yield gradient
    if trainer.engine.zero_stage > 0:
        for pieces in trainer.engine.optimizer.averaged_gradients.values():
            yield from pieces or ()


def _optimizer(trainer: Trainer) -> Iterator[Tensor]:
    basic = trainer.engine.basic_optimizer
    for group in basic.param_groups:
        for parameter in group["params"]:
            if trainer.engine.zero_stage > 0:
                yield parameter
            for value in basic.state[parameter].values():
                if isinstance(value, Tensor):
                    yield value
