"""A run of thousands of ranks, played rank by rank in one process without memory, and held against its plan."""

import warnings

from megamoe.model import cpu_bridge
from megamoe.training import engine_warnings

engine_warnings.silence()  # both before the engines are imported
cpu_bridge.apply_before_import()
warnings.filterwarnings("ignore", message=".*CUDA_DEVICE_MAX_CONNECTIONS.*")  # of GPUs, of which none is used here
