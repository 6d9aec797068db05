"""Loading, checking and writing configurations: what a user reads when something is wrong, by exact text."""

import contextlib

import pytest

from megamoe.config import Config, dump_yaml, load_config, validate, validate_for_training
from megamoe.config.exchange import check_nodes
from megamoe.config.keys import _ALIASES, all_keys
from megamoe.config.schema import ParallelConfig
from megamoe.config.support import PAGE, REFUSALS, refusals, support_page
from megamoe.config.validation import divisors
from megamoe.errors import ConfigError, TopologyError
from megamoe.topology.grid import Grid
from megamoe.topology.nodes import exchange_levels
from megamoe.topology.parameters import param_table


def refused(call, *arguments) -> str:
    """The message of the ConfigError that `call` must raise."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def config_file(tmp_path, monkeypatch):
    """Writes CONFIG.yaml in the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> str:
        (tmp_path / "CONFIG.yaml").write_text(text, encoding="utf-8")
        return "CONFIG.yaml"

    return write


# ---------------------------------------------------------------- unknown keys


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "optimizer: {learning_rate: 1}",
            'unknown key "optimizer.learning_rate" in CONFIG.yaml: did you mean "optimizer.lr"?',
        ),
        (
            "parallel: {tp: 2}",
            'unknown key "parallel.tp" in CONFIG.yaml: did you mean "parallel.tensor_parallel_size"?',
        ),
        ("tp: 2", 'unknown key "tp" in CONFIG.yaml: did you mean "parallel.tensor_parallel_size"?'),
        ("run: {lr: 1}", 'unknown key "run.lr" in CONFIG.yaml: did you mean "optimizer.lr"?'),
        ("run: {num_step: 1}", 'unknown key "run.num_step" in CONFIG.yaml: did you mean "run.num_steps"?'),
        ("optimiser: {lr: 1}", 'unknown key "optimiser" in CONFIG.yaml: did you mean "optimizer"?'),
        ("moe: {num-experts: 8}", 'unknown key "moe.num-experts" in CONFIG.yaml: did you mean "moe.num_experts"?'),
        (
            "data: {tokenizer: {file: x}}",
            'unknown key "data.tokenizer.file" in CONFIG.yaml: data.tokenizer has kind, path',
        ),
        (
            "data: {train: [{path: a}, {path: b, wieght: 2}]}",
            'unknown key "data.train[1].wieght" in CONFIG.yaml: did you mean "data.train[1].weight"?',
        ),
        (
            "colours: {}",
            'unknown key "colours" in CONFIG.yaml: the sections are model, moe, parallel, optimizer, data, checkpoint, '
            "monitor, run",
        ),
        (
            "3: 4",
            'unknown key "3" in CONFIG.yaml: the sections are model, moe, parallel, optimizer, data, checkpoint, '
            "monitor, run",
        ),
    ],
)
def test_an_unknown_key_in_a_file_names_the_nearest(config_file, text, message):
    assert refused(load_config, config_file(text)) == message


def test_an_unknown_key_on_the_command_line_names_the_nearest():
    message = 'unknown key "optimizer.learning_rate" in the command line: did you mean "optimizer.lr"?'
    assert refused(load_config, "quickstart", ["optimizer.learning_rate=1"]) == message
    assert refused(load_config, "quickstart", ["gbs=4"]).endswith('did you mean "run.global_batch_size"?')


def test_a_key_inside_a_list_or_a_value_says_what_to_give_instead():
    message = 'data.train is {"path": "x"} in the command line: it must be a list, each a group of path, weight'
    assert refused(load_config, "quickstart", ["data.train=[]", "data.train.path=x"]) == message
    message = 'run.dir is {"name": "x"} in the command line: it must be text'
    assert refused(load_config, "quickstart", ["run.dir.name=x"]) == message


def test_every_alias_means_a_key_that_exists_and_is_none_itself():
    keys = set(all_keys())
    assert set(_ALIASES) <= keys
    names = [alias for aliases in _ALIASES.values() for alias in aliases]
    assert len(names) == len(set(names))
    sections_of_names: dict[str, list[str]] = {}
    for key in keys:
        sections_of_names.setdefault(key.rpartition(".")[2], []).append(key)
    assert not set(names) & set(sections_of_names)


