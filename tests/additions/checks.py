"""Uses each toy of `toys.py`, in a process over a package to which it was added; fails over one without it.

    python -m tests.additions.checks FOLDER    writes FOLDER/found.json: row of the table -> what went wrong, or ""

FOLDER holds `base`, a tiny base; `repository` is the tree whose `src` is imported.
"""

import importlib.util
import json
import os
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["CHECKS"]

CHECKS: dict[str, Callable[[Path], None]] = {}
EVENTS: list[Any] = []
"""What the runs of these checks reported."""


def checks(row: str) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def keep(function: Callable[[Path], None]) -> Callable[[Path], None]:
        CHECKS[row] = function
        return function

    return keep


def rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"what is number {i}?", "completion": "odd" if i % 2 else "even"} for i in range(count)]


def written(path: Path, found: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return str(path)


def train(folder: Path, name: str, data: str, *more: str) -> Any:
    from haori.api import train

    keys = ["method.rank=4", "training.max_steps=2", "training.dtype=fp32", *more]
    return train(
        base=str(folder / "base"), data=data, name=name, overrides=keys, progress=False, on_event=EVENTS.append
    )


@cache
def usual_run(folder: Path) -> Any:
    """An ordinary run, which every one after it may look at."""
    return train(folder, "usual", written(folder / "usual.jsonl", rows(16)))


def haori(*words: object) -> str:
    from typer.testing import CliRunner

    from haori.cli.app import app

    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def section(**keys: Any) -> Any:
    from haori.data.section import TextSection

    return TextSection(**keys)


@checks("an adapter method")
def adapter_method(folder: Path) -> None:
    run = train(folder, "twice", written(folder / "twice.jsonl", rows(16)), "method.kind=twice", "method.alpha=6")
    config = json.loads((run.adapter.path / "adapter_config.json").read_text("utf-8"))
    assert config["lora_alpha"] == 12
    assert run.adapter.card.verification.passed


@checks("a row format")
def row_format(folder: Path) -> None:
    from haori.data.reading import read_conversations

    data = written(folder / "riddles.jsonl", [{"riddle": "what is red?", "solution": "blood"}])
    for kind in ("auto", "riddles"):
        ((row,), _) = read_conversations(section(path=data, format=kind))
        assert [message["content"] for message in row.messages] == ["what is red?", "blood"]


@checks("a kind of file")
def kind_of_file(folder: Path) -> None:
    from haori.data.reading import read_conversations
    from haori.data.section import Columns

    (folder / "some.toy").write_text("what is red? => blood\n", encoding="utf-8")
    columns = Columns(prompt="riddle", completion="solution")
    ((row,), _) = read_conversations(section(path=str(folder / "some.toy"), columns=columns))
    assert [message["content"] for message in row.messages] == ["what is red?", "blood"]
    assert row.origin.endswith("some.toy:1")


@checks("a preference loss")
def preference_loss(folder: Path) -> None:
    import torch

    from haori.tasks.preference.objective import pair_loss
    from haori.tasks.recipe import recipe_from

    keys = {
        "name": "n",
        "base": "b",
        "task": "preference",
        "data": {"path": "p"},
        "loss": {"kind": "square", "margin": 3.0},
    }
    recipe: Any = recipe_from(keys)
    scores = torch.tensor([-1.0, -2.0])
    assert pair_loss(recipe.loss, scores, torch.ones(2), torch.zeros(2)).loss.tolist() == [4.0]  # (-1 + 2 - 3)^2
    pairs = [{"prompt": row["prompt"], "chosen": "odd", "rejected": "even"} for row in rows(16)]
    run = train(folder, "square", written(folder / "pairs.jsonl", pairs), "task=preference", "loss.kind=square")
    assert run.adapter.card.verification.passed


@checks("a kind of head")
def kind_of_head(folder: Path) -> None:
    from transformers import BertConfig, BertModel

    from haori.bases import find_base, load_model
    from haori.core.records import Head

    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=40)
    BertModel(config).save_pretrained(folder / "bert")
    head = Head(kind="question_answering", labels=("start", "end"))  # type: ignore[arg-type]
    models = [load_model(find_base(str(folder / "bert")), head=head) for _ in range(2)]
    assert type(models[0]).__name__ == "BertForQuestionAnswering"
    assert models[0].qa_outputs.weight.equal(models[1].qa_outputs.weight)


@checks("an automatic choice")
def automatic_choice(folder: Path) -> None:
    run = usual_run(folder)
    assert run.adapter.card.recipe_data["optimizer"]["weight_decay"] == 0.25


