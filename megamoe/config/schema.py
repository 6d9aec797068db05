"""The configuration tree: frozen, typed, one section per concern.

Units are in the names: `num_` counts, `_size` of a group or dimension, `_steps`, `_tokens`, `_bytes`, `_seconds`.
Checks that need one section live here as types and bounds; checks across sections live in `validation`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Probability = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """A frozen group of settings that refuses keys it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False
    )


class ModelConfig(Section):
    """The transformer: its shape and the choices that tell one family from another.

    The paper's family is layernorm, gelu, sinusoidal, use_bias, tied and scaled embeddings; the modern one is
    rmsnorm, swiglu, rope, no biases, an untied head. Every choice is free on its own.
    """

    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 128
    ffn_hidden_size: PositiveInt | None = None  # None: 4 * hidden_size
    num_attention_heads: PositiveInt = 4
    num_query_groups: PositiveInt | None = None  # key/value heads; None: one per attention head
    head_dim: PositiveInt | None = None  # None: hidden_size / num_attention_heads
    vocab_size: PositiveInt = 51_200  # token ids the data may hold
    vocab_size_multiple: PositiveInt = 128  # embedding rows are vocab_size rounded up to this
    seq_length: PositiveInt = 256
    normalization: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_epsilon: Annotated[float, Field(gt=0.0)] = 1e-5
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    position_embedding: Literal["sinusoidal", "rope"] = "sinusoidal"
    rope_base: Annotated[float, Field(gt=0.0)] = 10_000.0
    qk_norm: Literal["none", "head", "full"] = "none"  # head: Qwen3, over head_dim; full: OLMoE, over all heads
    use_bias: bool = True  # biases on the linear layers of attention, FFN and experts
    tie_embeddings: bool = True
    scale_embeddings: bool = True  # multiply token embeddings by sqrt(hidden_size)
    attention_dropout: Probability = 0.0
    hidden_dropout: Probability = 0.0
    init: Literal["fairseq", "normal"] = "fairseq"
    init_std: Annotated[float, Field(gt=0.0)] = 0.02  # used by init "normal"
    num_labels: CountOrZero = 0  # 0: a language model; else a classifier, with a linear head in the output's place


class MoEConfig(Section):
    """The mixture of experts. `num_experts = 0` is the dense model through the same code."""

    num_experts: CountOrZero = 0
    num_experts_by_layer: tuple[PositiveInt, ...] | None = None
    # a pyramid: experts of each MoE layer, lowest first; num_experts is the largest of them. None: num_experts in each
    top_k: PositiveInt = 2
    layer_pattern: PositiveInt | tuple[int, ...] = 2
    # A period p: MoE where (i + 1) % p == 0 (0-based layer i); or the 0-based MoE layers themselves.
    expert_ffn_hidden_size: PositiveInt | None = None  # None: model.ffn_hidden_size
    shared_expert_ffn_hidden_size: PositiveInt | None = None  # an FFN that every token passes; None: there is none
    shared_expert_mix: Literal["add", "sigmoid_gate", "residual"] = "add"
    # how its output joins the routed one: their sum; the sum after a learned gate on it; a learned weight for each
    recompute_activation: bool = True
    # of an expert's FFN keep only what enters the activation, and apply that again in the backward pass
    dropless: bool = False
    capacity_factor: Annotated[float, Field(gt=0.0)] = 1.0
    # capacity of one expert for one rank's micro-batch of S tokens: top_k * ceil(S / experts * capacity_factor)
    drop_policy: Literal["position", "probability"] = "position"
    # who is dropped over capacity: later tokens, second choices before first ones; or the least probable
    eval_capacity_factor: Annotated[float, Field(gt=0.0)] | None = None  # None: as in training
    eval_capacity_fraction: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    # capacity in evaluation as a share of the tokens: ceil(fraction * S), as the paper's runs were evaluated
    score_function: Literal["softmax", "sigmoid"] = "softmax"
    gate_order: Literal["softmax_then_select", "select_then_softmax"] = "softmax_then_select"
    # select_then_softmax: the softmax is over the chosen logits alone
    normalize_gates: bool = True  # chosen gates are divided by their sum
    normalize_when: Literal["after_drops", "before_drops"] = "after_drops"  # what that sum counts, where tokens drop
    routed_scaling_factor: Annotated[float, Field(gt=0.0)] = 1.0  # multiplies the gates at the end
    num_expert_groups: PositiveInt | None = None  # groups of neighbouring experts; None: no groups
    num_selected_groups: PositiveInt | None = None  # a token's experts are of this many groups
    balance_bias_update_rate: NonNegative = 0.0  # step of the selection bias that balances the load; 0: no bias
    balance_loss: Literal["first_choice", "all_choices"] = "first_choice"
    balance_loss_scope: Literal["micro_batch", "sequence", "global_batch"] = "micro_batch"  # whose tokens are counted
    balance_loss_coeff: NonNegative = 0.01  # of the balance loss summed over MoE layers
    z_loss_coeff: NonNegative = 0.0  # of the mean square of the routers' log-partition, summed over MoE layers
    input_jitter: Probability = 0.0  # training: each router input times a draw from 1 - jitter to 1 + jitter