def test_the_names_in_messages_are_unique_in_the_tree():
    names = [key.rpartition(".")[2] for key in all_keys() if key.count(".") == 1]
    assert len(names) == len(set(names))


# ---------------------------------------------------------------- wrong values


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.num_steps=many", 'run.num_steps is "many" in the command line: it must be a whole number of at least 1'),
        ("run.num_steps=0", "run.num_steps is 0 in the command line: it must be a whole number of at least 1"),
        ("run.num_steps=1.5", "run.num_steps is 1.5 in the command line: it must be a whole number of at least 1"),
        ("run.num_steps=true", "run.num_steps is true in the command line: it must be a whole number of at least 1"),
        ("run.num_steps=", "run.num_steps is null in the command line: it must be a whole number of at least 1"),
        (
            "optimizer.beta1=1",
            "optimizer.beta1 is 1 in the command line: it must be a number of at least 0 and below 1",
        ),
        ("optimizer.lr=.nan", "optimizer.lr is NaN in the command line: it must be a number of at least 0"),
        ("run.precision=fp64", 'run.precision is "fp64" in the command line: it must be one of fp32, bf16, fp16'),
        ("moe.dropless=2", "moe.dropless is 2 in the command line: it must be true or false"),
        (
            "moe.num_experts_by_layer=4",
            "moe.num_experts_by_layer is 4 in the command line: it must be null or a list, each a whole number of at "
            "least 1",
        ),
        (
            "moe.layer_pattern=[1,x]",
            'moe.layer_pattern is [1, "x"] in the command line: it must be a whole number of at least 1 or a list, '
            "each a whole number",
        ),
        (
            "optimizer.expert_lr_scale=big",
            'optimizer.expert_lr_scale is "big" in the command line: it must be a number above 0 or '
            "inverse_sqrt_experts",
        ),
        (
            "model.head_dim=-1",
            "model.head_dim is -1 in the command line: it must be a whole number of at least 1 or null",
        ),
        (
            "data.split=[1,0]",
            "data.split is [1, 0] in the command line: it must be a list of 3, each a number of at least 0",
        ),
        ("data.train=[{weight: 1}]", "data.train[0].path is missing in the command line: it must be text"),
        (
            "data.train=[{path: a, weight: 0}]",
            "data.train[0].weight is 0 in the command line: it must be a number above 0",
        ),
        (
            "data.train=text",
            'data.train is "text" in the command line: it must be a list, each a group of path, weight',
        ),
        (
            "run.batch_size_ramp={start: 2, increment: 2}",
            "run.batch_size_ramp.num_samples is missing in the command line: it must be a whole number of at least 1",
        ),
        (
            "parallel.zero_stage=4",
            "parallel.zero_stage is 4 in the command line: it must be a whole number of at least 0 and of at most 3",
        ),
        (
            "monitor=3",
            "monitor is 3 in the command line: it must be a group of log_interval_steps, progress_bar, "
            "wandb_mode, wandb_project, wandb_name, sample_prompt, num_sample_tokens",
        ),
        (
            "run.num_steps",
            'cannot read "run.num_steps" in the command line: write section.key=value, as in run.num_steps=100',
        ),
        ("=3", 'cannot read "=3" in the command line: write section.key=value, as in run.num_steps=100'),
        (
            "data.train=[",
            'cannot read the value of "data.train" in the command line: expected the node content, but found '
            "'<stream end>'",
        ),
        ("preset=moe-15b", "a preset cannot be set in the command line: give its name in place of the file"),
    ],
)
def test_a_wrong_value_says_what_is_valid(override, message):
    assert refused(load_config, "quickstart", [override]) == message


def test_a_wrong_value_is_laid_to_the_source_that_said_it(config_file):
    path = config_file("preset: quickstart\nrun: {num_steps: 0}\nmodel: {num_layers: 0}\n")
    assert "num_layers is 0 in CONFIG.yaml: " in refused(load_config, path)
    assert "num_layers is -1 in the command line: " in refused(load_config, path, ["model.num_layers=-1"])


# ---------------------------------------------------------------- sources


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("moe-15", 'no preset or file "moe-15": did you mean "moe-15b"?'),
        ("MOE-1.1T", 'no preset or file "MOE-1.1T": did you mean "moe-1.1t"?'),
        (
            "runs/quickstart.yaml",
            'no file "runs/quickstart.yaml", nor a preset of that name: did you mean "quickstart"?',
        ),
    ],
)
def test_a_missing_source_names_the_nearest_preset(source, message):
    assert refused(load_config, source) == message


