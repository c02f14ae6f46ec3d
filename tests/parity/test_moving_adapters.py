"""The table of docs/guide/moving-adapters.md: each row is loaded here, and the page must say what was found.

With HAORI_WRITE_PAGES=1 the page is written instead of compared.
"""

import os
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from haori.library.formats.registry import format_named, read_updates
from haori.library.updates import AdapterUpdates
from tests.flux_models import image_transformers
from tests.parity import test_formats_flux as flux
from tests.parity import test_formats_peft as peft
from tests.parity.test_formats_in_pipelines import NOT_IN_STOCK, loaded_changes
from tests.unet_models import adapter, pipeline

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "moving-adapters.md"
FIXTURES = Path(__file__).parents[1] / "fixtures"
IMAGES = FIXTURES / "image_adapters"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->"


class Row(NamedTuple):
    """One line: what was loaded where, how many modules were compared, and the largest difference of any dW."""

    file: str
    written_by: str
    loaded_by: str
    modules: int
    error: float
    limit: float

    def __str__(self) -> str:
        return (
            f"| {self.file} | {self.written_by} | {self.loaded_by} | {self.modules} | under {self.limit:.0e} |".replace(
                "e-0", "e-"
            )
        )


def difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    wanted = wanted.double()
    return float((found.double().reshape(wanted.shape) - wanted).norm() / wanted.norm())


def installed(package: str) -> str:
    return f"{package} {version(package)}"


def genuine(name: str, what: str, tool: str) -> Row:
    """A file of another tool, read here; what it changes was computed by that tool."""
    updates = read_updates(IMAGES / f"{name}.safetensors")
    expected = load_file(IMAGES / f"{name}.expected.safetensors")
    errors = []
    for key, change in expected.items():
        module, _, part = key.rpartition(".")
        if part == "change" or f"{module}.change" not in expected:
            full = module if module in updates.modules else f"unet.{module}"
            weight = expected.get(f"{module}.weight") if part == "change" else None
            update = updates.modules[full]
            found = update.delta() if weight is None else update.change(weight.double())
            errors.append(difference(found, change))
    return Row(what, tool, "Haori", len(errors), max(errors), 1e-5)


def llama_cpp_file() -> Row:
    folder = FIXTURES / "formats" / "gguf"
    import json

    config = json.loads((folder / "llama_config.json").read_text())
    found = read_updates(folder / "llama_f32.gguf", config)
    expected = read_updates(folder / "llama_peft")
    errors = [difference(found.modules[name].delta(), update.delta()) for name, update in expected.modules.items()]
    return Row("GGUF LoRA", "llama.cpp, of llama-cpp-python 0.3.36", "Haori", len(errors), max(errors), 1e-6)


