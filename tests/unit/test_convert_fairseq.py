"""fairseq's checkpoints, made by a literal writer of its layout, give a model with the logits of its own plain forward.

Neither the writer nor the forward knows anything of megamoe: names, files, numbering and computation are fairseq's.
"""

import math
import os
import shutil
import zipfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megamoe.checkpoint.folders import resolve_checkpoint
from megamoe.cli import main
from megamoe.convert.fairseq import open_fairseq
from megamoe.convert.megatron_dist import refuse_torch_dist
from megamoe.convert.pickles import StoredSource, open_file
from megamoe.errors import ConversionError
from megamoe.verification.own_logits import own_logits
from tests.parity.reference import forward
from tests.unit.convert_sources import converted, tensor

D, HEADS, LAYERS, ROWS, FFN, EXPERTS = 16, 2, 4, 40, 24, 4
DENSE = {
    "decoder_embed_dim": D, "decoder_ffn_embed_dim": FFN, "decoder_layers": LAYERS, "decoder_attention_heads": HEADS,
    "activation_fn": "gelu", "share_decoder_input_output_embed": True, "no_scale_embedding": False, "dropout": 0.1,
    "decoder_learned_pos": False, "decoder_input_dim": D, "decoder_output_dim": D, "tokens_per_sample": 12,
    "adaptive_softmax_cutoff": None, "_name": "transformer_lm_gpt",
}  # fmt: skip
MOE = DENSE | {
    "moe_freq": 2, "moe_expert_count": EXPERTS, "moe_gating_use_fp32": True, "moe_second_expert_policy": "all",
    "moe_normalize_gate_prob_before_dropping": False, "moe_top1_expert": False,
    "moe_eval_capacity_token_fraction": -1.0,
}  # fmt: skip


def linear(name: str, rows: int, columns: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": tensor(f"{name}.weight", rows, columns), f"{name}.bias": tensor(f"{name}.bias", rows)}


def norm(name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": 1 + tensor(f"{name}.weight", D), f"{name}.bias": tensor(f"{name}.bias", D)}


def state(args: dict) -> dict[str, torch.Tensor]:
    """A whole model by fairseq's names, experts by global number."""
    embedding = tensor("embedding", ROWS, D)
    model = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": embedding,
        "decoder.embed_positions._float_tensor": torch.tensor([1e9]),
    }
    for i in range(LAYERS):
        layer = f"decoder.layers.{i}"
        for part in ("k_proj", "v_proj", "q_proj", "out_proj"):
            model |= linear(f"{layer}.self_attn.{part}", D, D)
        model |= norm(f"{layer}.self_attn_layer_norm") | norm(f"{layer}.final_layer_norm")
        if args.get("moe_freq") and (i + 1) % args["moe_freq"] == 0:
            gate = f"{layer}.moe_layer.gate.wg.weight"
            model[gate] = 5 * tensor(gate, EXPERTS, D)
            heads = [f"{layer}.moe_layer.experts.{e}" for e in range(EXPERTS)]
        else:
            heads = [layer]
        for head in heads:
            model |= linear(f"{head}.fc1", FFN, D) | linear(f"{head}.fc2", D, FFN)
    model |= norm("decoder.layer_norm")
    tied = args["share_decoder_input_output_embed"]
    model["decoder.output_projection.weight"] = embedding if tied else tensor("head", ROWS, D)
    return model


def checkpoint(args: dict, model: dict[str, torch.Tensor]) -> dict:
    """What fairseq saves beside the weights; numpy numbers are in its iterator and meters."""
    return {
        "args": None, "cfg": {"_name": None, "model": dict(args), "criterion": {"moe_gate_loss_wt": 0.02}},
        "model": model, "criterion": None, "task_state": {},
        "optimizer_history": [{"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": np.float64(3.5)}}],
        "extra_state": {"metrics": [], "best": np.float32(1)},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(7)}}},
    }  # fmt: skip