def test_a_source_like_no_preset_lists_them():
    assert refused(load_config, "zzzz").startswith('no preset or file "zzzz": the presets are dense-125m, dense-355m, ')


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  num_steps: 3\n  seed: : 4\n", "cannot read CONFIG.yaml, line 3: mapping values are not allowed here"),
        (
            "run:\n\tnum_steps: 3\n",
            "cannot read CONFIG.yaml, line 2: found character '\\t' that cannot start any token",
        ),
        ("run:\n  seed: 1\n  seed: 2\n", 'cannot read CONFIG.yaml, line 3: key "seed" is given twice'),
        ("- run\n", "CONFIG.yaml does not hold groups of settings: write for example run: {num_steps: 100}"),
        ("preset: moe-15\n", 'no preset "moe-15" in CONFIG.yaml: did you mean "moe-15b"?'),
        (
            "run: !!python/object:os.system {}\n",
            "cannot read CONFIG.yaml, line 1: could not determine a constructor for the tag "
            "'tag:yaml.org,2002:python/object:os.system'",
        ),
        ("run: &a {dir: *a}\n", "cannot read CONFIG.yaml, line 1: found unconstructable recursive node"),
        (
            "run: {dir: !!binary aaaa}\n",
            "cannot read CONFIG.yaml, line 1: could not determine a constructor for the tag 'tag:yaml.org,2002:binary'",
        ),
    ],
)
def test_a_file_that_cannot_be_read_says_where(config_file, text, message):
    assert refused(load_config, config_file(text)) == message


def test_a_file_that_is_no_text_or_no_file(config_file, tmp_path):
    config_file("")
    (tmp_path / "CONFIG.yaml").write_bytes(b"\xff\xfe\x00")
    assert refused(load_config, "CONFIG.yaml") == "CONFIG.yaml is not a text file in UTF-8: give a YAML file"
    assert refused(load_config, str(tmp_path)) == f"cannot read {tmp_path}: Is a directory"


def test_an_empty_file_and_empty_sections_are_all_defaults(config_file):
    assert load_config(config_file("")) == Config()
    assert load_config(config_file("model:\nrun:\n  # nothing\n")) == Config()


def test_later_sources_win_and_groups_are_merged(config_file):
    path = config_file("preset: quickstart\nrun: {num_steps: 7, seed: 3}\ndata: {tokenizer: {path: tok.model}}\n")
    config = load_config(path, ["run.seed=4", "run.seed=5", "data.tokenizer.kind=sentencepiece"])
    assert (config.run.num_steps, config.run.seed, config.run.global_batch_size) == (7, 5, 16)
    assert (config.data.tokenizer.kind, config.data.tokenizer.path) == ("sentencepiece", "tok.model")
    assert config.parallel.tensor_parallel_size == 2


def test_override_values_are_typed():
    config = load_config(
        "moe-15b",
        [
            "optimizer.lr=1e-4",
            "run.num_steps=1e3",
            "model.rope_base=1e6",
            "model.vocab_size=50_257",
            "run.batch_size_ramp={start: 32, increment: 32, num_samples: 1e6}",
            "optimizer.expert_lr_scale=inverse_sqrt_experts",
            "moe.layer_pattern=[1, 3]",
            "data.train=[{path: x, weight: 2}, {path: y}]",
            "data.split=[90,10,0]",
            "run.dir=2026",
            "monitor.wandb_name='7'",
            "monitor.sample_prompt=He said: go #1",
            "moe.eval_capacity_factor=null",
            "optimizer.clip_grad=.5",
        ],
    )
    assert config.optimizer.lr == 1e-4
    assert config.run.num_steps == 1000
    assert config.model.rope_base == 1e6
    assert config.model.vocab_size == 50_257
    assert config.run.batch_size_ramp.num_samples == 1_000_000
    assert config.optimizer.expert_lr_scale == "inverse_sqrt_experts"
    assert config.moe.layer_pattern == (1, 3)
    assert [(corpus.path, corpus.weight) for corpus in config.data.train] == [("x", 2.0), ("y", 1.0)]
    assert config.data.split == (90.0, 10.0, 0.0)
    assert (config.run.dir, config.monitor.wandb_name) == ("2026", "7")
    assert config.monitor.sample_prompt == "He said: go #1"
    assert config.moe.eval_capacity_factor is None
    assert config.optimizer.clip_grad == 0.5


