"""The text engine on several replicas, in processes and on machines that Ray looks after. Knows nothing about HTTP.

Importing this package is light; each name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.serve.ray.cluster import require_ray
    from haori.serve.ray.engine import RayEngine
    from haori.serve.ray.plan import ReplicaPlan
    from haori.serve.ray.scale import Scale, parse_scale
    from haori.serve.ray.starting import open_ray_engine

__all__ = ["RayEngine", "ReplicaPlan", "Scale", "open_ray_engine", "parse_scale", "require_ray"]

__getattr__ = lazy_exports(
    __name__,
    {
        "cluster": ("require_ray",),
        "engine": ("RayEngine",),
        "plan": ("ReplicaPlan",),
        "scale": ("Scale", "parse_scale"),
        "starting": ("open_ray_engine",),
    },
)