class ParallelConfig(Section):
    """How the ranks are folded. Data parallel size is what remains: world / (tensor * pipeline)."""

    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    virtual_pipeline_parallel_size: PositiveInt = 1  # model chunks per pipeline rank; >1: interleaved schedule
    expert_parallel_size: PositiveInt = 1
    expert_tensor_parallel_size: PositiveInt = 1  # 1 or tensor_parallel_size
    sequence_parallel: bool = False
    all_to_all: Literal["flat", "hierarchical"] = "flat"  # hierarchical: inside the node first, then across
    all_to_all_chunks: PositiveInt = 1  # groups of a rank's experts; one computes while the next one's tokens travel
    ranks_per_node: PositiveInt | None = None  # for all_to_all hierarchical; None: what the launcher says
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 1
    recompute: Literal["none", "selective", "full"] = "none"
    timeout_seconds: Annotated[float, Field(gt=0.0)] = 300.0  # longest wait in a collective


class OptimizerConfig(Section):
    """Optimizer, learning-rate schedule, clipping, loss scale, and what is special about experts."""

    name: Literal["adamw", "sgd"] = "adamw"
    implementation: Literal["auto", "torch", "apex"] = "auto"  # auto: NVIDIA apex where it is really installed
    lr: NonNegative = 6e-4
    min_lr: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "wsd", "constant"] = "linear"
    warmup_steps: CountOrZero = 0
    decay_steps: PositiveInt | None = None  # linear, cosine: step that reaches min_lr; None: run.num_steps
    wsd_decay_steps: PositiveInt | None = None  # wsd: steps of the last phase; None: a tenth of the whole
    beta1: Probability = 0.9
    beta2: Probability = 0.98
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    momentum: Probability = 0.0  # sgd
    weight_decay: NonNegative = 0.01
    decay_norms_and_biases: bool = True  # the paper decays every parameter
    clip_grad: NonNegative = 0.0  # largest global gradient norm; 0: no clipping
    expert_grad_scaling: Literal["mean", "sqrt_world_size"] = "mean"
    # mean: the gradient of the mean loss; sqrt_world_size: times sqrt(ranks that share one set of experts)
    expert_grad_world_size: PositiveInt | None = None  # that number of ranks; None: expert_parallel_size
    expert_lr_scale: Annotated[float, Field(gt=0.0)] | Literal["inverse_sqrt_experts"] = 1.0
    # multiplies the experts' learning rate; inverse_sqrt_experts: 1 / sqrt(experts of the layer)
    initial_loss_scale: Annotated[float, Field(gt=0.0)] = 4.0  # fp16
    loss_scale_window_steps: PositiveInt = 2_000
    min_loss_scale: Annotated[float, Field(gt=0.0)] = 1e-4


class Corpus(Section):
    """One indexed dataset: the path of its .bin/.idx pair without the ending, and its weight in the blend."""

    path: str
    weight: Annotated[float, Field(gt=0.0)] = 1.0
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")] | None = None  # in metrics; None: end of the path


class TokenizerConfig(Section):
    """What turns text into ids; needed to sample text, not to train on indexed datasets."""

    kind: Literal["sentencepiece", "gpt2_bpe", "byte"] = "byte"
    path: str | None = None  # sentencepiece: the .model file; gpt2_bpe: folder with vocab.json and merges.txt


