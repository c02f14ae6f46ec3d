"""Adapters from and to the Hugging Face hub, through `huggingface_hub`: its endpoint, cache, login and proxies hold.

A revision is pinned to its commit before anything is fetched, only the files of one adapter are, and pickles never.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from haori.bases.licence import front_matter, licence_of_folder
from haori.core.errors import DownloadError, FileFormatError
from haori.core.hashing import hash_file
from haori.core.safetensors_header import read_safetensors_header
from haori.core.settings import settings
from haori.core.storage import explain_os_errors
from haori.library.adapter_files import CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME
from haori.library.exchange.addresses import HubAddress
from haori.library.exchange.fetched import Fetched
from haori.library.exchange.requesting import Limits
from haori.library.model_cards.reading import read_model_card
from haori.library.stated import Stated

__all__ = ["fetch_from_hub", "push_to_hub"]

_BESIDE = (
    "README.md", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "chat_template.jinja", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "head.json",
)  # fmt: skip
_BESIDE_LIMIT_BYTES = 64 << 20
_DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"


def fetch_from_hub(address: HubAddress, limits: Limits) -> Fetched:
    """Fetch an adapter into the hub's cache: a PEFT folder, or the one LoRA file of a repository.

    Raises:
        DownloadError: Offline, not found, gated, too large, or not the content that the hub states.
        FileFormatError: There is no adapter in it, there are several, or there are only pickles.
    """
    from huggingface_hub import HfApi, snapshot_download

    with _explained(address):
        info = HfApi().model_info(address.repo, revision=address.revision, files_metadata=True)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    hashes = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
    weights, wanted = _choose(address, sizes)
    if (size := sum(sizes[name] for name in wanted)) > limits.size_bytes:
        raise DownloadError(
            f"'{address}' is {size / 1e9:,.1f} GB; at most {limits.size_bytes / 1e9:,.1f} GB are fetched."
        )
    commit = str(info.sha)
    with _explained(address), explain_os_errors(Path(_cache())):
        patterns = [name.replace("[", "[[]") for name in wanted]  # names, not patterns
        folder = Path(snapshot_download(address.repo, revision=commit, allow_patterns=patterns))
    path = folder / weights
    found = _check(address, path, hashes.get(weights))
    said = read_model_card(folder)
    table = front_matter(folder / "README.md")
    prompt = table.get("instance_prompt")
    place = path.parent if path.name == WEIGHTS_NAME and (path.parent / CONFIG_NAME).is_file() else path
    stated = Stated(
        licence=licence_of_folder(folder), tags=said.tags, stated_bases=said.bases,
        trigger_words=(" ".join(prompt.split())[:300],) if isinstance(prompt, str) and prompt.strip() else (),
        downloaded_from=str(HubAddress(address.repo, commit, address.file)),
    )  # fmt: skip
    called = address.repo.partition("/")[2] if address.file is None else Path(address.file).stem
    return Fetched(place, found, weights in hashes, called, stated)


def push_to_hub(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Upload an exported adapter as one commit, compare what the hub has then, and return the commit's address.

    Args:
        folder: What `haori library export` writes: files, no folders.
        repo: `OWNER/REPO`; made where it is not there.
        private: Make it private; one that is there and public is refused.
        message: The message of the commit.

    Raises:
        DownloadError: No login, no permission, or no network; the repository is public and was to be private; or the
            hub has something else than was sent.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    address = HubAddress(repo)
    with _explained(address, writes=True):
        api.create_repo(repo, repo_type="model", private=private, exist_ok=True)
        if private and api.model_info(repo).private is False:
            raise DownloadError(
                f"The repository {repo!r} is there already and public, so nothing was uploaded; give another name, or "
                "leave out --private."
            )
        files = sorted(path for path in folder.iterdir() if path.is_file())
        commit = api.create_commit(
            repo, [CommitOperationAdd(file.name, str(file)) for file in files], commit_message=message
        )
        info = api.model_info(repo, revision=commit.oid, files_metadata=True)
    there = {file.rfilename: file.lfs.sha256 if file.lfs is not None else None for file in info.siblings or ()}
    for file in files:
        if file.name not in there or there[file.name] not in {None, hash_file(file).removeprefix("sha256:")}:
            raise DownloadError(f"The hub has another {file.name!r} in {repo!r} than was uploaded; try again.")
    return str(commit.commit_url)


def _choose(address: HubAddress, sizes: Mapping[str, int]) -> tuple[str, list[str]]:
    """Return the name of the weight file, and of all files to fetch."""
    files = set(sizes)
    at = "" if address.file is None else f"{address.file}/"
    if address.file in files:
        weights = str(address.file)
        if not weights.endswith(".safetensors"):
            raise FileFormatError(f"'{address}' is no safetensors file; nothing else is fetched.")
        at = f"{weights.rpartition('/')[0]}/" if "/" in weights else ""
    else:
        inside = sorted(name for name in files if name.startswith(at) and "/" not in name[len(at) :])
        found = [name for name in inside if name.endswith(".safetensors")]
        preferred = [name for name in found if name[len(at) :] in {WEIGHTS_NAME, _DIFFUSERS_NAME}]
        if len(preferred or found) != 1:
            raise FileFormatError(_no_weights(address, files, preferred or found, at))
        weights = (preferred or found)[0]
    beside = [f"{at}{name}" for name in (CONFIG_NAME, *_BESIDE)] if weights.endswith(WEIGHTS_NAME) else []
    wanted = dict.fromkeys([weights, *beside, "README.md", "LICENSE", f"{at}README.md"])
    small = [name for name in wanted if name in files and (name == weights or sizes[name] <= _BESIDE_LIMIT_BYTES)]
    return weights, small


def _no_weights(address: HubAddress, files: set[str], found: list[str], at: str) -> str:
    if found:
        names = ", ".join(repr(name) for name in found[:8])
        return f"'{address}' has several LoRA files: {names}; choose one, as in hub:{address.repo}/{found[0]}."
    if f"{at}{PICKLE_NAME}" in files:
        return (
            f"'{address}' holds only the pickle {PICKLE_NAME!r}, which can run code and is not fetched; ask its author "
            "for safetensors."
        )
    below = sorted(name for name in files if name.endswith(".safetensors"))[:5]
    hint = f"; in its folders are {', '.join(map(repr, below))}, which can be chosen behind a slash" if below else ""
    return f"'{address}' holds no adapter: neither {WEIGHTS_NAME} nor one safetensors file{hint}."


def _check(address: HubAddress, path: Path, stated: str | None) -> str:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if stated is not None and found != stated:
        raise DownloadError(
            f"{path.name!r} of '{address}' is not what the hub states (sha256 {found} instead of {stated}); run "
            "`hf cache rm` for it and try again."
        )
    read_safetensors_header(path)
    return found


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


@contextmanager
def _explained(address: HubAddress, *, writes: bool = False) -> Iterator[None]:
    from huggingface_hub import constants, errors

    if settings().offline or constants.HF_HUB_OFFLINE:
        switch = "HAORI_OFFLINE" if settings().offline else "HF_HUB_OFFLINE"
        raise DownloadError(f"'{address}' needs the hub, and {switch} is set; unset it.")
    try:
        yield
    except errors.GatedRepoError as error:
        raise DownloadError(
            f"The hub model {address.repo!r} is gated: accept its terms on its page and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        remedy = "may not be written to with this login" if writes else "is not there, or private"
        raise DownloadError(
            f"The hub model {address.repo!r} {remedy}; check the spelling, or log in with `hf auth login`."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise DownloadError(f"The hub model {address.repo!r} has no revision {address.revision!r}.") from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = " Log in with `hf auth login`, or set HF_TOKEN." if status in {401, 403} or writes else ""
        raise DownloadError(f"The hub refused '{address}': {_first_line(error)}.{login}") from error
    except (OSError, RuntimeError, _httpx_error()) as error:
        raise DownloadError(f"The hub cannot be reached for '{address}': {_first_line(error)}.") from error


def _httpx_error() -> type[Exception]:
    import httpx2  # which huggingface_hub asks with

    found: type[Exception] = httpx2.HTTPError
    return found


def _first_line(error: BaseException) -> str:
    lines: Any = str(error).strip().splitlines() or [type(error).__name__]
    return str(lines[0]).rstrip(".:")[:300]
