"""`haori library add tinker://...`: a checkpoint of the training API becomes an adapter of the library."""

__all__ = ["add_trained"]


def add_trained(path: str, *, base: str | None, name: str | None, licence: str | None) -> str:
    """Prove a checkpoint of this machine's server, store it with its lineage, and return its name with version.

    Args:
        path: `tinker://RUN/weights/NAME` or `tinker://RUN/sampler_weights/NAME`.
        base: What it was trained over; by default what it says itself.
        name: In the library; by default what the run asked for, or the checkpoint's.
        licence: The terms of whoever trained it; by default they follow from what it was made from.
    """
    from haori.bases import find_base
    from haori.cli.console import results
    from haori.jobs.sessions.adding import add_checkpoint, base_of_checkpoint, name_of_checkpoint
    from haori.jobs.sessions.paths import local_checkpoint
    from haori.library import ancestors, effective_licence, licence_line

    folder = local_checkpoint(path)
    found = base_of_checkpoint(folder) if base is None else find_base(base)
    stored = add_checkpoint(folder, found, name=name or name_of_checkpoint(folder), licence=licence)
    assert stored.card.verification is not None
    checks = len(stored.card.verification.checks)
    results().print(f"[bold green]{stored.name}[/] is in the library: {checks} checks passed.")
    results().print(licence_line(effective_licence(stored.card, ancestors(stored))), markup=False, soft_wrap=True)
    return stored.name