class DataConfig(Section):
    """Where training, validation and test samples come from."""

    tokenizer: TokenizerConfig = TokenizerConfig()
    train: tuple[Corpus, ...] = ()
    valid: tuple[Corpus, ...] = ()  # empty: cut from train by `split`
    test: tuple[Corpus, ...] = ()
    split: tuple[NonNegative, NonNegative, NonNegative] = (0.98, 0.02, 0.0)  # train, valid, test shares of `train`


class CheckpointConfig(Section):
    """When the state of a run is written and checked, how much of it is kept, and what a run starts from."""

    save_interval_steps: CountOrZero = 0  # 0: only at the end
    keep_last: PositiveInt = 2
    keep_every_steps: PositiveInt | None = None  # besides: those of every multiple of this step are kept for good
    save_at_end: bool = True
    async_save: bool = True  # training goes on while a copy of the state is written
    save_timeout_seconds: Annotated[float, Field(gt=0.0)] = 1_800.0  # a save that takes longer has failed
    on_save_failure: Literal["continue", "stop"] = "continue"  # a save at the end that fails always ends in an error
    resume: bool = True  # go on from the newest complete checkpoint of the run folder
    on_damage: Literal["fall_back", "stop"] = "fall_back"  # the newest is damaged: take the one before, or stop
    verify: Literal["full", "sampled"] = "full"  # checksums on reading: of every block, or of one tensor in ten
    load_from: str | None = None  # fine-tuning: start from the weights of this checkpoint, or of this run's newest
    replica_check_interval_steps: CountOrZero = 100  # compare what must be equal on several ranks; 0: never


Freezable = Literal["routers", "experts", "dense", "embeddings", "norms", "attention", "ffn", "output"]


class FinetuneConfig(Section):
    """Training on examples of a task (docs/finetune.md). `objective` null: it is off, and data.train is trained on."""

    objective: Literal["language_model", "classification"] | None = None
    train_files: tuple[str, ...] = ()  # JSON Lines files
    valid_files: tuple[str, ...] = ()  # validated on whole; without any nothing is
    labels: tuple[str, ...] = ()  # classification: names of the classes; empty: labels are numbers from 0
    loss_on: Literal["completion", "all"] = "completion"  # of examples with a prompt; a lone text counts whole
    too_long: Literal["refuse", "cut"] = "refuse"  # examples longer than model.seq_length
    newlines_end_documents: bool = False  # a newline is the end-of-document id, as in the paper's data
    num_epochs: Annotated[float, Field(gt=0.0)] | None = None  # `megamoe finetune` makes run.num_steps of it
    freeze: tuple[Freezable, ...] = ()  # parts that stay as they are; dense: all but experts and routers
    best_by: Literal["loss", "accuracy"] = "loss"  # which validation's checkpoint is kept whatever comes later
    stop_after_validations: PositiveInt | None = None  # in a row without a better one, training ends; null: it goes on


class WatchdogConfig(Section):
    """When a run that stands still is ended, and its ranks' stacks are written."""

    enabled: bool = True
    hang_timeout_seconds: Annotated[float, Field(gt=0.0)] | None = None
    # longest time without progress, or without a rank's heartbeat; None: half of parallel.timeout_seconds
    slow_timeout_seconds: Annotated[float, Field(gt=0.0)] = 1_800.0
    # longest time without progress while a run loads, goes through its first step, saves, validates, samples or ends
    poll_seconds: Annotated[float, Field(gt=0.0)] = 1.0  # between heartbeats; at most a third of the timeout is used


class MonitorConfig(Section):
    """What is printed and recorded while a run goes on. Variables WANDB_... that are set win over wandb_... here."""

    log_interval_steps: PositiveInt = 10
    expert_load_interval_steps: CountOrZero = 100
    # tokens by expert and layer, summed over so many steps, with the next line of metrics; 0: never
    progress_bar: bool = True  # only ever drawn on a terminal
    peak_flops_per_second: Annotated[float, Field(gt=0.0)] | None = None  # of one device; None: if it is known
    wandb_mode: Literal["disabled", "offline", "online"] = "offline"
    wandb_project: str = "megamoe"
    wandb_entity: str | None = None
    wandb_group: str | None = None
    wandb_job_type: str = "train"
    wandb_tags: tuple[str, ...] = ()
    wandb_name: str | None = None
    wandb_notes: str | None = None
    wandb_timeout_seconds: Annotated[float, Field(gt=0.0)] = 60.0
    # longest wait for the service before the run is offline, and for all to be sent when training has ended
    wandb_artifacts: bool = False  # tell of each checkpoint: its manifest, and where the rest lies
    tensorboard: bool = False  # write event files into RUN/tensorboard; needs the package tensorboard
    sample_prompt: str | None = None  # text to continue when training ends; needs data.tokenizer
    num_sample_tokens: CountOrZero = 60


