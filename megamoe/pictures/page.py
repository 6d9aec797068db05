"""The frame of an HTML page that needs nothing but itself: no request leaves it, and only its own script runs in it."""

import base64
import hashlib
import json
from html import escape
from typing import Any

from megamoe.pictures.colours import GROUND_CSS, MARKS_CSS, scale_css

STYLE = """\
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{font:15px/1.5 var(--font);margin:0 auto;
max-width:1480px;padding:28px clamp(12px,3vw,44px) 56px;background:var(--bg);color:var(--ink)}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3{font-size:.95rem;margin:0}
.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}.wait{color:var(--wait)}
pre{background:var(--panel);padding:1em;overflow-x:auto;font-size:12.5px;border-radius:6px}
@media print{body{max-width:none;padding:0;font-size:11px}h2{break-after:avoid}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
"""


def page(title: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """The whole page. `body` is markup, `title` is not; `data` is what the script finds as JSON under the id "data"."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"'sha256-{digest}'" if script else "'none'"
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {scripts}; base-uri 'none'"
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(policy)}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>\n{GROUND_CSS}{STYLE}{MARKS_CSS}{scale_css()}\n{style}</style></head>\n<body>\n{body}\n",
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{script_json(data)}</script>\n')
    if script:
        parts.append(f"<script>{script}</script>\n")
    return "".join([*parts, "</body></html>\n"])


def script_json(tree: Any) -> str:
    """JSON that may stand inside a script element, whatever texts it holds."""
    text = json.dumps(tree, separators=(",", ":"), allow_nan=False)  # ASCII alone
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
