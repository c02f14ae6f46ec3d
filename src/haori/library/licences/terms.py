"""What single licences ask of those who use or share an adapter, read from their texts.

A licence of data or of a base is applied to the adapter as if it bound what was trained on it, which is the careful
reading where courts have not spoken. Licences that no rule here names fall back to ScanCode's category of them, and
where that says nothing the answer is `unknown`. A reading aid, not legal advice.

Texts: Creative Commons 4.0 sections 2 to 4 and its list of compatible licences; GPL-2.0 section 6, GPL-3.0 sections 7,
10 and 13; ODbL-1.0 section 4; CDLA-Permissive-2.0 section 3; CreativeML Open RAIL-M, section III and attachment A;
Llama 2, 3 and 3.1 Community Licenses, section 1.b and 2; Gemma Terms of Use, section 3; FLUX.1 [dev] Non-Commercial
License, sections 1 to 4; Stability AI Community License, sections II to IV.
"""

import json
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

from haori.core.records import Permissions

__all__ = ["FORBIDS", "SEVERITY", "UNKNOWN_LICENCE", "Answer", "Limit", "Terms", "permission_terms", "terms_of"]

Answer = Literal["yes", "conditions", "unknown", "no"]
"""`conditions`: allowed, with duties beyond credit and notices. Unknown is worse than these and better than no."""

Limit = Literal["non-commercial", "use restrictions", "patent clause", "advertising clause"]
"""What a licence adds that a share-alike licence may not allow beside it."""

SEVERITY: tuple[Answer, ...] = ("yes", "conditions", "unknown", "no")
UNKNOWN_LICENCE = "LicenseRef-scancode-unknown"


@dataclass(frozen=True)
class Terms:
    """What one licence says.

    Attributes:
        commercial: May an adapter made from this be used commercially, without being shared?
        redistribution: May it be shared?
        credit: Must the source be credited, or its notices be kept? None where that is unknown.
        says: What decides the answers, in a few words.
        duties: What else must be done.
        limits: What it adds that share-alike licences may forbid.
        shared_under: The licences under which what is made from it may be shared, where it restricts them.
        unchanged: It may be shared as it is, but not what is made from it.
        notice: A line that must stand beside what is shared.
    """

    commercial: Answer
    redistribution: Answer
    credit: bool | None
    says: str = ""
    duties: tuple[str, ...] = ()
    limits: frozenset[Limit] = frozenset()
    shared_under: frozenset[str] | None = None
    unchanged: bool = False
    notice: str | None = None

    @property
    def reason(self) -> str:
        """Return what it says with its duties, as one phrase."""
        return "; ".join(part for part in (self.says, *self.duties) if part)

    def of_itself(self) -> "Terms":
        """Return the terms for the licensed work itself, rather than for what was made from it."""
        return replace(self, redistribution="conditions") if self.unchanged else self

    def excepted(self) -> "Terms":
        """Return the terms under an exception, such as that of Classpath: they do not reach the whole work."""
        return replace(self, shared_under=None)


_NC = "non-commercial use only"
_CREDIT = "credit the source"
_SAME = "share what is made from it under the same licence"
_NOT_SHARED = "what is made from it may not be shared"
_INHERIT = "pass on its use restrictions with what you share"
_COPY = "give a copy of the licence"
_MULTIMODAL = "multimodal models are not licensed to people and companies in the European Union"
_RESTRICTED: frozenset[Limit] = frozenset({"use restrictions"})
_NON_COMMERCIAL: frozenset[Limit] = frozenset({"non-commercial"})
_UNKNOWN = Terms("unknown", "unknown", None, "its terms are unknown")
_UNREAD = Terms("unknown", "unknown", None, "terms not known here; read the licence")
_NO_DUTIES = Terms("yes", "yes", False, "no duties")
_DATA_RESULTS = Terms("yes", "yes", False, "what is computed from the data is free of conditions")
_RAIL = Terms(
    "conditions", "conditions", True, "commercial use within the use restrictions", (_INHERIT, _COPY), _RESTRICTED
)  # fmt: skip
_NON_COMMERCIAL_MODEL = Terms(
    "no", "conditions", True, f"{_NC}, and derivatives inherit that", (_COPY,), _NON_COMMERCIAL
)  # fmt: skip
_BUILT_WITH_LLAMA = ('say "Built with Llama"', 'begin the name of what you share with "Llama"')
_NOT_FOR_OTHERS = "do not use it to improve other language models"


