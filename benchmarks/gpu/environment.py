"""Prints the card, its driver, versions of what matters, and which packages of the project are missing here."""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import commit, processor

VERSIONS = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "triton", "bitsandbytes")
NEEDED = (
    "accelerate", "datasets", "gguf", "huggingface_hub", "license_expression", "matplotlib", "peft", "platformdirs",
    "pydantic", "pydantic_settings", "pytest", "rich", "sacrebleu", "safetensors", "sklearn", "sqlalchemy",
    "tokenizers", "torch", "transformers", "typer", "yaml",
)  # fmt: skip


def version_of(name: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def main() -> None:
    """Print it as one JSON object."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    found = {
        "commit": commit(), "python": sys.version.split()[0], "processor": processor(), "missing": missing,
        **{name: version_of(name) for name in VERSIONS},
    }  # fmt: skip
    if "torch" not in missing:
        import torch

        found |= {"cuda": torch.version.cuda, "gpu": None}
        if torch.cuda.is_available():
            card = torch.cuda.get_device_properties(0)
            found |= {
                "gpu": card.name, "memory_bytes": card.total_memory, "capability": f"{card.major}.{card.minor}",
                "bf16": torch.cuda.is_bf16_supported(),
            }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
