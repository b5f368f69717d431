"""``python -m benchmarks``: run, print the tables, write the results."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.check import judge
from benchmarks.contenders import CONTENDERS
from benchmarks.report import print_report, print_verdicts
from benchmarks.suite import run
from benchmarks.workloads import FAMILIES, FamilyName

RESULTS: Final = Path(__file__).parent / "results"
WIDTH: Final = 160
"""Columns of the tables where nobody says otherwise (a pipe, the file)."""


def main(arguments: list[str] | None = None) -> int:
    """Run what the command line says; the exit code."""
    options = _options(arguments)
    stored: Path | None = options.stored
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if stored is not None:
        results: dict[str, Any] = json.loads(stored.read_text())
    else:
        # What was started and stopped is ended and woken by the ends of blocks.
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        family = FAMILIES[options.family]
        with _progress() as progress:
            results = run(
                family.quick if options.quick else family.full,
                options.rounds or (1 if options.quick else family.rounds),
                options.only or _contenders(options.family),
                progress,
                options.family,
                family.congestion if options.congestion is None else options.congestion,
            )
    verdicts = judge(results)
    print_report(console, results)
    print_verdicts(console, verdicts)
    if stored is None:
        _write(results, options.out, console)
    kept = all(v.found == "PASS" for v in verdicts if v.requirement.binding)
    return 1 if options.check and not kept else 0


def _contenders(family: FamilyName) -> list[str]:
    return [name for name, entry in CONTENDERS.items() if family in entry.families]


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Every workload with every contender, interleaved. Figures of different runs "
        "do not compare; ratios inside one run do.",
    )
    parser.add_argument(
        "--family",
        choices=FAMILIES,
        default="core",
        help="core: this project's own limits (the default). peers: other libraries, all under "
        "one congestion control. distance: emulated long ways, through a relay",
    )
    parser.add_argument(
        "--congestion",
        metavar="NAME",
        help="default TCP congestion control of a network of the run's own, which needs "
        "CAP_SYS_ADMIN; by default reno, and for core the system's network as it is",
    )
    parser.add_argument("--quick", action="store_true", help="see that all of it works, < 20 s")
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a limit is not kept, or was not measured",
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="default 9 (peers: 7, distance: 3), with --quick 1"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=CONTENDERS,
        metavar="NAME",
        help="; ".join(f"{family}: {', '.join(_contenders(family))}" for family in FAMILIES),
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, metavar="DIR", help="default benchmarks/results"
    )
    parser.add_argument(
        "--from",
        dest="stored",
        type=Path,
        metavar="FILE",
        help="run nothing: show (and check) the results in this JSON file",
    )
    options = parser.parse_args(arguments)
    if options.rounds is not None and options.rounds < 1:
        parser.error("--rounds must be at least 1")
    for name in options.only or []:
        if options.family not in CONTENDERS[name].families:
            parser.error(f"{name} takes no part in the family {options.family}")
    if options.quick and options.out == RESULTS:
        # What is kept there was measured in full.
        options.out = None
    return options


def _write(results: dict[str, Any], folder: Path | None, console: Console) -> None:
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    stem = FAMILIES[results["family"]].stem
    written = [f"{stem}.json", f"{stem}.txt"]
    (folder / written[0]).write_text(_json(results))
    with (folder / written[1]).open("w") as file:
        plain = Console(file=file, width=WIDTH)
        print_report(plain, results)
        print_verdicts(plain, judge(results))
    if results["family"] == "core":
        written += _drawn(results, folder, console)
    console.print(f"written: {', '.join(written)} in {folder}", highlight=False)


def _drawn(results: dict[str, Any], folder: Path, console: Console) -> list[str]:
    try:
        from benchmarks.plot import draw
    except ImportError as error:
        console.print(f"no picture: {error}", highlight=False)
        return []
    pictures = ["results.svg", "results.png"]
    draw(results, [folder / name for name in pictures])
    return pictures


def _json(results: dict[str, Any]) -> str:
    """One line per measurement: small, and a change of one is a change of one line."""
    head = {key: value for key, value in results.items() if key != "measurements"}
    lines = ",\n".join(f"    {json.dumps(m, ensure_ascii=False)}" for m in results["measurements"])
    opening = json.dumps(head, indent=2, ensure_ascii=False).removesuffix("\n}")
    return f'{opening},\n  "measurements": [\n{lines}\n  ]\n}}\n'


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """Tells how far it is: a bar on a terminal, a line per step elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda text, share: print(f"{share:4.0%} {text}", file=sys.stderr, flush=True)
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


if __name__ == "__main__":
    sys.exit(main())