def peft_row(case: str, what: str, folder: Path, *, reads: bool) -> Row:
    """An adapter of PEFT read here, or one written here and loaded by PEFT."""
    from peft import PeftModel

    build, config = peft.CASES[case]
    adapted = peft.moved(build(), config)
    saved = peft.saved(adapted, folder / "peft")
    updates = read_updates(saved)
    expected = peft.merged_differences(build, adapted)
    if reads:
        found = {f"{name.removeprefix('model.')}.weight": change
                 for name, change in peft.changes(updates, build().state_dict()).items()}  # fmt: skip
    else:
        format_named("peft").write(updates, folder / "out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(build(), folder / "out").eval()
        found = {name: change for name, change in peft.merged_differences(build, loaded).items()
                 if expected[name].abs().max() > 0}  # fmt: skip
    errors = [difference(change, expected[name]) for name, change in found.items()]
    tools = (installed("peft"), "Haori") if reads else ("Haori", installed("peft"))
    return Row(what, *tools, len(errors), max(errors), 1e-6)


def unet_row(family: str, format_name: str, what: str, folder: Path) -> Row:
    """A file written here and loaded by a stock pipeline of diffusers."""
    pipe = pipeline(family)
    updates = adapter(pipe, family, lambda name: not any(part in name for part in NOT_IN_STOCK))
    path = folder / "a.safetensors"
    format_named(format_name).write(updates, path)
    return _compared(what, loaded_changes(pipe, path), updates, type(pipe).__name__)


def transformer_row(family: str, format_name: str, what: str, folder: Path, model: Any) -> Row:
    import copy

    model = copy.deepcopy(model)
    before = {name: module.weight.detach().clone() for name, module in model.named_modules()
              if getattr(module, "weight", None) is not None}  # fmt: skip
    updates = flux.adapter_of(model, family)
    if format_name == "kohya":  # what diffusers' converter for these files lists
        left_out = ("guidance", "modulation", "norm_out")
        modules = {key: update for key, update in updates.modules.items() if not any(part in key for part in left_out)}
        updates = AdapterUpdates(modules, family=family)
    path = folder / "a.safetensors"
    format_named(format_name).write(updates, path)
    pipe = flux.load(family, model, path)
    changes = flux.changed_weights(model, before)
    found = {f"transformer.{name}": change for name, change in changes.items() if change.any()}
    return _compared(what, found, updates, type(pipe).__name__)


def _compared(what: str, found: dict[str, torch.Tensor], updates: AdapterUpdates, pipe: str) -> Row:
    assert sorted(found) == sorted(updates.modules)
    errors = [difference(change, updates.modules[name].delta()) for name, change in found.items()]
    return Row(what, "Haori", f"{pipe} of {installed('diffusers')}", len(errors), max(errors), 1e-6)


def measured(folder: Path) -> list[Row]:
    models = image_transformers()
    places = iter(range(100))

    def new() -> Path:
        place = folder / str(next(places))
        place.mkdir()
        return place

    rows: list[Callable[[], Row]] = [
        lambda: genuine("kohya_sd15_r8_a4", "kohya, SD 1.5", "sd-scripts"),
        lambda: genuine("lycoris_sd15_loha_r4_a2", "LyCORIS LoHa, SD 1.5", "lycoris-lora"),
        lambda: genuine("lycoris_kinds", "LyCORIS LoCon, LoHa, LoKr, Tucker, DoRA", "lycoris-lora 4.1.3"),
        lambda: genuine("lycoris_rs_lora", "the same, rank-stabilised", "lycoris-lora 4.1.3"),
        lambda: genuine("diffusers_flux_r4_a8", "diffusers, Flux.1", "diffusers"),
        *(
            (lambda name=name, what=what: genuine(f"lycoris_flux_{name}", f"{what}, Flux.1", "lycoris-lora 4.1.3"))
            for name, what in (
                ("lokr", "LyCORIS LoKr"), ("loha_dora", "LyCORIS LoHa with DoRA"), ("locon_dora", "LyCORIS DoRA"),
            )
        ),
        llama_cpp_file,
        *(
            (lambda case=case, what=what: peft_row(case, f"PEFT folder: {what}", new(), reads=True))
            for case, what in (("lora", "LoRA"), ("rslora", "rsLoRA"), ("dora", "DoRA"), ("loha", "LoHa"))
        ),
        *(
            (lambda case=case, what=what: peft_row(case, f"PEFT folder: {what}", new(), reads=False))
            for case, what in (("patterns", "LoRA of several ranks"), ("dora", "DoRA"), ("loha", "LoHa"))
        ),
        *(
            (lambda family=family, kind=kind, what=what: unet_row(family, kind, what, new()))
            for family, kind, what in (
                ("sd15", "diffusers", "diffusers, SD 1.5"), ("sdxl", "diffusers", "diffusers, SDXL"),
                ("sd15", "kohya", "kohya, SD 1.5"), ("sdxl", "kohya", "kohya, SDXL"),
            )
        ),
        *(
            (lambda family=family, kind=kind, what=what: transformer_row(family, kind, what, new(), models[family]))
            for family, kind, what in (
                ("flux1", "diffusers", "diffusers, Flux.1"), ("flux2", "diffusers", "diffusers, Flux.2"),
                ("qwen_image", "diffusers", "diffusers, Qwen-Image"), ("z_image", "diffusers", "diffusers, Z-Image"),
                ("flux2", "kohya", "kohya, Flux.2"), ("qwen_image", "comfyui", "ComfyUI, Qwen-Image"),
            )
        ),
    ]  # fmt: skip
    return [row() for row in rows]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    return measured(tmp_path_factory.mktemp("moving"))


def test_every_file_has_the_same_effect_everywhere(rows: list[Row]) -> None:
    for row in rows:
        assert row.modules > 0
        assert row.error < row.limit, row


def test_the_page_says_what_was_loaded_where(rows: list[Row]) -> None:
    table = "\n".join([
        "| file | written by | loaded by | modules | largest difference |", "|---|---|---|---|---|", *map(str, rows),
    ])  # fmt: skip
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = f"{before}{BEGIN}\n{table}\n\n{END}{after}"
    if os.environ.get("HAORI_WRITE_PAGES") == "1":
        PAGE.write_text(wanted, "utf-8")
    assert PAGE.read_text("utf-8") == wanted
