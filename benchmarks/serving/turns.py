"""Who waits how long for a first token when the base and names of adapters are asked for alike, through the server."""

import asyncio
import json
import time
from collections import defaultdict
from typing import Any

import httpx
from provenance import median
from setting import Setting
from starting import serving
from throughput import quantile
from workload import adapter_folder

_STREAMS_PER_PLACE = 2  # so many streams as two batches: half of them wait
_ADAPTERS = ("one", "two")
_NAMES = ("one", "two", "one:0.5", "two:-0.5")


def turns_part(setting: Setting) -> dict[str, Any]:
    """Measure the time to the first token of streams that ask again and again, a fifth of them of the bare base.

    The others ask for two adapters, one at half its strength and one at a negative one besides. Twice as many streams
    ask as the batch has places, so half of the requests wait at any time. The first request of each does not count.
    """
    setting.need_adapters(len(_ADAPTERS))
    options = ("--max-batch", str(setting.sizes.in_flight), "--adapter-root", str(setting.adapters.resolve()))
    with serving(setting.base, setting.home / "turns", *options) as address:
        waits = asyncio.run(_ask_all(setting, address))
    return summary(waits)


def summary(waits: dict[str, list[float]]) -> dict[str, Any]:
    """Return the times to the first token by name, and how the adapters' compare to the base's.

    Args:
        waits: Seconds to the first token of each request, by name; the base is called `base`.
    """
    by_name = {
        name: {"ttft_p50_s": median(found), "ttft_p95_s": quantile(found, 0.95), "requests": len(found)}
        for name, found in waits.items()
    }
    for name, found in by_name.items():
        print(f"  {name:8} first token p50 {found['ttft_p50_s']:.2f} s, p95 {found['ttft_p95_s']:.2f} s", flush=True)
    adapters = [value for name, found in waits.items() if name != "base" for value in found]
    return {"names": by_name, "ttft_adapter_vs_base": median(adapters) / median(waits["base"])}


async def _ask_all(setting: Setting, address: str) -> dict[str, list[float]]:
    waits: dict[str, list[float]] = defaultdict(list)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600.0, limits=limits, trust_env=False) as client:
        base = (await client.get("/v1/models")).raise_for_status().json()["data"][0]["id"]
        for number, name in enumerate(_ADAPTERS):
            place = {"lora_name": name, "lora_path": str(adapter_folder(setting.adapters.resolve(), number))}
            (await client.post("/v1/load_lora_adapter", json=place)).raise_for_status()
        names = ("base", *_NAMES)

        async def stream(number: int) -> None:
            name = names[number % len(names)]
            for turn in range(1 + setting.sizes.rounds):
                prompt = setting.pool[(turn * count + number) % len(setting.pool)]
                asked = {
                    "model": base if name == "base" else name, "prompt": prompt, "stream": True, "temperature": 0.0,
                    "max_tokens": setting.sizes.new_tokens, "ignore_eos": True,
                }  # fmt: skip
                waited = await _first_token_s(client, asked)
                if turn:
                    waits[name].append(waited)

        count = max(len(names), _STREAMS_PER_PLACE * setting.sizes.in_flight)
        await asyncio.gather(*map(stream, range(count)))
    return {name: waits[name] for name in names}


async def _first_token_s(client: httpx.AsyncClient, asked: dict[str, Any]) -> float:
    """Ask, read to the end, and return the seconds to the first piece of text."""
    asked_at = time.perf_counter()
    first = None
    async with client.stream("POST", "/v1/completions", json=asked) as reply:
        if reply.status_code != 200:
            raise RuntimeError(f"{asked['model']} was refused: {(await reply.aread()).decode()}")
        async for line in reply.aiter_lines():
            if first is None and line.startswith("data: {") and _has_text(line):
                first = time.perf_counter()
    if first is None:
        raise RuntimeError(f"{asked['model']} was answered without any text")
    return first - asked_at


def _has_text(line: str) -> bool:
    chunk = json.loads(line.removeprefix("data: "))
    if "error" in chunk:
        raise RuntimeError(chunk["error"]["message"])
    return any(choice["text"] for choice in chunk["choices"])
