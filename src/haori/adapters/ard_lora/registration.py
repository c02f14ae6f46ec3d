"""Makes ARD-LoRA known to PEFT, which has no hook for methods from outside.

PEFT looks a method up by the `PeftType` of its configuration, an enumeration that it closes. Adding a member in the
way `enum` itself does works on Python 3.11 to 3.13; the rest is PEFT's own registration.
"""

from typing import Any

from haori.adapters.ard_lora.config import PEFT_TYPE, ArdLoraConfig
from haori.adapters.ard_lora.tuner import ArdLoraModel

__all__ = ["register"]


def register() -> None:
    """Add `ARD_LORA` to PEFT's methods; a second call changes nothing."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType, register_peft_method

    if PEFT_TYPE not in PeftType.__members__:
        _add_member(PeftType, PEFT_TYPE)
    if PEFT_TYPE not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=PEFT_TYPE.lower(), config_cls=ArdLoraConfig, model_cls=ArdLoraModel, prefix=ArdLoraModel.prefix
        )


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member whose value is its name to an enumeration of strings."""
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(enumeration.__members__)
    type.__setattr__(enumeration, name, member)  # EnumType's own refuses
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
