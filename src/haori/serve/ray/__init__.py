"""The text engine on several replicas, in processes and on machines that Ray looks after. Knows nothing about HTTP.

Importing this package is light; each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from haori.serve.ray.cluster import require_ray
    from haori.serve.ray.engine import RayEngine, RayStatus
    from haori.serve.ray.plan import ReplicaPlan
    from haori.serve.ray.scale import Scale, parse_scale
    from haori.serve.ray.starting import open_ray_engine

_HOMES = {
    "cluster": ("require_ray",),
    "engine": ("RayEngine", "RayStatus"),
    "plan": ("ReplicaPlan",),
    "scale": ("Scale", "parse_scale"),
    "starting": ("open_ray_engine",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["RayEngine", "RayStatus", "ReplicaPlan", "Scale", "open_ray_engine", "parse_scale", "require_ray"]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
