"""Fetches a base from the Hugging Face hub: safetensors, configuration and tokenizer only, never code or pickles.

The hub's own cache, token and endpoint settings hold. Without a network, what the cache holds is used.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from haori.bases.folder import read_json
from haori.bases.pipeline import PIPELINE_INDEX, needed_parts
from haori.core.errors import BaseError
from haori.core.settings import settings
from haori.core.storage import explain_os_errors

__all__ = ["fetch_from_hub", "is_hub_id"]

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
_WANTED = [
    "config.json", PIPELINE_INDEX, "generation_config.json", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "spiece.model",
    "sentencepiece*.model", "chat_template*", "README.md", "LICENSE*", "modules.json", "sentence_bert_config.json",
    "1_Pooling/config.json",
]  # fmt: skip
# Weights without a variant, whole or in shards, and the variant of the others.
_PLAIN = re.compile(r"(model|diffusion_pytorch_model)(-\d{5}-of-\d{5})?\.safetensors")
_VARIANT = re.compile(r"\.([a-z0-9_]+?)(?:-\d{5}-of-\d{5})?\.safetensors$")
_REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5", "*.so", "*.sh"]


def is_hub_id(spec: str) -> bool:
    """Say whether `spec` has the form `organisation/name`."""
    return _ID.fullmatch(spec) is not None and ".." not in spec and "--" not in spec


def fetch_from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of the hub model `repo` and the commit it holds, fetching what is missing.

    Of a diffusers pipeline the parts are fetched that its index names, each with one set of weights.

    Args:
        repo: `organisation/name`.
        revision: Branch, tag or commit; None is the main branch.

    Raises:
        BaseError: Offline and not cached, not found, gated, or a pipeline with a part without safetensors.
        StorageError: The disk is full or not writable.
    """
    folder = _fetched(repo, revision, _WANTED)
    if (folder / PIPELINE_INDEX).is_file() and not (folder / "config.json").is_file():
        wanted = _of_pipeline(repo, folder)
        if wanted:
            _fetched(repo, folder.name, wanted)
    return folder, folder.name


def _of_pipeline(repo: str, folder: Path) -> list[str]:
    """Return the files of the parts that a pipeline's index names; none where only what is cached can be used."""
    from huggingface_hub import HfApi

    if _switch() is not None:
        return []
    index = read_json(folder / PIPELINE_INDEX)
    with _explained(repo, None):
        files = HfApi().list_repo_files(repo, revision=folder.name)
    wanted = []
    for name in needed_parts(index):
        inside = [file for file in files if file.rpartition("/")[0] == name]
        wanted += [file for file in inside if file.endswith((".json", ".txt", ".model", ".jinja"))]
        weights = [file for file in inside if file.endswith(".safetensors")]
        plain = [file for file in weights if _PLAIN.fullmatch(file.rpartition("/")[2])]
        variants = {found[1] for file in weights if (found := _VARIANT.search(file))}
        if weights and not plain and len(variants) > 1:
            weights = [file for file in weights if f".{min(variants, key=lambda v: (v != 'fp16', v))}." in file]
        if not weights and any(file.endswith((".bin", ".ckpt", ".pt")) for file in inside):
            raise BaseError(
                f"The hub model {repo!r} holds {name!r} only as a pickle, and pickles can run code; look for a copy of "
                "it with safetensors."
            )
        wanted += plain or weights
    return wanted


def _fetched(repo: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with _explained(repo, revision):
        return Path(
            snapshot_download(
                repo, revision=revision, allow_patterns=patterns, ignore_patterns=_REFUSED,
                local_files_only=_switch() is not None,
            )
        )  # fmt: skip


def _switch() -> str | None:
    """Return the name of the setting that keeps the hub from being asked, if one does."""
    from huggingface_hub import constants

    on = (("HAORI_OFFLINE", settings().offline), ("HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE))
    return next((name for name, is_on in on if is_on), None)


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Turn what the hub's client raises into one sentence."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision!r}" if revision else ""
    try:
        with explain_os_errors(Path(constants.HF_HUB_CACHE)):
            yield
    except errors.GatedRepoError as error:
        raise BaseError(
            f"The hub model {repo!r} is gated: accept its terms on its page and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BaseError(
            f"There is no folder {repo!r}, and the hub has no model of that id (or it is private; log in with "
            "`hf auth login`); check the spelling."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise BaseError(
            f"The hub model {repo!r} has no revision {revision!r}; name a branch, tag or commit."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        switch = _switch()
        why = f"{switch} is set" if switch else "the hub cannot be reached"
        remedy = f"unset {switch}" if switch else "check the network"
        raise BaseError(
            f"The hub model {repo!r}{at} is not on this machine and {why}; {remedy}, or use a local folder, a GGUF "
            "file or the built-in base 'smollm2-135m-instruct'."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
        raise BaseError(f"The hub model {repo!r}{at} could not be fetched: {reason}.") from error