def test_a_null_override_takes_a_group_away(config_file):
    path = config_file("run: {batch_size_ramp: {start: 2, increment: 2, num_samples: 9}}\n")
    assert load_config(path).run.batch_size_ramp.start == 2
    assert load_config(path, ["run.batch_size_ramp=null"]).run.batch_size_ramp is None


@pytest.mark.parametrize("prompt", ["plain", "two\nlines\n\n and: more # so", "'", "", "null", "1e-4", " x ", "é→\t"])
def test_what_is_written_loads_to_the_same_config(config_file, prompt):
    config = load_config("moe-1.1t", ["moe.layer_pattern=[1,3]", "data.train=[{path: 'a: #b', weight: 3}]"])
    monitor = config.monitor.model_copy(update={"sample_prompt": prompt})
    config = config.model_copy(update={"monitor": monitor})
    assert load_config(config_file(dump_yaml(config, {"model.head_dim": 128}))) == config


# ---------------------------------------------------------------- what goes together


def checked(*overrides: str, world_size: int | None = None) -> None:
    validate(load_config("quickstart", overrides), world_size)


ONE_RANK = ("parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.expert_parallel_size=1")
DENSE = ("moe.num_experts=0", "parallel.expert_parallel_size=1")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["moe.num_experts=60", "parallel.expert_parallel_size=8"],
            "expert_parallel_size 8 does not divide num_experts 60: use 1, 2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60",
        ),
        (
            ["parallel.tensor_parallel_size=3"],
            "tensor_parallel_size 3 does not divide num_attention_heads 4: use 1, 2, 4",
        ),
        (
            ["parallel.tensor_parallel_size=4", "model.num_query_groups=2"],
            "tensor_parallel_size 4 does not divide num_query_groups 2: use 1, 2",
        ),
        (["model.ffn_hidden_size=511"], "tensor_parallel_size 2 does not divide ffn_hidden_size 511: use 1"),
        (
            ["model.vocab_size=101", "model.vocab_size_multiple=1"],
            "tensor_parallel_size 2 does not divide the padded vocabulary 101: use 1",
        ),
        (["model.seq_length=127"], "tensor_parallel_size 2 does not divide seq_length 127: use 1"),
        (
            [*DENSE, "model.seq_length=127", "parallel.sequence_parallel=true"],
            "tensor_parallel_size 2 does not divide seq_length 127: use 1",
        ),
        (
            [*ONE_RANK, "parallel.sequence_parallel=true"],
            "sequence_parallel needs tensor_parallel_size above 1: use sequence_parallel false, or "
            "tensor_parallel_size 2, 4",
        ),
        (
            ["parallel.expert_tensor_parallel_size=4"],
            "expert_tensor_parallel_size 4 is neither 1 nor tensor_parallel_size 2: use 1 or 2",
        ),
        (
            ["parallel.expert_tensor_parallel_size=2", "moe.expert_ffn_hidden_size=7"],
            "expert_tensor_parallel_size 2 does not divide expert_ffn_hidden_size 7: use 1",
        ),
        (
            ["moe.num_experts=0"],
            "expert_parallel_size 2 needs experts, but num_experts is 0: use expert_parallel_size 1",
        ),
        (["parallel.pipeline_parallel_size=3"], "pipeline_parallel_size 3 does not divide num_layers 4: use 1, 2, 4"),
        (
            ["parallel.virtual_pipeline_parallel_size=4"],
            "virtual_pipeline_parallel_size 4 does not divide the layers of each of 2 pipeline stages, 2: use 1, 2",
        ),
        (
            [*ONE_RANK, "parallel.virtual_pipeline_parallel_size=2"],
            "virtual_pipeline_parallel_size 2 needs pipeline_parallel_size above 1: "
            "use virtual_pipeline_parallel_size 1",
        ),
        (
            ["model.num_attention_heads=5"],
            "num_attention_heads 5 does not divide hidden_size 128: use 1, 2, 4, 8, 16, 32, 64, 128",
        ),
        (["model.num_query_groups=3"], "num_query_groups 3 does not divide num_attention_heads 4: use 1, 2, 4"),
        (
            ["model.position_embedding=rope", "model.head_dim=33"],
            "position_embedding rope turns pairs of values, but head_dim is 33: use an even head_dim",
        ),
        (
            ["model.hidden_size=127", "model.head_dim=32"],
            "position_embedding sinusoidal is half sines and half cosines, but hidden_size is 127: use an even "
            "hidden_size of at least 4",
        ),
        (["moe.top_k=9"], "top_k 9 is more than num_experts 8: use 1 to 8"),
        (
            ["moe.layer_pattern=5"],
            "layer_pattern 5 puts experts in none of the 4 layers: use 1 to 4, or a list of layers",
        ),
        (
            ["moe.layer_pattern=[]"],
            "layer_pattern [] puts experts in no layer: list at least one, or set num_experts 0",
        ),
        (["moe.layer_pattern=[1,4]"], "layer_pattern names layer 4, but num_layers is 4: use layers 0 to 3"),
        (["moe.layer_pattern=[-1]"], "layer_pattern names layer -1, but num_layers is 4: use layers 0 to 3"),
        (
            ["moe.top_k=1"],
            "top_k 1 with normalize_gates true makes every gate 1, so that the router never learns from the language "
            "loss: use normalize_gates false",
        ),
        (
            ["moe.eval_capacity_factor=2", "moe.eval_capacity_fraction=0.5"],
            "eval_capacity_factor and eval_capacity_fraction are both set: use one of them",
        ),
        (["moe.layer_pattern=[1,1]"], "layer_pattern names layer 1 twice: list each layer once"),
        (
            ["moe.score_function=sigmoid", "moe.gate_order=select_then_softmax"],
            "gate_order select_then_softmax means nothing to score_function sigmoid: use gate_order "
            "softmax_then_select, or score_function softmax",
        ),
        (
            ["moe.top_k=1", "moe.normalize_gates=false", "moe.gate_order=select_then_softmax"],
            "top_k 1 with gate_order select_then_softmax makes every gate 1, so that the router never learns from the "
            "language loss: use gate_order softmax_then_select",
        ),
        (
            ["moe.balance_bias_update_rate=0.001"],
            "balance_bias_update_rate 0.001 needs score_function sigmoid, but it is softmax: use score_function "
            "sigmoid, or balance_bias_update_rate 0",
        ),
        (
            ["moe.normalize_gates=false", "moe.normalize_when=before_drops"],
            "normalize_when before_drops means nothing with normalize_gates false: use normalize_gates true, or "
            "normalize_when after_drops",
        ),
        (
            ["moe.num_expert_groups=4"],
            "num_expert_groups 4 needs num_selected_groups, which is not set: set both or neither",
        ),
        (
            ["moe.num_selected_groups=4"],
            "num_selected_groups 4 needs num_expert_groups, which is not set: set both or neither",
        ),
        (
            ["moe.num_expert_groups=3", "moe.num_selected_groups=1"],
            "num_expert_groups 3 does not divide num_experts 8: use 1, 2, 4, 8",
        ),
        (
            ["moe.num_expert_groups=4", "moe.num_selected_groups=5"],
            "num_selected_groups 5 is more than num_expert_groups 4: use 1 to 4",
        ),
        (
            ["moe.num_expert_groups=4", "moe.num_selected_groups=1", "moe.top_k=3"],
            "num_selected_groups 1 of 2 experts each hold fewer than top_k 3 experts: use num_selected_groups 2 to 4",
        ),
        (
            ["moe.dropless=true", "moe.normalize_when=before_drops"],
            "normalize_when before_drops means nothing with dropless true: use normalize_when after_drops, or "
            "dropless false",
        ),
        (
            ["moe.dropless=true", "moe.drop_policy=probability"],
            "drop_policy probability means nothing with dropless true: use drop_policy position, or dropless false",
        ),
        (
            ["moe.shared_expert_mix=residual"],
            "shared_expert_mix residual needs shared_expert_ffn_hidden_size, which is not set: set it, or use "
            "shared_expert_mix add",
        ),
        (
            ["moe.shared_expert_ffn_hidden_size=33"],
            "tensor_parallel_size 2 does not divide shared_expert_ffn_hidden_size 33: use 1",
        ),
        (
            [*DENSE, "moe.shared_expert_ffn_hidden_size=32"],
            "shared_expert_ffn_hidden_size 32 needs experts to stand beside, but num_experts is 0: use "
            "shared_expert_ffn_hidden_size null",
        ),
        (
            [*DENSE, "moe.num_experts_by_layer=[4,8]"],
            "num_experts_by_layer needs num_experts 8, the largest of its entries, but num_experts is 0: set it, or "
            "use num_experts_by_layer null",
        ),
        (
            ["moe.num_experts_by_layer=[4,4,8]"],
            "num_experts_by_layer has 3 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[]"],
            "num_experts_by_layer has 0 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[8]", "moe.layer_pattern=[0,3]"],
            "num_experts_by_layer has 1 entries, but layer_pattern puts experts in 2 layers: list 2",
        ),
        (
            ["moe.num_experts_by_layer=[2,4]"],
            "num_experts 8 is not the largest of num_experts_by_layer [2, 4]: use num_experts 4",
        ),
        (
            ["moe.num_experts_by_layer=[4,16]"],
            "num_experts 8 is not the largest of num_experts_by_layer [4, 16]: use num_experts 16",
        ),
        (
            ["moe.num_experts_by_layer=[6,8]", "parallel.expert_parallel_size=4"],
            "expert_parallel_size 4 does not divide num_experts_by_layer[0] 6: use 1, 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,2]", "moe.top_k=4"],
            "top_k 4 is more than num_experts_by_layer[1] 2: use 1 to 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,6]", "moe.num_expert_groups=4", "moe.num_selected_groups=2"],
            "num_expert_groups 4 does not divide num_experts_by_layer[1] 6: use 1, 2",
        ),
        (
            ["moe.num_experts_by_layer=[8,4]", "moe.num_expert_groups=4", "moe.num_selected_groups=1"],
            "num_selected_groups 1 of 1 experts each hold fewer than top_k 2 experts: use num_selected_groups 2 to 4",
        ),
        (["optimizer.min_lr=1"], "min_lr 1 is above lr 0.004: use 0 to 0.004"),
        (["optimizer.warmup_steps=200"], "warmup_steps 200 is not below num_steps 200: use 0 to 199"),
        (["optimizer.decay_steps=20"], "warmup_steps 20 is not below decay_steps 20: use 0 to 19"),
        (
            ["optimizer.schedule=wsd", "optimizer.wsd_decay_steps=190"],
            "wsd_decay_steps 190 and warmup_steps 20 are more than num_steps 200: use wsd_decay_steps 1 to 180",
        ),
        (
            ["optimizer.schedule=wsd", "optimizer.decay_steps=100"],
            "decay_steps means nothing to schedule wsd: use wsd_decay_steps, or decay_steps null",
        ),
        (
            ["optimizer.wsd_decay_steps=100"],
            "wsd_decay_steps means nothing to schedule cosine: use schedule wsd, or wsd_decay_steps null",
        ),
        (
            ["optimizer.implementation=apex", "optimizer.name=sgd"],
            "implementation apex has no sgd: use implementation auto or torch, or name adamw",
        ),
        (
            ["optimizer.min_loss_scale=8"],
            "min_loss_scale 8 is above initial_loss_scale 4: use at most 4",
        ),
        (["data.split=[0,0,0]"], "data.split leaves nothing to train on: give its first share a value above 0"),
        (
            ["data.tokenizer.kind=sentencepiece"],
            "data.tokenizer.kind sentencepiece needs data.tokenizer.path: give a .model file",
        ),
        (
            ["run.global_batch_size=30"],
            "global_batch_size 30 is not a multiple of micro_batch_size 4: use 28 or 32",
        ),
        (
            ["run.batch_size_ramp={start: 64, increment: 4, num_samples: 9}", "run.global_batch_size=32"],
            "batch_size_ramp.start 64 is above global_batch_size 32: use at most 32",
        ),
        (
            ["run.batch_size_ramp={start: 8, increment: 16, num_samples: 9}", "run.global_batch_size=32"],
            "batch_size_ramp.increment 16 does not lead from batch_size_ramp.start 8 to global_batch_size 32: "
            "use 4, 8, 12, 24",
        ),
        (
            ["parallel.all_to_all_chunks=3", "moe.num_experts=8", "parallel.expert_parallel_size=2"],
            "all_to_all_chunks 3 does not divide the experts of a rank, num_experts 8 / expert_parallel_size 2 = 4: "
            "use 1, 2, 4",
        ),
        (
            [
                "parallel.all_to_all_chunks=4", "moe.num_experts=8", "parallel.expert_parallel_size=2",
                "moe.num_experts_by_layer=[4,8]", "model.num_layers=4",
            ],
            "all_to_all_chunks 4 does not divide the experts of a rank, num_experts_by_layer[0] 4 / "
            "expert_parallel_size 2 = 2: use 1, 2",
        ),
        (
            [*DENSE, "parallel.all_to_all_chunks=2"],
            "all_to_all_chunks 2 needs experts, but num_experts is 0: use all_to_all_chunks 1",
        ),
        (
            [*DENSE, "parallel.all_to_all=hierarchical"],
            "all_to_all hierarchical needs experts, but num_experts is 0: use all_to_all flat",
        ),
        (
            ["parallel.zero_stage=3"],
            "zero_stage 3 with experts is not supported: DeepSpeed refuses its own MoE layers under ZeRO-3; "
            "use zero_stage 1 or 2",
        ),
        (
            ["parallel.zero_stage=0", "run.precision=bf16"],
            "zero_stage 0 with precision bf16 or fp16 is not supported: DeepSpeed's optimizer for that case leaves the "
            "experts out of the gradient norm (DeepSpeed issue 8613); use zero_stage 1 or 2, or precision fp32",
        ),
    ],
)
def test_an_impossible_combination_says_what_would_be_valid(overrides, message):
    assert refused(checked, *overrides) == message


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            [],
            6,
            "6 ranks are not a multiple of tensor_parallel_size 2 x pipeline_parallel_size 2 = 4: "
            "use 4, 8, 12, … ranks",
        ),
        (
            ["parallel.expert_parallel_size=8"],
            8,
            "expert_parallel_size 8 x expert_tensor_parallel_size 1 does not divide the 4 ranks of a pipeline stage: "
            "use expert_parallel_size 1, 2, 4",
        ),
        (
            ["parallel.expert_parallel_size=4", "parallel.expert_tensor_parallel_size=2"],
            8,
            "expert_parallel_size 4 x expert_tensor_parallel_size 2 does not divide the 4 ranks of a pipeline stage: "
            "use expert_parallel_size 1, 2",
        ),
        (
            ["parallel.expert_parallel_size=4", "parallel.all_to_all=hierarchical", "parallel.ranks_per_node=3"],
            8,
            "ranks_per_node 3 puts unequal numbers of an expert group's ranks on its nodes, which all_to_all "
            "hierarchical cannot use: use ranks_per_node 1, 2, 4, 8, or all_to_all flat",
        ),
        (
            ["run.global_batch_size=12"],
            8,
            "global_batch_size 12 is not a multiple of micro_batch_size 4 x data parallel size 2 = 8: use 8 or 16",
        ),
        (
            ["run.batch_size_ramp={start: 4, increment: 4, num_samples: 9}"],
            8,
            "batch_size_ramp.start 4 is not a multiple of micro_batch_size 4 x data parallel size 2 = 8: use 8",
        ),
        (
            ["parallel.virtual_pipeline_parallel_size=2", "run.global_batch_size=24"],
            8,
            "global_batch_size 24 is not a multiple of micro_batch_size 4 x data parallel size 2 x "
            "pipeline_parallel_size 2 = 16, as virtual_pipeline_parallel_size above 1 needs: use 16 or 32",
        ),
    ],
)
def test_what_does_not_fit_the_ranks_says_what_would(overrides, world_size, message):
    checked(*overrides)
    with pytest.raises(ConfigError) as caught:
        checked(*overrides, world_size=world_size)
    assert str(caught.value) == message


