"""The documentation says what the code does: commands, flags, keys, rules, limits, links and paths."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from haori.core import errors
from haori.data.section import TextSection
from haori.tasks.recipe import recipe_from, recipe_schema

ROOT = Path(__file__).parents[2]
READMES = (ROOT / "README.md", ROOT / "README.ja.md")
PAGES = [
    *READMES,
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "log.md"),
]
LANGUAGES = {"csv", "json", "python", "shell", "text", "yaml"}
SECTIONS = ("data", "method", "optimizer", "schedule", "training")


class Block(NamedTuple):
    language: str
    text: str


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.M | re.S)]


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)


def spans(page: Path) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> list[str]:
    lines = [line for block in blocks(page) if block.language == "shell" for line in block.text.splitlines()]
    return [line.strip() for line in lines if line.startswith("haori ")]


def table(page: Path, heading: str) -> list[list[str]]:
    """Return the rows of the first table under a heading, without its head."""
    text = re.split(rf"^## {re.escape(heading)}$", page.read_text("utf-8"), flags=re.M)[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return rows[2:]


@pytest.fixture(scope="module")
def cli() -> Any:
    from haori.cli.app import app

    return typer.main.get_command(app)


def find(command: Any, words: list[str]) -> tuple[Any, list[str]]:
    """Follow words down to a command; return it and the words left."""
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command, words


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_blocks_are_closed_and_state_their_language(page: Path):
    fences = re.findall(r"^```(.*)$", page.read_text("utf-8"), re.M)
    assert len(fences) % 2 == 0
    assert set(fences[::2]) <= LANGUAGES
    assert set(fences[1::2]) <= {""}
    for block in blocks(page):
        if block.language == "python":
            ast.parse(block.text)


def slugs(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert ROOT in found.parents, target
        assert not anchor or anchor in slugs(found), target


def repository_paths(page: Path) -> Iterator[str]:
    """Yield the spans that name a file or folder of the repository."""
    top = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    for span in spans(page):
        if " " in span or "*" in span:
            continue
        if span.split("/")[0] in top or span.endswith((".py", ".toml")) or re.fullmatch(r"[A-Z]+(\.\w+)*\.md", span):
            yield span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_paths_exist(page: Path):
    missing = [span for span in repository_paths(page) if not (ROOT / span).exists()]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_parse(page: Path, cli: Any):
    for line in commands(page):
        command, words = find(cli, shlex.split(line)[1:])
        try:
            command.make_context(command.name, words)
        except Exception as error:
            pytest.fail(f"{line}: {getattr(error, 'message', '') or error}")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_sentences_exist(page: Path, cli: Any):
    for span in spans(page):
        if not span.startswith("haori "):
            continue
        command, words = find(cli, shlex.split(span)[1:])
        known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, span


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_flags_in_sentences_exist(page: Path, cli: Any):
    def flags(command: Any) -> set[str]:
        own = {option for parameter in command.params for option in parameter.opts}
        return own.union(*(flags(child) for child in getattr(command, "commands", {}).values()))

    known = flags(cli) | {"--help"}
    assert {span.split()[0] for span in spans(page) if span.startswith("--")} <= known


def keys(schema: dict[str, Any], prefix: str = "") -> set[str]:
    found: set[str] = set()
    if "oneOf" in schema:  # one for each task
        return found.union(*(keys(schema["$defs"][part["$ref"].rpartition("/")[2]]) for part in schema["oneOf"]))
    for name, field in schema["properties"].items():
        found.add(prefix + name)
        for option in (field, *field.get("anyOf", []), *field.get("oneOf", [])):
            if "$ref" in option:
                inner = recipe_schema()["$defs"][option["$ref"].rpartition("/")[2]]
                found |= keys(inner, f"{prefix}{name}.")
    return found


@lru_cache(maxsize=1)
def recipe_keys() -> frozenset[str]:
    return frozenset(keys(recipe_schema()))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_recipe_keys_exist(page: Path):
    known = recipe_keys()
    given = re.findall(r"--set ([a-z\d_.]+)=", page.read_text("utf-8"))
    spoken = [span.partition("=")[0] for span in spans(page) if span.split(".")[0] in SECTIONS and "." in span]
    spoken = [key for key in spoken if re.fullmatch(r"[\w.]+", key) and not key.endswith(".json")]
    assert {*given, *spoken} <= known


def test_both_readmes_hold_the_same_commands_and_one_place_for_the_demo():
    english, japanese = READMES
    assert commands(english) == commands(japanese) != []
    assert sorted(s for s in spans(english) if s.startswith(("haori ", "make "))) == sorted(
        s for s in spans(japanese) if s.startswith(("haori ", "make "))
    )
    python = [[block for block in blocks(page) if block.language == "python"] for page in READMES]
    assert python[0] == python[1] != []
    for page in READMES:
        assert re.findall(r"<!-- demo:(\w+) -->", page.read_text("utf-8")) == ["begin", "end"]


def test_the_readme_names_every_command(cli: Any):
    text = READMES[0].read_text("utf-8")
    for name, command in cli.commands.items():
        assert f"`haori {name}" in text
        inside = getattr(command, "commands", {})
        row = next(line for line in text.splitlines() if line.startswith("|") and f"`haori {name}" in line)
        assert all(child in row for child in inside), row


def test_make_targets_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M))
    for page in PAGES:
        used = {span.split()[1] for span in spans(page) if span.startswith("make ")}
        used |= set(re.findall(r"^make (\w+)$", "\n".join(block.text for block in blocks(page)), re.M))
        assert used <= targets, page


def test_the_recipe_reference_is_up_to_date():
    tool = ROOT / "tools" / "write_recipe_reference.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], check=False).returncode == 0, (
        "docs/guide/recipe.md is old: run tools/write_recipe_reference.py"
    )


def test_the_calls_of_the_training_api_are_up_to_date():
    tool = ROOT / "tools" / "write_tinker_calls.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], check=False).returncode == 0, (
        "docs/guide/tinker.md is old: run tools/write_tinker_calls.py"
    )


def test_the_page_for_those_who_come_from_other_tools_is_up_to_date():
    tool = ROOT / "tools" / "write_coming_from.py"
    assert subprocess.run([sys.executable, str(tool), "--check"], check=False).returncode == 0, (
        "docs/guide/coming-from.md is old: run tools/write_coming_from.py"
    )


def test_recipes_in_the_documentation_are_recipes():
    import yaml

    found = [block.text for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert found
    for text in found:
        recipe_from(yaml.safe_load(text.replace("2e-4", "0.0002")))


def test_exit_codes_are_those_of_the_errors():
    classes = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {found.exit_code for found in classes if issubclass(found, errors.HaoriError)}
    for page, heading in zip(READMES, ("Exit codes", "終了コード"), strict=True):
        listed = [int(code) for row in table(page, heading) for code in row[0].split(", ")]
        assert listed == [0, *sorted(codes), 130, 143]


def resolved(rows: int, parameters: float, *overrides: str) -> Any:
    from tests.training_samples import resolve_all

    recipe = recipe_from({"name": "a", "base": "b", "data": {"path": "c"}}, overrides)
    return resolve_all(recipe, [50] * rows, int(parameters), ("fp32", ""))[0]


def steps_of(heading: str) -> Iterator[tuple[float, float]]:
    """Yield (just inside the row's limit, value) from a table of `under N | value` rows."""
    limit = 1.0
    for what, value in table(ROOT / "docs/guide/choosing-settings.md", heading):
        if what != "more":
            number = re.search(r"under ([\d,.]+)( billion)?", what)
            assert number is not None
            limit = float(number[1].replace(",", "")) * (1e9 if number[2] else 1)
        yield (limit - 1 if what != "more" else limit), float(value)


FACTORS = "Learning rate by method"
METHOD_EXAMPLES = (
    ["method.kind=full"],
    ["method.kind=head"],
    ["method.init=pissa"],
    ["method.kind=adalora"],
    ["method.lr_ratio=16"],
    ["method.kind=peft", "method.type=IA3"],
)


def test_every_kind_of_method_is_in_the_guide():
    from haori.core.methods import METHODS

    rows = table(ROOT / "docs/guide/choosing-settings.md", "Method")
    assert [row[0].strip("`") for row in rows] == list(METHODS)


def test_automatic_choices_are_those_of_the_guide():
    for rows, rank in steps_of("Rank"):
        method = resolved(int(rows), 1e9).method
        assert (method.rank, method.alpha) == (rank, 2 * rank)
    for parameters, lr in steps_of("Learning rate"):
        assert resolved(100, parameters).optimizer.lr == lr
    factors = {what: factor for what, factor, _ in table(ROOT / "docs/guide/choosing-settings.md", FACTORS)}
    assert len(factors) == len(METHOD_EXAMPLES)
    for (what, factor), overrides in zip(factors.items(), METHOD_EXAMPLES, strict=True):
        over, _, under = factor.partition("/")
        lr = resolved(100, 0.1e9).optimizer.lr * int(over) / int(under or 1)
        assert resolved(100, 0.1e9, *overrides).optimizer.lr == pytest.approx(lr), what
    for rows, epochs in steps_of("Epochs"):
        assert resolved(int(rows), 1e9).training.epochs == epochs
    assert [resolved(rows, 1e9).training.batch_tokens for rows in (40, 400, 4000)] == [200, 500, 1600]
    assert resolved(100, 1e9).training.micro_batch_tokens == 2048
    assert [resolved(rows, 1e9).training.evaluations_per_epoch for rows in (100, 1000, 9000, 90000)] == [1, 2, 2, 4]


def test_presets_for_pictures_are_those_of_the_guide():
    from haori.tasks.text_to_image.choices import PRESETS

    for page, heading in (("pictures.md", "Settings"), ("pictures.ja.md", "設定")):
        rows = table(ROOT / "docs/guide" / page, heading)
        given = {row[0].strip("`"): tuple(row[1:5]) for row in rows if row[0].startswith("`")}
        assert given == {
            name: (f"{preset.rank}", f"{preset.alpha:g}", f"{preset.alpha / preset.rank:g}", f"{preset.seen:,}")
            for name, preset in PRESETS.items()
        }


def test_the_pages_on_pictures_hold_the_same_code_and_settings():
    english, japanese = (ROOT / "docs/guide" / name for name in ("pictures.md", "pictures.ja.md"))
    assert commands(english) == commands(japanese) != []
    form = r"[a-z_]+\.[a-z_]+(=.*)?|--?[a-z].*|haori .*|\w+Pipeline"
    spoken = [{span for span in spans(page) if re.fullmatch(form, span)} for page in (english, japanese)]
    assert spoken[0] == spoken[1] != set()


def test_limits_of_the_proof_are_those_of_the_guide():
    from haori.library.proof import checks, merging

    shares = {name.strip("`"): float(share) for name, share, _ in table(ROOT / "docs/guide/proof.md", "Limits")}
    assert shares == {"reload": checks._SHARE, "repeat": checks._SHARE, "merge": merging._SHARE}


YOUR_DATA = ROOT / "docs/guide/your-data.md"
EXAMPLES = re.findall(r"^### ([\w-]+)\n\n```json\n(.*?)^```$", YOUR_DATA.read_text("utf-8"), re.M | re.S)


@pytest.mark.parametrize(("name", "row"), EXAMPLES, ids=[name for name, _ in EXAMPLES])
def test_example_rows_are_of_the_format_they_stand_under(name: str, row: str, tmp_path: Path):
    from haori.data import read_conversations

    path = tmp_path / "rows.jsonl"
    path.write_text(row, encoding="utf-8")
    rows, report = read_conversations(TextSection(path=str(path)))
    assert (report.format, len(rows), report.notes) == (name, 1, ())


def test_every_row_format_has_an_example():
    formats = recipe_schema()["$defs"]["TextSection"]["properties"]["format"]["enum"]
    assert {name for name, _ in EXAMPLES} == set(formats) - {"auto"}


def test_error_messages_are_those_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from haori.data import read_conversations

    monkeypatch.chdir(tmp_path)
    shown = next(block.text for block in blocks(YOUR_DATA) if block.language == "text").splitlines()
    good = '{"prompt": "Who?", "completion": "Me."}'
    rows = {
        2: '{"prompt": "x", "completion": 3}',
        7: '{"messages": [{"role": "usr", "content": "a"}, {"role": "assistant", "content": "b"}]}',
        9: '{"prompt": "Where is my invoice?", "completion": "Under Billing"',
    }
    for line in shown:
        number = int(line.split(":")[1])
        first = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
        text = [first if number == 7 else good] * (number - 1) + [rows[number]]
        Path("tickets.jsonl").write_text("\n".join(text), encoding="utf-8")
        with pytest.raises(errors.DataError) as caught:
            read_conversations(TextSection(path="tickets.jsonl"))
        assert str(caught.value).startswith(line.removesuffix("..."))


TROUBLES = ROOT / "docs/guide/troubleshooting.md"


def troubles() -> list[list[str]]:
    """Return the rows of all tables of the page: symptom, cause, command."""
    lines = [line for line in TROUBLES.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines if not line.startswith("| you see")]


def said_in_the_code() -> str:
    """Return all text in the code, each string on a line of its own, with formatted parts as a gap."""
    found: list[str] = []
    for path in (ROOT / "src/haori").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_said_in_the_code():
    text = said_in_the_code()
    quoted = [words for row in troubles() for words in re.findall(r'(?<!`)"([^"]+)"(?!: )', row[0])]
    assert len(quoted) >= 30
    assert [words for words in quoted if words not in text] == []


def test_the_troubleshooting_page_gives_a_way_out_of_each_trouble():
    rows = troubles()
    assert len(rows) >= 40
    assert [row for row in rows if len(row) != 3 or not all(row)] == []


def test_commands_in_tables_of_the_guide_parse(cli: Any):
    for page in (TROUBLES, ROOT / "docs/guide/coming-from.md"):
        for span in spans(page):
            if span.startswith("haori "):
                command, words = find(cli, shlex.split(span)[1:])
                try:
                    command.make_context(command.name, words) if words else None  # without any it is only spoken of
                except Exception as error:
                    pytest.fail(f"{span}: {getattr(error, 'message', '') or error}")


def test_the_experiment_on_initialisation_holds():
    code = next(block for block in blocks(ROOT / "docs/guide/initialisation.md") if block.language == "python")
    exec(compile(code.text, "initialisation.md", "exec"), {"__name__": "guide"})


def test_the_layers_are_those_of_the_import_contract():
    packages = {path.parent.name for path in (ROOT / "src/haori").glob("*/__init__.py")}
    drawn = next(block.text for block in blocks(ROOT / "docs/architecture.md") if "core  " in block.text)
    levels = [set(re.findall(r"\w+", line.partition("   ")[0])) & packages for line in drawn.splitlines()]
    assert set().union(*levels) == packages
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"][0]
    order = [set(re.findall(r"\w+", layer)) & packages for layer in contract["layers"]]
    assert [level for level in order if level] == levels


def test_the_modules_on_the_way_of_data_exist():
    drawn = next(block.text for block in blocks(ROOT / "docs/architecture.md") if "my.jsonl" in block.text)
    for line in drawn.splitlines():
        package = ""
        for word in line[:44].partition("->")[0].replace(",", " ").split():
            package, _, module = word.rpartition("/") if "/" in word else (package, "", word)
            assert not package or (ROOT / "src/haori" / package / f"{module}.py").is_file(), word


def test_the_documentation_tells_nothing_about_this_machine():
    for page in PAGES:
        text = page.read_text("utf-8")
        assert not re.search(r"/(home|root|tmp|work|Users)/", text), page
        assert not re.search(r"TODO|FIXME|XXX", text), page


def test_the_speed_in_the_readmes_is_that_of_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "train_speed"))
    chart = importlib.import_module("chart")
    result = json.loads((ROOT / "benchmarks" / "train_speed" / "results.json").read_text())
    for name, block in chart.sentences(result).items():
        assert f"{chart.BEGIN}{block}{chart.END}" in (ROOT / name).read_text(encoding="utf-8")
