"""Pictures with adapters: what they cost beside the base's, and beside diffusers' set_adapters.

emoji-sd, 64 x 64 pixels, LoRA of rank 16 on the linear layers of its UNet's blocks and of its text encoder. Contenders
take turns in one process; a ratio is the median over rounds of what two of them took in the same round.

    merged_overhead       a picture with five adapters merged, against one of the base
    onthefly_overhead     the same put on on the fly, what it takes to put them on included
    different_vs_same     eight pictures with eight adapters in a batch, against eight of one adapter: pictures/s
    against_set_adapters  the same against diffusers drawing them one after the other with set_adapters: pictures/s
    switch_ms             taking one adapter off and putting another on, merged or on the fly, whichever takes longer
    listed_ms             1,000 mounted files looked for and listed anew
    grown_mb              memory after 500 pictures of 50 adapters, beyond that after the first 50

    python benchmarks/images_use/run.py [--write] [--smoke]

Prints a table and, as its last line, one JSON object; `--write` keeps it. `--smoke` says that everything runs and
nothing else.
"""

import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from provenance import median, provenance, report

SMOKE = "--smoke" in sys.argv
ROUNDS, STEPS = (1, 2) if SMOKE else (9, 20)
FILES, PICTURES, ADAPTERS = (100, 20, 10) if SMOKE else (1000, 500, 50)
BARS = {
    "merged_overhead": ("<=", 1.02), "onthefly_overhead": ("<=", 1.25), "different_vs_same": (">=", 0.8),
    "against_set_adapters": (">=", 3.0), "switch_ms": ("<=", 50.0), "listed_ms": ("<=", 100.0),
    "grown_mb": ("<=", 20.0),
}  # fmt: skip
PROMPTS = ("a cat", "a red apple", "a house", "the sun", "a dog", "a cup of tea", "a car", "a tree")


def write_adapters(components: dict[str, Any], folder: Path, count: int) -> list[Path]:
    """Write LoRA files of rank 16 as diffusers names their tensors."""
    import torch

    from haori.library.formats.registry import format_named
    from haori.library.updates import AdapterUpdates, ModuleUpdate

    ends = (".to_q", ".to_k", ".to_v", ".to_out.0", ".proj", ".ff.net.2", ".q_proj", ".v_proj")
    files = []
    for at in range(count):
        numbers = torch.Generator().manual_seed(at)
        modules = {}
        for component, model in components.items():
            for path, layer in model.named_modules():
                if not isinstance(layer, torch.nn.Linear) or not path.endswith(ends):
                    continue
                name = path if component == "unet" else f"text_model.{path.removeprefix('text_model.')}"
                a = 0.05 * torch.randn(16, layer.in_features, generator=numbers)
                b = 0.02 * torch.randn(layer.out_features, 16, generator=numbers)
                modules[f"{component}.{name}"] = ModuleUpdate("lora", {"A": a, "B": b}, alpha=16.0)
        file = folder / f"style-{at:04}.safetensors"
        format_named("diffusers").write(AdapterUpdates(modules, family="sd15"), file)
        files.append(file)
    return files


class Drawing:
    """The pipeline with our adapters, and another of the same base with diffusers' own."""

    def __init__(self, folder: Path) -> None:
        import torch

        from haori.bases import find_base
        from haori.bases.diffusion import pipeline_of
        from haori.bases.quiet import quiet_diffusers
        from haori.images.adapters import PictureAdapters
        from haori.images.mixing import Mixer, Strength
        from haori.library import Library

        self.torch, self.strength = torch, Strength
        base = find_base("emoji-sd")
        self.ours: Any = pipeline_of(base, dtype="fp32", device="cpu")
        self.stock: Any = pipeline_of(base, dtype="fp32", device="cpu")
        components = {"unet": self.ours.unet, "text_encoder": self.ours.text_encoder}
        self.mixer = Mixer(components)
        self.files = write_adapters(components, folder, ADAPTERS)
        self.adapters = PictureAdapters(components, base, library=Library(folder / "library"))
        self.read = [self.adapters.read(file) for file in self.files]
        with warnings.catch_warnings(), quiet_diffusers():
            warnings.simplefilter("ignore")
            for file in self.files[:8]:
                self.stock.load_lora_weights(str(folder), weight_name=file.name, adapter_name=file.stem)

    def draw(self, pipe: Any, count: int = 1, steps: int = STEPS) -> Any:
        """Draw pictures of the first prompts."""
        numbers = [self.torch.Generator().manual_seed(at) for at in range(count)]
        return pipe(prompt=list(PROMPTS[:count]), num_inference_steps=steps, generator=numbers).images

    def mix(self, *which: int) -> Any:
        """Return a blend of some adapters."""
        return tuple(self.strength(self.read[at], 1 / len(which), 1 / len(which)) for at in which)

    def merged(self, count: int, *which: int) -> Callable[[], None]:
        """Return what draws pictures of one mix that is merged; the weights are kept from the last time."""

        def run() -> None:
            with self.mixer.merged(self.mix(*which)):
                self.draw(self.ours, count)

        return run

    def on_the_fly(self, *mixes: tuple[int, ...]) -> Callable[[], None]:
        """Return what draws a batch of a picture for each mix."""

        def run() -> None:
            with self.mixer.on_the_fly([self.mix(*which) for which in mixes]):
                self.draw(self.ours, len(mixes))

        return run

    def one_after_the_other(self) -> None:
        """Draw eight pictures of eight adapters with diffusers."""
        for file in self.files[:8]:
            self.stock.set_adapters([file.stem])
            self.draw(self.stock)


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compete(drawing: Drawing) -> dict[str, list[float]]:
    """Let the contenders take turns and return the seconds of each."""
    five, eight = (0, 1, 2, 3, 4), [(at,) for at in range(8)]
    drawing.merged(1, *five)()
    contenders: dict[str, Callable[[], Any]] = {
        "base": lambda: drawing.draw(drawing.ours),
        "five merged": drawing.merged(1, *five),
        "five on the fly": drawing.on_the_fly(five),
        "eight different": drawing.on_the_fly(*eight),
        "eight alike": drawing.merged(8, 0),
        "eight by set_adapters": drawing.one_after_the_other,
    }
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        for name, work in contenders.items():
            if name == "five merged":  # as it is for all pictures of a mix but the first
                drawing.merged(1, *five)()
            took = seconds(work)
            if turn:
                found[name].append(took)
    return found


