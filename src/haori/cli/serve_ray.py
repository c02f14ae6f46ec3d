"""The options of `haori serve --ray`, and what they open."""

from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from haori.cli.serve_native import tell_hidden

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.cli.serve_native import NativeChoice
    from haori.serve.ray import Scale
    from haori.server import AccessLog, Backend, ServerSettings

__all__ = ["RayAddress", "RayChoice", "RayReplicas", "UseRay", "open_on_ray", "ray_choice"]

UseRay = Annotated[bool, typer.Option("--ray", help="Let Ray Serve run the native engine on several replicas.")]
RayReplicas = Annotated[
    str | None, typer.Option(help="Replicas on Ray: a number, or the fewest and the most as 1:4. By default 2.")
]
RayAddress = Annotated[
    str | None, typer.Option(help="A Ray cluster to use, such as 10.0.0.1:6379; without one, Ray is started here.")
]

_DEFAULT_REPLICAS = "2"


class RayChoice(NamedTuple):
    """How many replicas, and on which cluster; None starts Ray on this machine."""

    scale: "Scale"
    address: str | None


def ray_choice(ray: bool, replicas: str | None, address: str | None, engine: str) -> RayChoice | None:
    """Check the options; None when Ray is not asked for.

    Raises:
        InputError: They do not go together, or the number of replicas is none.
        MissingExtraError: Ray is not installed.
    """
    from haori.core.errors import InputError

    if not ray:
        if replicas is not None or address is not None:
            raise InputError("--replicas and --ray-address are for --ray; add that.")
        return None
    if engine != "native":
        raise InputError(f"--ray runs replicas of the native engine, not of {engine!r}; leave one of the two out.")
    from haori.serve.ray import parse_scale, require_ray

    scale = parse_scale(replicas or _DEFAULT_REPLICAS)
    require_ray()
    return RayChoice(scale, address)


def open_on_ray(
    base: "Base", settings: "ServerSettings", native: "NativeChoice", log: "AccessLog", choice: RayChoice
) -> "Backend":
    """Start the replicas; runs beside the server, which says meanwhile that it is loading.

    Raises:
        HaoriError: They cannot be started, the base is an encoder, or a pinned adapter is not there.
    """
    from haori.core.errors import InputError
    from haori.core.settings import settings as places
    from haori.library import Library
    from haori.serve import AdapterDirectory, EngineLimits, is_encoder
    from haori.serve.ray import ReplicaPlan, open_ray_engine
    from haori.server import Backend

    if is_encoder(base):
        raise InputError(f"The base {base.name!r} is an encoder, and --ray serves text only; leave --ray out.")
    directory = AdapterDirectory(Library(), base.reference(), base_names=[base.name], roots=native.roots)
    tell_hidden(directory, log)
    directory.check_adapters(native.pinned)
    limits = EngineLimits(
        base.context_length, running=settings.max_batch, waiting=native.waiting, adapter_bytes=native.adapter_bytes
    )
    home = places()
    plan = ReplicaPlan(
        base, limits, native.weights, native.cache_bytes, native.roots, home.home, home.workspace, native.pinned
    )
    return Backend(open_ray_engine(plan, choice.scale, choice.address, say=log.event), directory)
