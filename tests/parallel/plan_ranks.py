"""One rank's side of the tests of plans: train a step and count the bytes of every tensor that is then alive."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.pipeline_parallel import schedules
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megamoe.config.schema import Config
from megamoe.dry_run.recorder import Recorder
from megamoe.moe.exchange import Exchange
from megamoe.moe.layer import MoELayer
from megamoe.moe.precision import compute_dtype
from megamoe.topology import updates
from megamoe.training.build import Trainer
from megamoe.training.engine import ScheduleEngine
from megamoe.training.optimizer_state import create_state
from tests.parallel.worlds import let_threads_finish, samples, trainer_of
from tests.parity.ranks import share

_RESULTS_BYTES = 32  # losses, norms and counters of a step: the one thing that the audit leaves out


def audit_configs(configs: list[Config], bucket_elements: int | None = None) -> list[dict[str, Any]]:
    """By configuration: what a rank holds and does. `bucket_elements`: instead of the engine's largest bucket."""
    if bucket_elements is not None:
        updates.MAX_REDUCE_BUCKET_ELEMENTS = bucket_elements
    gc.collect()
    gc.freeze()  # what the process held before is not looked at again
    return [_audit(config) for config in configs]


def _audit(config: Config) -> dict[str, Any]:
    RotaryEmbedding.forward.cache_clear()  # holds angles of models that are gone
    with trainer_of(config) as trainer:
        moments: dict[str, dict[str, int]] = {}
        _watch(trainer, moments)
        create_state(trainer.engine.basic_optimizer)  # as a first step would
        (batch,) = samples(config, 1)
        batch %= config.model.num_labels or config.model.vocab_size  # a classifier is asked for a label everywhere
        recorder = Recorder()
        # It slows every operation down, and a rank alone has nobody to call.
        recording = recorder if dist.get_world_size() > 1 else nullcontext()
        with recording, _rows_noted(trainer) as rows, _passes_noted() as passes:
            _mark_update(trainer, recorder)
            trainer.train_step(share(trainer, batch), len(batch))
        statistics = sum(_storage_bytes(each) for load in trainer.statistics.take().values() for each in vars_of(load))
        moments["rest"] = _alive(trainer)
        saved, rows_of_saved = saved_by_layer(trainer)
        names = [(local.parameter.name, local.tied_copy, local.shape) for local in trainer.parameters]
        return {
            "names": names,
            "moments": moments,
            "statistics": statistics,
            "calls": [(call.kind, call.ranks, call.num_bytes, call.phase, call.peer) for call in recorder.calls],
            "rows": rows,
            "passes": passes,
            "saved": saved,
            "rows_of_saved": rows_of_saved,
            "widens": compute_dtype(torch.empty(0, dtype=torch.bfloat16)) is torch.float32,
        }


def _mark_update(trainer: Trainer, recorder: Recorder) -> None:
    """Have the recorder know which calls belong to the update."""

    def mark(owner: Any, method: str) -> None:
        call = getattr(owner, method)

        def marked(*args: Any, **kwargs: Any) -> Any:
            with recorder.during("update"):
                return call(*args, **kwargs)

        setattr(owner, method, marked)

    mark(trainer.engine, "apply_gradients")
    mark(trainer.balance_bias, "update")


@contextmanager
def _passes_noted() -> Iterator[list[str]]:
    """Forward and backward passes as Megatron-core's schedule makes them: "forward" or "backward"."""
    noted: list[str] = []
    originals = {name: getattr(schedules, name) for name in ("forward_step", "backward_step")}

    def noting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            noted.append(name.removesuffix("_step"))
            return originals[name](*args, **kwargs)

        return call

    for name in originals:
        setattr(schedules, name, noting(name))
    try:
        yield noted
    finally:
        for name, original in originals.items():
            setattr(schedules, name, original)


