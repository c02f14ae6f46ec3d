"""What an ARD-LoRA adapter is, as PEFT stores it in adapter_config.json."""

from dataclasses import dataclass, field

from peft import PeftConfig

from haori.core.errors import InputError

__all__ = ["PEFT_TYPE", "ArdLoraConfig"]

PEFT_TYPE = "ARD_LORA"


@dataclass
class ArdLoraConfig(PeftConfig):  # type: ignore[misc] # peft has no types
    """Configuration of ARD-LoRA; the fields shared with `peft.LoraConfig` mean the same.

    While ranks are learnt, the factors hold 2 r rows and columns and the gates follow from the parameter `ard_rho`.
    Once they are settled and pruned, `head_ranks` and `rank_pattern` are given, the gates are multiplied into the
    factors and there is no `ard_rho`. The scale is lora_alpha / r in either state.

    Raises:
        InputError: Rank or alpha is not positive.
    """

    r: int = field(default=8, metadata={"help": "Rank at the start, r0; a head can reach twice that."})
    lora_alpha: float = field(default=8, metadata={"help": "Strength of the update: the scale is lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the adapter's input."})
    per_head: bool = field(default=True, metadata={"help": "Learn a rank per attention head, not only per module."})
    target_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules not to adapt."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of the layers."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules trained in full and saved."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Ids of tokens whose embeddings are trained."}
    )
    head_ranks: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Learnt rank of each head of each module, once pruned."}
    )
    rank_pattern: dict[str, int] | None = field(
        default=None, metadata={"help": "Rank of the factors of each module, the largest of its heads, once pruned."}
    )

    def __post_init__(self) -> None:
        """Check the numbers and name the method."""
        from peft.utils import PeftType

        super().__post_init__()
        self.peft_type = PeftType(PEFT_TYPE)
        if self.r < 1 or self.lora_alpha <= 0:
            raise InputError(f"ARD-LoRA needs a positive rank and alpha, not r={self.r!r}, alpha={self.lora_alpha!r}.")
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)

    @property
    def largest_rank(self) -> int:
        """Return the largest rank a head can reach, 2 r0."""
        return 2 * self.r
