"""From a preset or a YAML file, and overrides of the command line, to one frozen `Config`.

Later sources win: preset, then file, then overrides in their order. Groups are merged key by key, lists are replaced.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from pydantic import ValidationError

from megamoe.config.keys import accepted, check_keys, field_at
from megamoe.config.presets import PRESETS
from megamoe.config.schema import Config, Section
from megamoe.errors import ConfigError

COMMAND_LINE = "the command line"
Settings = TypeVar("Settings", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML as users of a configuration mean it.

    PyYAML follows YAML 1.1: it takes `1e-4` for text, `010` for eight and `12:30` for 750. Here numbers are those of
    YAML 1.2, `1e6` is a whole number, dates stay text, and a key given twice is an error.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in ("bool", "null", "merge")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }


class _Dumper(yaml.SafeDumper):
    """One setting a line, lists on one line, quotes around text that `_Loader` or YAML 1.1 would take for a number."""


_Dumper.add_representer(
    list, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)


_INT = re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf))$"
    r"|\.(?:nan|NaN)$"
)
_WHOLE_EXPONENT = re.compile(r"([-+]?[0-9_]+)[eE]\+?([0-9]{1,2})$")
for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:int", _INT, list("-+0123456789"))
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _construct_number(loader: _Loader, node: yaml.ScalarNode) -> int | float:
    whole = _WHOLE_EXPONENT.match(node.value)
    if whole:
        return int(whole[1].replace("_", "")) * 10 ** int(whole[2])
    return loader.construct_yaml_float(node)


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f'key "{key.value}" is given twice', problem_mark=key.start_mark)
            seen.add(key.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_number)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


@dataclass(frozen=True)
class Layer:
    """One source of settings, checked for unknown keys, and its name for error messages."""

    tree: Mapping[str, Any]
    where: str


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration that `source` (a preset's name or a YAML file) and `section.key=value` overrides describe.

    A file may name a preset to start from with the top key `preset`. Override values are YAML. Types and bounds are
    checked here; what several keys must agree on is checked by `megamoe.config.validation.validate`.
    Raises ConfigError, one sentence: unknown source or key with the nearest, wrong value with what is valid.
    """
    return resolve(layers_of(source, overrides))


def layers_of(source: str | None, overrides: Sequence[str]) -> list[Layer]:
    """What `load_config` is made of, the least first. Raises ConfigError for what cannot be read."""
    return [*(_source_layers(source) if source is not None else ()), *(_override_layer(each) for each in overrides)]


def override_config(config: Config, overrides: Sequence[str], where: str) -> Config:
    """`config`, which came from `where`, with `section.key=value` overrides. Raises ConfigError as `load_config`."""
    return resolve([Layer(config.model_dump(mode="json"), where), *layers_of(None, overrides)])


def layered_config(trees: Sequence[tuple[Mapping[str, Any], str]]) -> Config:
    """The configuration of several trees, each with what holds it for messages, the later ones above. The first may
    name a preset. Raises ConfigError as `load_config`."""
    layers = []
    for tree, where in trees:
        own = dict(tree)
        if not layers and "preset" in own:
            name = str(own.pop("preset"))
            layers.append(Layer(preset_tree(name, where), f"preset {name}"))
        layers.append(Layer(own, where))
    return resolve(layers)


def checked_settings(kind: type[Settings], tree: Any, where: str) -> Settings:
    """`tree`, which came from `where`, as settings of another schema. Raises ConfigError as `load_config`."""
    check_keys(tree, where, kind, root=kind)
    try:
        return kind.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, [Layer(tree, where)], kind)) from None


def resolve(layers: Sequence[Layer]) -> Config:
    """The configuration that `layers` make, each above the one before. Raises ConfigError as `load_config`."""
    tree: dict[str, Any] = {}
    for layer in layers:
        check_keys(layer.tree, layer.where)
        tree = _merge(tree, layer.tree)
    try:
        # Strict, and by way of JSON: "3" and true are no numbers, yet a list is a tuple.
        return Config.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        raise ConfigError(_explain(error, tree, layers)) from None


def dump_yaml(config: Config, notes: Mapping[str, object] | None = None) -> str:
    """The whole configuration as YAML that `load_config` reads back to an equal one.

    notes: by dotted key of a section's own value, what stands beside it as a comment.
    """
    lines = []
    for section, settings in config.model_dump(mode="json").items():
        lines.append(f"{section}:")
        for line in yaml.dump(settings, Dumper=_Dumper, sort_keys=False, width=10_000).splitlines():
            note = (notes or {}).get(f"{section}.{line.partition(':')[0]}")
            lines.append(f"  {line}" + ("" if note is None else f"  # {note}"))
    return "\n".join(lines) + "\n"


