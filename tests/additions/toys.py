"""What each row of the table "where to add what" (docs/architecture.md) says to do, done with a toy."""

from dataclasses import dataclass, field

__all__ = ["TOYS", "Edit", "Toy"]


@dataclass(frozen=True)
class Edit:
    """A change of one file: `old`, which stands there once, becomes `new`."""

    path: str
    old: str
    new: str


@dataclass(frozen=True)
class Toy:
    """What is added.

    Attributes:
        edits: Changes of files that are there.
        files: New files by path.
        renamed: A name that the row lets be changed wherever it is read.
    """

    edits: tuple[Edit, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    renamed: str = ""


def after(path: str, anchor: str, text: str) -> Edit:
    return Edit(path, anchor, anchor + text)


def before(path: str, anchor: str, text: str) -> Edit:
    return Edit(path, anchor, text + anchor)


_METHODS, _RECIPE = "src/haori/core/methods.py", "src/haori/tasks/recipe.py"
_PREFERENCE = "src/haori/tasks/preference"
_HEADS, _KERNELS = "src/haori/bases/heads.py", "src/haori/adapters/fused/kernels"
_PLAN, _CONFIG = "src/haori/serve/models/llama_plan.py", "src/haori/serve/models/llama_config.py"
_FAMILIES = "src/haori/bases/diffusion/families"
_PAGE = "docs/guide/coming-from.md"

_METHOD = '''"""LoRA whose dW counts twice."""

from haori.adapters.insertion import insert_config
from haori.adapters.low_rank import LowRankBehaviour, check_low_rank, low_rank_config


def check(model, tokenizer, method, targets):
    check_low_rank(model, tokenizer, method, targets)


def insert(model, tokenizer, method, targets, insertion):
    twice = method.model_copy(update={"alpha": 2 * method.alpha})
    return insert_config(
        model, low_rank_config(model, tokenizer, twice, targets, insertion.task_type), insertion.seed
    )


def behaviour(model, method, steps):
    return LowRankBehaviour(model, method.lr_ratio)
'''

_SECTION = '''class TwiceMethod(LowRankMethod):
    """LoRA whose dW counts twice."""

    kind: Literal["twice"] = Field(description="LoRA, twice.")


'''

_READER = """def _read_pairs(path: Path, name: str) -> Iterator[RawRow]:
    for number, line, done in _lines(path, name):
        left, _, right = line.rstrip().partition(" => ")
        yield RawRow(f"{name}:{number}", name, {"riddle": left, "solution": right}, done)


"""

_FAMILY = '''"""Stable Diffusion that predicts the other way round."""

from haori.bases.diffusion.families.stable_diffusion import StableDiffusion


class ToyFamily(StableDiffusion):
    def predict(self, denoiser, noisy, timesteps, conditions):
        return -super().predict(denoiser, noisy, timesteps, conditions)
'''

_ALBUM = '''"""Lines of a picture and its caption, parted by a bar."""

from haori.data.pictures.listing import Listing, PictureFile


def list_album(path, section):
    rows = [[part.strip() for part in line.split("|")] for line in path.read_text("utf-8").splitlines()]
    return Listing("album", [
        PictureFile(name, path.parent / name, lambda caption=caption: caption, section) for name, caption in rows
    ])
'''

_ZIPPED = '''"""Bases in zip files."""

import zipfile

from haori.bases.registry import BaseRecord
from haori.core.settings import settings


def unzipped(path):
    folder = settings().cache / "zipped" / path.stem
    with zipfile.ZipFile(path) as file:
        file.extractall(folder)
    return BaseRecord(name=path.stem, source=f"zip:{path}", path=str(folder))
'''

_ENTRY = """_TOY = CatalogueEntry(
    name="toy-base", requirement="tiny-base==1.0", filename="tiny_base-1.0-py3-none-any.whl", sha256="@SHA256@",
    size_bytes=@SIZE@, folder="tiny_base/model", members=dict.fromkeys(@MEMBERS@, 1 << 20), licence="MIT",
    parameters=1, description="a toy",
)

"""

_PING = '''"""A route that says how many texts wait."""

from fastapi import APIRouter

router = APIRouter()


@router.get("/toy")
def toy() -> dict[str, str]:
    """Answer."""
    return {"toy": "here"}
'''

_FILE_FORMAT = '''"""Modules behind `toy:`."""

from haori.core.errors import InputError
from haori.library.formats.tensor_names import place_modules, read_modules
from haori.library.updates import AdapterUpdates


class Toy:
    name = "toy"
    title = "a toy"

    def detect(self, source):
        return any(key.startswith("toy:") for key in source.tensors)

    def read(self, source):
        modules = place_modules(source, read_modules(source).modules, lambda own: own.removeprefix("toy:"))
        return AdapterUpdates(modules, source.metadata, self.name)

    def write(self, updates, path, card=None, *, base_config=None):
        raise InputError("Toys are only read.")


FORMAT = Toy()
'''

_DOUBLE_C = """
/* x becomes 2 x. */
void haori_double(bf16 *x, int64_t many) {
    for (int64_t i = 0; i < many; i++) x[i] = narrow(2.0f * wide(x[i]));
}
"""

_TOOL = '''"""A toy of a tool."""

from haori.conversion.rules import fact, to
from haori.conversion.tool import Tool

TOYTUNE = Tool(
    name="toytune", title="Toytune", command="toytune {file}", signs=frozenset({"toy_base"}),
    keys={"toy_base": fact("base", "base"), "toy_data": fact("data", "data.path"), "toy_rank": to("method.rank")},
)
'''

TOYS: dict[str, Toy] = {
    "an adapter method": Toy(
        (
            before(_METHODS, "class FullMethod(Section):", _SECTION),
            after(_METHODS, "\nMethod = Annotated[\n", "    TwiceMethod |\n"),
            after(_METHODS, '    "lora": LoraMethod,\n', '    "twice": TwiceMethod,\n'),
            after("src/haori/adapters/methods.py", '    "lora": "lora",\n', '    "twice": "twice",\n'),
        ),
        {"src/haori/adapters/twice.py": _METHOD, "docs/guide/methods/twice.md": "# Twice\n"},
    ),
    "a row format": Toy((
        after("src/haori/data/section.py", 'Literal["auto", ', '"riddles", '),
        after("src/haori/data/formats.py", '    ("prompt", "response"): "prompt-completion",\n',
              '    ("riddle", "solution"): "riddles",\n'),
        after("src/haori/data/formats.py", '    "alpaca": _pair_builder,\n', '    "riddles": _pair_builder,\n'),
    )),
    "a kind of file": Toy((
        before("src/haori/data/readers.py", "READERS: dict", _READER),
        after("src/haori/data/readers.py", '    ".arrow": _read_arrow,\n', '    ".toy": _read_pairs,\n'),
    )),
    "a preference loss": Toy((
        before(f"{_PREFERENCE}/losses.py", "def orpo_loss(",
               "def square_loss(chosen: Tensor, rejected: Tensor, *, margin: float) -> PairLoss:\n"
               "    return _paired((chosen - rejected - margin).square(), chosen, rejected)\n\n\n"),
        before(f"{_PREFERENCE}/recipe.py", "class OrpoLoss(Section):",
               "class SquareLoss(Section):\n"
               '    """Squared distance from a margin."""\n\n'
               '    kind: Literal["square"] = Field(description="Squared distance.")\n'
               '    margin: float = Field(default=1.0, description="The margin.")\n\n\n'),
        after(f"{_PREFERENCE}/recipe.py", "PreferenceLoss = Annotated[", "SquareLoss | "),
        after(f"{_PREFERENCE}/objective.py", "    match section:\n",
              "        case SquareLoss():\n"
              "            return square_loss(chosen, rejected, margin=section.margin)\n"),
        after(f"{_PREFERENCE}/objective.py", "from haori.tasks.preference.losses import (\n", "    square_loss,\n"),
        before(f"{_PREFERENCE}/objective.py", "from haori.tasks.task import",
               "from haori.tasks.preference.recipe import SquareLoss\n"),
    )),
    "a kind of head": Toy((
        after("src/haori/core/records.py", 'Literal["sequence_classification", ', '"question_answering", '),
        after(_HEADS, "_ENDINGS = {\n", '    "question_answering": "ForQuestionAnswering",\n'),
        after(_HEADS, "_IN_WORDS = {", '"question_answering": "find answers", '),
        after(_HEADS, "    of_kind = {\n",
              '        "question_answering": (\n'
              "            transformers.AutoModelForQuestionAnswering,\n"
              "            modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,\n        ),\n"),
    )),
    "an automatic choice": Toy((
        Edit(_RECIPE, "weight_decay: float = Field(default=0.0, ge=0.0,",
             'weight_decay: Auto | Annotated[float, Field(ge=0)] = Field(default="auto",'),
        before("src/haori/training/auto.py", '    epochs = choose("training.epochs"',
               '    decay = choose("optimizer.weight_decay", recipe.optimizer.weight_decay, 0.25, "a toy")\n'),
        Edit("src/haori/training/auto.py", 'model_copy(update={"lr": lr})',
             'model_copy(update={"lr": lr, "weight_decay": decay})'),
        before("docs/guide/choosing-settings.md", "## Rank\n", "## Decay\n\n`optimizer.weight_decay` is 0.25.\n\n"),
    )),
    "a metric": Toy(
        (
            after("src/haori/metrics/kinds.py", "KINDS: dict[str, Kind] = {\n",
                  '    "same_length": Kind("Same length", "higher", "share"),\n'),
            after("src/haori/tasks/causal_lm/metric_groups.py",
                  '    group = Group(answers, right={"exact_match": equal})\n',
                  "    from haori.metrics.lengths import same_length\n\n"
                  "    alike = same_length(answers, references)\n"
                  '    group.metrics["same_length"] = Measured(sum(alike) / len(alike), mean_sums(alike))\n'),
        ),
        {"src/haori/metrics/lengths.py":
            "def same_length(answers, references):\n"
            "    return [float(len(a) == len(r)) for a, r in zip(answers, references, strict=True)]\n"},
    ),
    "an event": Toy((
        before("src/haori/core/events.py", "\nEvent = ",
               "\nclass Clipped(_Event):\n"
               '    """A gradient\'s norm."""\n\n'
               '    kind: Literal["clipped"] = "clipped"\n'
               '    norm: float = Field(description="The norm.")\n\n'),
        after("src/haori/core/events.py", "\nEvent = ", "Clipped | "),
        after("src/haori/training/loop.py", "from haori.core.events import ", "Clipped, "),
        after("src/haori/training/loop.py", "        self.on_event(done)\n",
              "        self.on_event(Clipped(norm=norm))\n"),
        after("src/haori/training/display.py", "from haori.core.events import ", "Clipped, "),
        after("src/haori/training/display.py", "        match event:\n",
              "            case Clipped(norm=norm):\n"
              '                self._print(f"norm {norm:.3f}")\n'),
    )),
    "a check of the proof": Toy((
        before("src/haori/library/proof/checks.py", "def check_repeated(",
               "def check_small(tensors: int) -> Check:\n"
               '    return Check(name="small", passed=tensors < 1000, detail="few tensors", value=tensors)\n\n\n'),
        after("src/haori/library/proof/verify.py", "from haori.library.proof.checks import (\n", "    check_small,\n"),
        before("src/haori/library/proof/verify.py", "    checks.append(check_prompts(prompt_pair))\n",
               "    checks.append(check_small(len(files.tensors)))\n"),
    )),
    "a licence whose terms are known": Toy((
        after("src/haori/library/licences/terms.py", "_NAMED: tuple[tuple[str, Terms], ...] = (\n",
              '    (r"toy-licence", Terms("no", "yes", True, "for play only")),\n'),
    )),
    "a base by name": Toy((
        before("src/haori/bases/catalogue.py", "CATALOGUE: Mapping", _ENTRY),
        after("src/haori/bases/catalogue.py", "for entry in (", "_TOY, "),
    )),
    "a component of a base": Toy((
        Edit("src/haori/bases/pipeline.py", '_STEMS = ("model",', '_STEMS = ("toy", "model",'),
    )),
    "a family of image bases": Toy(
        (
            before(f"{_FAMILIES}/__init__.py", '    "StableDiffusionPipeline":',
                   '    "StableDiffusionImg2ImgPipeline": "toy.ToyFamily",\n'),
        ),
        {f"{_FAMILIES}/toy.py": _FAMILY},
    ),
    "a layout of picture data": Toy(
        (
            before("src/haori/data/pictures/sources.py", '    if kind == ".toml":\n',
                   '    if kind == ".album":\n'
                   "        from haori.data.pictures.album import list_album\n\n"
                   "        return list_album(path, section)\n"),
        ),
        {"src/haori/data/pictures/album.py": _ALBUM},
    ),
    "a source of bases": Toy(
        (
            before("src/haori/bases/find.py", "    if path.is_file():\n        return _converted(path)\n",
                   '    if path.suffix == ".zip":\n'
                   "        from haori.bases.zipped import unzipped\n\n"
                   "        return unzipped(path)\n"),
        ),
        {"src/haori/bases/zipped.py": _ZIPPED},
    ),
    "a model that is served fast": Toy((
        after(_CONFIG, '    "llama": frozenset[str](),\n',
              '    "phi3": frozenset({"resid_pdrop", "embd_pdrop", "original_max_position_embeddings"}),\n'),
        after(_PLAN, "def _parts(module: Any) -> set[str]:\n",
              "    return _own_parts(module) - {\"resid_attn_dropout\", \"resid_mlp_dropout\"}\n\n\n"
              "def _own_parts(module: Any) -> set[str]:\n"),
        Edit(_PLAN, '_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")', '_PROJECTIONS = ("qkv_proj", "o_proj")'),
        Edit(_PLAN, '_MLP = ("gate_proj", "up_proj", "down_proj")', '_MLP = ("gate_up_proj", "down_proj")'),
        Edit(_PLAN, '!= {"act_fn"}', '!= {"activation_fn"}'),
        Edit(_PLAN, "type(mlp.act_fn)", "type(mlp.activation_fn)"),
        Edit(_PLAN, "    heads = (attention.q_proj.out_features / width, attention.k_proj.out_features / width)\n",
             "    heads = (config.num_attention_heads, config.num_key_value_heads)\n"),
        Edit(_PLAN, "(attention.q_proj, attention.k_proj, attention.v_proj),", "(attention.qkv_proj,),"),
        Edit(_PLAN, "(mlp.gate_proj, mlp.up_proj),", "(mlp.gate_up_proj,),"),
    )),
    "a kernel in C": Toy((
        before(f"{_KERNELS}.c", "\n/* losses[i] =", _DOUBLE_C),
        after(f"{_KERNELS}.py", "_ARGUMENTS = {\n", '    "haori_double": [_POINTER, _INT],\n'),
        after(f"{_KERNELS}.py", '    """The steps in plain torch, for every dtype and device."""\n',
              "\n    def double(self, x: Tensor) -> None:\n        x.mul_(2)\n"),
        after(f"{_KERNELS}.py", "        self._c = library\n",
              "\n    def double(self, x: Tensor) -> None:\n        self._c.haori_double(x.data_ptr(), x.numel())\n"),
    )),
    "a route": Toy(
        (
            after("src/haori/server/app.py", "from haori.server.access import Access\n",
                  "from haori.server import toy_route\n"),
            after("src/haori/server/app.py", "for module in (", "toy_route, "),
        ),
        {"src/haori/server/toy_route.py": _PING},
    ),
    "a field of the web UI": Toy((
        before("src/haori/server/sdapi/fields.py", '"do_not_save_samples": _NOTHING_SAVED', '"toy_field": "a toy", '),
        before("docs/guide/serving-pictures.md", "`subseed`, `do_not_save_samples`", "`toy_field`, "),
    )),
    "a file format of adapters": Toy(
        (
            after("src/haori/library/formats/registry.py", "FORMATS: dict[str, str] = {\n",
                  '    "toy": "haori.library.formats.toy",\n'),
        ),
        {"src/haori/library/formats/toy.py": _FILE_FORMAT},
    ),
    "a form in which models write calls of tools": Toy((
        after("src/haori/server/tools/formats.py", "_FORMATS = (\n",
              '    ToolFormat("toy", ("<<call>>",), (Marks("<<call>>", "<</call>>"),), before="<<call>>",\n'
              '               after="<</call>>"),\n'),
    )),
    "a key of the recipe renamed": Toy(
        (
            Edit(_RECIPE, "    keep_checkpoints: Positive", "    checkpoints_kept: Positive"),
            Edit("src/haori/training/loop.py", "training.keep_checkpoints", "training.checkpoints_kept"),
            Edit("src/haori/tasks/recipe_history.py", "RECIPE_SCHEMA = 1\n", "RECIPE_SCHEMA = 2\n"),
            Edit("src/haori/tasks/recipe_history.py", "dict[str, Any]]] = {}\n",
                 "dict[str, Any]]] = {1: lambda old: {**old, \"training\": {\n"
                 '    "checkpoints_kept" if key == "keep_checkpoints" else key: value\n'
                 '    for key, value in old.get("training", {}).items()}}}\n'),
        ),
        renamed="keep_checkpoints",
    ),
    "a key of another training tool": Toy((
        after("src/haori/conversion/axolotl.py", '    "lora_r": to("method.rank", whole),\n',
              '    "toy_dropout": to("method.dropout", number),\n'),
    )),
    "another training tool": Toy(
        (
            before("src/haori/conversion/tools.py", "from haori.conversion.training_arguments",
                   "from haori.conversion.toytune import TOYTUNE\n"),
            after("src/haori/conversion/tools.py", "for tool in (", "TOYTUNE, "),
            before(_PAGE, "## PEFT\n",
                   "## Toytune\n\n<!-- keys of toytune: begin -->\n<!-- keys of toytune: end -->\n\n"),
        ),
        {
            "src/haori/conversion/toytune.py": _TOOL,
            **{f"tests/fixtures/conversion/toytune/{number}.yml":
               f"toy_base: b/m\ntoy_data: a.jsonl\ntoy_rank: {number}\n" for number in (1, 2, 3)},
        },
    ),
    "a command": Toy(
        (
            after("src/haori/cli/app.py", "\nimport typer\n", "\nfrom haori.cli import greet\n"),
            before("src/haori/cli/app.py", 'app.command("demo")', 'app.command("greet")(greet.greet)\n'),
        ),
        {"src/haori/cli/greet.py":
            'import typer\n\n\ndef greet() -> None:\n    """Greet."""\n    typer.echo("good day")\n'},
    ),
}  # fmt: skip
