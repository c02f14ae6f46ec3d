"""ARD-LoRA (arXiv 2506.18267) as a method of PEFT: ranks learnt per layer and attention head.

    y_h = W_h x + (alpha / r0) B_h diag(g_h) A x          g_hi = clamp(r0 a_h - i + 1, 0, 1),  i = 1 .. 2 r0

a_h = softplus(rho_h) is learnt for every head h of every adapted module, from 1, which is rank r0, and is penalised.
A is shared by the heads of a module, so the gates can be multiplied into B (or A, see `heads`): what is computed
is always a plain LoRA. `docs/guide/methods/ard-lora.md` tells which parts are the paper's.

Importing this package makes `ARD_LORA` known to PEFT, which is needed before a stored adapter of it is loaded.
"""

from haori.adapters.ard_lora.config import ArdLoraConfig
from haori.adapters.ard_lora.conversion import to_lora
from haori.adapters.ard_lora.layer import ArdLoraLayer, Conv2d, Linear
from haori.adapters.ard_lora.method import check, insert
from haori.adapters.ard_lora.registration import register
from haori.adapters.ard_lora.training import ArdLoraBehaviour, behaviour
from haori.adapters.ard_lora.tuner import ArdLoraModel

__all__ = [
    "ArdLoraBehaviour",
    "ArdLoraConfig",
    "ArdLoraLayer",
    "ArdLoraModel",
    "Conv2d",
    "Linear",
    "behaviour",
    "check",
    "insert",
    "register",
    "to_lora",
]

register()
