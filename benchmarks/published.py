"""What `galerne fit` says of Mistral 7B on every Jetson, and its bounds beside what others publish of other tools.

    python -m benchmarks.published

prints the tables of docs/measurements.md.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galerne import schema
from galerne.export.facts import read_facts
from galerne.optimize.fit.bounds import decode_bound
from galerne.optimize.fit.choice import Case, assess
from galerne.optimize.fit.device import device_of
from galerne.optimize.fit.workload import Workload
from galerne.optimize.quantize.recipe import load
from galerne.runtime.footprint import forms_of
from galerne.targets.target import load as load_target
from galerne.targets.target import load_all

FILE = Path(__file__).with_suffix(".toml")
MODEL, CONTEXT, CHUNK = "mistral-7b-v0.1", 4096, 256
_RECIPES = ("fp16", "int8", "int4-rtn")
_ADDRESS = re.compile(r"https://\S+?(?=[,;]?(?:\s|$))")


@dataclass(frozen=True)
class Figure:
    """What somebody published: how fast a tool decodes on a target, in tokens a second of all rows together.

    model: a preset. recipe: one that stores at most as many bits a weight as the tool.
    bandwidth_bytes_per_s: where the power mode had less than the device's.
    """

    target: str
    model: str
    recipe: str
    tool: str
    tokens_per_s: float
    source: str
    batch: int = 1
    context: int = 128
    note: str = ""
    bandwidth_bytes_per_s: int | None = None

    def bound(self) -> float:
        """Return what `galerne fit` sets as the bound of the same."""
        facts, _ = read_facts(self.model)
        forms = forms_of(load(self.recipe).resolved())
        work = Workload(facts, forms, self.context, self.batch, CHUNK, self.context)
        return decode_bound(work, device_of(load_target(self.target)), self.bandwidth_bytes_per_s)


def figures() -> list[Figure]:
    """Return all of them. Raises: InputError if the file breaks its form."""
    tree: dict[str, Any] = tomllib.loads(FILE.read_text("utf-8"))
    return [schema.read(Figure, item, f"{FILE.name}: figures[{i}]") for i, item in enumerate(tree["figures"])]


def jetson_rows() -> list[list[str]]:
    """Return for each Jetson what each recipe takes, and its bound where it fits."""
    facts, longest = read_facts(MODEL)
    rows = [["", "usable", *(f"{name}: memory, decode at most" for name in _RECIPES), "building int4"]]
    for target in load_all():
        if target.kind != "jetson":
            continue
        case = Case(MODEL, facts, target, target.stack(), CONTEXT, 1, CHUNK, longest)
        recipes = assess(case).recipes
        cells = []
        for name in _RECIPES:
            each = recipes[name]
            rate = f"**{each.decode_bound_tokens_per_s:.1f}**" if each.fits else "does not fit"
            cells.append(f"{each.peak_bytes / 1e9:.1f} GB, {rate}")
        int4 = recipes["int4-rtn"]
        building = f"{int4.transient_bytes['building'] / 1e9:.1f} GB" if int4.transient_bytes else "-"
        if int4.fits and not int4.builds:
            building += ", needs swap"
        rows.append([f"`{target.name}`", f"{int4.usable_bytes / 1e9:.1f} GB", *cells, building])
    return rows


def published_rows() -> list[list[str]]:
    """Return each published figure beside its bound."""
    rows = [["", "model", "tool", "rows", "published tok/s", "bound", "share", "source"]]
    for each in figures():
        bound = each.bound()
        links = " ".join(f"[{i}]({address})" for i, address in enumerate(_ADDRESS.findall(each.source), 1))
        tool = f"{each.tool} ({each.note})" if each.note else each.tool
        share = f"{each.tokens_per_s / bound:.0%}"
        rate = f"{each.tokens_per_s:g}"
        rows.append([f"`{each.target}`", each.model, tool, str(each.batch), rate, f"{bound:.1f}", share, links])
    return rows


def markdown(rows: list[list[str]]) -> str:
    """Lay rows out as a table of Markdown, the first being the heads."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join(["---"] * len(rows[0])) + " |", *lines[1:]])


if __name__ == "__main__":
    print(markdown(jetson_rows()))
    print()
    print(markdown(published_rows()))
