"""A job folded down to a few ranks stays a job of its kind, and two real steps of it are taken."""

import itertools
import math
from pathlib import Path

import pytest

from megamoe.config.loading import load_config
from megamoe.config.presets import PRESETS
from megamoe.config.schema import Config
from megamoe.config.validation import validate
from megamoe.dry_run.folding import Folded, fold_down
from megamoe.dry_run.rehearsal import rehearse
from megamoe.errors import MegamoeError

LAYOUTS = Path(__file__).parents[2] / "launch_scripts" / "layouts"
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size", "expert_parallel_size",
         "expert_tensor_parallel_size")  # fmt: skip


def jobs() -> dict[str, Config]:
    """The shipped layouts, and each other preset under several."""
    found = {path.stem: load_config(str(path)) for path in LAYOUTS.glob("*.yaml")}
    for preset, (tensor, pipeline, expert) in itertools.product(PRESETS, ((1, 1, 1), (1, 1, 8), (4, 4, 4), (2, 2, 8))):
        config = load_config(preset)
        settings = [f"parallel.tensor_parallel_size={tensor}", f"parallel.pipeline_parallel_size={pipeline}"]
        settings.append(f"parallel.expert_parallel_size={expert if config.moe.num_experts else 1}")
        found[f"{preset} {tensor} {pipeline} {expert}"] = load_config(preset, settings)
    more = ["parallel.tensor_parallel_size=4", "parallel.sequence_parallel=true", "parallel.expert_parallel_size=16",
            "parallel.expert_tensor_parallel_size=4", "parallel.all_to_all=hierarchical", "parallel.ranks_per_node=8",
            "parallel.all_to_all_chunks=2", "moe.shared_expert_ffn_hidden_size=512"]  # fmt: skip
    return found | {"much at once": load_config("qwen3-30b-a3b", more)}


@pytest.mark.parametrize("name", jobs())
def test_what_is_more_than_one_stays_so_and_ranks_suffice(name):
    config = jobs()[name]
    folded = fold_down(config, 16)
    validate(folded.config, folded.world_size)
    assert folded.world_size <= 16
    for key in SIZES:
        size, tiny = getattr(config.parallel, key), getattr(folded.config.parallel, key)
        assert (tiny > 1) == (size > 1) and tiny <= size, key
        assert tiny == size or any(key in note for note in folded.notes)
    assert folded.config.parallel.zero_stage == config.parallel.zero_stage
    assert folded.config.parallel.recompute == config.parallel.recompute
    assert folded.config.model.activation == config.model.activation
    assert (folded.config.moe.num_experts > 0) == (config.moe.num_experts > 0)
    assert folded.config.model.hidden_size <= 32
    assert fold_down(config, 1).world_size == 1


def test_two_steps_are_taken_and_a_failing_rank_is_told(capfd):
    config = load_config("moe-1.1t", ["parallel.tensor_parallel_size=8", "parallel.pipeline_parallel_size=4",
                                      "parallel.expert_parallel_size=64"])  # fmt: skip
    folded = fold_down(config, 4)
    assert folded.world_size == 4 and folded.config.parallel.pipeline_parallel_size == 2
    seen = rehearse(folded)
    assert len(seen.losses) == len(seen.grad_norms) == 2
    # Random tokens: no better than a guess among 256, which fresh weights are not far from.
    assert all(math.log(256) - 0.5 < loss < math.log(256) + 2.0 for loss in seen.losses)
    assert all(norm > 0 for norm in seen.grad_norms)
    broken = Folded(folded.config, 3, ())
    with pytest.raises(MegamoeError, match="rehearsal"):
        rehearse(broken)
    assert "3 ranks" in capfd.readouterr().err