def test_training_needs_data():
    message = "data.train is empty: name an indexed dataset, as in data.train=[{path: data/my_text}]"
    assert refused(validate_for_training, load_config("quickstart"), 8) == message
    validate_for_training(load_config("quickstart", ["data.train=[{path: x}]"]), 8)


@pytest.mark.parametrize(
    "overrides",
    [
        ("moe.layer_pattern=[1]", "parallel.pipeline_parallel_size=4"),  # stages without experts
        ("moe.num_experts_by_layer=[4,8]", "parallel.expert_parallel_size=4"),
        ("moe.shared_expert_ffn_hidden_size=32", "moe.shared_expert_mix=sigmoid_gate"),
        ("parallel.virtual_pipeline_parallel_size=2",),
        ("parallel.sequence_parallel=true", "parallel.expert_tensor_parallel_size=2"),
        ("parallel.all_to_all=hierarchical", "parallel.expert_parallel_size=4", "parallel.ranks_per_node=2"),
        ("parallel.all_to_all=hierarchical",),  # how many ranks a node has is the launcher's to say
        ("optimizer.schedule=wsd",),
        ("run.num_steps=10", "optimizer.decay_steps=1000"),  # the start of a longer schedule
        ("parallel.zero_stage=2", "run.precision=fp16", "parallel.recompute=full"),
        ("run.batch_size_ramp={start: 8, increment: 8, num_samples: 100}",),
        (*DENSE, "model.seq_length=127"),  # a dense model without sequence parallel keeps the sequence whole
        ("moe.layer_pattern=1", "model.ffn_hidden_size=511", "moe.expert_ffn_hidden_size=33"),  # no dense layer to cut
    ],
)
def test_possible_combinations_pass(overrides):
    checked(*overrides, world_size=8)


