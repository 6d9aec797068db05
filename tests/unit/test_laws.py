"""The laws of the house, read from the imports: who may import whom, where the engines live, what stays free of torch.

Everything here parses the source; only one test starts an interpreter. To allow something new, edit the constants.
"""

import ast
import functools
import subprocess
import sys
from collections import Counter
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60

# Law 1: the parts of megamoe that each part may import, besides itself. A part that is not listed may import nothing.
MAY_IMPORT = {
    "errors": set(),
    "arguments": set(),
    "progress": set(),
    "host_memory": set(),
    "printing": {"errors"},
    "phases": set(),
    "runs": {"errors", "config", "checkpoint", "launch"},
    "attempt_commands": {"errors", "runs"},
    "preflight": {"errors", "config", "launch", "data", "checkpoint", "plan", "runs"},
    "preflight_commands": {"errors", "arguments", "config", "launch", "runs", "preflight"},
    "watchdog": {"errors", "phases"},
    "config": {"errors"},
    "launch": {"errors", "host_memory"},
    "topology": {"errors", "config"},
    "data": {"errors", "progress", "config"},
    "checkpoint": {"errors", "config", "topology"},
    "checkpoint_commands": {"errors", "progress", "config", "topology", "checkpoint"},
    "convert": {"errors", "host_memory", "config", "topology", "data", "checkpoint"},
    "verification": {"errors", "config", "topology", "data", "launch", "checkpoint", "convert", "training"},
    "inference": {"errors", "host_memory", "config", "topology", "launch", "checkpoint", "convert", "model", "moe",
                  "training"},
    "generation": {"errors", "printing", "config", "data", "launch", "checkpoint", "inference"},
    "generate_commands": {"errors", "arguments", "data", "launch", "inference", "generation"},
    "priming": {"errors", "progress", "printing", "config", "data", "checkpoint", "runs", "model", "inference"},
    "prime_commands": {"errors", "arguments", "config", "data", "launch", "inference", "priming"},
    "evaluation": {"errors", "progress", "printing", "config", "topology", "data", "checkpoint", "inference",
                   "training"},
    "evaluate_commands": {"errors", "arguments", "config", "launch", "inference", "evaluation"},
    "convert_commands": {"errors", "progress", "config", "data", "checkpoint", "convert",
                         "verification"},
    "study": {"errors", "progress", "config", "topology", "checkpoint", "launch", "data", "runs", "pictures", "plan",
              "dry_run", "report", "evaluation", "inference"},
    "study_commands": {"errors", "arguments", "config", "study"},
    "hf": set(),
    "pictures": set(),
    "report": {"errors", "config", "topology", "checkpoint", "runs", "pictures"},
    "report_commands": {"errors", "arguments", "report"},
    "surgery": {"errors", "config", "topology", "checkpoint", "runs"},
    "surgery_commands": {"errors", "progress", "config", "topology", "checkpoint", "surgery",
                         "verification"},
    "plan": {"errors", "config", "topology", "pictures"},
    "plan_commands": {"errors", "arguments", "progress", "config", "launch", "plan", "dry_run"},
    "dry_run": {"errors", "config", "topology", "data", "launch", "plan", "model", "moe", "training"},
    "sinks": {"errors", "config", "checkpoint", "runs"},
    "submit": {"errors", "config", "topology", "plan", "runs", "checkpoint"},
    "submit_commands": {"errors", "arguments", "config", "submit"},
    "model": {"errors", "phases", "config", "topology", "moe"},
    "moe": {"errors", "phases", "config", "topology"},
    "training": {"errors", "phases", "config", "topology", "model", "moe", "data", "launch", "checkpoint", "runs",
                 "sinks", "watchdog"},
    "cli": {"errors", "arguments", "host_memory", "printing", "config", "topology", "launch", "training", "data",
            "checkpoint", "runs", "attempt_commands", "preflight_commands", "checkpoint_commands", "convert_commands",
            "generate_commands", "plan_commands", "report_commands", "submit_commands", "surgery_commands",
            "finetune_commands", "evaluate_commands", "prime_commands", "study_commands",
            "train_start"},
    "train_start": {"errors", "arguments", "host_memory", "config", "launch", "training", "runs", "attempt_commands"},
    "finetune_commands": {"errors", "config", "topology", "data", "launch", "checkpoint", "runs", "training",
                          "train_start"},
    "__main__": {"cli"},
    "__init__": set(),
}

