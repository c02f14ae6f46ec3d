"""One process with one library: does what it is told and says how long it took, in seconds."""

import json
import random
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from adapters import folder_of, name_of
from provenance import serve

QUERIES = (
    "winter", "neon cat", "castle-004", "tag:gothic", "base:sd15 pastel", "trigger:tok77", "licence:apache-2.0 film",
    "accuracy>0.95", "method:lora river", "gardn", "nothing-of-this-name",
)  # fmt: skip


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return how long a piece of work took, and what came of it."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    """Read orders and answer them."""
    spec = json.loads(sys.argv[1])
    from haori.library import Library, list_table

    library = Library(Path(spec["root"]))
    count = spec["count"]
    numbers = random.Random(1)
    serve({})
    for line in sys.stdin:
        order = line.strip()
        answer: dict[str, Any] = {}
        if order == "scan":
            took, scan = timed(lambda: library.mounts.add(Path(spec["tree"]), "loras"))
            answer = {"s": took, "found": scan.files, "read": scan.changed}
        elif order == "rescan":
            took, scans = timed(library.mounts.rescan)
            answer = {"s": took, "found": scans[0].files, "read": scans[0].changed}
        elif order == "rebuild":
            took, rebuilt = timed(library.rebuild)
            answer = {"s": took, "found": rebuilt.adapters}
        elif order == "list":
            took, table = timed(lambda: list_table(library.search("").listed))
            answer = {"s": took, "found": table.row_count}
        elif order == "search":
            each = {}
            for query in QUERIES:
                if query.startswith("accuracy") and spec["tree"]:
                    continue  # what is mounted was never measured
                took, found = timed(lambda query=query: library.search(query))
                each[query] = {"s": took, "found": len(found.listed)}
            answer = {"each": each}
        elif order == "resolve":
            samples = []
            for _ in range(300):
                number = numbers.randrange(count)
                name = f"loras/{folder_of(number)}/{name_of(number)}" if spec["tree"] else name_of(number)
                took, stored = timed(lambda name=name: library.get(name))
                if name_of(number) not in stored.name:
                    raise SystemExit(f"{name} was taken for {stored.name}")
                samples.append(took)
            answer = {"samples": samples}
        answer["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