def test_whatever_passes_can_be_folded_and_has_a_table():
    """The rank grid and the parameter table check for themselves: nothing that passes here may fail there."""
    passed = 0
    for tensor in (1, 2, 3, 4):
        for stages in (1, 2, 4):
            for expert in (1, 2, 4, 8):
                for expert_tensor in (1, 2):
                    config = load_config(
                        "quickstart",
                        [
                            f"parallel.tensor_parallel_size={tensor}",
                            f"parallel.pipeline_parallel_size={stages}",
                            f"parallel.expert_parallel_size={expert}",
                            f"parallel.expert_tensor_parallel_size={expert_tensor}",
                            "run.global_batch_size=32",
                        ],
                    )
                    with contextlib.suppress(ConfigError):
                        validate(config, 8)
                        Grid.from_config(config.parallel, 8)
                        assert param_table(config.model, config.moe)
                        passed += 1
    assert passed == 31


@pytest.mark.parametrize("ranks_per_node", range(1, 13))
@pytest.mark.parametrize(("expert", "tensor"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2), (6, 2)])
def test_nodes_that_pass_are_those_the_groups_can_be_made_for(expert, tensor, ranks_per_node):
    sizes = {"expert_parallel_size": expert, "tensor_parallel_size": tensor, "expert_tensor_parallel_size": tensor}
    parallel = ParallelConfig(all_to_all="hierarchical", ranks_per_node=ranks_per_node, **sizes)
    outcomes = []
    for check, error in [
        (lambda: check_nodes(parallel, 12), ConfigError),
        (lambda: exchange_levels(Grid.from_config(parallel, 12).expert_groups(), ranks_per_node), TopologyError),
    ]:
        try:
            check()
            outcomes.append("fits")
        except error:
            outcomes.append("refused")
    assert outcomes[0] == outcomes[1]


def test_divisors_are_all_and_ascending():
    for number in range(1, 200):
        assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


# ---------------------------------------------------------------- the support matrix


def test_the_support_page_is_that_of_the_code():
    assert PAGE.read_text(encoding="utf-8") == support_page()


def test_every_refusal_can_happen_and_is_on_the_page():
    dense = load_config("quickstart", DENSE)
    cases = [
        load_config("quickstart", ["parallel.zero_stage=3"]),
        load_config("quickstart", [*DENSE, "parallel.zero_stage=3"]),
        load_config("quickstart", [*DENSE, *ONE_RANK, "parallel.zero_stage=3"]),
        load_config("quickstart", ["parallel.zero_stage=0", "run.precision=fp16"]),
    ]
    assert [next(refusals(case)) for case in cases] == list(REFUSALS)
    assert not list(refusals(dense))
    page = support_page()
    for refusal in REFUSALS:
        assert f"| {refusal.name} | {refusal.reason} | {refusal.instead} |" in page
    for row in ("| 0 | yes | no | no |", "| 1 | yes | yes | yes |", "| 2 | yes | yes | yes |", "| 3 | no | no | no |"):
        assert row in page
