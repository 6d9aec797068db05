"""Results as a table for people."""

import json
from collections.abc import Mapping
from typing import Any

_HEADER = ("set", "domain", "tokens", "documents", "nats/token", "perplexity", "±", "bits/byte", "dropped", "tokens/s")


def shown(tree: Mapping[str, Any], *, as_json: bool) -> str:
    """Results as the command prints them."""
    return json.dumps(tree, indent=2, allow_nan=False, ensure_ascii=False) if as_json else table(tree)


def table(tree: Mapping[str, Any]) -> str:
    """All models of a tree of results, sets and what they come to together."""
    return "\n\n".join(_model(model, tree) for model in tree["models"])


def _model(model: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    num_ranks = tree["layout"]["num_ranks"]
    lines = [
        f"{model['checkpoint']}: step {model['step']:,}, {model['num_trained_tokens']:,} tokens trained",
        f"{tree['precision']} on {num_ranks} rank{'s' if num_ranks > 1 else ''} ({tree['device']}), "
        f"capacity of experts: {capacity_text(tree['capacity'])}",
    ]
    done = [each for each in model["sets"] if each["is_complete"]]
    rows = [_row(each["name"], each["domain"], each) for each in done]
    for name, found in model.get("domains", {}).items():
        if found["num_sets"] > 1 and len(model["domains"]) > 1:
            rows.append(_row(f"all of {name}", name, found))
    if "overall" in model and len(done) > 1:
        rows.append(_row("all", "", model["overall"]))
    kept = [i for i in range(len(_HEADER)) if _HEADER[i] != "dropped" or any(row[i] != "-" for row in rows)]
    widths = {i: max(len(row[i]) for row in (_HEADER, *rows)) for i in kept}
    for row in (_HEADER, *rows):
        cells = (row[i].ljust(widths[i]) if i < 2 else row[i].rjust(widths[i]) for i in kept)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def capacity_text(capacity: Mapping[str, Any]) -> str:
    """As results keep it, in words."""
    if not capacity["drops_tokens"]:
        return "no token is dropped" if capacity["why"] == "default" else capacity["why"]
    return f"{capacity['kind'].replace('_', ' ')} {capacity['value']:g}"


def _row(name: str, domain: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    dropped = found.get("dropped_share_by_layer")
    share = None if dropped is None else sum(dropped.values()) / len(dropped)
    per_token = found["nats_per_token"]
    return (
        name, domain, f"{found['num_tokens']:,}", f"{found['num_documents']:,}",
        "not finite" if per_token is None else _number(per_token, ".5f"), _number(found["perplexity"], ".4f"),
        _number(found["perplexity_standard_error"], ".2g"), _number(found["bits_per_byte"], ".5f"),
        _number(share, ".2%"), _number(found.get("tokens_per_second"), ",.0f"),
    )  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
