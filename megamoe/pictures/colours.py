"""Colours that most people tell apart, also in grey, on light ground and on dark.

After the palette of Okabe and Ito (2008), darker on light ground and lighter on dark so that thin lines stay readable.
"""

LIGHT = ("#0072b2", "#d55e00", "#00875f", "#b0508f", "#b07a00", "#3793cf", "#6552ad", "#555b63")
DARK = ("#5bb8f0", "#ff8b4d", "#34cfa0", "#e795c3", "#efc14e", "#a3d2ff", "#b3a6f7", "#b9bfc7")
FILLS = ("#0072b2", "#56b4e9", "#009e73", "#f0e442", "#e69f00", "#d55e00", "#cc79a7", "#999999", "#444444")  # areas

# The ground that all stands on and its type, as variables; dark where the reader's screen is.
GROUND_CSS = """\
:root{color-scheme:light dark;--bg:#fff;--panel:#f6f7f9;--ink:#1b1f24;--soft:#59626d;--line:#d9dee4;--grid:#e9ecf0;
--good:#00704f;--bad:#b03000;--wait:#8a6100;
--font:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
@media screen and (prefers-color-scheme:dark){:root{--bg:#14171b;--panel:#1c2026;--ink:#e6e9ed;--soft:#9aa4b0;
--line:#343b44;--grid:#262c33;--good:#3ecf9f;--bad:#ff8f66;--wait:#efc14e}}
"""
# What pictures are drawn with: axes, lines, bands, dots and their names. An element's colour is its --c.
MARKS_CSS = """\
svg text{font:12px var(--font);fill:var(--soft)}
.x path,.y .base{stroke:var(--soft);stroke-width:1;fill:none}
.y path{stroke:var(--grid);stroke-width:1;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:1.7;stroke-linejoin:round;stroke-linecap:round}
.range{fill:var(--c);fill-opacity:.17;stroke:none}
.swatch-line{fill:none;stroke:var(--c);stroke-width:2.4;stroke-linecap:round}
.disc{fill:var(--c);stroke:var(--bg);stroke-width:1}
.ring{fill:none;stroke:var(--c);stroke-width:1;opacity:.75}
svg text.end{fill:var(--c)}
.ink{--c:var(--ink)}
"""

# Loads over their mean: blue below, orange above, the ground shows through where they are even; grey: none at all.
COLD, HOT, NONE = (24, 106, 180), (214, 92, 0), (128, 128, 128)
SHADES = 40  # steps of each side, as far apart as the eye needs
LOG2_RANGE = 2.0  # full colour at a quarter and at four times the mean


def scale_css() -> str:
    """The colours as variables --c0, … and --f0, … of a style sheet, classes .c0, … and .f0, … that set --c."""

    def variables(colours: tuple[str, ...]) -> str:
        return "".join(f"--c{index}:{colour};" for index, colour in enumerate(colours))

    fills = "".join(f"--f{index}:{colour};" for index, colour in enumerate(FILLS))
    classes = "".join(f".c{index}{{--c:var(--c{index})}}" for index in range(len(LIGHT)))
    classes += "".join(f".f{index}{{--c:var(--f{index})}}" for index in range(len(FILLS)))
    return (
        f":root{{{variables(LIGHT)}{fills}}}"
        f"@media screen and (prefers-color-scheme:dark){{:root{{{variables(DARK)}}}}}{classes}"
    )
