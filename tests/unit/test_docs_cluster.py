"""The recipes for clusters hold only what SkyPilot's and dstack's references know, and run a command that there is."""

import re
import shlex
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

FOLDER = Path(__file__).parents[2] / "docs" / "recipes" / "cluster"
_Size = Annotated[str, Field(pattern=r"^\d+(GB)?(\.\.(\d+(GB)?)?)?$")]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class SkyRecovery(Strict):
    strategy: Literal["FAILOVER", "EAGER_NEXT_REGION"]
    max_restarts_on_errors: int = 0


class SkyResources(Strict):
    """https://docs.skypilot.co/en/latest/reference/yaml-spec.html, of it what the recipe may use."""

    infra: str
    accelerators: Annotated[str, Field(pattern=r"^[\w-]+:\d+$")]
    cpus: Annotated[str, Field(pattern=r"^\d+\+?$")]
    memory: Annotated[str, Field(pattern=r"^\d+\+?$")]
    use_spot: bool
    job_recovery: SkyRecovery


class SkyTask(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
    resources: SkyResources
    volumes: dict[Annotated[str, Field(pattern=r"^/")], str]
    envs: dict[str, str]
    secrets: dict[str, None]  # null: taken from --secret, and refused without
    setup: str
    run: str


class DstackResources(Strict):
    """https://dstack.ai/docs/reference/dstack.yml/task, of it what the recipe may use."""

    cpu: _Size
    memory: _Size
    gpu: _Size


class DstackRetry(Strict):
    on_events: list[Literal["no-capacity", "interruption", "error"]]
    duration: Annotated[str, Field(pattern=r"^\d+[smhdw]$")]


class DstackTask(Strict):
    type: Literal["task"]
    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{1,40}$")]
    python: Literal["3.11", "3.12", "3.13"]
    env: list[Annotated[str, Field(pattern=r"^[A-Z_]+(=.+)?$")]]
    commands: list[str]
    resources: DstackResources
    volumes: list[Annotated[str, Field(pattern=r"^[a-z0-9-]+:/\w+$")]]
    spot_policy: Literal["spot", "on-demand", "auto"]
    stop_duration: Annotated[str, Field(pattern=r"^\d+[smh]$")]
    retry: DstackRetry


class DstackVolume(Strict):
    type: Literal["volume"]
    name: str
    backend: str
    region: str
    size: _Size


FILES = {"worker.sky.yaml": SkyTask, "worker.dstack.yml": DstackTask, "haori-jobs.volume.dstack.yml": DstackVolume}


def read(name: str) -> dict:
    return yaml.safe_load((FOLDER / name).read_text("utf-8"))


def test_every_file_is_checked():
    assert {path.name for path in FOLDER.iterdir() if path.suffix in {".yaml", ".yml"}} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_keys_and_values_are_those_of_the_references(name: str):
    FILES[name].model_validate(read(name))
    with pytest.raises(ValidationError):
        FILES[name].model_validate({**read(name), "retries": 3})


def test_the_commands_there_are_and_use_what_the_task_has():
    from haori.cli.app import app
    from haori.core.settings import Settings

    sky, dstack = read("worker.sky.yaml"), read("worker.dstack.yml")
    cli = typer.main.get_command(app)
    for line in [*sky["run"].splitlines(), *dstack["commands"]]:
        if "haori worker" not in line:
            continue
        words = shlex.split(line.removeprefix("exec "))
        cli.commands[words[1]].make_context(words[1], words[2:])
    given = {*sky["envs"], *sky["secrets"], *(one.partition("=")[0] for one in dstack["env"])}
    assert {name.removeprefix("HAORI_").lower() for name in given} <= set(Settings.model_fields)
    assert sky["envs"]["HAORI_HOME"] in sky["volumes"]
    assert dstack["volumes"] == [f"{read('haori-jobs.volume.dstack.yml')['name']}:/haori"]
    extra = re.search(r"haori\[(\w+)\]", sky["setup"])[1]
    assert f"\n{extra} = [" in (FOLDER.parents[2] / "pyproject.toml").read_text("utf-8")
