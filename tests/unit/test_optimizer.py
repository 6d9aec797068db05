"""Parameter groups as DeepSpeed needs them, and NVIDIA's apex told from the package of that name on PyPI."""

import itertools
import sys
from types import SimpleNamespace

import pytest
import torch

from megamoe.config import load_config
from megamoe.errors import ConfigError
from megamoe.model.naming import LocalParameter
from megamoe.topology.parameters import param_table
from megamoe.training import main
from megamoe.training.optimizer import apex_state, build_optimizer, parameter_groups

SMALL = ["model.hidden_size=8", "model.num_layers=2", "model.vocab_size=128", "model.num_attention_heads=2"]
EXPERT_ENDINGS = ("experts.fc1.weight", "experts.fc1.bias", "experts.fc2.weight", "experts.fc2.bias")


def settings(*overrides: str, preset: str = "laptop-moe"):
    return load_config(preset, [*SMALL, *overrides])


def local_parameters(config) -> list[LocalParameter]:
    """Every parameter of the model, whole, as one rank would hold it."""
    return [
        LocalParameter(
            parameter, torch.nn.Parameter(torch.ones(parameter.shape)), tuple(map(slice, parameter.shape)),
            parameter.shape, tied_copy=False,
        )
        for parameter in param_table(config.model, config.moe)
    ]  # fmt: skip


def named_groups(config) -> list[tuple[dict, list[str]]]:
    """Each group without its tensors, and the names of those."""
    parameters = local_parameters(config)
    name_of = {id(local.tensor): local.parameter.name for local in parameters}
    groups = parameter_groups(parameters, config)
    names = [[name_of[id(tensor)] for tensor in group.pop("params")] for group in groups]
    assert sorted(itertools.chain(*names)) == sorted(name_of.values()), "each parameter is in one group"
    return list(zip(groups, names, strict=True))


# ---------------------------------------------------------------- groups


def test_the_papers_groups_decay_everything():
    config = settings("optimizer.weight_decay=0.25", "parallel.expert_parallel_size=4")
    dense, experts = named_groups(config)
    assert dense[0] == {"weight_decay": 0.25, "lr_scale": 1.0, "name": "dense"}
    assert experts[0] == {"weight_decay": 0.25, "lr_scale": 1.0, "name": "ep_size_4", "moe": True}
    assert experts[1] == [f"layers.1.{ending}" for ending in EXPERT_ENDINGS]
    assert "layers.1.router.weight" in dense[1]


def test_norms_and_biases_may_be_left_out_of_the_decay():
    config = settings("optimizer.weight_decay=0.25", "optimizer.decay_norms_and_biases=false")
    groups = named_groups(config)
    facts = [(group["name"], group["weight_decay"], group.get("moe", False)) for group, _ in groups]
    assert facts == [("dense", 0.25, False), ("dense", 0.0, False), ("ep_size_1", 0.25, True), ("ep_size_1", 0.0, True)]
    for group, names in groups:
        for name in names:
            no_decay = name.endswith("bias") or "norm" in name
            assert (group["weight_decay"] == 0.0) == no_decay, name
            assert group.get("moe", False) == (".experts." in name), name


@pytest.mark.parametrize(("scale", "expected"), [("0.5", 0.5), ("inverse_sqrt_experts", 0.25)])
def test_experts_may_learn_at_a_rate_of_their_own(scale, expected):
    config = settings("moe.num_experts=16", f"optimizer.expert_lr_scale={scale}")
    assert {group["name"]: group["lr_scale"] for group, _ in named_groups(config)} == {
        "dense": 1.0,
        "ep_size_1": expected,
    }


def test_in_a_pyramid_the_rate_follows_each_layers_own_experts():
    pyramid = ("moe.num_experts=16", "moe.layer_pattern=1", "moe.num_experts_by_layer=[4,16]")
    groups = named_groups(settings(*pyramid, "optimizer.expert_lr_scale=inverse_sqrt_experts"))
    rates = {name: group["lr_scale"] for group, names in groups for name in names}
    for ending in EXPERT_ENDINGS:
        assert (rates[f"layers.0.{ending}"], rates[f"layers.1.{ending}"]) == (0.5, 0.25)
    assert {rate for name, rate in rates.items() if ".experts." not in name} == {1.0}
    assert [group["name"] for group, _ in named_groups(settings(*pyramid))] == ["dense", "ep_size_1"]


def test_shared_experts_learn_as_dense_layers_do():
    shared = ("moe.shared_expert_ffn_hidden_size=16", "moe.shared_expert_mix=residual")
    groups = named_groups(settings(*shared, "optimizer.expert_lr_scale=0.5"))
    for group, names in groups:
        for name in names:
            is_routed = ".experts." in name
            assert (group["lr_scale"], group.get("moe", False)) == (0.5 if is_routed else 1.0, is_routed), name
    assert any("shared_expert_mix" in name for _, names in groups for name in names)


def test_a_model_without_experts_or_biases_has_no_empty_group():
    config = settings("optimizer.expert_lr_scale=inverse_sqrt_experts", preset="laptop-dense")
    assert [group["name"] for group, _ in named_groups(config)] == ["dense"]
    parameters = [local for local in local_parameters(settings()) if local.parameter.kind == "expert"]
    assert [group["name"] for group in parameter_groups(parameters, settings())] == ["ep_size_1"]