# Law 2: the files that may import an engine. Patterns, with / as on disk, relative to megamoe/.
ENGINES = {"megatron", "deepspeed"}
ENGINE_FILES = {
    "megatron": ("model/*.py", "moe/layer.py", "moe/shared.py", "training/groups.py", "training/engine.py",
                 "training/step.py", "inference/schedule.py"),
    "deepspeed": ("model/cpu_bridge.py", "moe/layer.py", "training/groups.py", "training/engine.py",
                  "dry_run/accelerator.py"),
}

# Law 5: importing these must not bring torch in, nor anything that imports torch.
TORCH_FREE = ("cli", "phases", "printing", "runs", "sinks", "watchdog", "attempt_commands", "preflight_commands",
              "config", "topology", "plan", "launch", "data", "checkpoint", "checkpoint_commands", "convert", "surgery",
              "surgery_commands", "convert_commands", "plan_commands", "pictures", "report", "report_commands",
              "submit", "submit_commands", "train_start", "finetune_commands", "generate_commands",
              "prime_commands", "evaluate_commands", "study", "study_commands")
IMPORTS_TORCH = {"torch", "deepspeed", "megatron", "transformers", "safetensors.torch", "apex"}


class Import(NamedTuple):
    """One imported module name, as found in one file."""

    target: str  # absolute: "megamoe.config.schema"
    line: int
    lazy: bool  # inside a function: happens when it is called, not when the file is imported


def package_files() -> list[Path]:
    return sorted((ROOT / "megamoe").rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


@functools.cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in package_files()}


@functools.cache
def imports_of(path: Path) -> tuple[Import, ...]:
    """Every import of a file, absolute; `from package import module` counts as an import of the module."""
    found: list[Import] = []
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, lazy: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                found.append(Import(inner if inner in modules() else source, node.lineno, lazy))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:  # the body is never run
                visit(child, lazy)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inside)

    visit(tree_of(path), False)
    return tuple(found)


def part_of(module: str) -> str | None:
    """ "megamoe.config.schema" -> "config"; the package itself -> "__init__"; None outside megamoe."""
    names = module.split(".")
    if names[0] != "megamoe":
        return None
    return names[1] if len(names) > 1 else "__init__"


def loaded_with(module: str) -> dict[str, str | None]:
    """Every megamoe module and outside name that importing `module` brings in, each with the file that asks for it."""
    reached: dict[str, str | None] = {}
    waiting: list[tuple[str, str | None]] = [(module, None)]
    while waiting:
        name, asker = waiting.pop()
        if name in reached:
            continue
        reached[name] = asker
        names = name.split(".")
        if len(names) > 1:
            waiting.append((".".join(names[:-1]), asker))  # a package's __init__ runs before its modules
        if name in modules():
            path = modules()[name]
            waiting += [
                (found.target, f"{relative(path)}:{found.line}") for found in imports_of(path) if not found.lazy
            ]
    return reached


def has_prefix(module: str, prefixes: set[str]) -> bool:
    names = module.split(".")
    return any(".".join(names[:length]) in prefixes for length in range(1, len(names) + 1))


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def written_files() -> list[Path]:
    """What length and pickle rules hold for: the package and the tools."""
    return package_files() + sorted((ROOT / "tools").rglob("*.py"))


def test_imports_point_one_way():
    """Law 1."""
    wrong = []
    for path in package_files():
        part = part_of(module_name(path))
        for found in imports_of(path):
            target = part_of(found.target)
            if target in (None, part, "__init__"):
                continue
            if target not in MAY_IMPORT.get(part, set()):
                wrong.append(f"{relative(path)}:{found.line} imports {found.target}")
    assert not wrong, "\n".join(wrong)


def test_the_rules_themselves_have_no_cycle_and_keep_model_and_data_apart():
    """Guards the table above when somebody edits it."""
    order: list[str] = []
    left = {part: set(allowed) for part, allowed in MAY_IMPORT.items()}
    while left:
        free = sorted(part for part, allowed in left.items() if allowed <= set(order))
        assert free, f"the rules let these import each other in a circle: {sorted(left)}"
        order += free
        left = {part: allowed for part, allowed in left.items() if part not in free}
    for one, other in (
        ("model", "data"),
        ("data", "model"),
        ("moe", "data"),
        ("training", "plan"),
        ("training", "convert"),
    ):
        assert other not in MAY_IMPORT[one]


