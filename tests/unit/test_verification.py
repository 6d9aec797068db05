"""Windows of layers are models of their own, in which every layer of the whole has its place; what counts as equal."""

import numpy as np
import pytest

from megamoe.config.loading import load_config
from megamoe.errors import ConversionError
from megamoe.topology.parameters import num_parameters, param_table
from megamoe.verification.compare import compare_logits, fixed_token_ids
from megamoe.verification.windows import renamed, window_config, windows

UNEVEN = ["model.num_layers=8", "moe.num_experts=16", "moe.num_experts_by_layer=[4, 8, 8, 16]"]
MODELS = {
    "every second": load_config("laptop-moe", ["model.num_layers=6"]),
    "pyramid": load_config("laptop-moe", UNEVEN),
    "a list": load_config("laptop-moe", ["model.num_layers=5", "moe.layer_pattern=[3, 4]"]),
    "a list that ends early": load_config("laptop-moe", ["model.num_layers=5", "moe.layer_pattern=[1, 3]"]),
    "dense": load_config("laptop-dense", ["model.num_layers=3"]),
}


def size(config) -> int:
    return num_parameters(param_table(config.model, config.moe))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("width", [1, 2, 3])
def test_every_tensor_of_a_model_is_in_one_window_in_its_shape(name, width):
    config = MODELS[name]
    whole = {p.name: p.shape for p in param_table(config.model, config.moe)}
    seen = set()
    for first in range(0, config.model.num_layers, width):
        last = min(first + width, config.model.num_layers)
        part = window_config(config, first, last)
        assert type(config).model_validate(part.model_dump(mode="json")) == part
        rename = renamed(first, last)
        mapped = {rename(full): (full, shape) for full, shape in whole.items() if rename(full) is not None}
        assert {p.name: p.shape for p in param_table(part.model, part.moe)} == {n: s for n, (_, s) in mapped.items()}
        seen |= {full for full, _ in mapped.values()}
    assert seen == set(whole)


SMALLEST = {
    "every second": [(0, 2), (2, 4), (4, 6)],
    "pyramid": [(0, 2), (2, 4), (4, 6), (6, 8)],
    "a list": [(0, 4), (4, 5)],
    "a list that ends early": [(0, 2), (2, 5)],
    "dense": [(0, 1), (1, 2), (2, 3)],
}


@pytest.mark.parametrize("name", MODELS)
def test_windows_take_as_many_layers_as_fit_with_one_that_has_experts(name):
    config = MODELS[name]
    assert windows(config, size(config)) == [(0, config.model.num_layers)]
    limit = max(size(window_config(config, *window)) for window in SMALLEST[name])
    found = windows(config, limit)
    assert [0, *(last for _, last in found)] == [*(first for first, _ in found), config.model.num_layers]
    ends = [last for _, last in SMALLEST[name]]
    for first, last in found:
        assert size(window_config(config, first, last)) <= limit
        following = next((end for end in ends if end > last), None)
        assert following is None or size(window_config(config, first, following)) > limit
    assert windows(config, limit - 1) == []
    if len({size(window_config(config, *window)) for window in SMALLEST[name]}) == 1:
        assert found == SMALLEST[name]


def test_names_of_hugging_face_are_renamed_as_ours():
    rename = renamed(2, 4)
    assert rename("model.layers.3.mlp.experts.2.w1.weight") == "model.layers.1.mlp.experts.2.w1.weight"
    assert rename("layers.2.router.weight") == "layers.0.router.weight"
    assert rename("model.layers.21.mlp.up_proj.weight") is None
    assert rename("model.norm.weight") == "model.norm.weight"


def test_logits_are_compared_by_their_scale():
    ids = fixed_token_ids(50, num_sequences=2, seq_length=3)
    assert ids.shape == (2, 3) and (ids == fixed_token_ids(50, num_sequences=2, seq_length=3)).all() and ids.max() < 50
    ours = np.random.default_rng(0).normal(0, 10, (2, 3, 50)).astype(np.float32)
    agreement = compare_logits(ours, ours + 1e-4, "export")
    assert agreement.is_good and agreement.same_choice == 1.0
    assert agreement.largest_difference == pytest.approx(1e-4, rel=0.1)
    with pytest.raises(ConversionError, match=r"export: logits differ by 0.01 .*the conversion is wrong"):
        compare_logits(ours, ours + 1e-2, "export")
    with pytest.raises(ConversionError, match="is not finite"):
        compare_logits(ours, ours * np.nan, "export")
    with pytest.raises(ConversionError, match=r"\[2, 3, 50\] of one side, \[2, 3, 49\] of the other"):
        compare_logits(ours, ours[..., :49], "export")
