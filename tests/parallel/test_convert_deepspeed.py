"""Folders of DeepSpeed: saved by its real engine on two ranks, and by a literal writer for more kinds of ranks."""

import os
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.cli import main
from megamoe.convert.deepspeed_folders import open_deepspeed
from megamoe.errors import ConversionError
from megamoe.verification.own_logits import own_logits
from tests.harness import run_ranks
from tests.parallel.megatron_deepspeed import ARGS, EXPERTS, FFN, HEAD_DIM, HEADS, LAYERS, ROWS, D, Model, nested
from tests.parity.reference import forward
from tests.unit.convert_sources import converted, tensor

TAGS = ("residual", "plain", "half")


def save_with_deepspeed(folder: str) -> list[torch.Tensor]:
    """On each of two ranks with half of the experts: DeepSpeed's engine saves the model; its logits [2, 6, V]."""
    import deepspeed
    import torch.distributed as dist
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer as in_groups

    from megamoe.model import cpu_bridge

    cpu_bridge.apply()
    deepspeed.init_distributed("gloo", dist_init_required=False)
    found = []
    for tag in TAGS:
        half = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}} if tag == "half" else {}
        model = Model(2, residual=tag != "plain")
        for name, parameter in model.named_parameters():
            own = name if "deepspeed_experts" not in name else f"{name} of rank {dist.get_rank()}"
            parameter.data.copy_(tensor(own, *parameter.shape) * (8 if "gate.wg" in name else 1))
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, **half}
        optimizer = torch.optim.AdamW(in_groups({"params": list(model.parameters()), "name": "all"}), lr=1e-3)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if tag == "plain":  # as Megatron-DeepSpeed has it: nested, experts at the top, where the engine leaves them
            flat = model.state_dict
            model.state_dict = lambda *_, _flat=flat, **__: nested(_flat())
        args = ARGS | {"mlp_type": "standard" if tag == "plain" else "residual", "moe_expert_parallel_size": 2}
        client = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 7}
        engine.save_checkpoint(folder, tag=tag, client_state=client)
        tokens = torch.randint(0, ROWS, (2, 6), generator=torch.Generator().manual_seed(1))
        model.eval().float()
        with torch.no_grad():
            found.append(model(tokens))
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    logits = run_ranks(save_with_deepspeed, 2, str(folder), timeout_seconds=180)
    return folder, logits[0]


@pytest.mark.parametrize("tag", TAGS)
def test_a_model_saved_by_deepspeed_has_the_logits_it_had_there(saved, tag):
    folder, logits = saved
    source, conversion = open_deepspeed(folder / tag)
    weights = converted(source, conversion)
    tokens = torch.randint(0, ROWS, (2, 6), generator=torch.Generator().manual_seed(1))
    ours = forward(conversion.config, weights, tokens)[0]
    torch.testing.assert_close(ours, logits[TAGS.index(tag)], rtol=0, atol=2e-5)
    assert len(list((folder / tag).glob("layer_*_expert_*"))) == 2 * EXPERTS
    moe = conversion.config.moe
    assert (moe.num_experts, moe.top_k, moe.layer_pattern, moe.dropless) == (EXPERTS, 2, 2, True)
    assert (moe.shared_expert_mix == "residual") == (tag != "plain")


def test_the_command_makes_a_run_that_computes_the_same(saved, tmp_path, capsys):
    folder, logits = saved
    assert main(["convert", "from-deepspeed", str(folder / "residual"), str(tmp_path / "run")]) == 0
    assert "is complete" in capsys.readouterr().out
    tokens = torch.randint(0, ROWS, (2, 6), generator=torch.Generator().manual_seed(1))
    ours = torch.from_numpy(own_logits(resolve_checkpoint(tmp_path / "run"), tokens.numpy()))
    torch.testing.assert_close(ours[..., :ROWS], logits[0][..., :ROWS], rtol=0, atol=2e-5)


