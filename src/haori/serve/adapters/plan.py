"""What each tensor of an adapter's file is for, from its configuration and the header alone: no number is read.

An adapter is taken whole or not at all. What the engine cannot apply per request is refused by name; so is a tensor
that fits nowhere, one of the wrong shape, and one that the configuration promises and the file lacks. Scales and ranks
are PEFT's (0.21): alpha / r, or alpha / sqrt(r) with rsLoRA, by module where patterns say so.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Never

from haori.core.errors import InputError, MismatchError
from haori.library.config_values import PatternValues
from haori.library.target_modules import TargetModules
from haori.serve.adapters.refusals import not_applied, refuse_unsupported

if TYPE_CHECKING:
    from haori.library import AdapterFiles
    from haori.serve.adapters.reading import BaseTensors

__all__ = ["AdapterPlan", "ModuleTensors", "TokenTensor", "plan_adapter"]

_PREFIX = "base_model.model."
_DTYPES = frozenset({"F16", "BF16", "F32", "F64", "F8_E4M3", "F8_E5M2"})
# LoRA and ARD-LoRA keep A and B as modules, AdaLoRA as parameters.
_PARTS = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_A": "a",
    ".lora_B": "b",
    ".lora_E": "e",
    ".lora_B.bias": "lora_bias",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".ard_rho": "rho",
}
_SUFFIX = re.compile(r"\.(lora_[A-Za-z_]+(\.(weight|bias))?|ard_rho)$")
# What PEFT takes where a configuration says nothing.
_DEFAULT_RANK, _DEFAULT_ALPHA, _DEFAULT_INIT_RANK = 8, 8, 12
_HEADS = frozenset({"lm_head", "embed_out"})  # `all-linear` leaves them out
_TOKENS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one linear module, by their keys in the file."""

    a: str | None = None
    b: str | None = None
    e: str | None = None
    rho: str | None = None
    magnitude: str | None = None
    lora_bias: str | None = None
    base_bias: str | None = None


class TokenTensor(NamedTuple):
    """Trained rows of an embedding: the key of their values, and their token ids."""

    key: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class AdapterPlan:
    """Every tensor of a file with its use.

    Attributes:
        modules: By full module name in the base.
        scales: Scale of each module's update, alpha / r in the simplest case.
        vectors: Key of each norm weight or bias that was trained whole, by full parameter name.
        tokens: By full parameter name of the embedding.
        copies: Key of each weight that must be the base's own, by full parameter name. PEFT saves one of every
            embedding or head that is adapted. Those of an embedding or head may differ from it.
        is_tied: Whether an embedding that was saved whole is the output head too, where the base ties them.
    """

    modules: Mapping[str, ModuleTensors]
    scales: Mapping[str, float]
    vectors: Mapping[str, str]
    tokens: Mapping[str, TokenTensor]
    copies: Mapping[str, str]
    is_tied: bool


def plan_adapter(files: "AdapterFiles", base: "BaseTensors", label: str) -> AdapterPlan:
    """Give every tensor of an adapter its use.

    Args:
        files: The adapter.
        base: The base it is to act on.
        label: What errors call it.

    Raises:
        InputError: It holds what the engine cannot apply per request.
        MismatchError: It does not fit the base, or is not complete.
    """
    refuse_unsupported(files, label)
    plan = _Planner(files, base, label)
    for key in files.tensors:
        plan.take(key)
    return plan.finish()


