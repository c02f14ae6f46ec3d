"""What is done with adapters of the library, as kinds of job: measured, merged into their base, exported.

Each is short beside training: one that was interrupted begins again.
"""

import shutil
from pathlib import Path
from typing import Any

from haori.core.events import EventSink, Said

__all__ = ["evaluate", "export", "merge"]


def evaluate(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Measure an adapter beside its base; returns the report's folder and the metrics with their intervals.

    Args:
        arguments: `name` and `data`; if wanted `overrides` of the data section, `base`, `against_base`, `samples`, and
            of text `labels` and `max_new_tokens`, or of pictures `pictures`, as `PictureOptions` has them.
        folder: Holds the report, in `evaluation`.
        on_event: Receives what is measured.

    Raises:
        HaoriError: Adapter, base or data cannot be used.
    """
    from haori.data.pictures import PictureSection
    from haori.evaluation.pictures.asking import PictureOptions
    from haori.evaluation.pictures.evaluation import evaluate_pictures
    from haori.evaluation.stored import data_task, evaluate_stored
    from haori.library import Library
    from haori.tasks.examination import MeasureOptions
    from haori.tasks.recipe import recipe_from

    name, base = arguments["name"], arguments.get("base")
    on_event(Said(text=f"Measuring {name} on {arguments['data']}."))
    task = data_task(Library().get(name).card)
    document = {"name": "evaluate", "base": "any", "task": task, "data": {"path": arguments["data"]}}
    section = recipe_from(document, arguments.get("overrides", [])).data
    out = folder / "evaluation"
    shutil.rmtree(out, ignore_errors=True)
    if isinstance(section, PictureSection):
        options = PictureOptions(**arguments.get("pictures", {}))
        samples = arguments.get("samples", 8)
        result, place = evaluate_pictures(name, section, options=options, base_spec=base, samples=samples, out=out)
    else:
        asked = MeasureOptions(
            labels=arguments.get("labels", "auto"), max_new_tokens=arguments.get("max_new_tokens", 64)
        )
        result, place = evaluate_stored(
            name, section, options=asked, against_base=arguments.get("against_base", True), base_spec=base,
            samples=arguments.get("samples", 3), out=out,
        )  # fmt: skip
    metrics = {key: metric.model_dump(mode="json") for key, metric in result.metrics.items()}
    return {"folder": str(place), "report": str(place / "evaluation.html"), "metrics": metrics}


def merge(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Write base and adapter as one model, proved; returns its folder.

    Args:
        arguments: `name`; if wanted `base`, `dtype`, `stream`, as `merge_stored` takes them.
        folder: Holds the model, in `merged`.
        on_event: Receives what is merged.

    Raises:
        HaoriError: As `merge_stored`.
    """
    from haori.library import merge_stored

    name, out = arguments["name"], folder / "merged"
    on_event(Said(text=f"Merging {name} into its base."))
    shutil.rmtree(out, ignore_errors=True)
    merge_stored(
        name, out, base_spec=arguments.get("base"), dtype=arguments.get("dtype"), stream=arguments.get("stream", False)
    )
    return {"folder": str(out)}


def export(arguments: dict[str, Any], folder: Path, on_event: EventSink) -> dict[str, Any]:
    """Write an adapter for other tools, proved; returns the file or folder, and the licence that it is under.

    Args:
        arguments: `name`; if wanted `format` (peft, diffusers, kohya, comfyui, onetrainer, gguf) and `base`.
        folder: Holds what is written, in `exported`.
        on_event: Receives what is exported.

    Raises:
        HaoriError: As `export_stored` and `export_in_format`.
    """
    from haori.library import Library, ancestors, effective_licence, export_in_format, export_stored

    name, base = arguments["name"], arguments.get("base")
    stored = Library().get(name)
    wanted = arguments.get("format") or stored.card.format
    on_event(Said(text=f"Writing {stored.name} as {wanted}."))
    place = folder / "exported"
    shutil.rmtree(place, ignore_errors=True)
    if wanted == "peft":
        written = export_stored(name, place / stored.name, base_spec=base)
    else:
        ending = ".gguf" if wanted == "gguf" else ".safetensors"
        written = export_in_format(name, place / f"{stored.name}{ending}", wanted, base_spec=base)
    return {"path": str(written), "licence": effective_licence(stored.card, ancestors(stored)).expression}
