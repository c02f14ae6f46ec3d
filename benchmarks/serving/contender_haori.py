"""Haori's text engine: takes orders as lines of JSON and reports what each took.

An order names groups of requests; each group keeps so many requests in flight until all of its requests have ended. A
group in the background goes on for as long as the others do. The adapter's number is the queue that a request waits
in, as the model's name is at the server.
"""

import itertools
import json
import queue
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve
from workload import Request, adapter_folder

if TYPE_CHECKING:
    from haori.library import AdapterFiles
    from haori.serve import StreamChunk, TextEngine

warnings.filterwarnings("ignore")
CACHE_BYTES = 1 << 30


@dataclass
class Answer:
    """One request and when its pieces came."""

    group: int
    id: str
    asked: float
    first: float = 0.0
    first_tokens: int = 0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)
    finish: str = ""

    def facts(self) -> dict[str, Any]:
        """Return seconds to the first token and to the last, and tokens/s between the two."""
        decoding = self.last - self.first
        return {
            "group": self.group, "first_s": self.first - self.asked, "latency_s": self.last - self.asked,
            "tokens_per_s": (len(self.tokens) - self.first_tokens) / decoding if decoding else None,
        }  # fmt: skip


class Load:
    """Keeps an engine busy with an order.

    Args:
        engine: The engine.
        order: The groups, and how many tokens each answer has.
    """

    names = itertools.count()

    def __init__(self, engine: "TextEngine", order: dict[str, Any]) -> None:
        self.engine = engine
        self.new_tokens = order["new_tokens"]
        self.groups = order["groups"]
        self.ended: queue.SimpleQueue[Answer] = queue.SimpleQueue()
        self.open: dict[str, Answer] = {}
        self.sources: list[Iterator[Request]] = [
            itertools.cycle(group["requests"]) if group.get("background") else iter(group["requests"])
            for group in self.groups
        ]

    def run(self) -> list[Answer]:
        """Carry the order out; return the answers of the groups in the foreground."""
        for number, group in enumerate(self.groups):
            for _ in range(group["in_flight"]):
                self._ask(number)
        left = sum(len(group["requests"]) for group in self.groups if not group.get("background"))
        done = []
        while left:
            answer = self.ended.get()
            del self.open[answer.id]
            if answer.finish != "length":
                raise RuntimeError(f"a request ended with {answer.finish!r}")
            if not self.groups[answer.group].get("background"):
                done.append(answer)
                left -= 1
            self._ask(answer.group)
        for name in self.open:
            self.engine.cancel(name)
        self.engine.drain(60.0)
        return done

    def _ask(self, group: int) -> None:
        from haori.serve import BASE, Sampling, TextRequest

        request = next(self.sources[group], None)
        if request is None:
            return
        prompt, adapter = request
        answer = Answer(group, f"request-{next(Load.names)}", time.perf_counter())
        self.open[answer.id] = answer

        def deliver(chunk: "StreamChunk") -> None:
            now = time.perf_counter()
            if chunk.tokens and not answer.tokens:
                answer.first, answer.first_tokens = now, len(chunk.tokens)
            answer.tokens += chunk.tokens
            if chunk.finish is not None:
                answer.last, answer.finish = now, chunk.error or chunk.finish
                self.ended.put(answer)

        self.engine.submit(
            TextRequest(
                answer.id, tuple(prompt), BASE if adapter is None else ((str(adapter), 1.0),),
                Sampling(temperature=0.0, max_tokens=self.new_tokens, ignore_eos=True),
                queue="base" if adapter is None else str(adapter),
            ),
            deliver,
        )  # fmt: skip


def open_spec(spec: dict[str, Any]) -> "TextEngine":
    """Open an engine with the settings of a spec."""
    from workload import adapter_bytes

    from haori.bases import find_base
    from haori.library import inspect_adapter
    from haori.serve import EngineLimits, open_engine
    from haori.serve.adapters.packed import memory_bytes

    root = Path(spec["adapters"])

    def files_of(adapter: str) -> "AdapterFiles":
        return inspect_adapter(adapter_folder(root, int(adapter)))

    def refuse(sentence: str) -> None:
        raise RuntimeError(sentence)

    limits = EngineLimits(
        context_length=2048, running=spec["in_flight"], prefix_bytes=spec["prefix_bytes"],
        adapter_bytes=spec["resident"] * memory_bytes(adapter_bytes()),
    )  # fmt: skip
    base = find_base(spec["base"])
    return open_engine(base, files_of, limits, weights=spec["weights"], cache_bytes=CACHE_BYTES, say=refuse)


def main(spec: dict[str, Any]) -> None:
    """Carry out orders until there are no more."""
    from haori.training.memory import current_memory_bytes

    started = time.perf_counter()
    engine = open_spec(spec)
    serve({"open_s": time.perf_counter() - started})
    for line in sys.stdin:
        order = json.loads(line)
        before = engine.status()
        answers = Load(engine, order).run()
        after = engine.status()
        report = {
            "seconds": max(answer.last for answer in answers) - min(answer.asked for answer in answers),
            "tokens": sum(len(answer.tokens) for answer in answers),
            "requests": [answer.facts() for answer in answers],
            "rss_bytes": current_memory_bytes(),
            "loads": after.adapter_loads - before.adapter_loads,
            "preemptions": after.preemptions - before.preemptions,
            "resident": len(after.resident_adapters),
        }
        if order.get("answers"):
            report["answers"] = [answer.tokens for answer in sorted(answers, key=lambda answer: answer.asked)]
        print(json.dumps(report), flush=True)
    engine.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