def test_the_newest_tag_is_taken_and_must_be_there(saved, tmp_path):
    folder, _ = saved
    assert (folder / "latest").read_text() == "half"
    source, _ = open_deepspeed(folder)
    assert source.tensors["tp0/language_model.encoder.final_layernorm.weight"].dtype == "BF16"
    for text in ("../x", "gone", ""):
        (tmp_path / "latest").write_text(text)
        with pytest.raises(ConversionError, match="latest"):
            open_deepspeed(tmp_path)


def refusal(folder: Path, **options) -> str:
    with pytest.raises(ConversionError) as caught:
        open_deepspeed(folder, **options)
    return str(caught.value)


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_files_that_are_missing_too_many_exchanged_cut_or_hostile_are_named(saved, tmp_path):
    folder, _ = saved
    changed = tmp_path / "changed"

    def with_change(change, **options) -> str:
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(folder / "residual", changed)
        change()
        return refusal(changed, **options)

    def expert(layer: int, number: int, rank: int = 0) -> Path:
        return changed / f"layer_{layer}_expert_{number}_mp_rank_{rank:02d}_model_states.pt"

    whole = changed / "mp_rank_00_model_states.pt"
    said = with_change(lambda: expert(1, 2).unlink())
    assert f"{expert(1, 2)} is missing" in said and "expert 2 of layer 3" in said
    assert "is one too many" in with_change(lambda: shutil.copy(expert(0, 1), expert(0, 4)))
    assert "is one too many" in with_change(lambda: shutil.copy(expert(0, 1), expert(2, 1)))
    assert "are the same part" in with_change(
        lambda: shutil.copy(expert(0, 1), changed / expert(0, 1).name.replace("_1_", "_01_"))
    )
    assert "should be expert 1 of layer 1" in with_change(lambda: shutil.copy(expert(0, 2), expert(0, 1)))
    assert "should be expert 1 of layer 1" in with_change(lambda: shutil.copy(expert(1, 1), expert(0, 1)))
    assert f"{expert(0, 3)} is cut short" in with_change(lambda: os.truncate(expert(0, 3), 900))
    assert f"{whole} is missing" in with_change(whole.unlink)
    assert "mp_rank_01_model_states.pt is one too many" in with_change(
        lambda: shutil.copy(whole, changed / "mp_rank_01_model_states.pt")
    )
    assert "ZeRO-3" in with_change(lambda: whole.rename(changed / "zero_pp_rank_0_mp_rank_00_model_states.pt"))
    assert "before 0.5.9" in with_change(
        lambda: shutil.copy(expert(0, 0), changed / "expert_0_mp_rank_00_model_states.pt")
    )
    said = with_change(lambda: torch.save({"module": {}, "args": Trap(tmp_path / "sprung")}, whole))
    assert str(whole) in said and "posix.system" in said and not (tmp_path / "sprung").exists()
    assert "no `args`" in with_change(lambda: torch.save({"module": {}}, whole))
    assert "learned positions" in with_change(lambda: None, overrides={"use_rotary_position_embeddings": False})
    assert "num_experts" in with_change(lambda: None, overrides={"num_experts": [4, 2, 2]})
    assert "expert_2" in with_change(lambda: None, overrides={"num_experts": [4, 2]})
    assert "checkpoint_version 5" in with_change(lambda: None, overrides={"checkpoint_version": 5})
    assert "apply_layernorm_1p" in with_change(lambda: None, overrides={"apply_layernorm_1p": True})
    assert "mlp.coefficient" in with_change(lambda: None, overrides={"mlp_type": "standard"})


GATED = ARGS | {
    "num_key_value_heads": 2, "swiglu": True, "add_bias_linear": False, "bias_gelu_fusion": False,
    "normalization": "rmsnorm", "untie_embeddings_and_output_weights": True, "mlp_type": "standard",
}  # fmt: skip


