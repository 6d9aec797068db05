"""Loading, checking and writing configurations: what a user reads when something is wrong, by exact text."""


import pytest

from megamoe.config import Config, dump_yaml, load_config
from megamoe.config.keys import _ALIASES, all_keys
from tests.unit.config_cases import refused


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
            'unknown key "colours" in CONFIG.yaml: the sections are model, moe, parallel, optimizer, data, finetune, '
            "checkpoint, watchdog, monitor, guard, preflight, restart, run",
        ),
        (
            "3: 4",
            'unknown key "3" in CONFIG.yaml: the sections are model, moe, parallel, optimizer, data, finetune, '
            "checkpoint, watchdog, monitor, guard, preflight, restart, run",
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
    message = 'data.train is {"path": "x"} in the command line: it must be a list, each a group of path, weight, name'
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
            'data.train is "text" in the command line: it must be a list, each a group of path, weight, name',
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
            "monitor is 3 in the command line: it must be a group of log_interval_steps, expert_load_interval_steps, "
            "progress_bar, peak_flops_per_second, wandb_mode, wandb_project, wandb_entity, wandb_group, "
            "wandb_job_type, wandb_tags, wandb_name, wandb_notes, wandb_timeout_seconds, wandb_artifacts, tensorboard, "
            "sample_prompt, num_sample_tokens",
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
