"""Galerne beside llama.cpp and onnxruntime-genai on one model: `python -m benchmarks.peers --work DIR`.

Every round runs each tool once, in a process of its own, in an order that turns from round to round; ratios are taken within
a round, so that a machine that slows down for a while slows both sides of a ratio. It reports and never judges a time.
"""

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import child
from benchmarks.prepare import Tool, prepare
from galerne.errors import GalerneError
from galerne.progress import say

# key, title, printed as, whether more is better
METRICS = (
    ("decode_tokens_per_s", "decode tok/s", "{:.1f}", True),
    ("prefill_tokens_per_s", "prefill tok/s", "{:.0f}", True),
    ("load_s", "load s", "{:.2f}", False),
    ("peak_rss_mb", "peak RSS MB", "{:.0f}", False),
)
Run = dict[str, Any]


def run_tool(tool: Tool, patience_s: float, *, prompt: int, decode: int, threads: int) -> Run:
    """Run a tool and return its JSON line, with `peak_rss_mb` (MB of 10^6 bytes) and `other_cores` added."""
    sizes = ["--prompt", str(prompt), "--decode", str(decode), "--threads", str(threads)]
    command = [str(tool.python), "-m", tool.module, str(tool.model), *sizes, *tool.options]
    finished = child.run_quietly(command, patience_s)
    run: Run = json.loads(finished.stdout.splitlines()[-1])
    return {**run, "peak_rss_mb": finished.peak_rss_bytes / 1e6, "other_cores": finished.other_cores}


def run_rounds(tools: Sequence[Tool], rounds: int, patience_s: float, **request: int) -> list[dict[str, Run]]:
    """Run every tool once a round and return, for each round, the runs by tool."""
    results = []
    for i in range(rounds):
        turn = i % len(tools)
        runs = {}
        for tool in (*tools[turn:], *tools[:turn]):
            runs[tool.name] = run = run_tool(tool, patience_s, **request)
            shown = ", ".join(f"{title} {form.format(run[key])}" for key, title, form, _ in METRICS)
            say(f"round {i + 1}, {tool.name}: {shown}; others kept {_cores(run['other_cores'])} busy")
        results.append(runs)
    return results


def summarize(rounds: Sequence[dict[str, Run]], tools: Sequence[Tool]) -> dict[str, Any]:
    """Return the medians, least and most of each tool, and the ratios of Galerne to each peer within the rounds."""
    ratios = {
        f"{own.name} / {peer.name}": {
            key: _spread([runs[own.name][key] / runs[peer.name][key] for runs in rounds]) for key, *_ in METRICS
        }
        for peer in tools
        for own in tools
        if own.own and not peer.own
    }
    medians = {
        tool.name: {key: _spread([runs[tool.name][key] for runs in rounds]) for key, *_ in METRICS} for tool in tools
    }
    return {"tools": medians, "ratios": ratios}


def table(summary: dict[str, Any], tools: Sequence[Tool]) -> str:
    """Return the summary as two Markdown tables."""
    head = "| " + " | ".join(["median (least to most)", *(title for _, title, _, _ in METRICS)]) + " |"
    lines = [head, "|---" * (len(METRICS) + 1) + "|"]
    for tool in tools:
        cells = [_cell(summary["tools"][tool.name][key], form) for key, _, form, _ in METRICS]
        lines.append(f"| {tool.name} {tool.version} | " + " | ".join(cells) + " |")
    titles = [title.removesuffix(" tok/s").removesuffix(" s").removesuffix(" MB") for _, title, _, _ in METRICS]
    wanted = [
        f"{title} ({'more' if more else 'less'} is better)" for title, (*_, more) in zip(titles, METRICS, strict=True)
    ]
    lines += ["", "| ratio within a round | " + " | ".join(wanted) + " |", "|---" * (len(METRICS) + 1) + "|"]
    for name, ratios in summary["ratios"].items():
        cells = [_cell(ratios[key], "{:.2f}") for key, *_ in METRICS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def physical_cores() -> int:
    """Return how many cores this process may use, counting two threads of one core once."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed]
    return len({file.read_text() if file.is_file() else str(file) for file in siblings})


def main() -> int:
    """Parse the command line, prepare, run, and print the tables or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the models, some 10 GB, reused")
    parser.add_argument("--peers-python", type=Path, default=Path(sys.executable), help="the Python that has the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--decode", type=int, default=40, help="steps; the median one counts")
    parser.add_argument("--threads", type=int, default=physical_cores(), help="default: physical cores")
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        metavar="S",
        help="wait up to S seconds for a run that nothing else disturbs",
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="PEER", help="the peers to run; all by default")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    args = parser.parse_args()
    for option in ("rounds", "prompt", "decode", "threads"):
        if getattr(args, option) < 1:
            parser.error(f"--{option}: expected at least 1, found {getattr(args, option)}")
    try:
        tools = prepare(args.work.resolve(), args.peers_python.absolute())
        tools = [tool for tool in tools if not args.only or tool.own or tool.name in args.only]
        rounds = run_rounds(
            tools, args.rounds, args.patience, prompt=args.prompt, decode=args.decode, threads=args.threads
        )
    except GalerneError as exc:
        say(f"error: {exc}")
        return exc.exit_code
    summary = summarize(rounds, tools)
    if args.json:
        versions = {tool.name: tool.version for tool in tools}
        print(json.dumps({"versions": versions, "threads": args.threads, **summary, "rounds": rounds}))
    else:
        print(table(summary, tools))
    return 0


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _cell(spread: dict[str, float], form: str) -> str:
    median, least, most = (form.format(spread[key]) for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"


def _cores(other_cores: float | None) -> str:
    return "an unknown number of cores" if other_cores is None else f"{other_cores:.2f} cores"


if __name__ == "__main__":
    sys.exit(main())
