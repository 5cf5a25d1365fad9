"""A report as one HTML page that needs nothing beside itself."""

from html import escape

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: {verdict}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }}
h1 span {{ padding: 0 .5rem; border-radius: .3rem; color: #fff; }}
h2 {{ font-size: 1.05rem; margin: 2rem 0 .3rem; }}
table {{ border-collapse: collapse; width: 100%; }}
th, td {{ text-align: right; padding: .25rem .6rem; border-bottom: 1px solid #d9dee6; font-variant-numeric: tabular-nums; }}
th:first-child, td:first-child {{ text-align: left; }}
td.bar {{ width: 12rem; }}
.track {{ position: relative; height: .7rem; background: #eef1f5; }}
.track div {{ position: absolute; top: 0; bottom: 0; left: 0; }}
.yes {{ background: #2c7a4b; }}
.no {{ background: #b3261e; }}
dt {{ float: left; clear: left; width: 10rem; color: #566070; }}
dd {{ margin-left: 10rem; }}
.why {{ text-align: left; color: #b3261e; }}
svg {{ width: 100%; height: auto; font: 11px system-ui, sans-serif; fill: #566070; }}
</style>
</head>
<body>
<h1>{title} <span class="{verdict_class}">{verdict}</span></h1>
<dl>
{facts}
</dl>
{body}
</body>
</html>
"""


def page(title: str, passed: bool, facts: dict[str, str], body: str) -> str:
    """Lay a report out: a verdict, what it is about, and a body in HTML.

    Args:
        facts: plain text by its term.
    """
    return _PAGE.format(
        title=escape(title),
        verdict="passed" if passed else "failed",
        verdict_class=verdict_class(passed),
        facts="\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts.items()),
        body=body,
    )


def verdict_class(passed: bool) -> str:
    """Return the style class of a verdict's colour."""
    return "yes" if passed else "no"
