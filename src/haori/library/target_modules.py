"""Which modules a configuration adapts, as PEFT (0.21) reads it: by the end of the name, or by a regular expression."""

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["TargetModules"]

_ALL_LINEAR = "all-linear"


class TargetModules:
    """The modules that PEFT would adapt.

    Args:
        config: The configuration, checked by `check_values`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._targets = _Names(config.get("target_modules"))
        self._excluded = _Names(config.get("exclude_modules"))
        saved = config.get("modules_to_save") or ()
        self._saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in saved]
        layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
        self._layers = [layers] if isinstance(layers, int) else layers or ()
        patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
        starts = [rf"(?:^|.*?\.){pattern}\." for pattern in patterns or ()] or [r".*?\.[^.]*\."]
        self._in_layer = [re.compile(rf"{start}(?P<index>\d+)\.") for start in starts]

    def has(self, name: str, *, in_all_linear: bool) -> bool:
        """Say whether the module `name` is one of them.

        Args:
            name: Its full name in the base.
            in_all_linear: `all-linear` stands for it: it is linear and no output head.
        """
        if self._excluded.match(name) or any(saved.match(name) for saved in self._saved):
            return False
        expression = self._targets.expression
        if expression is not None and expression.pattern.lower() == _ALL_LINEAR:
            return in_all_linear
        if not self._targets.match(name):
            return False
        return expression is not None or not self._layers or name in self._targets.names or self._is_in_layers(name)

    def _is_in_layers(self, name: str) -> bool:
        found = next(filter(None, (pattern.match(name) for pattern in self._in_layer)), None)
        return found is not None and int(found["index"]) in self._layers


class _Names:
    """Ends of names, or one regular expression for the whole of a name."""

    def __init__(self, given: Any) -> None:
        self.expression = re.compile(given) if isinstance(given, str) and given else None
        self.names = frozenset(given) if isinstance(given, list) else frozenset[str]()

    def match(self, name: str) -> bool:
        if self.expression is not None:
            return self.expression.fullmatch(name) is not None
        while name not in self.names:
            _, dot, name = name.partition(".")
            if not dot:
                return False
        return bool(self.names)
