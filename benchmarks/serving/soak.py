"""Many short requests over many adapters: does memory stay where it was?"""

from itertools import islice
from typing import Any

from setting import Setting, batch
from workload import requests, zipf

_TURN = 100
_NEW_TOKENS = 4
_PREFIX_BYTES = 64 << 20


def soak_part(setting: Setting) -> dict[str, Any]:
    """Send short requests with adapters by Zipf's draw, which keeps on loading and putting out.

    Resident memory after each hundred requests: the most in the first tenth against the most in the last.
    """
    sizes = setting.sizes
    setting.need_adapters(sizes.registered)
    draws = zipf(sizes.registered, seed=1)
    turns = max(2, sizes.soak // _TURN)
    memory: list[int] = []
    loads = 0
    with setting.contenders({"haori": ("haori", setting.spec(prefix_bytes=_PREFIX_BYTES))}) as race:
        for number in range(turns):
            wanted = requests(setting.pool, number, list(islice(draws, _TURN)))
            done = race.turn("haori", batch(wanted, _NEW_TOKENS, in_flight=sizes.in_flight))
            if done is None:
                return {}
            memory.append(done["rss_bytes"])
            loads += done["loads"]
    tenth = max(1, turns // 10)
    first, last = max(memory[:tenth]), max(memory[-tenth:])
    print(f"  {turns * _TURN:,} requests, {loads:,} loads: {first / 1e6:.0f} MB at first, {last / 1e6:.0f} MB at last")
    return {
        "requests": turns * _TURN, "loads": loads, "first_bytes": first, "last_bytes": last, "growth": last / first,
        "samples": memory,
    }  # fmt: skip
