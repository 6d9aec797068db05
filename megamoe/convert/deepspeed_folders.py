"""Folders that a DeepSpeed engine saves of a Megatron-DeepSpeed model: dense, or with DeepSpeed's mixture of experts.

    mp_rank_{MM}_model_states.pt                        all but the experts, of model rank MM = t + T * stage
    layer_{l}_expert_{e}_mp_rank_{MM}_model_states.pt   expert e (global) of the l-th MoE layer of the stage
    layer_{ii}-model_{tt}-model_states.pt               instead of the first: layer ii of a PipelineModule

Each tensor becomes `tp{t}/{name}`, with the layer's number in the whole model. The links then join the tensor ranks.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megamoe.convert.deepspeed_links import conversion_of
from megamoe.convert.deepspeed_settings import config_of, experts_of_layers, refuse_inexpressible
from megamoe.convert.from_args import Settings
from megamoe.convert.links import Conversion
from megamoe.convert.pickles import Stored, StoredSource, TorchFile, flat_tensors, open_file
from megamoe.errors import ConversionError

_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_PIPE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_OLD_EXPERT = re.compile(r"expert_\d+_mp_rank_\d+_model_states\.pt")
_ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_OPTIMIZER = re.compile(r".*_optim_states\.pt")
_LAYER = re.compile(r"(language_model\.encoder\.layers\.)(\d+)(\..+)")
_EXPERT_NAME = re.compile(r"(.+\.mlp\.)deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(.+)")


@dataclass
class _Folder:
    """The files of one checkpoint by what their names say."""

    path: Path
    model: dict[int, Path] = field(default_factory=dict)
    experts: dict[tuple[int, int, int], Path] = field(default_factory=dict)  # (model rank, MoE layer, expert)
    pipe: dict[tuple[int, int], Path] = field(default_factory=dict)  # (layer, tensor rank)


def open_deepspeed(
    path: Path, *, vocab_multiple: int | None = None, overrides: Mapping[str, Any] | None = None
) -> tuple[StoredSource, Conversion]:
    """Open a folder of DeepSpeed's engine and find the megamoe model it is.

    path: the folder of one tag, or the one above it with the file `latest`. overrides: Megatron's arguments, and
    `checkpoint_version`, that the files lack or state wrongly. The conversion is proved.

    Raises ConversionError naming the file, tensor or argument that is missing, doubled, damaged or not expressible.
    """
    folder = _list(_tagged(Path(path)))
    ranks = {rank: open_file(file) for rank, file in sorted(folder.model.items())}
    settings = _settings(ranks, folder.path, overrides)
    refuse_inexpressible(settings)
    tensor, stages = _grid(folder, settings)
    if folder.pipe:
        stored = _pipe_layers(folder, settings, tensor)
    else:
        stored = {}
        for rank, file in ranks.items():
            stored |= _dense(file, rank % tensor, rank // tensor, settings.need("num_layers", int) // stages)
    experts = _experts(folder, settings, tensor, stages)
    stored |= experts
    config = config_of(settings, {name: place.shape for name, place in stored.items()}, tensor, vocab_multiple)
    conversion = conversion_of(config, settings, {name: place.shape for name, place in stored.items()}, tensor)
    conversion.prove()
    return StoredSource(stored), conversion


def _tagged(path: Path) -> Path:
    """The folder of one tag. Raises ConversionError where there is none."""
    if not path.is_dir():
        raise ConversionError(f"{path} is no folder")
    latest = path / "latest"
    if not latest.is_file():
        return path
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not tag or Path(tag).name != tag or not (path / tag).is_dir():
        raise ConversionError(f"{latest} names {tag[:100]!r}, which is no folder beside it")
    return path / tag


def _list(path: Path) -> _Folder:
    """Sort the files. Raises ConversionError for those that mean what we cannot read, and for two of one meaning."""
    folder = _Folder(path)
    for entry in sorted(path.iterdir()):
        name = entry.name
        if _ZERO_3.fullmatch(name):
            raise ConversionError(f"{entry} is a shard of ZeRO-3: join the weights with DeepSpeed's zero_to_fp32.py")
        if _OLD_EXPERT.fullmatch(name):
            raise ConversionError(f"{entry} is of DeepSpeed before 0.5.9: the name does not say which layer it is of")
        for pattern, files in ((_MODEL, folder.model), (_EXPERT, folder.experts), (_PIPE, folder.pipe)):
            match = pattern.fullmatch(name)
            if match is None:
                continue
            numbers = tuple(map(int, match.groups()))
            key = {1: numbers[0], 2: numbers, 3: (numbers[-1], *numbers[:-1])}[len(numbers)]
            if key in files:
                raise ConversionError(f"{entry} and {files[key].name} are the same part of the model")
            files[key] = entry
            break
        else:
            if name.endswith(".pt") and not _OPTIMIZER.fullmatch(name):
                raise ConversionError(f"{entry} is no file of a DeepSpeed checkpoint of a language model")
    if not folder.model:
        raise ConversionError(f"{path / 'mp_rank_00_model_states.pt'} is missing: it holds the settings")
    return folder


def _settings(ranks: Mapping[int, TorchFile], path: Path, overrides: Mapping[str, Any] | None) -> Settings:
    """Megatron's `args` of the first rank, with the checkpoint's version; those of the others must be of one run."""
    first = next(iter(ranks.values()))
    if not isinstance(first.content, Mapping) or "module" not in first.content:
        raise ConversionError(f"{first.path} was not saved by a DeepSpeed engine: it has no `module`")
    if first.content.get("args") is None and not overrides:
        raise ConversionError(
            f"{first.path} has no `args`, which Megatron-DeepSpeed saves: the number of heads cannot be told without"
        )
    args = first.content.get("args")
    settings = Settings({} if args is None else args, f"{path}, args,", overrides)
    for file in ranks.values():
        if file.content.get("iteration") != first.content.get("iteration"):
            raise ConversionError(
                f"{file.path} is of iteration {file.content.get('iteration')}, {first.path.name} of "
                f"{first.content.get('iteration')}: they are not of one checkpoint"
            )
    settings.values.setdefault("checkpoint_version", first.content.get("checkpoint_version", 0))
    return settings


def _grid(folder: _Folder, settings: Settings) -> tuple[int, int]:
    """Tensor and pipeline parallel size. Raises ConversionError where the files are not those of such a grid."""
    tensor = settings.get("tensor_model_parallel_size", settings.get("model_parallel_size", 1))
    stages = settings.get("pipeline_model_parallel_size", 1)
    settings.refuse("virtual_pipeline_model_parallel_size", (1,), "layers of interleaved stages are not told apart")
    if folder.pipe:
        stages = 1  # the names count layers over all stages
        tensor = max(rank for _, rank in folder.pipe) + 1
    elif settings.need("num_layers", int) % stages:
        raise ConversionError(f"{settings.where} has num_layers {settings.values['num_layers']} in {stages} stages")
    expected = set(range(tensor * stages))
    if not folder.pipe and set(folder.model) != expected:
        missing, extra = sorted(expected - set(folder.model)), sorted(set(folder.model) - expected)
        name = f"mp_rank_{(missing or extra)[0]:02d}_model_states.pt"
        raise ConversionError(
            f"{folder.path / name} {'is missing' if missing else 'is one too many'}: tensor parallel {tensor} times "
            f"pipeline parallel {stages} makes {tensor * stages} such files"
        )
    return tensor, stages


def _dense(file: TorchFile, t: int, stage: int, layers_per_stage: int) -> dict[str, Stored]:
    """The tensors of one model rank by name in the whole model.

    Experts that Megatron-DeepSpeed leaves in this file, too, repeat those of the experts' own files.
    """
    found = {}
    for name, place in flat_tensors(file.content["module"], str(file.path)).items():
        name = re.sub(r"^(module\.)+", "", name)
        name = re.sub(r"^encoderlayers\.", "language_model.encoder.layers.", name)
        if _EXPERT_NAME.fullmatch(name):
            name = f"local/{name}"
        if name.startswith("language_model.transformer."):  # as Megatron called its encoder at first
            name = name.replace(".transformer.", ".encoder.", 1)
        found[f"tp{t}/{_global_layer(name, stage * layers_per_stage, layers_per_stage, file.path)}"] = place
    if stage and (tied := found.pop(f"tp{t}/word_embeddings_for_head.weight", None)):
        found[f"tp{t}/tied/language_model.embedding.word_embeddings.weight"] = tied
    return found


def _global_layer(name: str, first: int, count: int, path: Path) -> str:
    """The name with `first` added to the number of its layer."""
    match = _LAYER.search(name)
    if match is None:
        return name
    if int(match[2]) >= count:
        raise ConversionError(f"{path} has {name}, but a stage has {count} layers")
    return name[: match.start()] + f"{match[1]}{first + int(match[2])}{match[3]}"


def _experts(folder: _Folder, settings: Settings, tensor: int, stages: int) -> dict[str, Stored]:
    """Every expert of every MoE layer by name in the whole model."""
    counts, per_stage = experts_of_layers(settings), settings.need("num_layers", int) // stages
    if folder.pipe and counts:
        raise ConversionError(f"{folder.path} has experts in a PipelineModule, whose files do not say of which stage")
    found: dict[str, Stored] = {}
    used: set[tuple[int, int, int]] = set()
    for stage in range(stages):
        layers = [i for i in counts if i // per_stage == stage]
        for number, layer in enumerate(layers):
            for e in range(counts[layer]):
                keys = [(t + tensor * stage, number, e) for t in range(tensor)]
                keys = [key for key in keys if key in folder.experts]
                used.update(keys)
                _check_present(folder, settings, keys, (tensor * stage, number, e), layer)
                for key in keys:
                    found |= _expert(folder.experts[key], key[0] % tensor, e, stage * per_stage, layer)
    if strangers := sorted(set(folder.experts) - used):
        path = folder.experts[strangers[0]]
        raise ConversionError(f"{path} is one too many: {settings.where} has no such layer, expert or rank")
    return found


def _check_present(folder: _Folder, settings: Settings, keys: list, first: tuple[int, int, int], layer: int) -> None:
    """Whole experts are on one tensor rank at least; those cut by tensor parallel on each."""
    is_cut = settings.get("enable_expert_tensor_parallelism", False)
    needed = settings.get("tensor_model_parallel_size", 1) if is_cut else 1
    if len(keys) >= needed:
        return
    rank = next(first[0] + t for t in range(needed) if (first[0] + t, *first[1:]) not in keys)
    name = f"layer_{first[1]}_expert_{first[2]}_mp_rank_{rank:02d}_model_states.pt"
    raise ConversionError(f"{folder.path / name} is missing: it holds expert {first[2]} of layer {layer}")


def _expert(path: Path, t: int, expert: int, first_layer: int, layer: int) -> dict[str, Stored]:
    """The tensors of one expert file, whose own names must say what the file's name says."""
    found = {}
    for name, place in flat_tensors(open_file(path).content, str(path)).items():
        name = re.sub(r"^(module\.)+", "", name).replace("language_model.transformer.", "language_model.encoder.")
        match, inner = _EXPERT_NAME.fullmatch(name), _LAYER.search(name)
        if match is None or inner is None or inner.start() != 0:
            raise ConversionError(f"{path} holds {name}, which is no tensor of an expert of Megatron-DeepSpeed")
        if int(match[2]) != expert or int(inner[2]) + first_layer != layer:
            raise ConversionError(
                f"{path} should be expert {expert} of layer {layer} (of its stage: {layer - first_layer}), but its "
                f"tensors are of expert {match[2]} of layer {inner[2]}"
            )
        found[f"tp{t}/language_model.encoder.layers.{layer}{name[inner.end(2) :]}"] = place
    return found


