"""Fetches a base from the Hugging Face hub: safetensors, configuration and tokenizer only, never code or pickles.

The hub's own cache, token and endpoint settings hold. Without a network, what the cache holds is used.
"""

import re
from pathlib import Path

from haori.bases.pipeline import PIPELINE_INDEX
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
_REFUSED = ["*.py", "*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt", "*.msgpack", "*.h5", "*.so", "*.sh"]


def is_hub_id(spec: str) -> bool:
    """Say whether `spec` has the form `organisation/name`."""
    return _ID.fullmatch(spec) is not None and ".." not in spec and "--" not in spec


def fetch_from_hub(repo: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder of the hub model `repo` and the commit it holds, fetching what is missing.

    Args:
        repo: `organisation/name`.
        revision: Branch, tag or commit; None is the main branch.

    Raises:
        BaseError: Offline and not cached, not found, gated, or a pipeline of several components.
        StorageError: The disk is full or not writable.
    """
    from huggingface_hub import constants, errors, snapshot_download

    switch = next(
        (n for n, on in (("HAORI_OFFLINE", settings().offline), ("HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)) if on),
        None,
    )
    at = f" at revision {revision!r}" if revision else ""
    try:
        with explain_os_errors(Path(constants.HF_HUB_CACHE)):
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=_WANTED, ignore_patterns=_REFUSED,
                    local_files_only=switch is not None,
                )
            )  # fmt: skip
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
        why = f"{switch} is set" if switch else "the hub cannot be reached"
        remedy = f"unset {switch}" if switch else "check the network"
        raise BaseError(
            f"The hub model {repo!r}{at} is not on this machine and {why}; {remedy}, or use a local folder, a GGUF "
            "file or the built-in base 'smollm2-135m-instruct'."
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
        raise BaseError(f"The hub model {repo!r}{at} could not be fetched: {reason}.") from error
    if (folder / PIPELINE_INDEX).is_file() and not (folder / "config.json").is_file():
        raise BaseError(
            f"The hub model {repo!r} is a diffusers pipeline of several components, which is not fetched from here; "
            f"fetch it with `hf download {repo} --local-dir FOLDER --exclude '*.bin'` and name the folder."
        )
    return folder, folder.name