def _llama(name: str, licence: str, *duties: str) -> Terms:
    return Terms(
        "conditions", "conditions", True, "free below 700 million monthly users",
        (*duties, "give a copy of the agreement and pass on its acceptable use policy"), _RESTRICTED,
        notice=f"{name} is licensed under the {licence}, Copyright © Meta Platforms, Inc. All Rights Reserved.",
    )  # fmt: skip


_META_3 = ('say "Built with Meta Llama 3"', 'begin the name of what you share with "Llama 3"', _NOT_FOR_OTHERS)
_GEMMA = Terms(
    "conditions",
    "conditions",
    True,
    "commercial use within the prohibited-use policy",
    (
        "pass on the prohibited-use policy as a binding term",
        "give a copy of the terms and say that the model was changed",
    ),
    _RESTRICTED,
    notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms.",
)
_FLUX_DEV = Terms(
    "no",
    "conditions",
    True,
    f"{_NC} of the model and of what is made from it; its images may be used commercially",
    (_COPY, "share what is made from it for non-commercial purposes only"),
    _NON_COMMERCIAL,
    notice="The FLUX.1 [dev] Model is licensed by Black Forest Labs. Inc. under the FLUX.1 [dev] Non-Commercial "
    "License. Copyright Black Forest Labs. Inc.",
)
_STABILITY = Terms(
    "conditions",
    "conditions",
    True,
    "free for those with less than 1 million US dollars of yearly revenue, who register with Stability AI",
    ('say "Powered by Stability AI"', "give a copy of the agreement and keep to its acceptable use policy"),
    _RESTRICTED,
    notice="This Stability AI Model is licensed under the Stability AI Community License, Copyright © "
    "Stability AI Ltd. All Rights Reserved.",
)
_RESEARCH = Terms(
    "no", "conditions", True, "research and other non-commercial use only", (_COPY,), _NON_COMMERCIAL
)  # fmt: skip
_QWEN = Terms(
    "conditions", "conditions", True, "free below 100 million monthly users",
    (_COPY, 'say "Built with Qwen" or "Improved using Qwen"'), _RESTRICTED,
)  # fmt: skip
_HUNYUAN = Terms(
    "conditions", "conditions", True,
    "free below 100 million monthly users, and not in the European Union, the United Kingdom and South Korea",
    (_INHERIT, _COPY), _RESTRICTED,
)  # fmt: skip
_NVIDIA = Terms(
    "conditions", "conditions", True, "commercial use while its guardrails are kept", (_COPY,), _RESTRICTED,
    notice="Licensed by NVIDIA Corporation under the NVIDIA Open Model License.",
)  # fmt: skip
_ODBL = Terms(
    "conditions", "conditions", True, "", (_CREDIT, "share databases that are made from it under the same licence"),
    shared_under=frozenset({"ODbL-1.0"}),
)  # fmt: skip
_APACHE = Terms("yes", "yes", True, "keep the notices", limits=frozenset({"patent clause"}))
_BSD_4 = Terms(
    "yes", "yes", True, "keep the notices", ("name its author in advertising",), frozenset({"advertising clause"})
)  # fmt: skip
_LLAMA_1 = Terms("no", "no", True, "non-commercial research only, not to be passed on", limits=_NON_COMMERCIAL)

