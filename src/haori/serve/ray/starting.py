"""Opens a base on replicas: joins Ray, deploys the replicas, and returns the engine in front of them."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from haori.core.errors import HaoriError
from haori.serve.ray.cluster import joined, require_ray
from haori.serve.ray.engine import RayEngine
from haori.serve.ray.plan import ReplicaFacts, ReplicaPlan
from haori.serve.ray.scale import Scale, cpus_per_replica

__all__ = ["open_ray_engine"]

_HEALTH_PERIOD_S = 10.0
_HEALTH_TIMEOUT_S = 60.0  # a replica that reads a long prompt on a busy machine is not ill
_FINISH_S = 600.0  # a replica that is no longer needed finishes the answers it has begun
_OUR_ERROR = re.compile(r"haori\.core\.errors\.\w+: (.+)")


def open_ray_engine(
    plan: ReplicaPlan, scale: Scale, address: str | None, *, say: Callable[[str], None] = lambda _: None
) -> RayEngine:
    """Start the replicas and the engine in front of them; returns when they answer.

    Args:
        plan: What each replica opens.
        scale: How many there are.
        address: A Ray cluster; None starts Ray on this machine.
        say: Takes sentences for people.

    Raises:
        MissingExtraError: Ray is not installed.
        InputError: The cluster is too small, or its token was not given.
        UnavailableError: Ray cannot be started or reached.
        HaoriError: A replica could not open the base.
    """
    from haori.bases import load_tokenizer

    require_ray()
    return RayEngine(plan, load_tokenizer(plan.base), scale, lambda: _deployed(plan, scale, address), say)


@contextmanager
def _deployed(plan: ReplicaPlan, scale: Scale, address: str | None) -> Iterator[tuple[Any, ReplicaFacts]]:
    """Deploy the replicas; yield Ray Serve's handle to them, and what they say of the model."""
    with joined(address, scale.most) as nodes:
        serve: Any = import_module("ray.serve")
        cpus = cpus_per_replica(nodes, scale)
        quiet = {"log_level": "ERROR", "enable_access_log": False}
        serve.start(proxy_location="Disabled", logging_config=quiet)
        name = f"haori-{plan.base.id}"
        try:
            handle = _run(serve, _application(serve, plan, scale, cpus, quiet), name)
            yield handle, handle.describe.remote().result()
        finally:
            if address is None:
                serve.shutdown()
            else:
                serve.delete(name)


def _application(serve: Any, plan: ReplicaPlan, scale: Scale, cpus: int, logging: dict[str, Any]) -> Any:
    from haori.serve.ray.replica import EngineReplica

    running = plan.limits.running
    size: dict[str, Any] = {"num_replicas": scale.fewest}
    if scale.most > scale.fewest:
        bounds = {"min_replicas": scale.fewest, "max_replicas": scale.most, "initial_replicas": scale.fewest}
        size = {"autoscaling_config": {**bounds, "target_ongoing_requests": running}}
    deployment: Any = serve.deployment(
        EngineReplica,
        name="engine",
        ray_actor_options={"num_cpus": cpus},  # torch is given so many threads
        # Beyond a full batch, so that the engine can choose the next in fair turn and never runs dry.
        max_ongoing_requests=2 * running,
        health_check_period_s=_HEALTH_PERIOD_S,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=_FINISH_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=1,
        logging_config=logging,
        **size,
    )
    return deployment.bind(plan)


def _run(serve: Any, application: Any, name: str) -> Any:
    """Deploy and wait; a replica's failure becomes the sentence it failed with."""
    try:
        return serve.run(application, name=name, route_prefix=None)
    except RuntimeError as error:
        found = _OUR_ERROR.findall(str(error))
        reason = found[-1] if found else str(error).strip().splitlines()[-1]
        raise HaoriError(f"A replica could not begin: {reason}") from None
