"""Small real adapters in thousands: kohya files in a models/Lora tree, and PEFT folders as the library stores them."""

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

STYLES = ("ink", "smile", "film", "neon", "paper", "garden", "winter", "chrome", "pastel", "gothic")
SUBJECTS = ("portrait", "city", "forest", "robot", "castle", "cat", "dress", "spaceship", "river", "mask")
FOLDERS = 100
_MODULE = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
_LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def name_of(number: int) -> str:
    """Return what the adapter of a number is called."""
    return f"{STYLES[number % 10]}-{SUBJECTS[number // 10 % 10]}-{number:05d}"


def folder_of(number: int) -> str:
    """Return the folder of the tree that it lies in."""
    return f"folder-{number % FOLDERS:02d}"


def safetensors(tensors: dict[str, tuple[list[int], bytes]], metadata: dict[str, str]) -> bytes:
    """Return a safetensors file of 32-bit tensors."""
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for key, (shape, data) in tensors.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + len(data)]}
        position += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, data in tensors.values())


def values(numbers: random.Random, count: int) -> bytes:
    """Return 32-bit numbers from -1 to 1."""
    return struct.pack(f"<{count}f", *(numbers.uniform(-1, 1) for _ in range(count)))


def write_tree(root: Path, count: int) -> None:
    """Write a models/Lora tree: kohya files of one module of rank 2, every second with a sidecar."""
    for number in range(count):
        numbers = random.Random(number)
        tensors = {
            f"{_MODULE}.alpha": ([], struct.pack("<f", 2.0)),
            f"{_MODULE}.lora_down.weight": ([2, 768], values(numbers, 64) * 24),
            f"{_MODULE}.lora_up.weight": ([16, 2], values(numbers, 32)),
        }
        metadata = {
            "ss_output_name": f"out_{number}", "ss_base_model_version": "sd_v1", "ss_network_dim": "2",
            "modelspec.tags": f"{STYLES[number % 10]}, {SUBJECTS[number // 10 % 10]}",
        }  # fmt: skip
        path = root / folder_of(number) / f"{name_of(number)}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(safetensors(tensors, metadata))
        if number % 2:
            said = {
                "description": f"Made of {number} pictures", "activation text": f"tok{number}, {STYLES[number % 10]}",
                "sd version": "SD1", "preferred weight": 0.8,
            }  # fmt: skip
            path.with_suffix(".json").write_text(json.dumps(said))


def write_stored(root: Path, count: int) -> None:
    """Write the folders of a library with so many proved adapters, without its index."""
    from haori.core.records import BaseReference, DataReference, Evaluation, Fingerprint, Metric, Verification
    from haori.library import adapter_id, draft_card, inspect_adapter
    from haori.library.cards import CARD_NAME
    from haori.library.stored_cards import stored_folder

    prints = Fingerprint(architecture="LlamaForCausalLM", structure="sha256:1", weights="sha256:2")
    base = BaseReference(name="bench-base", source="hub:org/bench-base", fingerprint=prints, licence="Apache-2.0")
    data = DataReference(source="rows.jsonl", hash="sha256:3", format="messages", rows={"train": 100}, licence="MIT")
    proof = Verification(passed=True, checks=(), dtype="fp32", time="2026-01-01T00:00:00+00:00")
    for number, folder in _peft_folders(root.parent / "made", count):
        figure = Evaluation(data=data, metrics={"accuracy": Metric(value=number % 1000 / 1000)}, time=proof.time)
        card = draft_card(
            folder, base, origin="trained", verification=proof, licence="Apache-2.0", data=(data,),
            evaluations=(figure,), tags=(STYLES[number % 10],), description=f"Knows {SUBJECTS[number // 10 % 10]}",
        ).with_fields(names=(f"{name_of(number)}@1",))  # fmt: skip
        kept = stored_folder(root, adapter_id(inspect_adapter(folder)))
        kept.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(kept)
        (kept / CARD_NAME).write_text(card.model_dump_json(indent=2) + "\n")


def _peft_folders(place: Path, count: int) -> Iterator[tuple[int, Path]]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    for number in range(count):
        numbers = random.Random(number)
        folder = place / str(number)
        folder.mkdir(parents=True)
        tensors = {
            f"{_LAYER}.lora_A.weight": ([2, 64], values(numbers, 128)),
            f"{_LAYER}.lora_B.weight": ([64, 2], values(numbers, 128)),
        }
        (folder / "adapter_model.safetensors").write_bytes(safetensors(tensors, {"format": "pt"}))
        (folder / "adapter_config.json").write_text(json.dumps(config))
        yield number, folder
