"""The tools that hold plans to published figures, imported as modules."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def _tool(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


plan_accuracy = _tool("plan_accuracy")
plan_memory = _tool("plan_memory")