class _Planner:
    """Collects the uses of one adapter's tensors."""

    def __init__(self, files: "AdapterFiles", base: "BaseTensors", label: str) -> None:
        self.files = files
        self.config = files.config
        self.base = base
        self.label = label
        self.targets = TargetModules(files.config)
        self.keys: dict[str, dict[str, str]] = {}
        self.vectors: dict[str, str] = {}
        self.tokens: dict[str, TokenTensor] = {}
        self.copies: dict[str, str] = {}

    def take(self, key: str) -> None:
        """Find the use of one tensor."""
        if self.files.tensors[key].dtype not in _DTYPES:
            self._misfit(f"the tensor {key!r} is of dtype {self.files.tensors[key].dtype}; use floats")
        name = key.removeprefix(_PREFIX)
        if name == key:
            self._misfit(f"the tensor {key!r} does not begin with {_PREFIX!r}, so it belongs to no module")
        if found := _SUFFIX.search(name):
            self._take_part(key, name[: found.start()], found.group())
        elif name.endswith(_TOKENS):
            self._take_tokens(key, name.removesuffix(_TOKENS))
        elif name.endswith(".base_layer.bias"):
            self._add(name.removesuffix(".base_layer.bias"), "base_bias", key)
        elif name.endswith(".bias") and self.base.linear(name.removesuffix(".bias")) is not None:
            self._add(name.removesuffix(".bias"), "base_bias", key)
        else:
            self._take_whole(key, name.replace(".base_layer.", "."))

    def finish(self) -> AdapterPlan:
        """Check that the parts of every module are there and fit, and return the plan."""
        adapted = {name: parts for name, parts in self.keys.items() if parts.keys() - {"base_bias"}}
        self._check_targets(adapted)
        self._check_complete()
        ranks = _Ranks(self.files, frozenset(adapted))
        modules = {name: ModuleTensors(**parts) for name, parts in self.keys.items()}
        scales = {name: self._check_shapes(name, module, ranks) for name, module in modules.items()}
        tied = bool(self.config.get("ensure_weight_tying"))
        return AdapterPlan(modules, scales, self.vectors, self.tokens, self.copies, tied)

    def _take_part(self, key: str, module: str, suffix: str) -> None:
        part = _PARTS.get(suffix)
        if part is None and not suffix.startswith(".lora_embedding_"):
            self._misfit(f"PEFT would ignore its tensor {key!r}")
        if part is None:
            self._unsupported(f"{suffix[1:]!r} for {module!r}")
        self._add(module, part, key)

    def _add(self, module: str, part: str, key: str) -> None:
        if self.base.linear(module) is None:
            known = any(name.startswith(f"{module}.") for name in self.base.names)
            if known:
                self._unsupported(f"an update of {module!r}, which is no linear layer that takes one")
            self._misfit(f"the base has no module {module!r}")
        if part in self.keys.setdefault(module, {}):
            self._misfit(f"{module!r} has the same part twice, {self.keys[module][part]!r} and {key!r}")
        self.keys[module][part] = key

    def _take_tokens(self, key: str, module: str) -> None:
        weight = f"{module}.weight"
        if weight not in self.base.names:
            self._misfit(f"the base has no embedding {module!r}")
        given: Any = self.config.get("trainable_token_indices")
        if isinstance(given, dict):
            given = next((ids for name, ids in given.items() if f".{module}".endswith(f".{name}")), None)
        if not isinstance(given, list) or not all(type(token) is int for token in given):
            self._misfit(f"its configuration does not say which tokens the rows of {module!r} are for")
        rows, width = self.base.tensor(weight).shape
        if len(set(given)) != len(given) or not all(0 <= token < rows for token in given):
            self._misfit(f"the trained tokens of {module!r} must be different ids below {rows:,}")
        self._check_shape(key, (len(given), width), f"{len(given)} trained tokens of {width} dimensions")
        self.tokens[weight] = TokenTensor(key, tuple(given))

    def _take_whole(self, key: str, name: str) -> None:
        if name not in self.base.names:
            self._misfit(f"the base has no weight {name!r}")
        shape = tuple(self.base.tensor(name).shape)
        self._check_shape(key, shape, f"the base's {list(shape)}")
        uses = self.vectors if len(shape) == 1 else self.copies
        if name in uses:
            self._misfit(f"{name!r} is in its file twice, as {uses[name]!r} and {key!r}")
        uses[name] = key

    def _check_targets(self, adapted: Collection[str]) -> None:
        """Refuse updates that PEFT would ignore, and modules that it would adapt and the file does not."""
        for name in adapted:
            if not self._is_target(name):
                self._misfit(f"its configuration does not adapt {name!r}, for which its file holds an update")
        for name in self._modules():
            if name not in adapted and self._is_target(name):
                self._misfit(f"its configuration adapts {name!r}, for which its file holds nothing")
        for name, parts in self.keys.items():
            key = parts.get("base_bias")
            if key is not None and (".base_layer." in key) != (name in adapted):
                self._misfit(f"PEFT would ignore its tensor {key!r}")

    def _modules(self) -> Iterable[str]:
        """Return every module of the base, those that hold others too."""
        found: dict[str, None] = {}
        for name in self.base.names:
            while (name := name.rpartition(".")[0]) and name not in found:
                found[name] = None
        return found

    def _is_target(self, name: str) -> bool:
        in_all_linear = self.base.linear(name) is not None and name.rpartition(".")[2] not in _HEADS
        return self.targets.has(name, in_all_linear=in_all_linear)

    def _check_complete(self) -> None:
        """Refuse a file that lacks what its configuration promises beside updates."""
        for saved in self.files.modules_to_save:
            # PEFT matches these by the mere end of the name.
            whole = [name for name in self.base.names if name.rpartition(".")[0].endswith(saved)]
            lost = [name for name in whole if name not in self.vectors and name not in self.copies]
            if lost or not whole:
                named = lost[0] if lost else saved
                self._misfit(f"its configuration saves {named!r} whole, and its file does not hold it")
        given: Any = self.config.get("trainable_token_indices")
        wanted = given if isinstance(given, dict) else {"": given} if given else {}
        for name in wanted:
            if not any(f".{weight}".endswith(f".{name}.weight" if name else "") for weight in self.tokens):
                named = f"tokens of {name!r}" if name else "tokens"
                self._misfit(f"its configuration trains {named}, and its file holds none of them")

    def _check_shapes(self, name: str, module: ModuleTensors, ranks: "_Ranks") -> float:
        """Check the shapes of a module's parts against the base and one another; return the scale of the update."""
        size = self.base.linear(name)
        assert size is not None
        for key in (module.magnitude, module.lora_bias, module.base_bias):
            if key is not None:
                self._check_shape(key, size[:1], f"the base's {size[0]} outputs")
        if module.base_bias is not None and f"{name}.bias" not in self.base.names:
            self._misfit(f"it trained a bias of {name!r}, which has none in the base")
        if module.a is None and module.b is None and module.lora_bias is None and module.magnitude is None:
            return 1.0
        if module.a is None or module.b is None:
            self._misfit(f"only one of the two factors of {name!r} is in its file")
        rank, scale = ranks.of(name)
        if module.rho is not None:
            rank *= 2  # while ranks are learnt, the factors have room for twice the rank at the start
        self._check_shape(module.a, (rank, size[1]), f"rank {rank} and the base's {size[1]} inputs")
        self._check_shape(module.b, (size[0], rank), f"the base's {size[0]} outputs and rank {rank}")
        self._check_method(name, module, rank)
        return scale

    def _check_method(self, name: str, module: ModuleTensors, rank: int) -> None:
        """Refuse parts that the method does not have, and a method without its parts."""
        if (module.magnitude is not None) != self.files.use_dora:
            self._misfit(f"its configuration and its file differ on whether {name!r} has a magnitude vector")
        if (module.lora_bias is not None) != bool(self.config.get("lora_bias")):
            self._misfit(f"its configuration and its file differ on whether the update of {name!r} has a bias")
        if (module.e is not None) != (self.files.peft_type == "ADALORA"):
            self._misfit(f"the singular values of {name!r} do not go with its method")
        if module.e is not None:
            self._check_shape(module.e, (rank, 1), f"rank {rank}")
        learning = self.files.peft_type == "ARD_LORA" and self.config.get("head_ranks") is None
        if (module.rho is not None) != learning:
            self._misfit(f"the rank factors of {name!r} do not go with its method")

    def _check_shape(self, key: str, expected: tuple[int, ...], meaning: str) -> None:
        shape = self.files.tensors[key].shape
        if shape != expected:
            self._misfit(f"the tensor {key!r} of shape {list(shape)} does not match {meaning}")

    def _misfit(self, problem: str) -> Never:
        raise MismatchError(f"The adapter {self.label} cannot be served on this base: {problem}.")

    def _unsupported(self, what: str) -> Never:
        raise InputError(not_applied(self.label, what))