# The first whole match decides, on the id in lower case without LicenseRef- and scancode-.
_NAMED: tuple[tuple[str, Terms], ...] = (
    (r"llama-license-2023|llama-?1", _LLAMA_1),
    (r"llama-?2(-.*)?", _llama("Llama 2", "LLAMA 2 Community License", _NOT_FOR_OTHERS)),
    (r"llama-?3(-[^.]*)?", _llama("Meta Llama 3", "Meta Llama 3 Community License", *_META_3)),
    (r"llama-?3\.1(-.*)?", _llama("Llama 3.1", "Llama 3.1 Community License", *_BUILT_WITH_LLAMA)),
    (r"llama-?3\.2(-.*)?", _llama("Llama 3.2", "Llama 3.2 Community License", *_BUILT_WITH_LLAMA, _MULTIMODAL)),
    (r"llama-?3\.3(-.*)?", _llama("Llama 3.3", "Llama 3.3 Community License", *_BUILT_WITH_LLAMA)),
    (r"llama-?4(-.*)?", _llama("Llama 4", "Llama 4 Community License", *_BUILT_WITH_LLAMA, _MULTIMODAL)),
    (r"gemma(-tou.*|-\d.*)?", _GEMMA),
    (r"flux[.-]?1-nc|flux[.-]?1?-?(kontext-)?dev(-non-commercial.*)?", _FLUX_DEV),
    (r"stability(ai)?-ai-community.*|stabilityai-community.*", _STABILITY),
    (r"(qwen|chameleon|mistral-ai|intel|h|fair-.*|ccg|ms)-research.*|apple-amlr|mrl(-.*)?|mnpl(-.*)?", _RESEARCH),
    (r"deepfloyd-if-license|sai-nc-community|(.*-)?(non-?commercial|nc)(-.*)?", _NON_COMMERCIAL_MODEL),
    (r"(creativeml-|bigscience-|bigcode-)?(open-?)?rail([+-]+[a-z0-9.]+)*[+-]*", _RAIL),
    (r"stable-diffusion-2022-08-22|responsible-ai-source-.*", _RAIL),
    (r"deepseek(-la-.*|-license)?|falcon-(llm|2|mamba).*", _RAIL),
    (r"tongyi-qianwen.*|qwen", _QWEN),
    (r"tencent-hunyuan.*", _HUNYUAN),
    (r"nvidia-open-model.*", _NVIDIA),
    (r"odbl(-1\.0)?", _ODBL),
    (r"odc-by(-1\.0)?", Terms("yes", "yes", True, _CREDIT)),
    (r"cdla-(permissive|sharing)-[\d.]+|c-uda-1\.0", _DATA_RESULTS),
    (r"mit-0|0bsd", _NO_DUTIES),
    (r"apache-2\.0", _APACHE),
    (r"bsd-4-clause.*", _BSD_4),
)
_CATEGORIES: dict[str, Terms] = {
    "Permissive": Terms("yes", "yes", True, "keep the notices"),
    "Public Domain": _NO_DUTIES,
    "Copyleft Limited": Terms(
        "conditions", "conditions", True, "limited copyleft: what you share may fall under the same licence"
    ),
}
_GPL_TARGETS = {
    ("", "1.0", False): {"GPL-1.0"},
    ("", "1.0", True): {"GPL-1.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    ("", "2.0", False): {"GPL-2.0"},
    ("", "2.0", True): {"GPL-2.0", "GPL-3.0", "AGPL-3.0"},
    ("", "3.0", False): {"GPL-3.0", "AGPL-3.0"},
    ("", "3.0", True): {"GPL-3.0", "AGPL-3.0"},
    ("a", "3.0", False): {"AGPL-3.0"},
    ("a", "3.0", True): {"AGPL-3.0"},
}
_CC_VERSIONS = ("1.0", "2.0", "2.1", "2.5", "3.0", "4.0")

FORBIDS: tuple[tuple[str, frozenset[Limit]], ...] = (
    ("GPL-1.0", frozenset({"non-commercial", "use restrictions", "patent clause", "advertising clause"})),
    ("GPL-2.0", frozenset({"non-commercial", "use restrictions", "patent clause", "advertising clause"})),
    ("GPL-3.0", frozenset({"non-commercial", "use restrictions", "advertising clause"})),
    ("AGPL-3.0", frozenset({"non-commercial", "use restrictions", "advertising clause"})),
    ("CC-BY-NC-SA-", frozenset({"use restrictions"})),
    ("", frozenset({"non-commercial", "use restrictions"})),
)
"""What may not be added to a work shared under a licence, by the beginning of its name; the first that fits counts."""


def terms_of(key: str) -> Terms:
    """Return the terms of one licence.

    Args:
        key: SPDX id or `LicenseRef-...`, as `license-expression` renders it.
    """
    if key == UNKNOWN_LICENCE:
        return _UNKNOWN
    name = key.lower().removeprefix("licenseref-").removeprefix("scancode-")
    if (creative := re.fullmatch(r"cc-by((?:-nc|-nd|-sa)*)(?:-(\d\.\d))?(-[a-z]{2,3})?", name)) is not None:
        return _creative_commons(set(creative[1].split("-")), creative[2])
    if (gnu := re.fullmatch(r"(a?)gpl-(\d\.\d)(-only|-or-later)?", name)) is not None:
        targets = _GPL_TARGETS.get((gnu[1], gnu[2], gnu[3] == "-or-later"), {key})
        more = ("offer the source to users of a network service",) if gnu[1] else ()
        says = "copyleft: what you share falls under the same licence"
        return Terms("conditions", "conditions", True, says, more, shared_under=frozenset(targets))
    for pattern, terms in _NAMED:
        if re.fullmatch(pattern, name):
            return terms
    category = _categories().get(key.lower()) or ""
    if category == "Copyleft":
        says = "copyleft: what you share falls under the same licence"
        return Terms("conditions", "conditions", True, says, shared_under=frozenset({key}))
    return _CATEGORIES.get(category, _UNREAD)


def permission_terms(given: Permissions) -> Terms:
    """Return the terms that an author's answers to Civitai's four questions make."""
    wanted = {
        "Image": "selling images made with it", "Rent": "offering it as a paid service",
        "Sell": "selling it or what is merged from it",
    }  # fmt: skip
    refused = [what for level, what in wanted.items() if level not in given.commercial_use]
    if "Rent" not in given.commercial_use and "RentCivit" in given.commercial_use:
        refused[refused.index(wanted["Rent"])] = "offering it as a paid service elsewhere than on Civitai"
    commercial: Answer = "yes" if not refused else "conditions" if given.commercial_use else "no"
    said = f"its author does not permit {' or '.join(refused)}" if refused else "its author permits all commercial use"
    duties = [] if given.no_credit else [_CREDIT]
    if not given.derivatives:
        duties.append(f"share it unchanged only: {_NOT_SHARED}")
    elif not given.different_licence:
        duties.append("share what is made from it with the same permissions")
    shared: Answer = "no" if not given.derivatives else "yes" if given.different_licence else "conditions"
    limits: frozenset[Limit] = _NON_COMMERCIAL if commercial == "no" else _RESTRICTED if refused else frozenset()
    return Terms(commercial, shared, not given.no_credit, said, tuple(duties), limits, unchanged=not given.derivatives)


def _creative_commons(elements: set[str], version: str | None) -> Terms:
    """Return the terms of a licence of Creative Commons by its elements: BY with NC, ND and SA."""
    commercial: Answer = "no" if "nc" in elements else "conditions" if elements & {"nd", "sa"} else "yes"
    limits = _NON_COMMERCIAL if "nc" in elements else frozenset()
    says = _NC if "nc" in elements else ""
    if "nd" in elements:
        says = f"{says}; {_NOT_SHARED}" if says else _NOT_SHARED
        return Terms(commercial, "no", True, says, (_CREDIT,), limits, unchanged=True)
    shared: Answer = "conditions" if elements & {"nc", "sa"} else "yes"
    if "sa" not in elements:
        return Terms(commercial, shared, True, says, (_CREDIT,), limits)
    version = version or "4.0"
    name = "CC-BY-NC-SA" if "nc" in elements else "CC-BY-SA"
    later = [v for v in _CC_VERSIONS if v >= version] if version != "1.0" else ["1.0"]
    targets = {f"{name}-{v}" for v in later} | ({"GPL-3.0"} if (name, version) == ("CC-BY-SA", "4.0") else set())
    return Terms(commercial, shared, True, says, (_CREDIT, _SAME), limits, frozenset(targets))


@lru_cache(maxsize=1)
def _categories() -> dict[str, str]:
    """Return ScanCode's category of every SPDX id, in lower case."""
    from license_expression import vendored_scancode_licensedb_index_location

    rows = json.loads(Path(vendored_scancode_licensedb_index_location).read_text(encoding="utf-8"))
    table = {}
    for row in rows:
        for key in (row.get("spdx_license_key"), *row.get("other_spdx_license_keys", [])):
            if key:
                table[key.lower()] = row.get("category") or ""
    return table