def _pipe_layers(folder: _Folder, settings: Settings, tensor: int) -> dict[str, Stored]:
    """The tensors of a PipelineModule: embedding, layers in their order, final norm, head or tied embedding."""
    by_layer: dict[int, dict[int, Path]] = defaultdict(dict)
    for (index, t), path in folder.pipe.items():
        by_layer[index][t] = path
    found: dict[str, Stored] = {}
    num_seen = num_embeddings = 0
    for index, paths in sorted(by_layer.items()):
        if missing := set(range(tensor)) - set(paths):
            name = f"layer_{index:02d}-model_{min(missing):02d}-model_states.pt"
            raise ConversionError(f"{folder.path / name} is missing: tensor parallel has {tensor} ranks")
        parts = {t: flat_tensors(open_file(path).content, str(path)) for t, path in sorted(paths.items())}
        if "word_embeddings.weight" in parts[0]:
            prefix = "tied/" * num_embeddings + "language_model.embedding."
            num_embeddings += 1
        elif "input_layernorm.weight" in parts[0]:
            prefix, num_seen = f"language_model.encoder.layers.{num_seen}.", num_seen + 1
        elif "lm_head.weight" in parts[0]:
            prefix = ""
        else:
            prefix = "language_model.encoder.final_layernorm."
        for t, part in parts.items():
            for name, place in part.items():
                full = "language_model.output_layer.weight" if name == "lm_head.weight" else f"{prefix}{name}"
                if f"tp{t}/{full}" in found:
                    raise ConversionError(f"{paths[t]} holds {name}, as a file before it does")
                found[f"tp{t}/{full}"] = place
    return found
