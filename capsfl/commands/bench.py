"""`capsfl bench [NAME]`: measures time and memory on this machine."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from capsfl.arguments import parse
from capsfl.bench import BENCHMARKS


def run(words: list[str]) -> int:
    """Measures by one of the benchmarks, or says which there are."""
    if not words or words[0] in ("-h", "--help"):
        list_benchmarks()
        return 0
    name, *options = words
    if name not in BENCHMARKS:
        raise ValueError(f"capsfl bench: unknown benchmark {name!r}; one of {', '.join(BENCHMARKS)}")
    if name == "routing":
        return run_routing(options)
    from capsfl.bench.command import Output, finish, say
    from capsfl.bench.machine import results_folder

    form, measure = load_benchmark(name)

    @dataclass(frozen=True)
    class Command(Output, form):
        pass

    Command.__doc__ = form.__doc__
    given = parse(Command, options, prog=f"capsfl bench {name}")
    results_folder(given.out)
    finish(measure(given, say=say), given)
    return 0


def run_routing(words: list[str]) -> int:
    """Measures the operators, draws their results again, or finds their fastest block sizes."""
    from capsfl.bench.command import Output, finish, redraw, say
    from capsfl.bench.machine import results_folder
    from capsfl.bench.routing import RoutingBench, measure
    from capsfl.bench.tuning import tune

    @dataclass(frozen=True)
    class RoutingCommand(RoutingBench, Output):
        """Measure every capsule operator, each implementation beside the others and torch where it is there."""

        table: bool = False
        """Measure nothing: write the page and the pictures again from the results."""
        tune: bool = False
        """Instead, find the fastest block sizes and record them for later runs."""

    given = parse(RoutingCommand, words, prog="capsfl bench routing")
    if given.tune:
        found = list(tune(quick=given.quick, say=say))
        if given.json:
            print(json.dumps(found))
        return 0
    folder = results_folder(given.out)
    if given.table:
        redraw(folder)
        return 0
    finish(measure(given, say=say), given)
    return 0


def list_benchmarks() -> None:
    """Says what there is to measure."""
    width = max(map(len, BENCHMARKS))
    for name, text in BENCHMARKS.items():
        print(f"capsfl bench {name:<{width}}  {text}")
    print("\nEach has its own --help.")


def load_benchmark(name: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    """The options of a benchmark and what measures it."""
    match name:
        case "segcaps":
            from capsfl.bench.segcaps import SegCapsBench, measure

            return SegCapsBench, measure
        case "scale":
            from capsfl.bench.scale import ScaleBench, measure

            return ScaleBench, measure
        case "sweep":
            from capsfl.bench.sweep import SweepBench, measure

            return SweepBench, measure
        case "rounds":
            from capsfl.bench.rounds import RoundsBench, measure

            return RoundsBench, measure
        case "ledger":
            from capsfl.bench.ledger import LedgerBench, measure

            return LedgerBench, measure
        case "ingest":
            from capsfl.bench.ingest import IngestBench, measure

            return IngestBench, measure
        case "mnist":
            from capsfl.bench.mnist import MnistBench, measure

            return MnistBench, measure
        case "segmenters":
            from capsfl.bench.segmenters import SegmentersBench, measure

            return SegmentersBench, measure
        case _:
            from capsfl.bench.geyer import GeyerBench, measure
            from capsfl.sweeps.cores import one_device_per_core

            def on_every_core(options: Any, **others: Any) -> dict[str, Any]:
                one_device_per_core()
                return measure(options, **others)

            return GeyerBench, on_every_core