def preset_tree(name: str, where: str = "") -> Mapping[str, Any]:
    """The settings of a preset that differ from the schema's defaults. Raises ConfigError naming the nearest."""
    if name in PRESETS:
        return PRESETS[name].tree
    asked_in = f" in {where}" if where else ""
    raise ConfigError(f'no preset "{name}"{asked_in}: {_nearest_preset(name)}')


def _nearest_preset(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.5)
    return f'did you mean "{near[0]}"?' if near else f"the presets are {', '.join(PRESETS)}"


def _source_layers(source: str) -> list[Layer]:
    if source in PRESETS:
        return [Layer(PRESETS[source].tree, f"preset {source}")]
    path = Path(source)
    if not path.exists():
        if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
            raise ConfigError(f'no file "{source}", nor a preset of that name: {_nearest_preset(path.stem)}')
        raise ConfigError(f'no preset or file "{source}": {_nearest_preset(source)}')
    tree = read_settings(path)
    layers = []
    if "preset" in tree:
        name = tree.pop("preset")
        layers.append(Layer(preset_tree(str(name), source), f"preset {name}"))
    # A section left empty, as when all its lines are commented out, changes nothing.
    return [*layers, Layer({key: {} if value is None else value for key, value in tree.items()}, source)]


def read_settings(path: Path) -> dict[Any, Any]:
    """The groups of settings in a YAML file, nothing checked. Raises ConfigError where it cannot be read as such."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not a text file in UTF-8: give a YAML file") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    tree = parse_yaml(text, str(path))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} does not hold groups of settings: write for example run: {{num_steps: 100}}")
    return tree


def parse_yaml(text: str, where: str) -> Any:
    """What the YAML of `where` holds, nothing checked. Raises ConfigError where it is none, or has a key twice."""
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds no objects
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"cannot read {where}{line}: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"cannot read {where}: {str(error).splitlines()[0]}") from None


def _override_layer(override: str) -> Layer:
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(
            f'cannot read "{override}" in {COMMAND_LINE}: write section.key=value, as in run.num_steps=100'
        )
    if key == "preset":
        raise ConfigError(f"a preset cannot be set in {COMMAND_LINE}: give its name in place of the file")
    parts = key.split(".")
    _, annotation, _, used = field_at(parts)
    is_text = used == len(parts) and annotation in (str, str | None)
    if is_text and text.strip() not in ("", "~", "null") and text.lstrip()[0] not in "'\"":
        value: Any = text  # run.dir=2026 is a name and no number, a prompt may hold ": "
    else:
        try:
            value = parse_yaml(text, f'the value of "{key}" in {COMMAND_LINE}')
        except ConfigError as error:
            raise ConfigError(str(error).replace(", line 1:", ":")) from None
    tree: Any = value
    for part in reversed(parts):
        tree = {part: tree}
    return Layer(tree, COMMAND_LINE)


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old if isinstance(old, Mapping) else {}, value) if isinstance(value, Mapping) else value
    return merged


def _explain(
    error: ValidationError, tree: Mapping[str, Any], layers: Sequence[Layer], root: type[Section] = Config
) -> str:
    """One sentence for the first thing that is wrong: which key, what it is, where that was said, what is valid."""
    detail = error.errors(include_url=False)[0]
    location = detail["loc"]
    key, annotation, metadata, used = field_at(location, root)
    path = location[:used]
    where = _where(path, layers)
    if detail["type"] == "missing" and used == len(location):
        return f"{key} is missing in {where}: it must be {accepted(annotation, metadata)}"
    value: Any = tree
    for part in path:
        value = value[part]
    return f"{key} is {json.dumps(value)} in {where}: it must be {accepted(annotation, metadata)}"


def _where(path: Sequence[str | int], layers: Sequence[Layer]) -> str:
    """The last source that said anything about `path`, or about what holds it."""
    best, best_depth = layers[-1].where, 0
    for layer in layers:
        depth, value = 0, cast(Any, layer.tree)
        for part in path:
            try:
                value = value[part]
            except (KeyError, IndexError, TypeError):
                break
            depth += 1
        if depth and depth >= best_depth:
            best, best_depth = layer.where, depth
    return best
