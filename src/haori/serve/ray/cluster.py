"""Starts Ray on this machine, or joins a cluster that runs: always with a token, for whoever reaches Ray runs code.

A Ray of our own is bound to loopback, has no dashboard, sends no usage figures, keeps its files in a private folder
that goes with it, and ends with this process however that ends.
"""

import ctypes
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from haori.core.errors import InputError, MissingExtraError, UnavailableError

__all__ = ["joined", "require_ray"]

_OBJECT_STORE_BYTES = 100 << 20  # messages are small; the least that Ray takes is 75 MiB
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # the name is history: with 0, Ray takes the loopback address
_LOCAL = {
    **_LOOPBACK,
    "RAY_AUTH_MODE": "token",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # their requests would otherwise wait for the timeout
    "RAY_agent_register_timeout_ms": "120000",  # on a busy machine its processes start slowly
}
_EVERYWHERE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # A replica that computes on the same processors is not gone because it takes more than 0.1 s to say how busy it is.
    "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",
}
_PORTS = ("port", "ray-client-server-port", "dashboard-agent-grpc-port", "dashboard-agent-listen-port",
          "metrics-export-port", "runtime-env-agent-port")  # fmt: skip
_QUIET = ("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0", "--include-dashboard=false",
          "--include-log-monitor=false", "--no-monitor", "--disable-usage-stats")  # fmt: skip
_STARTED = "Ray runtime started"
_END_S = 30.0
_REACH_S = 5.0


def require_ray() -> None:
    """Check that Ray is installed; imports nothing.

    Raises:
        MissingExtraError: It is not.
    """
    from importlib.util import find_spec

    if find_spec("ray") is None:
        raise MissingExtraError("Serving on Ray needs Ray Serve; install it with `pip install 'haori[ray]'`.")


@contextmanager
def joined(address: str | None, replicas: int) -> Iterator[list[int]]:
    """Join the Ray at `address`, or start one; yield the processors of each of its machines.

    One that was started ends with the context.

    Args:
        address: Host and port of a cluster, or `auto`; None starts Ray on this machine.
        replicas: How many there may be, for a Ray of our own to have room for.

    Raises:
        InputError: A cluster was given without its token.
        UnavailableError: Ray cannot be started or reached.
    """
    os.environ.update(_EVERYWHERE)
    with ExitStack() as stack:
        if address is None:
            address = stack.enter_context(_own(max(os.cpu_count() or 1, replicas)))
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            _reach(address)
        ray = stack.enter_context(_connected(address))
        yield [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]


@contextmanager
def _own(cpus: int) -> Iterator[str]:
    """Start Ray; yield its address."""
    with TemporaryDirectory(prefix="haori-ray-", ignore_cleanup_errors=True) as folder:  # for this user only
        token = Path(folder, "token")
        token.write_text(secrets.token_hex(32))
        os.environ.pop("RAY_AUTH_TOKEN", None)  # it would count before the file
        os.environ.update({**_LOCAL, "RAY_AUTH_TOKEN_PATH": str(token)})
        ports = dict(zip(_PORTS, _free_ports(len(_PORTS)), strict=True))
        arguments = [
            f"--num-cpus={cpus}", f"--object-store-memory={_OBJECT_STORE_BYTES}", f"--temp-dir={folder}/ray",
            *_QUIET, *(f"--{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "haori.serve.ray.head", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,  # Ctrl-C is for the server, which ends it in good order
        )  # fmt: skip
        try:
            _await_start(process)
            yield f"127.0.0.1:{ports['port']}"
        finally:
            _end(process)


def _await_start(process: "subprocess.Popen[str]") -> None:
    """Read what Ray says until it has started; what comes after fits the pipe.

    Raises:
        UnavailableError: It ended first.
    """
    said: list[str] = []
    assert process.stdout is not None
    for line in process.stdout:
        if _STARTED in line:
            return
        said += [line.strip()] if line.strip() else []
    raise UnavailableError(f"Ray could not be started on this machine: {said[-1] if said else 'it said nothing.'}")


def _end(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def _free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody listens on now, all different."""
    with ExitStack() as stack:
        taken = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]


def _reach(address: str) -> None:
    """Find out at once whether there is anything at an address; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # `auto`, or an address of another kind that Ray knows
    try:
        with socket.create_connection((host, int(port)), _REACH_S) as found:
            loopback = ip_address(found.getpeername()[0]).is_loopback
    except (OSError, OverflowError) as error:
        raise UnavailableError(f"Ray cannot be reached at {address!r}: {error}.") from None
    if loopback:
        os.environ.update(_LOOPBACK)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Join a Ray that runs."""
    import ray
    import ray.serve
    from ray.exceptions import AuthenticationError

    for name in ("ray", "ray.serve"):  # they would write between our lines on standard error
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with _kept(signal.SIGTERM):
            ray.init(address=address, log_to_driver=False, logging_level=logging.CRITICAL)
    except Exception as error:  # noqa: BLE001 - Ray raises plain exceptions of many kinds here
        if isinstance(error, AuthenticationError) or "token" in str(error).lower():
            raise InputError(
                f"The Ray at {address!r} asks for its token; give it with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
            ) from None
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise UnavailableError(
            f"Ray cannot be reached at {address!r}: {reason.rstrip('.')}; check the address, and the token "
            "(RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH)."
        ) from None
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def _kept(number: signal.Signals) -> Iterator[None]:
    """Put back what the process does on a signal: Ray has it abort three seconds after SIGTERM, while it drains.

    Done in C, because Python lets only the main thread.
    """
    sigaction = ctypes.CDLL(None).sigaction
    before = ctypes.create_string_buffer(1024)  # more than the structure takes anywhere
    sigaction(int(number), None, before)
    try:
        yield
    finally:
        sigaction(int(number), before, None)