def saved_by_layer(trainer: Trainer) -> tuple[dict[str, int], dict[int, list[list[tuple[int, int]]]]]:
    """Bytes that one micro-batch's forward pass saves for the backward pass, and the rows of its exchanges.

    Keys: 0-based layer numbers, "embedding" and "head". Each storage counts once, where it is first saved; weights and
    the table of angles do not count. Collective over the ranks of a pipeline stage.
    """
    config, found = trainer.config, {}
    seen = {local.tensor.untyped_storage().data_ptr(): local.tensor for local in trainer.parameters}
    place, is_kept = "embedding", True

    def pack(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if config.parallel.recompute == "full" and tensor.ndim == 4 and tensor.shape[1:3] == (1, 1):
            return  # the table of angles, which the model keeps
        if is_kept and storage.nbytes() and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = tensor  # kept, so that no other gets its memory
            found[place] = found.get(place, 0) + storage.nbytes()

    def enter(name: str) -> Any:
        def hook(*_: Any) -> None:
            # What a checkpoint's first pass computes without gradients is not kept, though some of it is handed in.
            nonlocal place, is_kept
            place, is_kept = name, torch.is_grad_enabled()

        return hook

    def leave(*_: Any) -> None:
        nonlocal is_kept
        is_kept = True

    ids = torch.zeros((config.run.micro_batch_size, config.model.seq_length), dtype=torch.int64)
    length = config.model.seq_length // (trainer.groups.grid.tensor if config.parallel.sequence_parallel else 1)
    with _rows_noted(trainer) as rows:
        for chunk in trainer.chunks:
            layers = chunk.decoder.layers
            hooks = [layer.register_forward_pre_hook(enter(str(layer.layer_number - 1))) for layer in layers]
            hooks += [layer.register_forward_hook(leave) for layer in layers]
            if chunk.post_process:
                hooks.append(chunk.decoder.final_layernorm.register_forward_pre_hook(enter("head")))
            if not chunk.pre_process:
                shape = (length, config.run.micro_batch_size, config.model.hidden_size)
                dtype = trainer.parameters[0].tensor.dtype
                chunk.set_input_tensor(torch.randn(shape, dtype=dtype).requires_grad_())
            with saved_tensors_hooks(pack, lambda nothing: nothing):
                output = chunk(ids, None, None, labels=ids if chunk.post_process else None)
            del output
            for hook in hooks:
                hook.remove()
            if not chunk.pre_process:
                chunk.decoder.input_tensor = None
    seen.clear()
    return found, rows


@contextmanager
def _rows_noted(trainer: Trainer) -> Iterator[dict[int, list[list[tuple[int, int]]]]]:
    """0-based layer -> by micro-batch, for each chunk of experts and then each hop: (rows sent, rows received)."""
    noted: dict[int, list[list[tuple[int, int]]]] = {}
    layer = 0
    plan, route_and_apply = Exchange.plan, MoELayer._route_and_apply

    def noted_plan(self: Exchange, tokens_per_expert: Tensor) -> Any:
        routes = plan(self, tokens_per_expert)
        # Full recompute goes through here twice, first without gradients.
        if trainer.config.parallel.recompute != "full" or not torch.is_grad_enabled():
            noted.setdefault(layer, []).append(
                [(sum(hop.send_counts), sum(hop.receive_counts)) for route in routes for hop in route.hops]
            )
        return routes

    def noted_layer(self: MoELayer, *args: Any, **kwargs: Any) -> Any:
        nonlocal layer
        layer = self.layer
        return route_and_apply(self, *args, **kwargs)

    Exchange.plan, MoELayer._route_and_apply = noted_plan, noted_layer
    try:
        yield noted
    finally:
        Exchange.plan, MoELayer._route_and_apply = plan, route_and_apply


def vars_of(load: Any) -> list[Tensor]:
    return [value for value in vars(load).values() if isinstance(value, Tensor)]


def _watch(trainer: Trainer, moments: dict[str, dict[str, int]]) -> None:
    """Fill `moments` as steps go by: "backward" when the last backward pass ends, "update" when gradients are reduced.

    At stage 2 the first is just before DeepSpeed lets go of its bucket; at lower stages, before the update begins.
    """
    engine = trainer.engine

    def before(owner: Any, method: str, moment: str) -> None:
        call = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            moments[moment] = _alive(trainer)
            return call(*args, **kwargs)

        setattr(owner, method, watched)

    if engine.zero_stage == 2:
        before(engine.optimizer, "_release_ipg_buffers", "backward")
    else:
        before(engine, "apply_gradients", "backward")
    before(engine.finalizer, "finalize", "update")


def _alive(trainer: Trainer) -> dict[str, int]:
    """Bytes of distinct storages: "weights", "optimizer", "zero" (ZeRO's gradients and buckets)
    and "other", which is all that lives but the first two."""
    let_threads_finish()  # gloo's let go of the tensors of their last collective
    gc.collect()
    engine = trainer.engine
    weights = [local.tensor for local in trainer.parameters]
    masters = engine.optimizer.single_partition_of_fp32_groups if engine.zero_stage > 0 else []
    states = [v for state in engine.basic_optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    angles = [chunk.rotary_pos_emb.inv_freq for chunk in trainer.chunks if hasattr(chunk, "rotary_pos_emb")]
    averaged = engine.optimizer.averaged_gradients.values() if engine.zero_stage > 0 else ()
    inputs = [chunk.decoder.input_tensor for chunk in trainer.chunks if chunk.decoder.input_tensor is not None]
    inputs += [each.grad for each in inputs if each.grad is not None]
    named = [*(piece for pieces in averaged for piece in pieces or ()), *inputs, *angles]
    named += [*trainer.balance_bias.by_layer.values(), *trainer.balance_bias._loads.values()]
    gradients = [getattr(weight, name, None) for weight in weights for name in ("grad", "grad_accum")]
    gradients = [gradient for gradient in gradients if gradient is not None]
    kinds = {"weights": weights, "optimizer": [*masters, *states]}
    sizes = {kind: _storages(tensors) for kind, tensors in kinds.items()}
    counted = {place for storages in sizes.values() for place in storages}
    kept = {place for place in _storages([*named, *gradients]) if place not in counted}
    others = {
        place: size
        for place, size in _storages([*named, *gradients, *_living(trainer)]).items()
        if place not in counted and (size > _RESULTS_BYTES or place in kept)
    }
    zero = {place: size for place, size in _storages(_of_zero(engine)).items() if place not in counted}
    sums = {kind: sum(storages.values()) for kind, storages in sizes.items()}
    return {**sums, "other": sum(others.values()), "zero": sum(zero.values())}


def _of_zero(engine: ScheduleEngine) -> Iterator[Tensor]:
    """The gradients and buckets of stages 1 and 2, wherever DeepSpeed keeps them."""
    zero = engine.optimizer
    if engine.zero_stage == 0:
        return
    for bucket in zero.ipg_buckets.values():
        yield from bucket.buffer
    if zero.grads_in_partition is not None:
        yield zero.grads_in_partition
    for kept in (zero.all_grad_tensors, zero.averaged_gradients):
        for pieces in kept.values():
            yield from pieces or ()


def _living(trainer: Trainer) -> Iterator[Tensor]:
    """Every tensor Python knows of, but for indices, random states, load statistics and DeepSpeed's shapes on meta."""
    statistics = {id(each) for load in trainer.statistics._loads.values() for each in vars_of(load)}
    for found in gc.get_objects():
        if not issubclass(type(found), Tensor) or found.device.type == "meta" or found.dtype is torch.uint8:
            continue
        if found.dtype is not torch.int64 and id(found) not in statistics:
            yield found


def _storages(tensors: Any) -> dict[int, int]:
    """Storage -> its bytes."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            found[storage.data_ptr()] = storage.nbytes()
    return found


def _storage_bytes(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()
