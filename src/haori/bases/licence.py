"""Finds the licence of a model folder and writes it as an SPDX id where there is one.

Sources, in order: `license:` in the front matter of README.md, then the text of a LICENSE file. A licence that
has no SPDX id becomes a `LicenseRef-...`; none found is None. This is not legal advice.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

__all__ = ["front_matter", "licence_of_folder", "licensing", "to_spdx"]

_READ_LIMIT = 64 << 10
# Ids of the model hub that differ from SPDX and from the ScanCode index.
_HUB_IDS = {
    "llama2": "LicenseRef-scancode-llama-2-license-2023",
    "llama3.1": "LicenseRef-scancode-llama-3.1-license-2024",
    "llama3.2": "LicenseRef-scancode-llama-3.2-license-2024",
    "llama3.3": "LicenseRef-scancode-llama-3.3-license-2024",
    "llama4": "LicenseRef-scancode-llama-4-cla-2025",
    "gemma": "LicenseRef-scancode-gemma-tou-2024-04-01",
    "bigscience-bloom-rail-1.0": "LicenseRef-scancode-bigscience-rail-1.0",
    "bigscience-openrail-m": "LicenseRef-scancode-bigscience-open-rail-m",
    "bigcode-openrail-m": "LicenseRef-scancode-bigcode-open-rail-m-v1",
    "flux-1-dev-non-commercial-license": "LicenseRef-scancode-flux-1-nc",
    "cc": None,
}
_UNKNOWN = {"", "other", "unknown", "none", "n/a"}
# Phrases near the top of a licence file; the first that matches decides.
_PHRASES = (
    (r"SPDX-License-Identifier:\s*([\w.+-]+)", None),
    (r"Apache License\s+Version 2\.0", "apache-2.0"),
    (r"LLAMA 2 COMMUNITY LICENSE", "llama2"),
    (r"LLAMA 3\.1 COMMUNITY LICENSE", "llama3.1"),
    (r"LLAMA 3\.2 COMMUNITY LICENSE", "llama3.2"),
    (r"LLAMA 3\.3 COMMUNITY LICENSE", "llama3.3"),
    (r"LLAMA 4 COMMUNITY LICENSE", "llama4"),
    (r"Gemma Terms of Use", "gemma"),
    (r"MIT License|Permission is hereby granted, free of charge, to any person", "mit"),
    (r"GNU AFFERO GENERAL PUBLIC LICENSE\s+Version 3", "agpl-3.0"),
    (r"GNU GENERAL PUBLIC LICENSE\s+Version 3", "gpl-3.0"),
    (r"Attribution-NonCommercial 4\.0 International", "cc-by-nc-4.0"),
    (r"Attribution 4\.0 International", "cc-by-4.0"),
)


def licence_of_folder(path: Path) -> str | None:
    """Return the licence of the model in `path`, or None if it does not say."""
    return _from_front_matter(path / "README.md") or _from_licence_file(path)


def to_spdx(raw: str) -> str | None:
    """Return the SPDX form of a licence id: `apache-2.0` becomes `Apache-2.0`."""
    import license_expression

    name = raw.strip()
    if name.lower() in _UNKNOWN:
        return None
    if name.lower() in _HUB_IDS:
        return _HUB_IDS[name.lower()]
    try:
        return str(licensing().parse(name, validate=True))
    except (license_expression.ExpressionError, license_expression.ParseError):
        return "LicenseRef-" + re.sub(r"[^A-Za-z0-9.-]+", "-", name).strip("-")[:100]


@lru_cache(maxsize=1)
def licensing() -> Any:
    """Return the index of licences that expressions are read with."""
    from license_expression import get_spdx_licensing

    return get_spdx_licensing()


def front_matter(readme: Path) -> dict[str, Any]:
    """Return the YAML table at the top of a model card; empty where there is none that can be read."""
    match = re.match(r"---\s*\n(.*?)\n---", _head(readme), re.DOTALL)
    if match is None:
        return {}
    try:
        table = yaml.safe_load(match[1])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date such as 2026-13-45
        return {}
    return table if isinstance(table, dict) else {}


def _from_front_matter(readme: Path) -> str | None:
    table = front_matter(readme)
    value: Any = table.get("license")
    names = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    found = [to_spdx(str(name)) for name in names]
    if not any(found) and isinstance(table.get("license_name"), str):
        found = [to_spdx(table["license_name"])]
    return " AND ".join(name for name in found if name) or None


def _from_licence_file(path: Path) -> str | None:
    files = (file for stem in ("LICENSE", "LICENCE", "COPYING") for file in sorted(path.glob(f"{stem}*")))
    for file in files:
        text = _head(file)
        for pattern, name in _PHRASES:
            match = re.search(pattern, text, re.IGNORECASE)
            if match:
                return to_spdx(name or match[1])
    return None


def _head(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as stream:
        return stream.read(_READ_LIMIT).decode("utf-8", errors="replace").lstrip("\ufeff")
