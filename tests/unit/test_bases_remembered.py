"""What loading a base has shown is remembered, and only for these very files."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from haori.bases import find_base, load_tokenizer
from haori.bases.remembered import recall, remember
from haori.core.records import Record
from haori.core.settings import settings


class Fact(Record):
    number: int


@pytest.fixture
def folder(tiny_base_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_base_folder, tmp_path / "base"))


def remembered(topic: str) -> list[Path]:
    return sorted((settings().cache / "remembered").glob(f"{topic}-*.json"))


def test_a_record_is_good_for_one_topic_and_for_these_files_only(folder: Path) -> None:
    base = find_base(str(folder))
    assert recall("fact", base, Fact) is None
    remember("fact", base, Fact(number=3))
    assert recall("fact", find_base(str(folder)), Fact) == Fact(number=3)
    assert recall("other", base, Fact) is None
    document = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**document, "eos_token_id": 7}))
    assert recall("fact", find_base(str(folder)), Fact) is None


@pytest.mark.parametrize("text", ["", "{", '{"number": "x"}', '{"number": 3, "more": 1}'])
def test_a_damaged_record_counts_as_unknown(folder: Path, text: str) -> None:
    base = find_base(str(folder))
    remember("fact", base, Fact(number=3))
    remembered("fact")[0].write_text(text)
    assert recall("fact", base, Fact) is None


def test_where_nothing_can_be_written_nothing_is_remembered(folder: Path) -> None:
    base = find_base(str(folder))
    settings().cache.parent.mkdir(parents=True, exist_ok=True)
    settings().cache.write_text("in the way")
    remember("fact", base, Fact(number=3))
    assert recall("fact", base, Fact) is None


def test_a_tokenizer_loaded_by_its_remembered_class_is_the_same_and_imports_less(folder: Path) -> None:
    base = find_base(str(folder))
    first = load_tokenizer(base)
    assert len(remembered("tokenizer")) == 1
    code = (
        "import json, sys\nfrom haori.bases import find_base, load_tokenizer\n"
        "t = load_tokenizer(find_base(sys.argv[1]))\n"
        "turn = [{'role': 'user', 'content': 'Is this negative?'}]\n"
        "print(json.dumps([type(t).__name__, t.backend_tokenizer.to_str(), t.special_tokens_map, t.model_max_length,\n"
        "    t.apply_chat_template(turn, tokenize=False, add_generation_prompt=True), t('a question').input_ids]))\n"
        "print(json.dumps('transformers.models.auto.tokenization_auto' in sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    found, slowly = map(json.loads, done.stdout.splitlines())
    turn = [{"role": "user", "content": "Is this negative?"}]
    prompt = first.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    assert found == [
        type(first).__name__, first.backend_tokenizer.to_str(), first.special_tokens_map, first.model_max_length,
        prompt, first("a question").input_ids,
    ]  # fmt: skip
    assert not slowly


@pytest.mark.parametrize(
    "record", [{"module": "os", "name": "system"}, {"module": "transformers.nothing", "name": "X"},
               {"module": "transformers.utils.logging", "name": "get_verbosity"}],
)  # fmt: skip
def test_a_remembered_class_that_is_no_tokenizer_of_transformers_is_not_used(folder: Path, record: dict) -> None:
    base = find_base(str(folder))
    wanted = load_tokenizer(base)
    place = remembered("tokenizer")[0]
    place.write_text(json.dumps(record))
    assert load_tokenizer(base).get_vocab() == wanted.get_vocab()
    assert json.loads(place.read_text()) != record
