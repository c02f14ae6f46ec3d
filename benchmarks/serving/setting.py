"""What all parts of the benchmark share: the base, prompts, adapters, environments, and how contenders are started."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import MissingError, python_of
from provenance import Contender
from workload import Request, write_adapters

HERE = Path(__file__).parent
_SETTLE_S = 0.5  # idle threads of the contender before stop spinning meanwhile


@dataclass(frozen=True)
class Sizes:
    """How much work is done.

    Attributes:
        in_flight: Requests at once.
        new_tokens: Tokens of each answer.
        registered: Adapters on disk for Zipf's draw, cold loads and the soak.
        resident: Adapters that fit into memory there.
        rounds: Turns of each contender that count.
        cold: Adapters that are read cold.
        soak: Requests of the soak.
    """

    in_flight: int = 32
    new_tokens: int = 64
    registered: int = 1000
    resident: int = 64
    rounds: int = 5
    cold: int = 50
    soak: int = 10_000


@dataclass
class Setting:
    """One run of the benchmark.

    Attributes:
        sizes: How much work is done.
        systems: Contenders that take part.
        base: Folder of the base.
        pool: Prompts.
        adapters: Folder of the made adapters.
        cache: Folder of files that are made once.
        venvs: Folder of environments.
        home: Folder for logs; the contenders' HAORI_HOME.
        missing: Contenders that cannot be had, and why.
    """

    sizes: Sizes
    systems: Sequence[str]
    base: Path
    pool: list[list[int]]
    cache: Path
    venvs: Path
    home: Path
    missing: dict[str, str] = field(default_factory=dict)

    @property
    def adapters(self) -> Path:
        """Folder of the made adapters."""
        return self.cache / "adapters-r16"

    def need_adapters(self, count: int) -> None:
        """Write what is missing of so many adapters."""
        write_adapters(self.adapters, count)

    def spec(self, **changed: Any) -> dict[str, Any]:
        """Return the settings of a contender."""
        return {
            "base": str(self.base), "adapters": str(self.adapters), "in_flight": self.sizes.in_flight,
            "weights": "bf16", "resident": self.sizes.resident, "prefix_bytes": 0, "loaded": 0, **changed,
        }  # fmt: skip

    @contextmanager
    def contenders(self, specs: dict[str, tuple[str, dict[str, Any]]]) -> Iterator["Race"]:
        """Start contenders, given as name to (system, spec); those that cannot be had are noted and left out."""
        with ExitStack() as stack:
            running = {}
            for name, (system, spec) in specs.items():
                if system not in self.systems or system in self.missing:
                    continue
                try:
                    script = HERE / f"contender_{system}.py"
                    running[name] = Contender(script, spec, self.home, python_of(system, self.venvs))
                except (MissingError, RuntimeError) as error:
                    self.note(system, error)
                    continue
                stack.callback(running[name].close)
            yield Race(self, {name: specs[name][0] for name in running}, running)

    def note(self, system: str, error: Exception) -> None:
        """Remember that a contender cannot be had; ours must."""
        if system in {"haori", "perplexity"}:
            raise error
        self.missing[system] = str(error).strip().splitlines()[-1]
        print(f"  without {system}: {self.missing[system]}", flush=True)


class Race:
    """Contenders that take turns.

    Args:
        setting: The run.
        systems: System of each contender.
        running: The contenders.
    """

    def __init__(self, setting: Setting, systems: dict[str, str], running: dict[str, Contender]) -> None:
        self.setting = setting
        self.systems = systems
        self.running = running

    def turn(self, name: str, order: dict[str, Any]) -> dict[str, Any] | None:
        """Let a contender carry out an order; None if it is not there, or not any more."""
        if name not in self.running or self.systems[name] in self.setting.missing:
            return None
        time.sleep(_SETTLE_S)
        try:
            return self.running[name].turn(json.dumps(order))
        except (RuntimeError, OSError) as error:
            self.setting.note(self.systems[name], error)
            return None


def batch(requests: Sequence[Request], new_tokens: int, *, in_flight: int | None = None) -> dict[str, Any]:
    """Return an order of one group; all requests at once unless `in_flight` says how many."""
    group = {"requests": list(requests), "in_flight": in_flight or len(requests)}
    return {"groups": [group], "new_tokens": new_tokens}
