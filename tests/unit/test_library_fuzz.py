"""Thousands of damaged files: each is read rightly or refused in a sentence, at once and in little memory."""

import json
import random
import resource
import struct
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

from haori.core.errors import HaoriError
from haori.library.formats.registry import read_updates
from haori.library.validation import validate_tensors

_GGUF = Path(__file__).parents[1] / "fixtures/formats/gguf"
_CONFIG = json.loads((_GGUF / "llama_config.json").read_text())
_SECONDS, _BYTES = 2.0, 200e6


def _tensors(kind: str) -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(3)

    def random_of(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=numbers).half()

    if kind == "peft":
        name = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
        return {
            name.format(layer, which, side): random_of(2, 8) if side == "A" else random_of(12, 2)
            for layer in range(3)
            for which in "qkv"
            for side in "AB"
        }
    unet = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn{}_to_{}"
    modules = [(unet.format(1, "q"), 8), (unet.format(2, "k"), 768), (unet.format(2, "v"), 768)]
    tensors = {}
    for name, inputs in modules:
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
        if kind == "kohya":
            tensors |= {f"{name}.lora_down.weight": random_of(2, inputs), f"{name}.lora_up.weight": random_of(8, 2)}
        else:
            for half in "12":
                tensors |= {f"{name}.hada_w{half}_a": random_of(8, 2), f"{name}.hada_w{half}_b": random_of(2, inputs)}
    return tensors