@checks("a metric")
def metric(folder: Path) -> None:
    from haori.api import evaluate
    from haori.evaluation.result import metric_lines

    usual_run(folder)
    result, report = evaluate("usual", written(folder / "test.jsonl", rows(6)), labels="none", max_new_tokens=4)
    (line,) = [line for line in metric_lines(result) if line.name == "same_length"]
    assert line.kind.title == "Same length" and line.adapter_interval and line.difference_interval
    assert "Same length" in (report / "evaluation.html").read_text("utf-8")


@checks("an event")
def event(folder: Path) -> None:
    import io

    from rich.console import Console

    from haori.core.events import EventReader
    from haori.training.display import TrainingDisplay

    usual_run(folder)
    (clipped, *_) = [event for event in EVENTS if event.kind == "clipped"]
    assert EventReader().read(clipped.model_dump_json()) == clipped  # as a job hands it to its parent
    shown = Console(file=io.StringIO())
    TrainingDisplay(shown).update(clipped)
    assert shown.file.getvalue().startswith(f"norm {clipped.norm:.3f}")


@checks("a check of the proof")
def check_of_the_proof(folder: Path) -> None:
    found = {check.name: check for check in usual_run(folder).adapter.card.verification.checks}
    assert found["small"].passed and found["small"].value > 0


@checks("a licence whose terms are known")
def licence(folder: Path) -> None:
    from haori.library.licences.terms import terms_of

    assert terms_of("LicenseRef-toy-licence").commercial == "no"


@checks("a base by name")
def base_by_name(folder: Path) -> None:
    from haori.bases import find_base, list_bases

    assert "toy-base" in [entry.name for entry in list_bases()]
    assert find_base("toy-base").source == "wheel:tiny-base==1.0"


@checks("a component of a base")
def component_of_a_base(folder: Path) -> None:
    from haori.bases import find_base
    from tests.pipeline_folders import write_pipeline

    painter = write_pipeline(folder / "painter", folder / "base")
    usual = find_base(str(painter)).components["unet"].fingerprint
    (painter / "unet" / "diffusion_pytorch_model.safetensors").rename(painter / "unet" / "toy.safetensors")
    assert find_base(str(painter)).components["unet"].fingerprint == usual


@checks("a family of image bases")
def family_of_image_bases(folder: Path) -> None:
    import torch

    from haori.bases import find_base
    from haori.bases.diffusion import load_diffusion_model
    from tests.diffusion_pipelines import saved, stable_diffusion

    pipeline = saved(stable_diffusion(), folder / "pipeline")
    noisy, time, states = torch.randn(1, 4, 8, 8), torch.tensor([500.0]), torch.randn(1, 77, 24)
    usual = load_diffusion_model(find_base(str(pipeline)), dtype="fp32", components=("unet",))
    index = pipeline / "model_index.json"
    index.write_text(index.read_text("utf-8").replace("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"))
    toy = load_diffusion_model(find_base(str(pipeline)), dtype="fp32", components=("unet",))
    with torch.no_grad():
        predicted = [model(noisy, time, text_states=states).sample for model in (usual, toy)]
    assert torch.equal(predicted[1], -predicted[0])
    assert bool(predicted[0].any())


@checks("a layout of picture data")
def layout_of_picture_data(folder: Path) -> None:
    from tests.pictures import picture, read

    album = folder / "album"
    album.mkdir()
    for number in range(3):
        picture(number).save(album / f"{number}.png")
    (album / "all.album").write_text("0.png | a cat\n1.png | a dog\n2.png | a cow\n", encoding="utf-8")
    split = read(album / "all.album")
    assert split.report.layout == "album"
    assert {row.caption for row in (*split.train, *split.validation)} == {"a cat", "a dog", "a cow"}


@checks("a source of bases")
def source_of_bases(folder: Path) -> None:
    from haori.bases import find_base, load_tokenizer

    with zipfile.ZipFile(folder / "packed.zip", "w") as file:
        for path in (folder / "base").iterdir():
            file.write(path, path.name)
    base = find_base(str(folder / "packed.zip"))
    assert base.fingerprint == find_base(str(folder / "base")).fingerprint
    assert load_tokenizer(base).encode("a")


@checks("a model that is served fast")
def model_served_fast(folder: Path) -> None:
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    from haori.bases import find_base
    from haori.serve.engine.scheduler import EngineLimits
    from haori.serve.opening import open_runner

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    config = Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, original_max_position_embeddings=128, pad_token_id=0,
        sliding_window=None, tie_word_embeddings=False,
    )  # fmt: skip
    Phi3ForCausalLM(config).save_pretrained(folder / "phi3")
    tokenizer.save_pretrained(folder / "phi3")
    limits = EngineLimits(context_length=64)
    opened = open_runner(find_base(str(folder / "phi3")), limits, weights="fp32", cache_bytes=1 << 22)
    assert opened.slow_because is None, opened.slow_because  # its logits were compared with the model's own


