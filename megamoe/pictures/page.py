"""The frame of an HTML page that needs nothing but itself: no request leaves it, and only its own script runs in it."""

import base64
import hashlib
import json
from html import escape
from typing import Any

from megamoe.pictures.colours import scale_css

STYLE = """\
:root{color-scheme:light dark;--bg:#fff;--panel:#f6f7f9;--ink:#1b1f24;--soft:#59626d;--line:#d9dee4;--grid:#e9ecf0;
--good:#00704f;--bad:#b03000;--wait:#8a6100}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1c2026;--ink:#e6e9ed;--soft:#9aa4b0;
--line:#343b44;--grid:#262c33;--good:#3ecf9f;--bad:#ff8f66;--wait:#efc14e}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;margin:0 auto;
max-width:1480px;padding:28px clamp(12px,3vw,44px) 56px;background:var(--bg);color:var(--ink)}
h1{font-size:1.65rem;line-height:1.2;margin:0 0 .2rem;overflow-wrap:anywhere}
h2{font-size:1.15rem;margin:2.4rem 0 .8rem;padding-bottom:.35rem;border-bottom:1px solid var(--line)}
h3{font-size:.95rem;margin:0}
.soft{color:var(--soft)}.good{color:var(--good)}.bad{color:var(--bad)}.wait{color:var(--wait)}
pre{background:var(--panel);padding:1em;overflow-x:auto;font-size:12.5px;border-radius:6px}
svg text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;fill:var(--soft)}
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
        f"<title>{escape(title)}</title>\n<style>\n{STYLE}{scale_css()}\n{style}</style></head>\n<body>\n{body}\n",
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