def switch_ms(drawing: Drawing) -> dict[str, list[float]]:
    """Return the milliseconds of putting on one adapter after another, which are read already."""
    found: dict[str, list[float]] = {"merged": [], "on the fly": []}
    for at in range(3 * ROUNDS):
        mix = drawing.mix(at % 8)

        def merge(mix: Any = mix) -> None:
            with drawing.mixer.merged(mix):
                pass

        def put_on(mix: Any = mix) -> None:
            with drawing.mixer.on_the_fly([mix]):
                pass

        found["merged"].append(1e3 * seconds(merge))
        found["on the fly"].append(1e3 * seconds(put_on))
    return found


def listed_ms(drawing: Drawing, folder: Path) -> list[float]:
    """Return the milliseconds of listing a mounted tree, which is looked through again each time."""
    from safetensors.torch import load_file, save_file

    tensors = dict(list(load_file(drawing.files[0]).items())[:4])
    for at in range(FILES):
        place = folder / "Lora" / f"group-{at % 20:02}"
        place.mkdir(parents=True, exist_ok=True)
        save_file(tensors, place / f"file-{at:04}.safetensors", {"ss_output_name": f"name {at}"})
        os.utime(place / f"file-{at:04}.safetensors", (1e9 + at,) * 2)
    drawing.adapters.library.mounts.add(folder / "Lora")
    time.sleep(2.5)  # files and folders that have just been written are read again
    drawing.adapters.refresh()

    def work() -> None:
        drawing.adapters.refresh()
        assert len(drawing.adapters.entries()) == FILES

    return [1e3 * seconds(work) for _ in range(ROUNDS)]


def grown_mb(drawing: Drawing) -> float:
    """Return by how much memory has grown after many pictures of many adapters."""
    drawing.adapters.capacity_bytes = 8 * drawing.read[0].size_bytes  # so that most are read again and again
    drawing.read.clear()
    first = 0.0
    for at in range(PICTURES):
        adapter = drawing.adapters.read(drawing.files[at % ADAPTERS])
        mix = (drawing.strength(adapter, 0.8),)
        with drawing.mixer.merged(mix) if at % 2 else drawing.mixer.on_the_fly([mix]):
            drawing.draw(drawing.ours, steps=1)
        if at == ADAPTERS - 1:
            first = _resident_mb()
    return _resident_mb() - first


def _resident_mb() -> float:
    import psutil

    return float(psutil.Process().memory_info().rss / 1e6)


def ratio(over: list[float], under: list[float]) -> dict[str, Any]:
    """Return the median of ratios round by round, and their spread."""
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"value": median(ratios), "least": min(ratios), "most": max(ratios)}


def spread(values: list[float]) -> dict[str, Any]:
    """Return the median and the spread."""
    return {"value": median(values), "least": min(values), "most": max(values)}


def main() -> None:
    """Measure everything and report."""
    with tempfile.TemporaryDirectory() as folder:
        drawing = Drawing(Path(folder))
        took = compete(drawing)
        switches = switch_ms(drawing)
        figures = {
            "merged_overhead": ratio(took["five merged"], took["base"]),
            "onthefly_overhead": ratio(took["five on the fly"], took["base"]),
            "different_vs_same": ratio(took["eight alike"], took["eight different"]),
            "against_set_adapters": ratio(took["eight by set_adapters"], took["eight different"]),
            "switch_ms": max(map(spread, switches.values()), key=lambda one: one["value"]),
            "listed_ms": spread(listed_ms(drawing, Path(folder))),
            "grown_mb": {"value": grown_mb(drawing)},
        }
    for name, samples in took.items():
        print(f"  {name:24} {median(samples):7.3f} s ({min(samples):.3f} to {max(samples):.3f})")
    for name, found in figures.items():
        sign, bar = BARS[name]
        between = f"({found['least']:.2f} to {found['most']:.2f})" if "least" in found else ""
        print(f"{name:22} {found['value']:7.2f} {between:20} {sign} {bar:g}")
    report(
        {
            "benchmark": "images_use", "smoke": SMOKE, "steps": STEPS, "rounds": ROUNDS,
            "bars": {name: f"{sign} {bar:g}" for name, (sign, bar) in BARS.items()}, **figures, "seconds": took,
            "switches_ms": switches, **provenance(),
        },
        HERE,
    )  # fmt: skip


if __name__ == "__main__":
    main()