@checks("a kernel in C")
def kernel_in_c(folder: Path) -> None:
    import torch

    from haori.adapters.fused.kernels import TorchKernels, compiled, kernels_for

    given = torch.randn(64, dtype=torch.bfloat16)
    by_c, by_torch = given.clone(), given.clone()
    kernels_for(by_c).double(by_c)
    TorchKernels().double(by_torch)
    assert by_c.equal(by_torch) and by_c.equal(given + given)
    assert compiled().library is None or type(kernels_for(by_c)) is not TorchKernels


@checks("a route")
def route(folder: Path) -> None:
    import httpx
    from transformers import AutoTokenizer

    from tests.server_samples import RepeatingEngine, served

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    with served(RepeatingEngine(tokenizer), home=folder) as server:
        assert httpx.get(f"{server.url}/toy", trust_env=False).json() == {"toy": "here"}


@checks("a field of the web UI")
def web_ui_field(folder: Path) -> None:
    from haori.server.pictures.body import read_body
    from haori.server.sdapi.fields import Txt2ImgFields

    _, read = read_body(Txt2ImgFields, {"prompt": "cat", "toy_field": 1}, lenient=False)
    assert read.warnings == []


@checks("a file format of adapters")
def file_format(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from haori.library.formats.registry import read_updates

    pair = {"toy:unet.conv_in.lora_down.weight": torch.ones(2, 4), "toy:unet.conv_in.lora_up.weight": torch.ones(3, 2)}
    save_file(pair, folder / "toy.safetensors")
    updates = read_updates(folder / "toy.safetensors")
    assert updates.format == "toy"
    assert updates.modules["unet.conv_in"].delta().tolist() == [[2.0] * 4] * 3


@checks("a form in which models write calls of tools")
def form_of_calls(folder: Path) -> None:
    from transformers import AutoTokenizer

    from haori.server.tools.events import CallArguments, CallBegun
    from haori.server.tools.formats import format_of
    from haori.server.tools.reader import CallReader

    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    tokenizer.chat_template += "{% if tools %}<<call>>{% endif %}"
    reader = CallReader(format_of(tokenizer), ["sum"])
    events = reader.push('<<call>>{"name": "sum", "arguments": {"a": 1}}<</call>>') + reader.close()
    assert [event.name for event in events if isinstance(event, CallBegun)] == ["sum"]
    assert json.loads("".join(event.text for event in events if isinstance(event, CallArguments))) == {"a": 1}


@checks("a key of the recipe renamed")
def renamed_key(folder: Path) -> None:
    from haori.tasks.recipe import recipe_from

    old = {"schema_version": 1, "name": "n", "base": "b", "data": {"path": "p"}, "training": {"keep_checkpoints": 5}}
    recipe: Any = recipe_from(old)
    assert (recipe.schema_version, recipe.training.checkpoints_kept) == (2, 5)
    assert usual_run(folder).adapter.card.recipe_data["training"]["checkpoints_kept"] == 2


@checks("a key of another training tool")
def key_of_another_tool(folder: Path) -> None:
    from haori.conversion import import_config

    theirs = {"base_model": "b/m", "datasets": [{"path": "a.jsonl"}], "adapter": "lora", "toy_dropout": 0.5}
    recipe: Any = import_config(Path(written(folder / "axolotl.json", [theirs]))).recipe  # type: ignore[list-item]
    assert recipe.method.dropout == 0.5
    assert "| `toy_dropout`" in coming_from() or "`lora_dropout`, `toy_dropout`" in coming_from()


@checks("another training tool")
def another_tool(folder: Path) -> None:
    from haori.conversion import import_config

    samples = sorted((repository() / "tests/fixtures/conversion/toytune").iterdir())
    assert [import_config(path).recipe.method.rank for path in samples] == [1, 2, 3]  # type: ignore[union-attr]
    assert "| `toy_rank` | `method.rank` |" in coming_from()


@checks("a command")
def command(folder: Path) -> None:
    assert haori("greet") == "good day\n"
    assert "Greet." in haori("--help")


def repository() -> Path:
    import haori

    return Path(str(haori.__file__)).parents[2]


@cache
def coming_from() -> str:
    """The page of keys, as the writer makes it of the tables."""
    place = repository() / "tools" / "write_coming_from.py"
    spec = importlib.util.spec_from_file_location("write_coming_from", place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.page(module.PAGE.read_text("utf-8")))


@contextmanager
def quiet() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = before


def main(folder: Path) -> None:
    found = {}
    for row, check in CHECKS.items():
        try:
            with quiet():
                check(folder)
        except Exception:
            found[row] = traceback.format_exc(limit=-6)
        else:
            found[row] = ""
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
