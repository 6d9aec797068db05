"""What Megatron-core and DeepSpeed hard-code for CUDA, bridged where there is none. Nothing here is active with CUDA.

Each patch stands beside its reason. Megatron-core 0.16.1, DeepSpeed 0.19.8.
"""

import logging
import os
from types import ModuleType
from typing import Any

import torch

_applied = False


class _TorchWithoutCuda(ModuleType):
    """`torch` for one module that writes device="cuda" into its factory calls."""

    def __init__(self) -> None:
        super().__init__("torch")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return torch.zeros(*size, **kwargs)


class _NotTheCpuGenerator(logging.Filter):
    """Drops one warning: that drawing in Megatron's CUDA generator changed the CPU's. Here they are the same one."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()


def apply_before_import() -> None:
    """Must run before DeepSpeed is imported: it chooses its accelerator once."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def apply() -> None:
    """Make both engines run on the CPU. Idempotent; does nothing where CUDA is available."""
    global _applied
    if _applied or torch.cuda.is_available():
        return
    _applied = True
    apply_before_import()
    _bridge_torch()
    _bridge_megatron()
    _bridge_deepspeed()


def _bridge_torch() -> None:
    cpu = torch.device("cpu")
    # Megatron allocates receive buffers and gather outputs on torch.cuda.current_device().
    torch.cuda.current_device = lambda: cpu
    # Its pipeline p2p waits for the device after batched sends.
    torch.cuda.synchronize = lambda device=None: None
    # Its random-state tracker seeds and reads "the CUDA generator": the CPU's is the one that dropout draws from here.
    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()


def _bridge_megatron() -> None:
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import random

    # The schedules count tokens in torch.zeros([], device="cuda").
    schedules.torch = _TorchWithoutCuda()
    # The tracker forks and restores the CUDA generator through these two.
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(_NotTheCpuGenerator())
    logging.getLogger().addFilter(_NotTheCpuGenerator())


def _bridge_deepspeed() -> None:
    import deepspeed.ops

    # init_distributed would compile a shared-memory collective with the C++ toolchain: a minute, and a compiler that
    # a newcomer need not have. gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