class Mutation:
    """One damage to a safetensors file, by a seeded generator; `name` says which for the count."""

    def __init__(self, numbers: random.Random, raw: bytes) -> None:
        self.numbers = numbers
        length = struct.unpack("<Q", raw[:8])[0]
        self.header, self.data = raw[8 : 8 + length], raw[8 + length :]
        self.length: int | None = None

    def file(self) -> tuple[str, bytes]:
        name = self.numbers.choice([key for key in dir(self) if key.startswith("do_")])
        getattr(self, name)()
        length = len(self.header) if self.length is None else self.length
        return name, struct.pack("<Q", length) + self.header + self.data

    def _flipped(self, raw: bytes, most: int) -> bytes:
        changed = bytearray(raw)
        for _ in range(self.numbers.randint(1, most)):
            changed[self.numbers.randrange(len(changed))] ^= 1 << self.numbers.randrange(8)
        return bytes(changed)

    def _json(self) -> dict:
        return json.loads(self.header)

    def _entry(self, document: dict) -> dict:
        return document[self.numbers.choice([key for key in document if key != "__metadata__"])]

    def do_header_bits(self) -> None:
        self.header = self._flipped(self.header, 3)

    def do_data_bits(self) -> None:
        self.data = self._flipped(self.data, 4)

    def do_data_values(self) -> None:
        at = self.numbers.randrange(0, len(self.data) - 4, 2)
        value = self.numbers.choice([b"\x00\x7e", b"\x00\x7c", b"\xff\x7b", b"\x00\x00", b"\x01\x3c"])
        self.data = self.data[:at] + value + self.data[at + 2 :]

    def do_length(self) -> None:
        self.length = self.numbers.choice(
            [0, 1, 7, len(self.header) - 1, len(self.header) + 3, 1 << 24, 1 << 31, (1 << 64) - 1]
        )

    def do_truncation(self) -> None:
        kept = self.numbers.randrange(len(self.header) + len(self.data))
        self.length = len(self.header)
        self.header, self.data = self.header[:kept], self.data[: max(0, kept - len(self.header))]

    def do_appended(self) -> None:
        self.data += self.numbers.randbytes(self.numbers.randint(1, 40))

    def do_offsets(self) -> None:
        document = self._json()
        entry = self._entry(document)
        start, end = entry["data_offsets"]
        entry["data_offsets"] = self.numbers.choice(
            [
                [start + 1, end + 1],
                [end, start],
                [start, end - 2],
                [0, end - start],
                [-start - 1, end],
                [start],
                [start, end, end],
                [float(start), end],
                [str(start), end],
                [1 << 62, (1 << 62) + end - start],
                [start, 1 << 63],
                None,
                [True, end],
            ]
        )
        self.header = json.dumps(document).encode()

    def do_dtype(self) -> None:
        document = self._json()
        kinds = ["F32", "BF16", "I16", "F64", "f16", "", "F4", "F8_E8M0", None, 16, ["F16"], "C64", "U16", "BOOL"]
        self._entry(document)["dtype"] = self.numbers.choice(kinds)
        self.header = json.dumps(document).encode()

    def do_shape(self) -> None:
        document = self._json()
        entry = self._entry(document)
        shape = entry["shape"]
        entry["shape"] = self.numbers.choice(
            [
                shape[::-1],
                [*shape, 1],
                [1, *shape],
                shape[:-1],
                [int(np.prod(shape))],
                [-1, *shape],
                [1 << 40, 1 << 40],
                [0],
                [2.0, 8],
                ["2", 8],
                None,
                "2",
                [[2], 8],
                [10**30],
                [1] * 40 + shape,
                [True, *shape],
            ]
        )
        self.header = json.dumps(document).encode()

    def do_twice(self) -> None:
        document = self._json()
        key = self.numbers.choice(list(document))
        text = self.header.rstrip().rstrip(b"}")
        spelled = json.dumps(key).encode()
        if self.numbers.random() < 0.4:
            spelled = b'"\\u00%02x' % ord(key[0]) + spelled[2:]
        self.header = text + b"," + spelled + b":" + json.dumps(document[key]).encode() + b"}"

    def do_names(self) -> None:
        document = self._json()
        key = self.numbers.choice(list(document))
        change = self.numbers.choice(
            ["", "." + key, key[:-1], key[1:], key.upper(), key.replace(".", ".."), "é" * 300, key + "\0"]
        )
        self.header = json.dumps({(change if k == key else k): v for k, v in document.items()}).encode()

    def do_missing(self) -> None:
        document = self._json()
        del document[self.numbers.choice(list(document))]
        self.header = json.dumps(document).encode()

    def do_swapped(self) -> None:
        document = self._json()
        first, second = self.numbers.sample(list(document), 2)
        document[first], document[second] = document[second], document[first]
        self.header = json.dumps(document).encode()

    def do_metadata(self) -> None:
        document = self._json()
        document["__metadata__"] = self.numbers.choice(
            [
                {},
                {"a": "b"},
                {"a": 1},
                [],
                "text",
                None,
                {"a": None},
                {"ss_network_dim": "nan"},
                {"": ""},
                {"a": {"b": "c"}},
                {"modelspec.architecture": "x" * 5000},
                {"ss_network_args": "{"},
                {"lora_adapter_metadata": "[[["},
            ]
        )
        self.header = json.dumps(document).encode()

    def do_json(self) -> None:
        self.header = self.numbers.choice(
            [
                b"{" * 5000,
                b"[" * 100_000,
                b"{}",
                b"[]",
                b"null",
                b'{"a":NaN}',
                b'{"a":' + b"9" * 6000 + b"}",
                b"\xff\xfe{}",
                b"{" + self.header + b"}",
                self.header + self.header,
                self.header.replace(b":", b"="),
                b" " + self.header,
                self.header.replace(b"F16", b"F\xff6"),
                self.header + b" " * 64,
                self.header.decode().encode("utf-16"),
            ]
        )


class Watch:
    """Holds each file to its limits: a HaoriError or an answer, within two seconds and 200 MB."""

    def __init__(self) -> None:
        self.slowest = 0.0
        self.kinds: Counter[tuple[str, bool]] = Counter()
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def read(self, path: Path, kind: str, config: dict | None = None):
        start = time.monotonic()
        try:
            validate_tensors(path)
            found = read_updates(path, config)
        except HaoriError as error:
            text = str(error)
            assert text.strip().endswith((".", "`", "?")) and 20 < len(text) < 1500, text
            found = None
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.kinds[kind, found is not None] += 1
        return found

    def check(self) -> None:
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory) * 1024
        assert self.slowest < _SECONDS, f"the slowest took {self.slowest:.1f} s"
        assert grown < _BYTES, f"memory grew by {grown / 1e6:.0f} MB"


def _values(factors) -> Counter[bytes]:
    """Return each tensor's values as one key, in whatever order its rows are."""
    return Counter(np.sort(factor.detach().double().flatten().numpy()).tobytes() for factor in factors)


