"""Speed of one rank's dense training step in fp32, megamoe against Hugging Face transformers.

Both sides train a model of the same shape (XGLM for the paper's family, Llama for the modern one), on the same
random tokens, with torch's AdamW, the same clipping and the same number of threads. They take turns in one process,
and who goes first changes from pair to pair, so that a machine that slows down or speeds up hurts both alike.

    python tools/benchmarks/dense_step.py                                  # the laptop preset
    python tools/benchmarks/dense_step.py --pairs 9 --threads 1 model.num_layers=6

Prints tokens per second of both sides and their ratio for every pair, and the median ratio.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from megamoe.config.loading import load_config
from megamoe.config.schema import Config, ModelConfig
from megamoe.errors import ConfigError, MegamoeError
from megamoe.topology.parameters import num_parameters, padded_vocab_size, param_table

TrainStep = Callable[[np.ndarray], float]  # token ids int64 [global batch, seq_length + 1] -> language loss
FIXED = ("run.precision=fp32", "optimizer.name=adamw", "optimizer.implementation=torch", "moe.num_experts=0")


@dataclass(frozen=True)
class Side:
    """One of the two competitors."""

    name: str
    train_step: TrainStep
    num_parameters: int


# ---------------------------------------------------------------- Hugging Face


def hugging_face_model(model: ModelConfig) -> torch.nn.Module:
    """The model of transformers that has this shape. Raises ConfigError where none has."""
    common = {
        "vocab_size": padded_vocab_size(model),
        "max_position_embeddings": model.seq_length,
        "use_cache": False,
        "attention_dropout": model.attention_dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }
    ffn_hidden_size = model.ffn_hidden_size or 4 * model.hidden_size
    plain = model.qk_norm == "none" and model.head_dim in (None, model.hidden_size // model.num_attention_heads)
    paper = (model.normalization, model.position_embedding) == ("layernorm", "sinusoidal")
    if plain and paper and model.activation != "swiglu" and model.use_bias and model.num_query_groups is None:
        config = transformers.XGLMConfig(
            **common,
            d_model=model.hidden_size,
            ffn_dim=ffn_hidden_size,
            num_layers=model.num_layers,
            attention_heads=model.num_attention_heads,
            activation_function={"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}[model.activation],
            dropout=model.hidden_dropout,
            activation_dropout=0.0,
            layerdrop=0.0,
            scale_embedding=model.scale_embeddings,
        )
        return transformers.XGLMForCausalLM(config)
    modern = (model.normalization, model.position_embedding, model.activation) == ("rmsnorm", "rope", "swiglu")
    if plain and modern and not model.scale_embeddings and model.hidden_dropout == 0.0:
        config = transformers.LlamaConfig(
            **common,
            hidden_size=model.hidden_size,
            intermediate_size=ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups or model.num_attention_heads,
            attention_bias=model.use_bias,
            mlp_bias=model.use_bias,
            rms_norm_eps=model.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        )
        return transformers.LlamaForCausalLM(config)
    raise ConfigError("this model has no twin in transformers: use the paper's dense family, or the modern one")


def hugging_face_side(config: Config) -> Side:
    """A plain training loop: forward, cross entropy, backward, clip, AdamW."""
    model = hugging_face_model(config.model).train()
    o = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=o.weight_decay
    )

    def train_step(samples: np.ndarray) -> float:
        micro_batches = torch.from_numpy(samples).split(config.run.micro_batch_size)
        losses = []
        for rows in micro_batches:
            logits = model(rows[:, :-1]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
            (loss / len(micro_batches)).backward()
            losses.append(loss.item())
        if o.clip_grad > 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        return statistics.fmean(losses)

    return Side("transformers", train_step, sum(p.numel() for p in model.parameters()))


# ---------------------------------------------------------------- megamoe


def megamoe_side(config: Config, rendezvous: str) -> Side:
    """The real trainer on one rank: Megatron's schedule, the DeepSpeed engine and everything between them."""
    from megamoe.data.batches import MicroBatch
    from megamoe.launch.environment import rank_environment
    from megamoe.training.distributed import initialize_distributed

    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    environment = rank_environment({**single, "MEGAMOE_INIT_METHOD": f"file://{rendezvous}"})
    device = initialize_distributed(environment, config.parallel.timeout_seconds)

    from megamoe.training.build import build_trainer  # DeepSpeed must be imported after the world is joined
    from megamoe.training.step import Batch

    trainer = build_trainer(config, device)

    def train_step(samples: np.ndarray) -> float:
        size = config.run.micro_batch_size
        rows = [samples[start : start + size] for start in range(0, len(samples), size)]
        batch = Batch(iter([MicroBatch(r[:, :-1], r[:, 1:]) for r in rows]), len(rows))
        return float(trainer.train_step(batch, len(samples)).lm_losses.mean())

    return Side("megamoe", train_step, num_parameters(param_table(config.model, config.moe)))


# ---------------------------------------------------------------- the race


def tokens_per_second(side: Side, batches: np.ndarray) -> float:
    """Speed over `batches` [steps, global batch, seq_length + 1]."""
    start = time.perf_counter()
    for samples in batches:
        side.train_step(samples)
    num_tokens = batches.shape[0] * batches.shape[1] * (batches.shape[2] - 1)
    return num_tokens / (time.perf_counter() - start)


def race(ours: Side, theirs: Side, batches: np.ndarray, num_pairs: int) -> list[float]:
    """Alternating runs; prints a line and returns a ratio for every pair."""
    ratios = []
    for pair in range(num_pairs):
        order = (ours, theirs) if pair % 2 == 0 else (theirs, ours)
        speed = {side.name: tokens_per_second(side, batches) for side in order}
        ratios.append(speed[ours.name] / speed[theirs.name])
        print(
            f"pair {pair + 1}: {ours.name} {speed[ours.name]:,.0f} tokens/s, "
            f"{theirs.name} {speed[theirs.name]:,.0f} tokens/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    return ratios


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--preset", default="laptop-dense", help="preset or YAML file (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="alternating pairs of runs (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of one run (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    return parser.parse_args()


def main() -> int:
    """Run the benchmark; 0, or 2 after printing what the user can mend."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    try:
        config = load_config(arguments.preset, [*FIXED, *arguments.overrides])
        with tempfile.TemporaryDirectory() as folder:
            ours = megamoe_side(config, os.path.join(folder, "rendezvous"))
            theirs = hugging_face_side(config)
            if ours.num_parameters != theirs.num_parameters:
                raise ConfigError(
                    f"the two models differ: megamoe has {ours.num_parameters:,} parameters, "
                    f"transformers {theirs.num_parameters:,}"
                )
            torch.set_num_threads(arguments.threads)  # an engine may have changed it
            shape = (arguments.steps, config.run.global_batch_size, config.model.seq_length + 1)
            batches = np.random.default_rng(0).integers(0, config.model.vocab_size, shape)
            print(f"{ours.num_parameters:,} parameters, global batch {shape[1]} x {config.model.seq_length} tokens,")
            print(f"micro-batch {config.run.micro_batch_size}, {arguments.threads} threads, torch {torch.__version__}")
            for side in (ours, theirs):  # first steps allocate and must not count
                print(f"{side.name}: loss of the first step {side.train_step(batches[0]):.4f}", flush=True)
            ratios = race(ours, theirs, batches, arguments.pairs)
            print(f"median ratio megamoe / transformers: {statistics.median(ratios):.3f}")
            torch.distributed.destroy_process_group()
    except MegamoeError as error:
        print(f"dense_step: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
