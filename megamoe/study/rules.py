"""What a study held equal, and what can be read from it: sentences for its page, of what its files say and no more."""

from collections.abc import Callable, Sequence

from megamoe.report.values import count_at, count_text, plain
from megamoe.runs.events import read_events
from megamoe.study.forecast import epochs_of
from megamoe.study.ladder import MAY_DIFFER, StudyRun, differing_keys, matches
from megamoe.study.points import Point, domains_of
from megamoe.study.schema import StudySettings
from megamoe.study.speedup import candidates_of, noise_of

_SAMPLES = ("data.", "model.seq_length", "run.global_batch_size")  # where these are equal, so are the samples of a seed
_MOST_HOSTS = 3  # that are named


def rules(study: StudySettings, runs: Sequence[StudyRun]) -> list[str]:
    """All of it was checked when the study was read; a model that breaks a rule is refused."""
    differing = {key for run in runs[1:] for key in differing_keys(runs[0].config, run.config)}
    has_equal_samples = not any(matches(key, _SAMPLES) for key in differing)
    order = "; runs of one seed see the same samples in the same order" if has_equal_samples else ""
    reading = _by_model(runs, _reading)
    texts = [
        f"Every model is trained on {count_text(runs[0].num_tokens)} tokens{reading and ', '}{reading}{order}.",
        f"Training: {_by_model(runs, _training)}.",
        f"Learning rates: {_by_model(runs, _learning_rate)}.",
        f"Models may differ in {', '.join((*MAY_DIFFER, *study.may_differ))} (a dot at the end: all of a section). "
        "Anything else that differed would have been refused.",
        f"Evaluation: the sets of {study.evaluation.sets}, in blocks or document by document as that file says; there "
        "experts drop no token.",
    ]
    mixtures = [run for run in runs if run.config.moe.num_experts]
    if dropping := dict.fromkeys(run.model.name for run in mixtures if not run.config.moe.dropless):
        whose = "" if all(run.model.name in dropping for run in mixtures) else f" of {', '.join(dropping)}"
        texts.append(
            f"In training experts{whose} have a capacity for each micro-batch and drop what is beyond it, as in the "
            "paper."
        )
    size = study.analysis.compute_vocab_size
    vocabulary = "the models' own vocabulary" if size is None else f"a nominal vocabulary of {size:,}"
    texts.append(
        f"Compute is the paper's: layers four times their forward pass, as if activations were recomputed, with "
        f"{vocabulary}. These runs need not have recomputed: time and memory are as measured."
    )
    return texts


def _by_model(runs: Sequence[StudyRun], text_of: Callable[[StudyRun], str]) -> str:
    """The text of all, where it is one; else each text behind its models."""
    names: dict[str, dict[str, None]] = {}
    for run in runs:
        names.setdefault(text_of(run), {})[run.model.name] = None
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{', '.join(own)}: {text or 'unknown'}" for text, own in names.items())


def _reading(run: StudyRun) -> str:
    epochs = epochs_of(run)
    if epochs is None:
        return ""
    return f"{epochs:.2f} of the text{': no token is met twice' if epochs <= 1 else ', which is read again'}"


def _training(run: StudyRun) -> str:
    sizes, optimizer = run.config.run, run.config.optimizer
    return (
        f"batches of {sizes.global_batch_size} sequences of {run.config.model.seq_length} tokens, "
        f"{sizes.num_steps:,} steps, {optimizer.name} with a {optimizer.schedule} schedule, {optimizer.warmup_steps} "
        f"steps of warmup, {sizes.precision}"
    )


def _learning_rate(run: StudyRun) -> str:
    optimizer = run.config.optimizer
    if not run.config.moe.num_experts:
        return f"{optimizer.lr:g}"
    scale = optimizer.expert_lr_scale
    return f"{optimizer.lr:g} (experts {scale if isinstance(scale, str) else f'{scale:g} of it'})"


