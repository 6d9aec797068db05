"""The page of a study: what was found, in pictures with their tables, what the rules were, and what it cannot show.

One file: no request leaves it, it holds no script, light and dark by the reader's own setting.
"""

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from megamoe.pictures.page import page
from megamoe.report.values import bytes_text, count_text, duration
from megamoe.study.charts import figure
from megamoe.study.ladder import StudyRun
from megamoe.study.pictures import (
    colour_of,
    cost_picture,
    domain_name,
    fits_of,
    flops_text,
    learning_picture,
    speedup_picture,
)
from megamoe.study.points import Point, domains_of
from megamoe.study.rules import limits, rules
from megamoe.study.schema import StudySettings
from megamoe.study.speedup import Speedup
from megamoe.study.tables import factor_table, fit_table, model_table, set_table, table
from megamoe.study.training import Failure

STYLE = """\
.study-charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr));gap:26px 34px}
.study-legend{display:flex;flex-wrap:wrap;gap:.1rem 1rem;font-size:.8rem;color:var(--soft);margin:.1rem 0 .3rem}
.study-legend span{display:inline-flex;align-items:center;gap:.4rem}
.study-legend svg{width:26px;height:10px;flex:none}
.verdict{font-size:1.05rem;max-width:75ch}
.bad-list{border-left:3px solid var(--bad);padding-left:1rem}
ul.plain{max-width:85ch;padding-left:1.2rem}ul.plain li{margin:.3rem 0}
td:last-child{min-width:0}
"""


def html_study(
    study: StudySettings, runs: Sequence[StudyRun], points: Sequence[Point], factors: Sequence[Speedup],
    failures: Sequence[Failure], missing: Sequence[str],
) -> str:  # fmt: skip
    """The page. `missing`: what the report does without, in words."""
    title = f"{study.name}: {study.analysis.compared} against {study.analysis.baseline}"
    num_wanted = sum(len(run.eval_steps) for run in runs)
    head = (
        f"{len(study.models)} models, {len(runs)} runs, each trained on {count_text(runs[0].num_tokens)} tokens under "
        f"equal rules; {len(points)} of {num_wanted} checkpoints evaluated."
    )
    sections = [
        f'<header><h1>{escape(title)}</h1><p class="soft">{head}</p></header>',
        _troubles(failures, missing),
        _cards(study, factors),
        *(_domain_section(study, points, factors, domain) for domain in domains_of(points)),
        _cost_section(study, points, factors) if points else "<p>No checkpoint is evaluated yet.</p>",
        _list("What the rules were", rules(study, runs)),
        _list("What this can and cannot show", limits(study, runs, points)),
    ]
    style = files("megamoe.report").joinpath("report.css").read_text("utf-8")
    return page(f"{title} · megamoe study", "\n".join(sections), style=style + STYLE)


def _troubles(failures: Sequence[Failure], missing: Sequence[str]) -> str:
    texts = [f"{each.act} of {each.run} failed (exit code {each.exit_code}): {each.message}" for each in failures]
    items = "".join(f"<li>{escape(text)}</li>" for text in [*texts, *missing])
    return f'<ul class="plain bad-list">{items}</ul>' if items else ""


def _cards(study: StudySettings, factors: Sequence[Speedup]) -> str:
    """The factor of each domain, large, at the middle target."""
    parts = []
    for each in factors:
        names = {"paper_flops": "compute", "train_seconds": "time", "peak_memory_bytes": "memory"}
        if each.method != "trained" or each.cost not in names:
            continue
        families = f"{study.analysis.baseline} / {study.analysis.compared}"
        name = f"{names[each.cost].capitalize()}, {families}, {domain_name(each.domain)}"
        if not len(each.targets):
            parts.append((name, "no factor", each.reason))
            continue
        middle = len(each.targets) // 2
        told = each.interval_text(middle)
        interval = f"{study.analysis.confidence:.0%}: {told}" if told else "no interval"
        parts.append(
            (name, f"{each.factors[middle]:.2f} ×", f"{interval}; at {each.targets[middle]:.3f} nats a token")
        )
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd><small>{escape(more)}</small></div>"
        for name, value, more in parts
    )
    return f'<dl class="cards">{cards}</dl>' if cards else ""


def _domain_section(
    study: StudySettings, points: Sequence[Point], factors: Sequence[Speedup], domain: str
) -> str:
    drawn = [
        cost_picture(points, domain),
        speedup_picture(factors, study.analysis, domain, "paper_flops"),
        learning_picture(points, domain),
        speedup_picture(factors, study.analysis, domain, "train_seconds"),
    ]
    figures = "".join(figure(each) for each in drawn if each is not None)
    own = [each for each in factors if each.domain == domain]
    tables = f"<h3>The factor at a few targets</h3>{factor_table(study, own)}"
    if fits := fits_of(points, domain):
        tables += f"<h3>Power laws: loss = offset + (compute / unit)^-exponent</h3>{fit_table(fits)}"
    return (
        f'<section id="{escape(domain)}"><h2>{escape(domain_name(domain).capitalize())}</h2>'
        f'<div class="study-charts">{figures}</div>{tables}</section>'
    )


def _cost_section(study: StudySettings, points: Sequence[Point], factors: Sequence[Speedup]) -> str:
    """Compute is neither time nor memory: what each model took of all of them."""
    swatches = " ".join(
        f'<span class="swatch {colour_of(family, points)}"></span>{escape(family)}'
        for family in dict.fromkeys(point.family for point in points)
    )
    rows = []
    for each in factors:
        if each.method == "trained" and len(each.targets):
            middle = len(each.targets) // 2
            known = each.factors[each.factors == each.factors]
            rows.append(
                (
                    domain_name(each.domain), each.cost.replace("_", " "), f"{each.targets[middle]:.3f}",
                    _amount(each.cost, float(each.baseline_costs[middle])),
                    _amount(each.cost, float(each.compared_costs[middle])), f"{each.factors[middle]:.2f}",
                    f"{known.min():.2f} to {known.max():.2f}",
                )
            )  # fmt: skip
    head = ("domain", "what", "target", study.analysis.baseline, study.analysis.compared, "factor", "over all targets")
    return (
        f'<section id="costs"><h2>Compute, time and memory</h2><p class="soft">{swatches}</p>{model_table(points)}'
        f"<h3>What each family takes to reach the middle target</h3>{table(head, rows, numbers=(2, 3, 4, 5, 6))}"
        f"<h3>Every evaluation set, at the end of training</h3>{set_table(points)}</section>"
    )


def _amount(cost: str, value: float) -> str:
    if value != value:
        return "–"
    if cost == "train_seconds":
        return duration(value)
    if cost == "peak_memory_bytes":
        return bytes_text(value)
    return count_text(value) if cost == "num_parameters" else flops_text(value)


def _list(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return f'<section><h2>{escape(title)}</h2><ul class="plain">{items}</ul></section>'