def test_the_command_line_imports_its_work_only_when_asked():
    """Law 1 and 5: cli.py may reach training and data, but inside functions."""
    path = modules().get("megamoe.cli")
    assert path is not None, "megamoe/cli.py is missing"
    eager = [found for found in imports_of(path) if not found.lazy and part_of(found.target) in {"training", "data"}]
    assert not eager, [f"{relative(path)}:{found.line} imports {found.target}" for found in eager]


def test_no_module_imports_itself_in_a_circle():
    """Also within a part. Imports inside functions do not count: they are how a circle is opened."""
    edges = {
        name: {found.target for found in imports_of(path) if not found.lazy and found.target in modules()} - {name}
        for name, path in modules().items()
    }
    # Peel off modules that import nothing that is left; what cannot be peeled is in a circle or leads to one.
    while free := [name for name, targets in edges.items() if not targets & edges.keys()]:
        for name in free:
            del edges[name]
    while leaves := [name for name in edges if not any(name in targets for targets in edges.values())]:
        for name in leaves:
            del edges[name]
    assert not edges, f"modules that import each other: {sorted(edges)}"


@pytest.mark.parametrize("engine", sorted(ENGINES))
def test_engines_are_imported_in_named_files_only(engine):
    """Law 2, imports inside functions included."""
    wrong = []
    for path in package_files():
        inside = path.relative_to(ROOT / "megamoe").as_posix()
        if any(fnmatch(inside, pattern) for pattern in ENGINE_FILES[engine]):
            continue
        wrong += [f"{relative(path)}:{found.line}" for found in imports_of(path) if has_prefix(found.target, {engine})]
    assert not wrong, f"{engine} is imported outside the files named in ENGINE_FILES: {wrong}"


@pytest.mark.parametrize("part", TORCH_FREE)
def test_no_torch_can_be_reached_by_imports(part):
    """Law 5, by reading: says which file brings torch in."""
    names = [name for name in modules() if part_of(name) == part]
    assert names, f"megamoe.{part} is missing"
    wrong = {}
    for name in names:
        for reached, asker in loaded_with(name).items():
            if has_prefix(reached, IMPORTS_TORCH):
                wrong[asker] = reached
    assert not wrong, "\n".join(f"{asker} imports {reached}" for asker, reached in sorted(wrong.items()))


def test_no_torch_is_loaded_by_the_fast_paths():
    """Law 5, by doing: catches what third packages load, too."""
    names = ["megamoe.cli", *(name for name in modules() if part_of(name) in TORCH_FREE)]
    program = (
        f"import sys, importlib\nfor name in {sorted(set(names))!r}:\n    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'importing {name} loads torch'\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_files_and_functions_stay_short():
    long = []
    for path in (*written_files(), *(ROOT / "tests").rglob("*.py")):
        num_lines = len(path.read_text().splitlines())
        if num_lines > LONGEST_FILE:
            long.append(f"{relative(path)} has {num_lines} lines, the most is {LONGEST_FILE}")
    for path in written_files():
        for function in functions_of(path):
            num_lines = function.end_lineno - function.lineno + 1
            if num_lines > LONGEST_FUNCTION:
                long.append(
                    f"{relative(path)}:{function.lineno} {function.name} has {num_lines} lines, "
                    f"the most is {LONGEST_FUNCTION}"
                )
    assert not long, "\n".join(long)


def test_nothing_is_pickled():
    """Also not by way of torch.load, which unpickles unless told weights_only=True."""
    wrong = []
    for path in written_files():
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            else:
                names = set()
            wrong += [
                f"{relative(path)}:{node.lineno} imports {name}" for name in names & {"pickle", "dill", "cloudpickle"}
            ]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "torch.load",
                "torch.save",
                "np.load",
                "numpy.load",
            }:
                wrong += [f"{relative(path)}:{node.lineno} {problem}" for problem in pickling(node)]
    assert not wrong, "\n".join(wrong)


def pickling(call: ast.Call) -> list[str]:
    """What is wrong with one call that may pickle."""
    called = ast.unparse(call.func)
    options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if called == "torch.save":
        return ["torch.save writes a pickle: write safetensors"]
    if called == "torch.load" and options.get("weights_only") != "True":
        return ["torch.load without weights_only=True"]
    if called in {"np.load", "numpy.load"} and options.get("allow_pickle", "False") != "False":
        return [f"{called} with allow_pickle"]
    return []


def test_no_two_files_of_a_part_share_a_name():
    """The next reader finds a thing by its folder's name: megamoe/x.py beside megamoe/x/ would hide one of them."""
    twice = [name for name, count in Counter(module_name(path) for path in package_files()).items() if count > 1]
    assert not twice, twice
