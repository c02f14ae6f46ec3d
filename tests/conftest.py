"""Fixtures: a private HAORI_HOME for every test and a tiny real Llama with a real tokenizer."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: threads that wait for one another only cost time
if "CC" not in os.environ and shutil.which("cc"):  # kernels take seconds to compile, and every test has a new home
    os.environ["CC"] = str(Path(__file__).with_name("caching_compiler.sh"))
    os.environ["HAORI_TESTS_COMPILED"] = str(Path(__file__).parents[1] / ".pytest_cache" / "compiled")

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

from tests.alone import pytest_runtest_protocol  # noqa: F401 - pytest looks for it here
from tests.postgres import postgres  # noqa: F401 - a fixture

# A busy machine makes the first examples slow; what is tested is not how fast they are made.
hypothesis_settings.register_profile("haori", deadline=None, suppress_health_check=[HealthCheck.too_slow])
hypothesis_settings.load_profile("haori")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts background jobs, and processes inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(autouse=True)
def haori_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    from haori.core.settings import settings

    home = tmp_path / "haori-home"
    monkeypatch.setenv("HAORI_HOME", str(home))
    settings.cache_clear()
    yield home
    settings.cache_clear()


def build_tiny_base(folder: Path, seed: int = 0, layers: int = 2) -> Path:
    """Write a Llama of 2 layers, D 64, with a byte-level BPE tokenizer and a ChatML template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    corpus = ["Is this review positive or negative?", "user assistant system answer the question"] * 20
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    raw.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=CHATML,
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_base_folder: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_base_folder)
