"""Addresses of the training API that this server does not answer, each with the reason and what to do instead.

They are refused with 400, which the client shows at once; it would try again for minutes after 501.
"""

import re

__all__ = ["reason_of"]

_REASONS = {
    r"PUT sessions/[^/]+/project": "There are no projects here: what a key makes belongs to its account. Make a key "
    "of another account by `haori keys create NAME --owner ACCOUNT`.",
    r"GET sessions/[^/]+/trace_export": "No trace of a session is kept; the server's access log has a line for each "
    "request.",
    r"GET training_runs/[^/]+/checkpoints/.+/archive": "There are no archives of checkpoints here; export weights with "
    "save_weights_external of a newer tinker, or `tinker checkpoint download`.",
    r"POST sessions/search": "Sessions are not searched here; list them with list_sessions, and look at each with "
    "get_session.",
    r"GET audit": "There is no audit log here; the server's access log has a line for each request.",
    r"GET billing/usage/events": "Nothing is billed here; `haori keys list` shows what keys may use.",
    r"GET billing/usage/checkpoints/current": "Nothing is billed here; list_user_checkpoints tells the size of each "
    "checkpoint.",
    r"POST create_custom_loss": "Losses of your own are not run on this server; forward_backward_custom runs them in "
    "the client.",
    r"POST retrieve_futures": "Answers are given one by one here, by retrieve_future.",
    r"POST join_sampling_session": "Samplers are not joined here; clients number their samples themselves.",
    r"POST auth/token": "There are no tokens here; send the API key itself as X-API-Key.",
    r"GET auth/apikey/me": "Nothing is told of a key here; `haori keys list` shows the keys on the server's machine.",
}


def reason_of(method: str, address: str) -> str | None:
    """Return why a request is refused; None for an address that nothing is known of.

    Args:
        method: Such as GET.
        address: After `/api/v1/`.
    """
    asked = f"{method} {address}"
    return next((reason for form, reason in _REASONS.items() if re.fullmatch(form, asked)), None)
