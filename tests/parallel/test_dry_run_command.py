"""`megamoe dry-run`: the quickstart's job and the giant's pass; a mistake planted in code or settings is named."""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megamoe.cli import main
from tests.harness import run_ranks

JOB = ("quickstart", "--gpus", "8", "run.precision=bf16", "parallel.pipeline_parallel_size=1")


def played(*arguments: str, mistake: str | None = None) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, in this process; -1 where an engine itself finds the mistake."""
    out, err = io.StringIO(), io.StringIO()
    planted = PLANTED.get(mistake, contextlib.nullcontext)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), planted():
        try:
            code = main(["dry-run", "--shapes-only", *arguments])
        except AssertionError as error:
            return -1, out.getvalue(), str(error)
    return code, out.getvalue(), err.getvalue()


def all_played(*jobs: tuple[tuple[str, ...], str | None]) -> list[tuple[int, str, str]]:
    return [played(*arguments, mistake=mistake) for arguments, mistake in jobs]


@contextlib.contextmanager
def experts_reduced_as_dense() -> Iterator[None]:
    """The mark is lost by which DeepSpeed knows experts: their gradients are averaged over all data ranks."""
    from megamoe.moe.layer import MoELayer

    build = MoELayer.__init__

    def init(self: MoELayer, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for parameter in self.experts.parameters():
            parameter.allreduce = True

    with mock.patch.object(MoELayer, "__init__", init):
        yield


@contextlib.contextmanager
def recompute_forgotten() -> Iterator[None]:
    from megamoe.model import gpt

    made = gpt.transformer_config

    def forgetful(config: Any) -> Any:
        none = config.parallel.model_copy(update={"recompute": "none"})
        return made(config.model_copy(update={"parallel": none}))

    with mock.patch.object(gpt, "transformer_config", forgetful):
        yield


def with_setting(section: str, **values: Any) -> Callable[[], Any]:
    """The trainer is built from other settings than the plan."""

    @contextlib.contextmanager
    def planted() -> Iterator[None]:
        from megamoe.dry_run import build

        built = build.build_trainer

        def other(config: Any, *args: Any, **kwargs: Any) -> Any:
            changed = getattr(config, section).model_copy(update=values)
            return built(config.model_copy(update={section: changed}), *args, **kwargs)

        with mock.patch.object(build, "build_trainer", other):
            yield

    return planted


@contextlib.contextmanager
def one_all_reduce_too_many() -> Iterator[None]:
    from megamoe.moe.layer import Router

    forward = Router.forward

    def noisy(self: Router, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(torch.zeros(3, device=x.device))
        return forward(self, x)

    with mock.patch.object(Router, "forward", noisy):
        yield


@contextlib.contextmanager
def groups_of_other_ranks() -> Iterator[None]:
    from megamoe.topology.grid import Grid

    with mock.patch.object(Grid, "expert_groups", Grid.expert_data_groups):
        yield


@contextlib.contextmanager
def tensor_sum_forgotten() -> Iterator[None]:
    """Of gradients that each tensor rank has in part."""
    from megamoe.training import gradients

    with mock.patch.object(gradients, "is_summed_over_tensor", return_value=False):
        yield


PLANTED: dict[str | None, Callable[[], Any]] = {
    "experts reduced as dense": experts_reduced_as_dense,
    "weights in fp32": with_setting("run", precision="fp32"),
    "recompute forgotten": recompute_forgotten,
    "one all-reduce too many": one_all_reduce_too_many,
    "groups of other ranks": groups_of_other_ranks,
    "tensor sum forgotten": tensor_sum_forgotten,
    "states not cut": with_setting("parallel", zero_stage=2),
    "a layer without experts": with_setting("moe", layer_pattern=4),
    "one expert more": with_setting("moe", num_experts=16),
    "a larger vocabulary": with_setting("model", vocab_size=8192),
    "another optimizer": with_setting("optimizer", name="sgd", momentum=0.9),
    "wider experts": with_setting("moe", expert_ffn_hidden_size=1024),
}
NAMED = {
    "experts reduced as dense": "All params in MoE group must be MoE params",
    "weights in fp32": "bytes of weights",
    "recompute forgotten": "bytes of saved activations",
    "one all-reduce too many": "calls of all_reduce in forward over 8 ranks (0..7), of 12 bytes",
    "groups of other ranks": "expert groups",
    "tensor sum forgotten": "calls of all_reduce in update over 2 ranks",
    "states not cut": "bytes of gradients",
    "a layer without experts": "calls of all_to_all",
    "one expert more": "bytes of weights",
    "a larger vocabulary": "bytes of weights",
    "another optimizer": "bytes of the optimizer",
    "wider experts": "bytes of weights",
}
ALSO = {  # the rank that is played must own such a gradient
    "tensor sum forgotten": ("parallel.zero_stage=0", "run.precision=fp32"),
}
SETTINGS = {  # what is given, exit code, what is said
    "a size that does not divide": (("parallel.tensor_parallel_size=3",), 2, "does not divide"),
    "uneven stages": (("model.num_layers=5", "parallel.pipeline_parallel_size=2"), 2, "does not divide num_layers 5"),
    "ranks that do not fold": (
        ("--gpus", "6", "parallel.expert_parallel_size=4", "run.global_batch_size=12"), 2, "the 6 ranks"
    ),
    "a cluster that is too small": (("--cluster", "SMALL"), 1, "OUT OF MEMORY"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, tuple[int, str, str]]:
    small = tmp_path_factory.mktemp("cluster") / "small.yaml"
    small.write_text("cluster: h100-80gb\nmemory_bytes: 9000000\noverhead_bytes: 0\n")
    jobs: dict[str, tuple[tuple[str, ...], str | None]] = {
        "as it is": (("quickstart", "--gpus", "8", "--cluster", "h100-80gb"), None),
        "in a tree": (("quickstart", "--gpus", "8", "--json"), None),
    }
    jobs |= {name: ((*JOB, "parallel.recompute=full", *ALSO.get(name, ())), name) for name in NAMED}
    for name, (settings, _, _) in SETTINGS.items():
        given = tuple(str(small) if each == "SMALL" else each for each in settings)
        jobs[name] = ((*JOB, *given), None)
    (found,) = run_ranks(all_played, 1, *jobs.values(), init=False, timeout_seconds=280)
    return dict(zip(jobs, found, strict=True))


def test_a_sound_job_passes(outcomes):
    code, out, _ = outcomes["as it is"]
    assert code == 0 and "2 roles of 8 ranks" in out and "all as planned" in out
    code, out, _ = outcomes["in a tree"]
    tree = json.loads(out)
    assert code == 0 and tree["is_good"] and [role["differences"] for role in tree["roles"]] == [[], []]


@pytest.mark.parametrize("mistake", NAMED)
def test_a_planted_mistake_is_named(mistake, outcomes):
    code, out, err = outcomes[mistake]
    assert code != 0, out
    assert NAMED[mistake] in out + err, out + err


@pytest.mark.parametrize("mistake", SETTINGS)
def test_settings_that_cannot_run_are_named(mistake, outcomes):
    _, exit_code, said = SETTINGS[mistake]
    code, out, err = outcomes[mistake]
    assert (code, said in out + err) == (exit_code, True), out + err
