"""How the learning rate that suits a method compares with the one that suits plain LoRA, by rules of thumb."""

from haori.core.methods import AdaloraMethod, FullMethod, HeadMethod, LoraMethod, LowRankMethod, Method, PeftMethod

__all__ = ["rate_factor"]

_FEW_NUMBERS = frozenset({"IA3", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA"})


def rate_factor(method: Method) -> tuple[float, str]:
    """Return the factor on LoRA's rate, and why, to be put behind the reason for that rate; 1 and nothing for LoRA."""
    if isinstance(method, FullMethod):
        return 0.1, "; a tenth of it, since every weight moves"
    if isinstance(method, HeadMethod):
        return 4.0, "; four times it, since a head alone is small and starts from nothing"
    if isinstance(method, AdaloraMethod):
        return 10.0, "; ten times it, since P and Q start small and L at zero: a step moves W little"
    if isinstance(method, LoraMethod) and method.init in {"pissa", "olora"}:
        return 0.2, f"; a fifth of it, since the factors of {method.init} start large"
    if isinstance(method, PeftMethod) and method.type.upper() in _FEW_NUMBERS:
        return 10.0, f"; ten times it, since {method.type.upper()} trains few numbers"
    if isinstance(method, LowRankMethod) and method.lr_ratio != 1.0:
        return method.lr_ratio**-0.5, f"; divided by sqrt({method.lr_ratio:g}), so that A and B straddle it"
    return 1.0, ""
