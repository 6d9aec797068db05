"""What a study held equal, and what can be read from it: sentences for its page."""

from collections.abc import Sequence

from megamoe.report.values import count_text
from megamoe.study.forecast import epochs_of
from megamoe.study.ladder import MAY_DIFFER, StudyRun
from megamoe.study.points import Point, domains_of
from megamoe.study.schema import StudySettings
from megamoe.study.speedup import LEAST_SHARE, candidates_of, noise_of


def rules(study: StudySettings, runs: Sequence[StudyRun]) -> list[str]:
    """All of it was checked when the study was read; a model that breaks a rule is refused."""
    first = runs[0].config
    epochs = epochs_of(runs[0])
    read = "" if epochs is None else f", {epochs:.2f} of the text: no token is met twice" if epochs <= 1 else (
        f", which reads the text {epochs:.2f} times"
    )  # fmt: skip
    rates = {run.model.name: _learning_rate(run) for run in runs}
    texts = [
        f"Every model is trained on {count_text(runs[0].num_tokens)} tokens{read}; runs of one seed see the same "
        "samples in the same order.",
        f"Batches of {first.run.global_batch_size} sequences of {first.model.seq_length} tokens, "
        f"{first.run.num_steps:,} steps, {first.optimizer.name} with a {first.optimizer.schedule} schedule, "
        f"{first.optimizer.warmup_steps} steps of warmup, {first.run.precision}.",
        "Learning rates by model: "
        + "; ".join(f"{name} {rate}" for name, rate in rates.items())
        + ". They were chosen beforehand, not tuned for each model.",
        f"Models may differ in {', '.join((*MAY_DIFFER, *study.may_differ))} (a dot at the end: all of a section). "
        "Anything else that differed would have been refused.",
        f"Evaluation: the sets of {study.evaluation.sets}, in blocks or document by document as that file says; there "
        "experts drop no token.",
    ]
    if any(run.config.moe.num_experts and not run.config.moe.dropless for run in runs):
        texts.append(
            "In training experts have a capacity for each micro-batch and drop what is beyond it, as in the paper."
        )
    size = study.analysis.compute_vocab_size
    vocabulary = "the models' own vocabulary" if size is None else f"a nominal vocabulary of {size:,}"
    texts.append(
        f"Compute is the paper's: layers four times their forward pass, as if activations were recomputed, with "
        f"{vocabulary}. These runs need not have recomputed: time and memory are as measured."
    )
    return texts


def _learning_rate(run: StudyRun) -> str:
    optimizer, has_experts = run.config.optimizer, run.config.moe.num_experts > 0
    of_experts = f" (experts {optimizer.expert_lr_scale:g} of it)" if has_experts else ""
    return f"{optimizer.lr:g}{of_experts}"


def limits(study: StudySettings, runs: Sequence[StudyRun], points: Sequence[Point]) -> list[str]:
    analysis = study.analysis
    texts = [
        f"The factor is s(t) = c({analysis.baseline}) / c({analysis.compared}), where c(t) is what a family spends to "
        "reach a loss of t. Between fully trained models log compute is a straight line over the loss; a model that is "
        "no better than a cheaper one is left out. Beyond what both families reach there is no number.",
        "Checkpoints on the way have not had their learning rate decay to its end, so they are worse than a model "
        "trained for that long: the factor along the best of all checkpoints is a second opinion, not a better one.",
        _interval_text(study, points),
        "Models of this size on so few tokens say how the method works and which way it points; they do not say what "
        "the factor is for models a thousand times as large. In the paper it shrinks as models grow.",
        "Time is that of this machine with this code: what mixtures pay for routing, exchange and memory differs "
        "between machines. Peak memory is that of the whole process, program and libraries included.",
    ]
    return texts


def _interval_text(study: StudySettings, points: Sequence[Point]) -> str:
    analysis, domains = study.analysis, domains_of(points)
    if not domains:
        return "There are no points yet."
    noise = noise_of(candidates_of(points, domains[0]))
    if noise.degrees:
        last = noise.deviations[max(noise.deviations)]
        seeds = (
            f"Between seeds a loss deviates by {last:.4f} nats a token ({domains[0].replace('_', ' ')}, at the end; "
            f"{noise.degrees} degrees of freedom, pooled over the models that have several seeds and taken for all)"
        )
    else:
        seeds = "No model has several seeds: what another seed would change is not in the intervals"
    text = "one draw for all models, which read the same texts" if analysis.text_noise == "shared" else (
        "a draw for each model, though all read the same texts, which is wider than the truth"
    )  # fmt: skip
    return (
        f"{seeds}. Intervals are of {analysis.confidence:.0%}, from {analysis.num_replicates:,} replicates of a "
        f"parametric bootstrap (seed {analysis.seed}): seeds by Student's t, texts by their standard errors, {text}. "
        f"Where fewer than {LEAST_SHARE:.0%} of the replicates reach a target there is no interval."
    )