def limits(study: StudySettings, runs: Sequence[StudyRun], points: Sequence[Point]) -> list[str]:
    analysis = study.analysis
    sizes = sorted(run.num_parameters for run in runs)
    return [
        f"The factor is s(t) = c({analysis.baseline}) / c({analysis.compared}), where c(t) is what a family spends to "
        "reach a loss of t. Between fully trained models log compute is a straight line over the loss; a model that is "
        "no better than a cheaper one is left out. Beyond what both families reach there is no number.",
        "Checkpoints on the way have not had their learning rate decay to its end, so they are worse than a model "
        "trained for that long: the factor along the best of all checkpoints is a second opinion, not a better one.",
        _interval_text(study, points),
        f"This is of models of {count_text(sizes[0])} to {count_text(sizes[-1])} parameters on "
        f"{count_text(runs[0].num_tokens)} tokens; it does not say what the factor is for others. In the paper it "
        "shrinks as models grow.",
        f"{_places(runs)} What mixtures pay for routing, exchange and memory differs between machines.",
        "Peak memory is that of the fullest rank: what was allocated on its GPU, or without one that of the whole "
        "process, program and libraries included.",
    ]


def _places(runs: Sequence[StudyRun]) -> str:
    """Where runs were trained, by their records: times of unlike places are no measure of the models."""
    names: dict[str, list[str]] = {}
    for run in runs:
        starts = [_place(event) for event in read_events(run.dir) if event["kind"] == "start"]
        names.setdefault(", then ".join(dict.fromkeys(starts)), []).append(run.name)
    unknown = names.pop("", [])
    missing = f" Where {', '.join(unknown)} ran is not recorded." if names and unknown else ""
    if not names:
        return "Time is as measured; where the runs were trained is not recorded."
    if len(names) == 1:
        return f"Time is that of {next(iter(names))}.{missing}"
    told = "; ".join(f"{', '.join(own)} on {place}" for place, own in names.items())
    return f"Times are not of one place, and are to be compared with care: {told}.{missing}"


def _place(start: dict[str, object]) -> str:
    count, named = count_at(start, "world_size"), start.get("hosts")
    hosts = [plain(str(host)) for host in named] if isinstance(named, list) else []
    more = f" and {len(hosts) - _MOST_HOSTS} more" if len(hosts) > _MOST_HOSTS else ""
    ranks = "ranks" if count is None else "1 rank" if count == 1 else f"{count} ranks"
    return f"{ranks} of {', '.join(hosts[:_MOST_HOSTS]) or 'unnamed hosts'}{more}"


def _interval_text(study: StudySettings, points: Sequence[Point]) -> str:
    analysis, domains = study.analysis, domains_of(points)
    if not domains:
        return "There are no points yet."
    noise = noise_of(candidates_of(points, domains[0]))
    if noise.degrees:
        seeds = (
            f"Between seeds a loss deviates by {noise.at(noise.last_tokens):.4f} nats a token "
            f"({domains[0].replace('_', ' ')}, at {count_text(noise.last_tokens)} tokens; {noise.degrees} "
            f"degree{'s' * (noise.degrees > 1)} of freedom, pooled over the models that have several "
            "seeds and taken for all)"
        )
    else:
        seeds = "No model has several seeds: what another seed would change is not in the intervals"
    text = (
        "one draw for all models, which read the same texts; that is narrower than the truth, for models do not err "
        "alike on every text" if analysis.text_noise == "shared" else
        "a draw for each model, though all read the same texts, which is wider than the truth"
    )  # fmt: skip
    return (
        f"{seeds}. Intervals are of {analysis.confidence:.0%}, from {analysis.num_replicates:,} replicates of a "
        f"parametric bootstrap (seed {analysis.seed}): seeds by Student's t, texts by their standard errors, {text}. "
        "A power law whose points lie further from it than seeds explain takes that distance for the seeds'. A "
        "replicate in which a family does not reach a target, or begins below it, bounds the factor from one side: "
        "where too many do, the interval is open there. Costs are taken as measured: intervals of time and memory "
        "hold no noise of time or memory."
    )
