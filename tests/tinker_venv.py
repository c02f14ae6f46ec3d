"""The real clients of the training API, for tests.

They cap transformers below what Haori needs, so they never come into the environment of Haori.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.client_folder import environment_of, finish, installed


class TinkerClients:
    """Runs programs that import `tinker` and `tinker_cookbook`."""

    def __init__(self, folder):
        self.folder = folder

    def start(self, script, *arguments, **environment):
        """Start a script; `environment` adds variables."""
        of_clients = {"TINKER_TELEMETRY": "0", "TINKER_API_KEY": "tml-local"}
        variables = environment_of(self.folder, **(of_clients | environment))
        return subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, env=variables,
        )  # fmt: skip

    def run(self, script, *arguments, timeout_s=60, **environment):
        """Run a script to its end and return what it wrote; one that fails fails the test."""
        return finish(self.start(script, *arguments, **environment), timeout_s)


@pytest.fixture(scope="session")
def tinker_clients():
    """The clients; the first test that asks for them installs them."""
    return TinkerClients(installed("tinker", Path(__file__).with_name("tinker-requirements.txt")))