def test_adamw_and_sgd_take_the_settings():
    overrides = ["optimizer.implementation=torch", "optimizer.beta1=0.8", "optimizer.eps=1e-6", "optimizer.lr=0.1"]
    config = settings(*overrides)
    adamw = build_optimizer(local_parameters(config), config)
    assert type(adamw) is torch.optim.AdamW
    for group in adamw.param_groups:
        assert (group["betas"], group["eps"], group["lr"], group["fused"]) == ((0.8, 0.98), 1e-6, 0.1, True)
    config = settings("optimizer.name=sgd", "optimizer.momentum=0.5", "optimizer.weight_decay=0.125")
    sgd = build_optimizer(local_parameters(config), config)
    assert type(sgd) is torch.optim.SGD
    assert {(group["momentum"], group["weight_decay"]) for group in sgd.param_groups} == {(0.5, 0.125)}


# ---------------------------------------------------------------- apex


@pytest.fixture
def apex(monkeypatch, tmp_path):
    """Put a package named apex on the path: apex(files), a mapping of paths to texts; apex(None) takes it away."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
            monkeypatch.delitem(sys.modules, name)

    def install(files: dict[str, str] | None) -> None:
        forget()
        if files is None:
            monkeypatch.setitem(sys.modules, "apex", None)
            return
        for path, text in files.items():
            target = tmp_path / "apex" / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


# What importing the web toolkit of that name comes to: parts of it are missing, or it was written for an older Python.
UNRELATED = {
    "no optimizers": {"__init__.py": "", "lib/__init__.py": ""},
    "missing dependency": {"__init__.py": "from pyramid_of_old import velruse\n", "optimizers.py": "FusedAdam = 1\n"},
    "other failure": {"__init__.py": "import collections\ncollections.Mapping_\n", "optimizers.py": "FusedAdam = 1\n"},
    "without FusedAdam": {"__init__.py": "", "optimizers.py": ""},
}
NVIDIA = {
    "__init__.py": "",
    "optimizers.py": (
        "import torch\n"
        "class FusedAdam(torch.optim.AdamW):\n"
        "    def __init__(self, groups, *, lr, betas, eps, adam_w_mode):\n"
        "        super().__init__(groups, lr=lr, betas=betas, eps=eps)\n"
        "        self.adam_w_mode = adam_w_mode\n"
    ),
}


def said_at_start(config) -> list[str]:
    """What `main` says before the first step."""
    said: list[str] = []
    grid = SimpleNamespace(world=1, tensor=1, data=1, pipeline=1, expert=1)
    trainer = SimpleNamespace(config=config, groups=SimpleNamespace(grid=grid), step=0)
    splits = SimpleNamespace(train=SimpleNamespace(num_samples=7))
    main._say_start(trainer, SimpleNamespace(say=said.append), splits, loaded=None)
    return said


def has_cuda(monkeypatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)


def test_absent_apex(apex):
    apex(None)
    config = settings()
    assert apex_state() == "absent"
    assert type(build_optimizer(local_parameters(config), config)) is torch.optim.AdamW
    assert not any("apex" in line for line in said_at_start(config))


@pytest.mark.parametrize("kind", UNRELATED)
@pytest.mark.parametrize("cuda", [False, True])
def test_an_unrelated_apex_is_told_and_training_goes_on_with_torch(apex, monkeypatch, kind, cuda):
    apex(UNRELATED[kind])
    has_cuda(monkeypatch, cuda)
    config = settings()
    assert apex_state() == "unrelated"
    assert type(build_optimizer(local_parameters(config), config)) is torch.optim.AdamW
    sentence = "the package apex that is installed is not NVIDIA's: torch's AdamW is used"
    assert said_at_start(config)[0] == sentence
    for other in ("optimizer.implementation=torch", "optimizer.name=sgd"):
        assert sentence not in said_at_start(settings(other)), "nobody looked for it"


def test_nvidias_apex_is_used_on_a_gpu_only(apex, monkeypatch):
    apex(NVIDIA)
    config = settings("optimizer.lr=0.1", "optimizer.eps=1e-6")
    assert apex_state() == "nvidia"
    assert not any("apex" in line for line in said_at_start(config))
    has_cuda(monkeypatch, False)
    assert type(build_optimizer(local_parameters(config), config)) is torch.optim.AdamW
    has_cuda(monkeypatch, True)
    fused = build_optimizer(local_parameters(config), config)
    assert type(fused).__name__ == "FusedAdam" and fused.adam_w_mode
    assert [group["name"] for group in fused.param_groups] == ["dense", "ep_size_1"]
    assert all((g["lr"], g["betas"], g["eps"]) == (0.1, (0.9, 0.98), 1e-6) for g in fused.param_groups)
    by_torch = settings("optimizer.implementation=torch")
    assert type(build_optimizer(local_parameters(by_torch), by_torch)) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("files", "cuda", "found"),
    [
        (None, True, "apex is absent, CUDA is available"),
        (UNRELATED["no optimizers"], True, "apex is unrelated, CUDA is available"),
        (NVIDIA, False, "apex is nvidia, CUDA is not available"),
    ],
)
def test_apex_that_is_asked_for_and_cannot_be_used(apex, monkeypatch, files, cuda, found):
    apex(files)
    has_cuda(monkeypatch, cuda)
    config = settings("optimizer.implementation=apex")
    with pytest.raises(ConfigError) as caught:
        build_optimizer(local_parameters(config), config)
    assert str(caught.value) == (
        f"optimizer.implementation is apex, but NVIDIA's apex cannot be used here ({found}): build it from NVIDIA's "
        'repository, or use "auto" or "torch"'
    )


def test_apex_that_is_asked_for_and_there(apex, monkeypatch):
    apex(NVIDIA)
    has_cuda(monkeypatch, True)
    config = settings("optimizer.implementation=apex")
    assert type(build_optimizer(local_parameters(config), config)).__name__ == "FusedAdam"
