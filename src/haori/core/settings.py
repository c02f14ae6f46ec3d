"""Where things live, and the few settings that belong to a machine rather than to a run.

Each setting is an environment variable `HAORI_<NAME>`.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import platformdirs
from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from haori.core.errors import InputError
from haori.core.user_path import user_path

__all__ = ["Settings", "settings"]


class Settings(BaseSettings):
    """Machine-wide settings, read from `HAORI_*` environment variables."""

    model_config = SettingsConfigDict(env_prefix="HAORI_", frozen=True, extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path(platformdirs.user_data_dir("haori", appauthor=False)),
        description="Folder that holds bases, the library and runs.",
    )
    workspace: Path | None = Field(
        default=None, description="Folder that holds the library and runs, where they are kept apart from home."
    )
    database: str | None = Field(
        default=None, description="Address of the service's database, such as postgresql://user@host/name."
    )
    prices: dict[str, float] = Field(
        default_factory=dict,
        description='Price of a million trained tokens by base, first match wins: {"smollm2*": 0.5, "*": 2}.',
    )
    currency: str = Field(default="USD", description="Currency of the prices.")
    slurm: dict[str, Any] = Field(
        default_factory=dict, description="What jobs ask of Slurm, by submitit's names: partition, time limit."
    )
    ray_job: dict[str, Any] = Field(
        default_factory=dict, description="What jobs reserve on Ray, by the names of its submit_job."
    )
    model_aliases: dict[str, str] = Field(
        default_factory=dict,
        description="Names that clients give, with the base that each means here, as JSON.",
    )
    webhook_hosts: tuple[str, ...] = Field(
        default=(), description="Patterns of the hosts that webhooks may be sent to, as JSON; none by default."
    )
    webhook_to_loopback: bool = Field(
        default=False, description="Let webhooks be sent to this machine itself, over http too; for tests."
    )
    offline: bool = Field(default=False, description="Never ask a model hub or package index.")
    native: bool = Field(default=True, description="Compile the C kernels for serving; false leaves all to torch.")

    allow_urls: bool = Field(default=False, description="Let adapters be fetched from any https URL.")
    download_limit_gb: float = Field(default=32.0, gt=0, description="Largest adapter that is fetched, in GB.")
    download_from_loopback: bool = Field(
        default=False, description="Let adapters be fetched from this machine itself, over http too; for tests."
    )
    civitai_endpoint: str = Field(default="https://civitai.com", description="Address of Civitai, or of a mirror.")

    @property
    def bases(self) -> Path:
        """Folder of registered base models."""
        return self.home / "bases"

    @property
    def library(self) -> Path:
        """Folder of adapters."""
        return (self.workspace or self.home) / "library"

    @property
    def runs(self) -> Path:
        """Folder of training runs."""
        return (self.workspace or self.home) / "runs"

    @property
    def database_file(self) -> Path:
        """File of the service's database, where none is given."""
        return (self.workspace or self.home) / "haori.db"

    @property
    def jobs(self) -> Path:
        """Folder of what jobs, uploaded files and training sessions keep outside the database."""
        return (self.workspace or self.home) / "jobs"

    @property
    def cache(self) -> Path:
        """Folder of things that can be made again."""
        return self.home / "cache"


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Return the settings of this process (`settings.cache_clear()` reads the environment again).

    Raises:
        InputError: An environment variable holds what it cannot.
    """
    try:
        found = Settings()
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        name = f"HAORI_{'_'.join(map(str, problem['loc'])).upper()}"
        rule = problem["msg"].replace("Input should", "it should", 1)
        raise InputError(f"The environment variable {name} cannot be {problem['input']!r}: {rule}.") from None
    folders = {"home": found.home, "workspace": found.workspace}
    return found.model_copy(
        update={name: user_path(path).absolute() for name, path in folders.items() if path is not None}
    )
