"""A library of ten thousand adapters: scanning, listing, searching, finding by name; converting and merging weights.

    mounted    a models/Lora tree of 10,000 kohya files in 100 folders, half with a sidecar
    stored     10,000 adapters in the library itself
    convert    a kohya file of Stable Diffusion 1.5 written as diffusers does, beside copying the file
    merge      a LoRA merged into a sharded checkpoint of 1.7 billion weights, beside copying it

Each library is looked at by a process of its own, whose peak memory counts. A search is the slowest of a
dozen, a misspelled one and one that finds nothing among them; a name is looked up 300 times, at random, and the
median counts. Bars: an unchanged tree looked through in 2 s, a search in 50 ms, a name found in 1 ms, 300 MB of
memory, 200 MB/s converted, a merge in 1.2 times the time of the copy. Prints a table and, as its last line, one JSON
object.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
from adapters import write_stored, write_tree
from provenance import Contender, median, provenance, report
from weights import convert, merge

PARTS = ("mounted", "stored", "convert", "merge")
BARS = {
    "rescan_s": 2.0, "search_ms": 50.0, "resolve_ms": 1.0, "memory_mb": 300.0, "convert_mb_s": 200.0,
    "merge_vs_copy": 1.2,
}  # fmt: skip
AT_LEAST = {"convert_mb_s"}
ROUNDS, REST_S = 5, 3.0


def library_part(home: Path, kind: str, count: int) -> dict[str, Any]:
    """Measure one library of `count` adapters, mounted or stored."""
    root, tree = home / kind, home / "tree"
    (write_tree if kind == "mounted" else write_stored)(tree if kind == "mounted" else root, count)
    time.sleep(REST_S)  # files that were written just now are read once more
    spec = {"root": str(root), "tree": str(tree) if kind == "mounted" else "", "count": count}
    contender = Contender(HERE / "contender.py", spec, home)
    first = contender.turn("scan" if kind == "mounted" else "rebuild")
    contender.close()
    contender = Contender(HERE / "contender.py", spec, home)
    rescans = [contender.turn("rescan") for _ in range(ROUNDS)] if kind == "mounted" else []
    lists = [contender.turn("list") for _ in range(ROUNDS)]
    searches = [contender.turn("search")["each"] for _ in range(ROUNDS)]
    cold, warm = contender.turn("resolve"), contender.turn("resolve")
    contender.close()
    found = {query: each["found"] for query, each in searches[0].items()}
    if not (first["found"] == lists[0]["found"] == count and found["nothing-of-this-name"] == 0):
        raise SystemExit(f"{kind}: not every adapter was found: {first}, {found}")
    if any(each["read"] for each in rescans):
        raise SystemExit(f"An unchanged tree was read again: {rescans}")
    return {
        "adapters": count, "first_s": first["s"], "first_peak_mb": first["peak_mb"],
        "rescan_s": [each["s"] for each in rescans], "list_ms": [_ms(each["s"]) for each in lists],
        "search_ms": {query: [_ms(each[query]["s"]) for each in searches] for query in found}, "found": found,
        "resolve_ms": [_ms(s) for s in warm["samples"]], "first_resolve_ms": [_ms(s) for s in cold["samples"]],
        "memory_mb": warm["peak_mb"],
    }  # fmt: skip


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


def figures(parts: dict[str, Any]) -> dict[str, float]:
    """Return the figures that the bars are for, of the parts that were measured; of two libraries the worse."""
    libraries = [parts[kind] for kind in ("mounted", "stored") if kind in parts]
    found: dict[str, float] = {}
    if "mounted" in parts:
        found["rescan_s"] = median(parts["mounted"]["rescan_s"])
        found["first_scan_s"] = parts["mounted"]["first_s"]
    if libraries:
        found["list_ms"] = max(median(part["list_ms"]) for part in libraries)
        found["search_ms"] = max(median(each) for part in libraries for each in part["search_ms"].values())
        found["resolve_ms"] = max(median(part["resolve_ms"]) for part in libraries)
        found["memory_mb"] = max(part["memory_mb"] for part in libraries)
    if "convert" in parts:
        found["convert_mb_s"] = median(parts["convert"]["convert_mb_s"])
        found["copy_mb_s"] = median(parts["convert"]["copy_mb_s"])
    if "merge" in parts:
        ratios = [one / other for one, other in zip(parts["merge"]["merge_s"], parts["merge"]["copy_s"], strict=True)]
        found["merge_vs_copy"] = median(ratios)
        found["merge_memory_shards"] = parts["merge"]["memory_shards"]
    return {name: round(value, 4) for name, value in found.items()}


def _keeps(name: str, value: float) -> bool:
    return value >= BARS[name] if name in AT_LEAST else value <= BARS[name]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--adapters", type=int, default=10_000)
    parser.add_argument("--rank", type=int, default=1024, help="of the file that is converted")
    parser.add_argument("--layers", type=int, default=24, help="of the checkpoint that is merged into")
    parser.add_argument("--hidden", type=int, default=2048, help="likewise")
    parser.add_argument("--shards", type=int, default=4, help="likewise")
    parser.add_argument("--write", action="store_true", help="keep the result")
    given = parser.parse_args()
    parts: dict[str, Any] = {}
    for name in given.only.split(","):
        print(f"{name}:", flush=True)
        with tempfile.TemporaryDirectory() as place:
            home = Path(place)
            if name in {"mounted", "stored"}:
                parts[name] = library_part(home, name, given.adapters)
            elif name == "convert":
                parts[name] = convert(home, given.rank, ROUNDS)
            else:
                parts[name] = merge(home, given.layers, given.hidden, given.shards, ROUNDS)
    found = figures(parts)
    for name, value in found.items():
        bar = BARS.get(name)
        said = "" if bar is None else f"(bar {bar:g}: {'kept' if _keeps(name, value) else 'MISSED'})"
        print(f"{name:20} {value:12,.3f} {said}")
    report({"benchmark": "library", **found, "bars": BARS, "parts": parts, **provenance()}, HERE)


if __name__ == "__main__":
    main()