def whole_model(args: dict) -> dict[str, torch.Tensor]:
    """Every matrix uncut and unfused: q, k, v [heads, head_dim, d], gate and linear half apart."""
    groups, model = args["num_key_value_heads"], {}
    bias, ends = args["add_bias_linear"], ("weight", "bias")

    def add(name: str, *shape: int, with_bias: bool = bias) -> None:
        model[f"{name}.weight"] = tensor(name, *shape)
        if with_bias:
            model[f"{name}.bias"] = tensor(f"{name} bias", *(shape[:-1] if len(shape) > 1 else shape))

    def ffn(name: str) -> None:
        for half in ("gate", "up") if args["swiglu"] else ("up",):
            add(f"{name}.{half}", FFN, D)
        add(f"{name}.down", D, FFN)

    add("embedding", ROWS, D, with_bias=False)
    if args["untie_embeddings_and_output_weights"]:
        add("head", ROWS, D, with_bias=False)
    for i in range(LAYERS):
        for part, heads in (("q", HEADS), ("k", groups), ("v", groups)):
            add(f"{i}.{part}", heads, HEAD_DIM, D)
        add(f"{i}.out", D, HEADS * HEAD_DIM)
        for norm in ("first", "second"):
            add(f"{i}.{norm}", D, with_bias=args["normalization"] == "layernorm")
        if (i + 1) % 2 == 0 and args["num_experts"] != [1]:
            add(f"{i}.gate", EXPERTS, D, with_bias=False)
            for e in range(EXPERTS):
                ffn(f"{i}.expert{e}")
        else:
            ffn(f"{i}.mlp")
    add("final", D, with_bias=args["normalization"] == "layernorm")
    assert all(name.endswith(ends) for name in model)
    return model


def cut(value: torch.Tensor, t: int, size: int, dim: int = 0) -> torch.Tensor:
    return value.chunk(size, dim)[t].clone()


