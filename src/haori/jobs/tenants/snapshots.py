"""A session's adapter as the serving engine takes it: a copy, so that training goes on while requests use it."""

from uuid import uuid4

import torch

from haori.jobs.tenants.tenant import Tenant
from haori.serve.adapters.reading import AdapterWeights, ModuleUpdate

__all__ = ["snapshot"]


@torch.no_grad()
def snapshot(tenant: Tenant) -> AdapterWeights:
    """Return a copy of the factors as they are now; its id is new, so no cache takes it for an earlier one.

    An adapter that has not been trained yet has no effect, and is as good to sample from as any.
    """
    updates = {
        name: ModuleUpdate(pair.a.detach().cpu().clone(), (pair.b.detach() * pair.scale).cpu().T.contiguous())
        for name, pair in tenant.factors.items()
    }
    size = sum(part.nbytes for update in updates.values() for part in (update.a, update.b) if part is not None)
    return AdapterWeights(f"live:{uuid4().hex}", updates, {}, {}, size)
