"""Serving speed: many adapters over one base in one batch, against vLLM and PEFT; one request against llama.cpp.

SmolLM2-135M-Instruct on this machine's CPU, 32 requests in flight, 64 new tokens each, greedy, adapters of rank 16 on
all linear layers, no prefix cache anywhere:

    base       no adapter, by all systems
    adapters   1, 8 and 32 distinct adapters in the batch, by all systems, with the floor that memory sets
    zipf       1,000 adapters on disk, drawn by Zipf's law, memory for 64
    stream     one request, in 8 and 4 bits, against llama.cpp
    cold       from submission to an adapter's being in memory, its file dropped from the page cache and not
    fairness   latency of others beside one adapter at ten times their load
    turns      time to the first token of adapters, at other strengths too, beside the base's, through the server
    soak       resident memory over many short requests
    start      from the command to the first answer of `haori serve`
    weights    perplexity of general text with weights in 32, 16, 8 and 4 bits

Each contender is a process of its own, those of other projects in environments of their own; they take turns. One
that cannot be installed is reported with the reason. Prints tables and, as its last line, one JSON object; `--write`
keeps it, with the parts of earlier runs that were not measured again.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from figures import BARS, figures, show
from guard import check
from provenance import provenance, report
from setting import Setting, Sizes
from single_stream import stream_part
from soak import soak_part
from starting import start_part
from throughput import adapters_part, base_part, zipf_part
from turns import turns_part
from waiting import cold_part, fairness_part
from weight_formats import weights_part
from workload import BASE, prompts

PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "base": base_part, "adapters": adapters_part, "zipf": zipf_part, "stream": stream_part, "cold": cold_part,
    "fairness": fairness_part, "turns": turns_part, "soak": soak_part, "start": start_part,
    "weights": weights_part,
}  # fmt: skip
CONTENDERS = {"ours": ("haori", "perplexity"), "vllm": ("vllm",), "peft": ("peft",), "llamacpp": ("llamacpp",)}


def arguments() -> argparse.Namespace:
    """Read the command line."""

    def names(allowed: Any) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            given = text.split(",")
            if unknown := [name for name in given if name not in allowed]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(allowed)}")
            return given

        return split

    sizes = Sizes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=names(PARTS), default=list(PARTS), help="parts, separated by commas")
    parser.add_argument("--contenders", type=names(CONTENDERS), default=list(CONTENDERS), help="likewise: " + ", ".join(
        CONTENDERS
    ))  # fmt: skip
    parser.add_argument("--venvs", type=Path, help="folder of environments; by default in the cache of HAORI_HOME")
    parser.add_argument("--write", action="store_true", help="keep the result")
    for name, default in vars(sizes).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Measure and report."""
    given = arguments()
    from haori.bases import find_base
    from haori.core.settings import settings

    base = find_base(BASE)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(
            sizes=Sizes(**{name: getattr(given, name) for name in vars(Sizes())}),
            systems=[system for name in given.contenders for system in CONTENDERS[name]],
            base=base.path,
            pool=prompts(base),
            cache=settings().cache / "benchmark-serving",
            venvs=given.venvs or settings().cache / "benchmark-venvs",
            home=Path(folder),
        )
        setting.cache.mkdir(parents=True, exist_ok=True)
        if "haori" in setting.systems:
            check(setting)
        kept = HERE / "results.json"
        parts: dict[str, Any] = json.loads(kept.read_text())["parts"] if given.write and kept.is_file() else {}
        for name in given.only:
            print(f"{name}:", flush=True)
            started = time.perf_counter()
            measured = PARTS[name](setting)
            parts[name] = {
                **measured, "sizes": vars(setting.sizes), "took_s": round(time.perf_counter() - started),
                **provenance(), "cpus": len(os.sched_getaffinity(0)),
            }  # fmt: skip
            if given.write:  # a later part may fail, and this one took long
                kept.write_text(json.dumps(result(setting, parts), indent=1) + "\n")
    found = figures(parts)
    show(found)
    for system, reason in setting.missing.items():
        print(f"without {system}: {reason}")
    report(result(setting, parts), HERE)


def result(setting: Setting, parts: dict[str, Any]) -> dict[str, Any]:
    """Return what is kept."""
    bars = {key: f"{sign} {bar:g}" for key, (sign, bar) in BARS.items()}
    return {
        "benchmark": "serving", **figures(parts), "missing": setting.missing, "bars": bars, "parts": parts,
        **provenance(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