def rank_layer(model: dict, args: dict, i: int, t: int, size: int, order: str) -> tuple[dict, dict]:
    """The tensors of layer i on tensor rank t by their names in the layer, and those of its experts by number."""
    found, experts, groups = {}, {}, args["num_key_value_heads"]
    is_cut = args["enable_expert_tensor_parallelism"]

    def ffn(name: str, cutting: bool) -> dict:
        part = (lambda v, d=0: cut(v, t, size, d)) if cutting else (lambda v, d=0: v)
        halves, out = (("gate", "up") if args["swiglu"] else ("up",)), {}
        for end in ("weight", "bias") if args["add_bias_linear"] else ("weight",):
            out[f"dense_h_to_4h.{end}"] = torch.cat([part(model[f"{name}.{half}.{end}"]) for half in halves])
            out[f"dense_4h_to_h.{end}"] = model[f"{name}.down.{end}"]
        return out | {"dense_4h_to_h.weight": part(model[f"{name}.down.weight"], 1)}

    for end in ("weight", "bias") if args["add_bias_linear"] else ("weight",):
        q, k, v = (cut(model[f"{i}.{part}.{end}"], t, size) for part in "qkv")
        if order == "part":
            rows = torch.cat([q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)])
        elif order == "inner":
            rows = torch.stack([q, k, v], 2).flatten(0, 2)
        else:
            q = q.unflatten(0, (groups // size, -1))
            rows = torch.cat([torch.cat([q[g].flatten(0, 1), k[g], v[g]]) for g in range(groups // size)])
        found[f"self_attention.query_key_value.{end}"] = rows
        found[f"self_attention.dense.{end}"] = model[f"{i}.out.{end}"]
    found["self_attention.dense.weight"] = cut(model[f"{i}.out.weight"], t, size, 1)
    for theirs, norm in (("input_layernorm", "first"), ("post_attention_layernorm", "second")):
        found |= {f"{theirs}.{e}": model[f"{i}.{norm}.{e}"] for e in ("weight", "bias") if f"{i}.{norm}.{e}" in model}
    if f"{i}.gate.weight" in model:
        found["mlp.deepspeed_moe.gate.wg.weight"] = model[f"{i}.gate.weight"]
        experts = {e: ffn(f"{i}.expert{e}", is_cut) for e in range(EXPERTS)}
    else:
        found |= {f"mlp.{name}": value for name, value in ffn(f"{i}.mlp", True).items()}
    return found, experts


def ends_of(model: dict, t: int, size: int) -> tuple[dict, dict, dict]:
    """What a rank has of the embedding, the final norm and the head."""
    norm = {end: model[f"final.{end}"] for end in ("weight", "bias") if f"final.{end}" in model}
    head = {"weight": cut(model["head.weight"], t, size)} if "head.weight" in model else {}
    return {"word_embeddings.weight": cut(model["embedding.weight"], t, size)}, norm, head


def write(
    folder: Path, args: dict, size: int, stages: int = 1, order: str = "head", client: dict | None = None
) -> None:
    """The files of tensor x pipeline ranks, layers numbered from 0 on every stage, each whole expert on one rank."""
    folder.mkdir()
    args = args | {"tensor_model_parallel_size": size, "pipeline_model_parallel_size": stages}
    model, per_stage = whole_model(args), LAYERS // stages
    for rank in range(size * stages):
        t, stage, prefix = rank % size, rank // size, "language_model.encoder.layers"
        words, norm, head = ends_of(model, t, size)
        module = {f"language_model.embedding.{n}": v for n, v in words.items()} if stage == 0 else {}
        moe_layers = 0
        for local in range(per_stage):
            found, experts = rank_layer(model, args, stage * per_stage + local, t, size, order)
            module |= {f"{prefix}.{local}.{name}": value for name, value in found.items()}
            for e, values in experts.items():
                if args["enable_expert_tensor_parallelism"] or e // (EXPERTS // 2) == t or size == 1:
                    name = f"{prefix}.{local}.mlp.deepspeed_moe.experts.deepspeed_experts.{e}"
                    file = f"layer_{moe_layers}_expert_{e}_mp_rank_{rank:02d}_model_states.pt"
                    torch.save({f"{name}.{end}": value for end, value in values.items()}, folder / file)
            moe_layers += bool(experts)
        if stage == stages - 1:
            module |= {f"language_model.encoder.final_layernorm.{end}": value for end, value in norm.items()}
            module |= {f"language_model.output_layer.{end}": value for end, value in head.items()}
            if stage and not head:
                module["word_embeddings_for_head.weight"] = words["word_embeddings.weight"]
        state = {"module": module, "args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 1}
        torch.save(state | (client or {}), folder / f"mp_rank_{rank:02d}_model_states.pt")


def write_pipe(folder: Path, args: dict, size: int, stages: int) -> None:
    """A PipelineModule's files: one for each layer and tensor rank; the layers without tensors leave gaps."""
    folder.mkdir()
    args = args | {"tensor_model_parallel_size": size, "pipeline_model_parallel_size": stages}
    model = whole_model(args)
    for rank in range(size * stages):
        state = {"module": None, "args": Namespace(**args), "checkpoint_version": 3.0, "iteration": 1}
        torch.save(state, folder / f"mp_rank_{rank:02d}_model_states.pt")
    for t in range(size):
        words, norm, head = ends_of(model, t, size)
        layers = [rank_layer(model, args, i, t, size, "head")[0] for i in range(LAYERS)]
        last = {"lm_head.weight": head["weight"]} if head else words
        for index, part in enumerate([words, *layers, norm, last], start=1):
            torch.save(part, folder / f"layer_{index:02d}-model_{t:02d}-model_states.pt")


def expected(args: dict) -> dict[str, torch.Tensor]:
    """Our tensors of the same model, put together from its uncut parts."""
    model, groups, found = whole_model(args), args["num_key_value_heads"], {}

    def ffn(name: str, part: str) -> dict[str, torch.Tensor]:
        halves, out = (("gate", "up") if args["swiglu"] else ("up",)), {}
        for end in ("weight", "bias") if args["add_bias_linear"] else ("weight",):
            both = [model[f"{name}.{half}.{end}"] for half in halves]
            out[f"{part}.fc1.{end}"] = torch.stack(both) if args["swiglu"] else both[0]
            out[f"{part}.fc2.{end}"] = model[f"{name}.down.{end}"]
        return out

    for i in range(LAYERS):
        for end in ("weight", "bias") if args["add_bias_linear"] else ("weight",):
            q, k, v = (model[f"{i}.{part}.{end}"] for part in "qkv")
            per_group = [[*q[g * HEADS // groups : (g + 1) * HEADS // groups], k[g], v[g]] for g in range(groups)]
            found[f"layers.{i}.attention.qkv.{end}"] = torch.cat([rows for group in per_group for rows in group])
            found[f"layers.{i}.attention.out.{end}"] = model[f"{i}.out.{end}"]
        if f"{i}.gate.weight" in model:
            found[f"layers.{i}.router.weight"] = model[f"{i}.gate.weight"]
            experts = [ffn(f"{i}.expert{e}", f"layers.{i}.experts") for e in range(EXPERTS)]
            found |= {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}
        else:
            found |= ffn(f"{i}.mlp", f"layers.{i}.ffn")
    pairs = {"embedding": "embedding", "head": "output", "final": "final_norm"}
    pairs |= {f"{i}.first": f"layers.{i}.attention_norm" for i in range(LAYERS)}
    pairs |= {f"{i}.second": f"layers.{i}.ffn_norm" for i in range(LAYERS)}
    for theirs, ours in pairs.items():
        found |= {f"{ours}.{end}": model[f"{theirs}.{end}"] for end in ("weight", "bias") if f"{theirs}.{end}" in model}
    return found


PLAIN = ARGS | {"mlp_type": "standard"}
DENSE = {"num_experts": [1]}


@pytest.mark.parametrize(
    ("args", "size", "stages", "order", "client"),
    [
        (PLAIN, 2, 1, "head", {}),
        (PLAIN | {"enable_expert_tensor_parallelism": True}, 2, 2, "head", {}),
        (PLAIN, 2, 2, "head", {}),
        (GATED, 2, 1, "head", {}),
        (GATED | {"enable_expert_tensor_parallelism": True}, 2, 2, "head", {}),
        (PLAIN, 4, 1, "part", {"checkpoint_version": 0}),
        (PLAIN | DENSE, 2, 1, "inner", {"checkpoint_version": 1.0}),
        (PLAIN | DENSE | {"ds_sequence_parallel_fpdt": False}, 2, 4, "part", {}),
    ],
)
def test_tensor_and_pipeline_ranks_are_joined(tmp_path, args, size, stages, order, client):
    write(tmp_path / "x", args, size, stages, order, client)
    assert_expected(tmp_path / "x", args)


@pytest.mark.parametrize("args", [PLAIN | DENSE, GATED | DENSE])
def test_the_layers_of_a_pipeline_module_are_joined(tmp_path, args):
    write_pipe(tmp_path / "x", args, 2, 2)
    assert_expected(tmp_path / "x", args)
    missing = tmp_path / "x" / "layer_03-model_01-model_states.pt"
    missing.unlink()
    assert f"{missing} is missing" in refusal(tmp_path / "x")


def assert_expected(folder: Path, args: dict) -> None:
    source, conversion = open_deepspeed(folder, vocab_multiple=64)
    found, wanted = converted(source, conversion), expected(args)
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        if name in ("embedding.weight", "output.weight"):
            assert not found[name][ROWS:].any()
            found[name] = found[name][:ROWS]
        assert torch.equal(found[name], value), name


def test_what_ranks_hold_in_common_must_be_there_on_each_and_stages_have_their_files(tmp_path):
    write(tmp_path / "x", PLAIN, 2, 2)
    (tmp_path / "x" / "mp_rank_03_model_states.pt").unlink()
    assert "mp_rank_03_model_states.pt is missing" in refusal(tmp_path / "x")
    write(tmp_path / "y", PLAIN, 2, 2)
    for path in (tmp_path / "y").glob("layer_0_expert_*_mp_rank_0[23]_*"):  # as where stages overwrite each other's
        path.unlink()
    assert "layer_0_expert_0_mp_rank_02_model_states.pt is missing" in refusal(tmp_path / "y")
    write(tmp_path / "z", GATED | {"ds_sequence_parallel_fpdt": False}, 2)
    assert "num_key_value_heads" in refusal(tmp_path / "z")