def _used(updates) -> Counter[bytes]:
    return _values([factor for update in updates.modules.values() for factor in update.factors.values()])


@pytest.mark.parametrize(("kind", "count"), [("peft", 800), ("kohya", 600), ("lycoris", 600)])
def test_damaged_safetensors_are_read_rightly_or_refused(kind, count, tmp_path):
    raw = save(_tensors(kind), {"format": "pt"})
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw)
    watch = Watch()
    assert watch.read(path, "whole") is not None
    numbers = random.Random(20_260 + count)
    for _ in range(count):
        name, changed = Mutation(numbers, raw).file()
        path.write_bytes(changed)
        found = watch.read(path, name)
        if found is None:
            continue
        held = load_file(path)  # the library of the format reads the same, and all of it is used
        factors = [tensor for key, tensor in held.items() if not key.endswith(".alpha")]
        assert _used(found) + _values(found.extra.values()) == _values(factors), name
    watch.check()
    accepted = {name for (name, whole), _ in watch.kinds.items() if whole}
    refused = {name for (name, whole), _ in watch.kinds.items() if not whole}
    assert {"do_data_bits", "do_metadata"} <= accepted and not accepted & {"do_twice", "do_truncation", "do_appended"}
    assert refused >= {"do_twice", "do_offsets", "do_dtype", "do_shape", "do_length", "do_json", "do_data_values"}


def _damaged_gguf(numbers: random.Random, raw: bytes) -> tuple[str, bytes]:
    changed = bytearray(raw)
    end = raw.rindex(b".lora_b") + 60  # of the header, about
    kind = numbers.choice(
        ["header bits", "data bits", "counts", "lengths", "types", "truncation", "appended", "letters"]
    )
    if kind == "header bits":
        for _ in range(numbers.randint(1, 4)):
            changed[numbers.randrange(end)] ^= 1 << numbers.randrange(8)
    elif kind == "data bits":
        changed[numbers.randrange(end + 64, len(raw))] ^= 1 << numbers.randrange(8)
    elif kind == "counts":
        at, size = numbers.choice([(4, 4), (8, 8), (16, 8)])
        changed[at : at + size] = numbers.choice([0, 1, 13, 1 << 20, (1 << 31) - 1, (1 << 8 * size) - 1]).to_bytes(
            size, "little"
        )
    elif kind == "lengths":
        at = numbers.choice([at for at in range(24, end) if raw[at : at + 3] in (b"gen", b"ada", b"blk")]) - 8
        changed[at : at + 8] = numbers.choice([0, 3, 1 << 16, 1 << 33, (1 << 64) - 1]).to_bytes(8, "little")
    elif kind == "types":
        at = numbers.randrange(24, end)
        changed[at : at + 4] = numbers.choice([4, 8, 9, 12, 13, 30, 1 << 31]).to_bytes(4, "little")
    elif kind == "truncation":
        del changed[numbers.randrange(len(raw)) :]
    elif kind == "appended":
        changed += numbers.randbytes(numbers.randint(33, 90))
    else:
        at = numbers.choice([at for at in range(24, end) if raw[at : at + 4] == b"blk."])
        changed[at + numbers.randrange(24)] = numbers.randrange(32, 127)
    return kind, bytes(changed)


def test_damaged_gguf_files_are_read_rightly_or_refused(tmp_path):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    path = tmp_path / "a.gguf"
    watch = Watch()
    numbers = random.Random(77)
    for name in ("llama_f32", "llama_q8_0"):
        raw = (_GGUF / f"{name}.gguf").read_bytes()
        path.write_bytes(raw)
        assert watch.read(path, "whole", _CONFIG) is not None
        for _ in range(250):
            kind, changed = _damaged_gguf(numbers, raw)
            path.write_bytes(changed)
            found = watch.read(path, kind, _CONFIG)
            if found is None:
                continue
            held = [torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))) for t in GGUFReader(path).tensors]
            assert _used(found) == _values(held), kind
    watch.check()
    accepted = {name for (name, whole), _ in watch.kinds.items() if whole}
    assert "data bits" in accepted and not accepted & {"truncation", "appended"}
    assert sum(n for (_, whole), n in watch.kinds.items() if not whole) > 300
