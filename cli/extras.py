"""Which of Galerne's extras brings a package that is not installed."""

import re
from importlib import metadata

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA = re.compile(r"extra == ['\"](.+?)['\"]")


def extra_of(module: str | None) -> str | None:
    """Return the first extra that brings a module, by its name; None where none does."""
    wanted = _plain((module or "").partition(".")[0])
    try:
        required = metadata.requires("galerne") or ()
    except metadata.PackageNotFoundError:  # run from a folder that was never installed
        return None
    for requirement in required:
        name, extra = _NAME.match(requirement), _EXTRA.search(requirement)
        if name and extra and _plain(name[0]) == wanted:
            return extra[1]
    return None


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