def save_moe(folder: Path, args: dict, num_ranks: int, suffix: str = "", dtype: torch.dtype = torch.float32) -> dict:
    """X-shared.pt and X-rank-N.pt, split by the word `expert` in a name; experts are numbered anew in each file."""
    folder.mkdir()
    model = {name: value.to(dtype) for name, value in state(args).items()}
    shared = {name: value for name, value in model.items() if "expert" not in name}
    num_local = max(EXPERTS // num_ranks, 1)
    for rank in range(num_ranks):
        shard = suffix.format(rank=rank)
        if rank == 0 or suffix:
            torch.save(checkpoint(args, shared), folder / f"model-shared{shard}.pt")
        local = {}
        for name, value in model.items():
            if "expert" in name:
                head, rest = name.split(".experts.")
                number, end = rest.split(".", 1)
                if int(number) // num_local == rank % (EXPERTS // num_local):
                    local[f"{head}.experts.{int(number) % num_local}.{end}"] = value.clone()
        torch.save(checkpoint(args, local), folder / f"model-rank-{rank}{shard}.pt")
    return model


def fairseq_logits(model: dict[str, torch.Tensor], args: dict, tokens: torch.Tensor) -> torch.Tensor:
    """The decoder in evaluation, nothing dropped, as fairseq computes it: [b, s] -> [b, s, V]."""
    model = {name.removeprefix("decoder."): value.float() for name, value in model.items()}
    gelu = {"gelu": lambda x: F.gelu(x), "gelu_accurate": lambda x: F.gelu(x, approximate="tanh")}

    def project(x, name):
        return x @ model[f"{name}.weight"].T + model[f"{name}.bias"]

    def normed(x, name):
        return F.layer_norm(x, (D,), model[f"{name}.weight"], model[f"{name}.bias"])

    def ffn(x, head):
        return project(gelu[args["activation_fn"]](project(x, f"{head}.fc1")), f"{head}.fc2")

    def mixture(x, layer):
        gates = (x @ model[f"{layer}.gate.wg.weight"].T).softmax(-1)
        out = torch.zeros_like(x)
        for t in range(len(x)):
            best = gates[t].argsort(descending=True)[: 1 if args["moe_top1_expert"] else 2]
            weights = gates[t][best]
            if not args["moe_top1_expert"]:
                weights = weights / weights.sum()
            for e, weight in zip(best.tolist(), weights, strict=True):
                out[t] += weight * ffn(x[t], f"{layer}.experts.{e}")
        return out

    steps = tokens.shape[1]
    rates = torch.exp(torch.arange(D // 2).float() * -(math.log(10000) / (D // 2 - 1)))
    angles = (torch.arange(steps) + 2).float()[:, None] * rates
    x = model["embed_tokens.weight"][tokens] * (1 if args["no_scale_embedding"] else math.sqrt(D))
    x = x + torch.cat([angles.sin(), angles.cos()], 1)
    for i in range(LAYERS):
        h = normed(x, f"layers.{i}.self_attn_layer_norm")
        q, k, v = (
            project(h, f"layers.{i}.self_attn.{part}_proj").view(*h.shape[:2], HEADS, -1).transpose(1, 2)
            for part in "qkv"
        )
        mask = torch.full((steps, steps), -math.inf).triu(1)
        mixed = ((q * (D // HEADS) ** -0.5) @ k.transpose(2, 3) + mask).softmax(-1) @ v
        x = x + project(mixed.transpose(1, 2).flatten(2), f"layers.{i}.self_attn.out_proj")
        h = normed(x, f"layers.{i}.final_layer_norm")
        if f"layers.{i}.fc1.weight" in model:
            x = x + ffn(h, f"layers.{i}")
        else:
            x = x + mixture(h.flatten(0, 1), f"layers.{i}.moe_layer").view(h.shape)
    return normed(x, "layer_norm") @ model["output_projection.weight"].T


def assert_same_logits(path: Path, model: dict[str, torch.Tensor], args: dict, **options) -> tuple:
    source, conversion = open_fairseq(path, **options)
    weights = converted(source, conversion)
    config = conversion.config
    if config.moe.num_experts:
        config = config.model_copy(update={"moe": config.moe.model_copy(update={"dropless": True})})
    tokens = torch.randint(0, ROWS, (2, 7), generator=torch.Generator().manual_seed(3))
    logits = forward(config, weights, tokens)[0][..., :ROWS]
    torch.testing.assert_close(logits, fairseq_logits(model, args, tokens), rtol=0, atol=1e-5)
    return weights, conversion


@pytest.mark.parametrize(
    "change",
    [{}, {"share_decoder_input_output_embed": False}, {"activation_fn": "gelu_accurate", "no_scale_embedding": True}],
)
def test_a_dense_model_has_the_logits_of_fairseq(tmp_path, change):
    args = DENSE | change
    model = state(args)
    torch.save(checkpoint(args, model), tmp_path / "model.pt")
    _, conversion = assert_same_logits(tmp_path, model, args)
    assert conversion.config.model.vocab_size == ROWS and conversion.config.model.vocab_size_multiple == 8
    assert conversion.config.model.seq_length == 12 and conversion.config.moe.num_experts == 0
    assert any("fused kernel" in note for note in conversion.notes) == (args["activation_fn"] == "gelu")


def test_older_files_keep_their_settings_in_args(tmp_path):
    model = state(DENSE)
    torch.save(checkpoint(DENSE, model) | {"cfg": None, "args": Namespace(**DENSE)}, tmp_path / "checkpoint_best.pt")
    assert_same_logits(tmp_path / "checkpoint_best.pt", model, DENSE)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_a_mixture_has_the_logits_of_fairseq_from_any_number_of_files(tmp_path, num_ranks):
    model = save_moe(tmp_path / "x", MOE, num_ranks)
    weights, conversion = assert_same_logits(tmp_path / "x", model, MOE)
    moe = conversion.config.moe
    assert (moe.num_experts, moe.top_k, moe.layer_pattern, moe.normalize_when) == (EXPERTS, 2, 2, "after_drops")
    assert moe.eval_capacity_fraction is None and moe.capacity_factor == 1 and moe.balance_loss_coeff == 0.01
    for e in range(EXPERTS):
        name = f"decoder.layers.3.moe_layer.experts.{e}.fc2.bias"
        assert torch.equal(weights["layers.3.experts.fc2.bias"][e], model[name])
    copies = [item for item in conversion.duplicates if "experts" in item.theirs]
    assert len(copies) == (EXPERTS * 2 * 4 if num_ranks == 8 else 0)


def test_top_1_half_precision_misnamed_files_and_a_padded_vocabulary(tmp_path):
    args = MOE | {"moe_top1_expert": True, "moe_eval_capacity_token_fraction": 0.5}
    model = save_moe(tmp_path / "x", args, 2, suffix="-shard{rank}", dtype=torch.bfloat16)
    for name in ("model-shared-shard0.pt", "model-rank-1-shard1.pt"):
        weights, conversion = assert_same_logits(tmp_path / "x" / name, model, args, vocab_multiple=64)
    assert conversion.config.moe.eval_capacity_fraction == 0.5 and not conversion.config.moe.normalize_gates
    assert weights["embedding.weight"].shape == (64, D) and not weights["embedding.weight"][ROWS:].any()
    assert any("softmax counts" in note for note in conversion.notes)
    assert sum(item.theirs.startswith("model-shared-shard1.pt/") for item in conversion.duplicates) > 10


def refusal(path: Path, **options) -> str:
    with pytest.raises(ConversionError) as caught:
        open_fairseq(path, **options)
    return str(caught.value)


def test_missing_doubled_and_copied_files_are_named(tmp_path):
    save_moe(tmp_path / "x", MOE, 4)

    def with_change(change) -> str:
        folder = tmp_path / "changed"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "x", folder)
        change(folder)
        return refusal(folder)

    assert "model-rank-1.pt is missing" in with_change(lambda f: (f / "model-rank-1.pt").unlink())
    assert "moe_expert_count 4" in with_change(lambda f: [(f / f"model-rank-{r}.pt").unlink() for r in (2, 3)])
    assert "share 4 experts" in with_change(lambda f: (f / "model-rank-3.pt").unlink())
    assert "name the one file" in with_change(lambda f: (f / "model-shared.pt").rename(f / "other-shared.pt"))
    assert "rank 2 is there twice" in with_change(
        lambda f: shutil.copy(f / "model-rank-2.pt", f / "model-rank-2-shard2.pt")
    )
    said = with_change(lambda f: shutil.copy(f / "model-rank-0.pt", f / "model-rank-3.pt"))
    assert "model-rank-3.pt holds the same experts as model-rank-0.pt" in said
    assert "model-shared.pt is missing" in with_change(lambda f: (f / "model-shared.pt").unlink())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"decoder_learned_pos": True}, "decoder_learned_pos"),
        ({"activation_fn": "relu"}, "activation_fn"),
        ({"layernorm_embedding": True}, "layernorm_embedding"),
        ({"decoder_attention_heads": None}, "decoder_attention_heads"),
        ({"decoder_attention_heads": 3}, "num_attention_heads 3"),
        ({"decoder_layers": 3}, "decoder_layers 3"),
        ({"decoder_ffn_embed_dim": 32}, "fc1.weight"),
        ({"moe_freq": 1}, "moe_freq 1"),
        ({"moe_expert_count": 8}, "moe_expert_count 8"),
        ({"moe_batch_prioritized_routing": True}, "moe_batch_prioritized_routing"),
        ({"decoder_output_dim": 8}, "decoder_output_dim"),
    ],
)
def test_settings_that_cannot_be_told_or_expressed_are_named(tmp_path, change, word):
    save_moe(tmp_path / "x", MOE | change | {"moe_freq": 2}, 2)
    assert word in refusal(tmp_path / "x", overrides=change)


def test_an_override_says_what_the_file_lacks(tmp_path):
    model = save_moe(tmp_path / "x", MOE | {"decoder_attention_heads": None, "activation_fn": "gelu"}, 2)
    told = {"decoder_attention_heads": HEADS, "activation_fn": "gelu_accurate"}
    assert_same_logits(tmp_path / "x", model, MOE | told, overrides=told)


def test_tensors_that_are_missing_unknown_or_of_another_shape_are_named(tmp_path):
    path = tmp_path / "model.pt"
    for change, word in (
        (lambda m: m.pop("decoder.layers.2.self_attn.k_proj.bias"), "layers.2.self_attn.k_proj.bias"),
        (lambda m: m.update({"decoder.layers.0.extra": torch.ones(2)}), "layers.0.extra"),
        (lambda m: m.update({"encoder.x": torch.ones(2)}), "encoder.x"),
        (lambda m: m.update({"decoder.layers.0.fc1.bias": torch.ones(3)}), "fc1.bias has shape [3]"),
        (lambda m: m.update({"decoder.version": torch.tensor([1.0])}), "version [1.0]"),
        (lambda m: m.update({"decoder._fsdp_wrapped_module.flat_param_0": torch.ones(3)}), "FSDP"),
        (lambda m: m.pop("decoder.embed_tokens.weight"), "embed_tokens"),
        (lambda m: m.update({"decoder.layer_norm.bias": torch.ones(D).bool()}), "layer_norm.bias has dtype torch.bool"),
    ):
        model = state(DENSE)
        change(model)
        torch.save(checkpoint(DENSE, model), path)
        assert word in refusal(path)


def test_a_dictionary_that_is_too_long_is_refused(tmp_path):
    torch.save(checkpoint(DENSE, state(DENSE)), tmp_path / "model.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(ROWS - 4)))
    open_fairseq(tmp_path / "model.pt")
    (tmp_path / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(ROWS - 3)))
    assert "dict.txt" in refusal(tmp_path / "model.pt")


class Trap:
    """Runs a command when it is unpickled by a loader that runs things."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path):
    path, sprung = tmp_path / "model.pt", tmp_path / "sprung"
    for cargo, name in ((Trap(sprung), "system"), (eval, "eval"), (Path("x"), "pathlib"), (zipfile.ZipFile, "ZipFile")):
        torch.save(checkpoint(DENSE, state(DENSE)) | {"extra_state": [cargo]}, path)
        said = refusal(path)
        assert str(path) in said and name in said
    assert not sprung.exists()
    torch.save(checkpoint(DENSE, state(DENSE)), path, _use_new_zipfile_serialization=False)
    assert "torch 1.6" in refusal(path)


def test_what_other_libraries_allow_in_this_process_is_not_allowed_here(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(checkpoint(DENSE, state(DENSE)) | {"extra_state": [Path("x")]}, path)
    with torch.serialization.safe_globals([type(Path("x"))]):
        torch.save(Path("x"), tmp_path / "allowed.pt")
        assert torch.load(tmp_path / "allowed.pt", weights_only=True) == Path("x")
        assert "pathlib" in refusal(path)
        assert type(Path("x")) in torch.serialization.get_safe_globals()  # theirs stays theirs


def test_the_command_makes_a_run_that_computes_the_same(tmp_path, capsys):
    model = save_moe(tmp_path / "old", MOE, 2)
    arguments = [str(tmp_path / "old"), str(tmp_path / "run"), "--set", f"decoder_attention_heads={HEADS}"]
    assert main(["convert", "from-fairseq", *arguments]) == 0
    assert "is complete" in capsys.readouterr().out
    checkpoint_folder = resolve_checkpoint(tmp_path / "run")
    tokens = torch.randint(4, ROWS, (2, 8), generator=torch.Generator().manual_seed(1))
    wanted = fairseq_logits(model, MOE, tokens)
    found = torch.from_numpy(own_logits(checkpoint_folder, tokens.numpy()))
    torch.testing.assert_close(found[..., : wanted.shape[-1]], wanted, rtol=1e-4, atol=1e-4)


def test_files_cut_short_or_flipped_are_named(tmp_path):
    path = tmp_path / "model.pt"
    torch.save(checkpoint(DENSE, state(DENSE)), path)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert str(path) in refusal(path)
    path.write_bytes(whole)
    place = open_file(path).content["model"]["decoder.layers.1.fc1.weight"]
    source, conversion = open_fairseq(path)
    damaged = bytearray(whole)
    damaged[place.position + 17] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ConversionError, match=r"model.pt is damaged: layers.1.fc1.weight"):
        converted(source, conversion)
    path.write_bytes(whole[: place.position + 17])
    with pytest.raises(ConversionError, match=r"model.pt is cut short"):
        converted(source, conversion)


def test_any_region_of_any_view_is_read(tmp_path):
    """Regions of contiguous, transposed, narrowed and repeated tensors, in each dtype."""
    base = tensor("base", 6, 5, 4)
    views = {
        "whole": base, "turned": base.permute(2, 0, 1), "narrow": base[1:4, :, 1:3],
        "repeated": base[:1].expand(3, 5, 4), "half": base.half(), "one": base[:, :1], "double": base.double(),
        "count": torch.arange(12).view(3, 4),
    }  # fmt: skip
    torch.save(views, tmp_path / "views.pt")
    source = StoredSource(open_file(tmp_path / "views.pt").content)
    draw = np.random.default_rng(4)
    for name, value in views.items():
        bits = value.contiguous().view(torch.int16 if name == "half" else value.dtype).numpy()
        for _ in range(20):
            box = tuple(tuple(sorted(draw.choice(n + 1, 2, replace=False).tolist())) for n in value.shape)
            read = source.read(name, box)
            part = bits[tuple(slice(*ends) for ends in box)]
            assert read.flags.c_contiguous and np.array_equal(read.view(bits.dtype), part), (name, box)


def test_a_torch_dist_checkpoint_is_recognised_and_what_is_said_of_it_is_true(tmp_path):
    import torch.distributed.checkpoint as torch_checkpoint

    torch_checkpoint.save({"weight": torch.ones(2, 2)}, checkpoint_id=tmp_path / "iter_0000001")
    with pytest.raises(ConversionError, match=r"iter_0000001 is a torch_dist checkpoint"):
        refuse_torch_dist(tmp_path / "iter_0000001")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "iter_0000001" / ".metadata", weights_only=True)
    refuse_torch_dist(tmp_path)