class _Ranks:
    """Rank and scale of each module, as PEFT reads them off the configuration."""

    def __init__(self, files: "AdapterFiles", modules: frozenset[str]) -> None:
        self.files = files
        config = files.config
        self.rank = config.get("r", _DEFAULT_RANK)
        self.alpha = config.get("lora_alpha", _DEFAULT_ALPHA)
        self.ranks = PatternValues(config.get("rank_pattern"), self.rank, modules)
        self.alphas = PatternValues(config.get("alpha_pattern"), self.alpha, modules)

    def of(self, module: str) -> tuple[int, float]:
        """Return rank and scale of a module."""
        config = self.files.config
        if self.files.peft_type == "ADALORA":
            first = config.get("init_r", _DEFAULT_INIT_RANK)
            kept = (config.get("rank_pattern") or {}).get(f"{module}.lora_E")
            rank = first if kept is None else sum(kept)
            # PEFT divides by the rank at the start, and by a little more, whatever the rank became.
            return rank, (self.alpha if self.alpha > 0 else float(rank)) / (first + 1e-5)
        rank = self.ranks.of(module)
        if self.files.peft_type == "ARD_LORA":
            return rank, self.alpha / self.rank
        return rank, self.alphas.of(module) / (math.sqrt(rank) if self.files.use_rslora else rank)