class GuardConfig(Section):
    """What is done about spikes of the loss and about divergence (docs/operations.md). Losses are in nats a token."""

    action: Literal["disabled", "warn", "skip", "roll_back", "stop"] = "warn"
    # a spike's step: trained on all the same; not applied; undone together with what came after a checkpoint; the last
    divergence_action: Literal["warn", "roll_back", "stop"] | None = None  # None: as action; where that is skip, stop
    judge_after_steps: CountOrZero = 100  # of the run: up to there only what is no number is judged
    window_steps: Annotated[int, Field(ge=8)] = 128  # recent steps that a loss is compared with
    min_window_steps: Annotated[int, Field(ge=8)] = 32  # no comparison with fewer
    threshold: Annotated[float, Field(gt=0.0)] = 8.0
    # a spike is above the window's median by more than so many standard deviations, as its median deviation tells them
    min_rise: NonNegative = 0.1  # and by more than so much
    grad_norm_factor: Annotated[float, Field(gt=1.0)] | None = None
    # a gradient norm above the median of the window's by this factor is a spike, too; None: norms are not judged
    divergence_steps: PositiveInt = 16  # diverged: the median of so many last losses is above
    divergence_rise: Annotated[float, Field(gt=0.0)] = 1.0  # the lowest median of a window so far by this,
    guessing_margin: NonNegative = 1.0  # or the loss of guessing, log(vocab_size), by this
    max_roll_backs: PositiveInt = 3  # within
    roll_back_window_steps: PositiveInt = 1_000  # so many steps: one more stops the run
    min_roll_back_steps: CountOrZero = 0  # take a checkpoint of at least so many steps before the spike


class PreflightConfig(Section):
    """What `megamoe preflight` holds the nodes to before a run begins."""

    meeting_timeout_seconds: Annotated[float, Field(gt=0.0)] = 180.0  # for the last rank to come
    max_clock_difference_seconds: Annotated[float, Field(gt=0.0)] = 2.0  # from the median node
    min_relative_compute: Probability = 0.75  # of the median rank's rate of products
    min_relative_bandwidth: Probability = 0.5  # between neighbours, of the faster links'


class RestartConfig(Section):
    """How often a batch job that failed is queued again, and how many hosts it then avoids."""

    max_attempts: PositiveInt = 50  # attempts that may fail; one that a signal ended with its state saved did not fail
    max_attempts_without_progress: PositiveInt = 3  # in a row that left no newer checkpoint, whatever ended them
    max_excluded_hosts: CountOrZero = 4  # hosts found bad that the next attempts do without


class BatchSizeRamp(Section):
    """Grow the global batch from `start` by `increment` samples, evenly over the first `num_samples` samples."""

    start: PositiveInt
    increment: PositiveInt
    num_samples: PositiveInt


class RunConfig(Section):
    """One training run: its folder, length, batch, precision and limits."""

    dir: str = "runs/default"
    num_steps: PositiveInt = 100
    micro_batch_size: PositiveInt = 1  # sequences per rank and forward pass
    global_batch_size: PositiveInt = 8  # sequences per optimizer step, over all ranks
    batch_size_ramp: BatchSizeRamp | None = None
    seed: CountOrZero = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: GPUs where this machine has one for each of its ranks
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    eval_interval_steps: CountOrZero = 0  # 0: only at the end
    num_eval_batches: CountOrZero = 8  # global batches per validation; 0: none
    max_skipped_steps: PositiveInt = 20  # consecutive steps with a non-finite gradient before the run stops


class Config(Section):
    """A whole run, resolved: every default is filled in, nothing is left to be looked up elsewhere."""

    model: ModelConfig = ModelConfig()
    moe: MoEConfig = MoEConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    monitor: MonitorConfig = MonitorConfig()
    guard: GuardConfig = GuardConfig()
    preflight: PreflightConfig = PreflightConfig()
    restart: RestartConfig = RestartConfig()
    run: RunConfig = RunConfig()
