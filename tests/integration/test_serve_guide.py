"""The calls of the serving guide, made as written against a real server; only bases are tiny and the port is free."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from haori.bases import find_base
from haori.library import import_adapter
from tests.classifier_adapters import stock_classifier
from tests.encoder_models import build_tiny_encoder
from tests.integration.test_serve_embeddings import serving
from tests.library_samples import stock_lora
from tests.tool_bases import build_tool_base

PAGE = (Path(__file__).parents[2] / "docs/guide/serving.md").read_text("utf-8")
ADDRESS = "http://127.0.0.1:8000"


def section(title: str, language: str) -> str:
    text = re.split(rf"^## {title}$", PAGE, flags=re.M)[1].split("\n## ")[0]
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S))


def run(words: list[str], text: str, home: Path) -> str:
    done = subprocess.run(
        words, input=text, capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "HAORI_HOME": str(home)},
    )  # fmt: skip
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def desk(tiny_base_folder, tmp_path_factory):
    """A home with two versions of `support` and a `poet`, and the address of a server over them."""
    from haori.core.settings import settings

    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HAORI_HOME", str(home))
        settings.cache_clear()
        base = find_base(str(tiny_base_folder))
        for seed, name in enumerate(("support", "support", "poet"), start=1):
            folder = stock_lora(tiny_base_folder, tmp_path_factory.mktemp("adapter"), seed=seed)
            import_adapter(folder, base, name=name)
        with serving(home / "server.log", "--base", tiny_base_folder) as (_, url, _command):
            yield home, url
    settings.cache_clear()


@pytest.mark.parametrize(
    ("title", "said"),
    {
        "Call": [r'"content": ?"', r'"max_model_len": ?256'],
        "Names, strengths, blends": [r'"model": ?"support:0.4\+poet:0.6"', r'"content": ?"'],
        "Adapters while the server runs": ["'helpdesk' added successfully", "'helpdesk' removed successfully"],
        "Scores": [r'"token_logprobs": ?\[null, ?-'],
        "Structured output": [r'"content": ?"\{.*\\"city\\"'],
        "Metrics and logs": [rf"^{name}" for name in re.findall(r"`((?:vllm|haori):\w+)`", PAGE)],
    }.items(),
)
def test_the_calls_of_the_guide(title, said, desk):
    home, url = desk
    printed = run(["bash", "-e"], section(title, "shell").replace("curl -s", "curl -sS").replace(ADDRESS, url), home)
    assert '"error":' not in printed
    for pattern in said:
        assert re.search(pattern, printed, re.M), pattern


def test_the_python_of_the_guide(desk):
    home, url = desk
    assert run([sys.executable], section("Call", "python").replace(ADDRESS, url), home).strip()


def test_the_responses_of_the_guide(desk):
    home, url = desk
    assert run([sys.executable], section("Responses", "python").replace(ADDRESS, url), home).strip()


def test_the_tools_of_the_guide(tmp_path, haori_home):
    folder = build_tool_base(tmp_path / "base", "hermes")
    import_adapter(stock_lora(folder, tmp_path / "adapter"), find_base(str(folder)), name="support")
    with serving(tmp_path / "log", "--base", folder) as (_, url, _command):
        printed = run([sys.executable], section("Tools", "python").replace(ADDRESS, url), haori_home)
    assert re.match(r"order_status \{'order': ['\"].{0,32}['\"]\}\n", printed), printed


def test_the_commands_of_the_guide(desk, tmp_path):
    home = shutil.copytree(desk[0], tmp_path / "home")  # a server asks for keys as soon as there are any
    lines = f"{section('New versions', 'shell')}\n{section('Keys', 'shell')}".split("\n")
    lines = [line for line in lines if line]
    assert len(lines) == 8
    for line in lines:
        run(["bash", "-e"], line.replace("haori ", f"{sys.executable} -m haori.cli.app ", 1), home)


def test_the_embeddings_of_the_guide(tmp_path):
    folder = build_tiny_encoder(tmp_path / "all-minilm-l6-v2")
    with serving(tmp_path / "log", "--base", folder) as (_, url, _command):
        code = section("Embeddings", "python").replace(ADDRESS, url)
        assert run([sys.executable], code, tmp_path).split()[:2] == ["2", "32"]


def test_the_classification_of_the_guide(tmp_path, haori_home):
    folder = build_tiny_encoder(tmp_path / "all-minilm-l6-v2")
    mood = stock_classifier(folder, tmp_path / "mood", labels=2, target_modules=["query", "value"])
    import_adapter(mood, find_base(str(folder)), name="mood")
    with serving(tmp_path / "log", "--base", folder) as (_, url, _command):
        code = section("Classification", "python").replace(ADDRESS, url)
        lines = run([sys.executable], code, haori_home).splitlines()
    for index, line in enumerate(lines):
        assert re.fullmatch(rf"{index} label [01] \[0\.\d+, 0\.\d+\] 2", line), line
    assert len(lines) == 2
