"""What may be done with an adapter, by the licences of what it was made from: answers as the licences' texts give them.

Each row names the fault that it is there to catch.
"""

import time
from typing import Any, NamedTuple

import pytest

from haori.core.records import AdapterCard, BaseReference, Combination, DataReference, Permissions
from haori.library.licences.verdict import commercial_use, effective_licence
from tests.library_samples import base_reference

HUB_SD, HUB_SDXL = "creativeml-openrail-m", "openrail++"
FLUX, STABILITY = "flux-1-dev-non-commercial-license", "LicenseRef-stabilityai-ai-community"


def card(base: str | None, *datasets: str | None, **fields: Any) -> AdapterCard:
    data = tuple(
        DataReference(source=f"d{n}.jsonl", hash="h", format="text", rows={"train": 1}, licence=licence)
        for n, licence in enumerate(datasets)
    )
    plain = {"id": "sha256:" + "a" * 64, "origin": "trained", "created": "now", "method": "lora"}
    return AdapterCard(base=base_reference(licence=base), data=data, **{**plain, **fields})


class Case(NamedTuple):
    base: str | None
    data: tuple[str | None, ...]
    commercial: str
    sharing: str
    credit: str
    clash: int  # pairs that cannot be kept together
    fault: str


TABLE = [
    Case("Apache-2.0", (), "yes", "yes", "required", 0, "Apache's notices (section 4) taken for no duty"),
    Case("MIT", ("MIT",), "yes", "yes", "required", 0, "one licence twice counted as a clash"),
    Case("BSD-3-Clause", (), "yes", "yes", "required", 0, "the category of ScanCode not looked up"),
    Case("MIT-0", (), "yes", "yes", "not required", 0, "MIT-0 read as MIT, whose notice it drops"),
    Case("0BSD", ("CC0-1.0",), "yes", "yes", "not required", 0, "public domain asked for credit"),
    Case("PDDL-1.0", (), "yes", "yes", "not required", 0, "a public-domain dedication of data not known"),
    Case("MIT", ("CC-BY-4.0",), "yes", "yes", "required", 0, "attribution taken for a condition of use"),
    Case("MIT-0", ("CC-BY-4.0",), "yes", "yes", "required", 0, "only the base asked for credit"),
    Case("MIT", ("CC BY 4.0",), "yes", "yes", "required", 0, "a licence written with spaces taken for unknown"),
    Case("MIT", ("CC-BY-SA-4.0",), "conditions", "conditions", "required", 0, "share-alike lost"),
    Case("MIT", ("CC-BY-NC-4.0",), "no", "conditions", "required", 0, "NC read as a ban on sharing"),
    Case("MIT", ("CC-BY-NC-SA-4.0",), "no", "conditions", "required", 0, "SA of NC-SA clashing with its own NC"),
    Case("MIT", ("CC-BY-ND-4.0",), "conditions", "no", "required", 0, "ND read as non-commercial, or sharing allowed"),
    Case("MIT", ("CC-BY-NC-ND-4.0",), "no", "no", "required", 0, "one of two elements dropped"),
    Case("MIT", ("CC-BY-NC-SA-3.0-DE",), "no", "conditions", "required", 0, "a ported licence not recognised"),
    Case("MIT", ("ODC-By-1.0",), "yes", "yes", "required", 0, "ODC-By read as share-alike"),
    Case("MIT", ("ODbL-1.0",), "conditions", "conditions", "required", 0, "the ODbL's share-alike (4.4) lost"),
    Case("MIT", ("CDLA-Permissive-2.0",), "yes", "yes", "required", 0, "MIT's own notice lost beside free results"),
    Case("0BSD", ("CDLA-Sharing-1.0",), "yes", "yes", "not required", 0, "sharing (3.1) asked of results (3.5)"),
    Case("LGPL-3.0-only", (), "conditions", "conditions", "required", 0, "limited copyleft taken for permissive"),
    Case("GPL-3.0-or-later", (), "conditions", "conditions", "required", 0, "copyleft lost"),
    Case("AGPL-3.0-only", ("GPL-3.0-only",), "conditions", "conditions", "required", 0, "section 13 unknown: a clash"),
    Case("llama2", (), "conditions", "conditions", "required", 0, "700 million users forgotten"),
    Case("llama3.1", ("MIT",), "conditions", "conditions", "required", 0, "as above, with data"),
    Case("LicenseRef-llama3", (), "conditions", "conditions", "required", 0, "Llama 3, which ScanCode lacks, unknown"),
    Case("LicenseRef-scancode-llama-license-2023", (), "no", "no", "required", 0, "LLaMA 1 read as Llama 2"),
    Case("gemma", (), "conditions", "conditions", "required", 0, "use restrictions (3.2) lost"),
    Case(HUB_SD, (), "conditions", "conditions", "required", 0, "use restrictions (attachment A) lost"),
    Case(HUB_SDXL, (), "conditions", "conditions", "required", 0, "the ++ of the hub's id not read"),
    Case("bigscience-bloom-rail-1.0", (), "conditions", "conditions", "required", 0, "RAIL that is not open unknown"),
    Case(FLUX, (), "no", "conditions", "required", 0, "FLUX.1 [dev] taken for FLUX.1 [schnell] (Apache-2.0)"),
    Case(STABILITY, (), "conditions", "conditions", "required", 0, "limit of revenue forgotten"),
    Case("LicenseRef-scancode-stability-ai-nc-2023-12-06", (), "no", "conditions", "required", 0, "read as community"),
    Case("LicenseRef-qwen-research", (), "no", "conditions", "required", 0, "research licence read as that of Qwen"),
    Case("LicenseRef-exaone-ai-model-1.1-nc", (), "no", "conditions", "required", 0, "nc at the end overlooked"),
    Case("NCSA", (), "yes", "yes", "required", 0, "the letters nc read as non-commercial"),
    Case(None, ("MIT",), "unknown", "unknown", "required", 0, "a base without licence taken for free"),
    Case("MIT", (None,), "unknown", "unknown", "required", 0, "data without licence taken for free"),
    Case("MIT-0", ("LicenseRef-house-rules",), "unknown", "unknown", "unknown", 0, "unread terms taken for free"),
    Case("MIT", ("CC-BY-NC-4.0", None), "no", "unknown", "required", 0, "unknown hides a no"),
    Case("MIT", ("CC-BY-SA-4.0", "CC-BY-NC-4.0"), "no", "no", "required", 1, "SA and NC kept together"),
    Case("MIT", ("CC-BY-SA-4.0", "CC-BY-NC-SA-4.0"), "no", "no", "required", 1, "two kinds of share-alike together"),
    Case("MIT", ("CC-BY-SA-3.0", "CC-BY-SA-4.0"), "conditions", "conditions", "required", 0, "later version refused"),
    Case("MIT", ("CC-BY-SA-1.0", "CC-BY-SA-4.0"), "conditions", "no", "required", 1, "1.0 has no later versions"),
    Case("MIT", ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"), "no", "conditions", "required", 0, "NC may go under NC-SA"),
    Case("MIT", ("CC-BY-SA-4.0", "ODbL-1.0"), "conditions", "no", "required", 1, "share-alikes of data together"),
    Case("GPL-2.0-only", ("Apache-2.0",), "conditions", "no", "required", 1, "patent clause under GPL-2.0 overlooked"),
    Case("GPL-2.0-or-later", ("Apache-2.0",), "conditions", "conditions", "required", 0, "or-later not taken as 3.0"),
    Case("GPL-3.0-only", ("Apache-2.0",), "conditions", "conditions", "required", 0, "3.0 refused what it allows"),
    Case("GPL-2.0-only", ("GPL-3.0-only",), "conditions", "no", "required", 1, "two versions only together"),
    Case("GPL-2.0-only", ("AGPL-3.0-only",), "conditions", "no", "required", 1, "AGPL joined to GPL-2.0"),
    Case("GPL-3.0-only", ("CC-BY-SA-4.0",), "conditions", "conditions", "required", 0, "one-way compatibility unknown"),
    Case("GPL-2.0-only", ("CC-BY-SA-4.0",), "conditions", "no", "required", 1, "compatible with version 3 only"),
    Case("GPL-3.0-only", ("CC-BY-NC-4.0",), "no", "no", "required", 1, "NC is a further restriction (section 10)"),
    Case("GPL-3.0-only", ("BSD-4-Clause",), "conditions", "no", "required", 1, "the advertising clause overlooked"),
    Case("GPL-2.0-only WITH Classpath-exception-2.0", ("Apache-2.0",), "conditions", "conditions", "required", 0, "-"),
    Case(HUB_SD, ("CC-BY-SA-4.0",), "conditions", "no", "required", 1, "use restrictions under share-alike"),
    Case("llama3.1", ("GPL-3.0-only",), "conditions", "no", "required", 1, "Llama's policy under the GPL"),
    Case("MIT OR GPL-2.0-only", ("Apache-2.0",), "yes", "yes", "required", 0, "the choice that clashes taken"),
    Case("GPL-2.0-only OR MIT", ("Apache-2.0",), "yes", "yes", "required", 0, "the first choice, which clashes, taken"),
    Case("CC-BY-NC-4.0 OR MIT", (), "yes", "yes", "required", 0, "the first choice taken, though it allows less"),
    Case("0BSD", ("CC-BY-SA-4.0", "CC-BY-NC-SA-4.0", "ODbL-1.0"), "no", "no", "required", 3, "one pair named of three"),
    Case("CC-BY-NC-4.0 OR CC-BY-ND-4.0", (), "conditions", "no", "required", 0, "the best of two choices mixed"),
    Case("MIT OR CC-BY-NC-4.0", (), "yes", "yes", "required", 0, "OR read as AND"),
    Case("MIT AND CC-BY-NC-4.0", (), "no", "conditions", "required", 0, "AND read as OR"),
    Case("Apache-2.0 AND (", (), "unknown", "unknown", "unknown", 0, "an expression cut short read by half"),
]  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.fault)
def test_what_the_licences_allow_together(case: Case):
    verdict = effective_licence(card(case.base, *case.data))
    found = (verdict.commercial, verdict.redistribution, verdict.credit, len(verdict.conflicts))
    assert found == (case.commercial, case.sharing, case.credit, case.clash), verdict.reasons


def test_a_clash_names_both_sources():
    (said,) = effective_licence(card("MIT", "CC-BY-SA-4.0", "CC-BY-NC-4.0")).conflicts
    assert "CC-BY-SA-4.0 (data d0.jsonl)" in said
    assert "CC-BY-NC-4.0 (data d1.jsonl)" in said
    assert "non-commercial" in said


def test_the_decisive_sources_are_named():
    verdict = effective_licence(card("MIT", "CC-BY-NC-4.0", None))
    assert [why.split(":")[0] for why in verdict.because("commercial")] == ["data d0.jsonl"]
    assert [why.split(":")[0] for why in verdict.because("redistribution")] == ["data d1.jsonl"]


PERMISSIONS = [
    # (no credit, commercial, derivatives, other licence), commercial, sharing, credit, of one made from it
    ((True, ("Image", "RentCivit", "Rent", "Sell"), True, True), "yes", "yes", "not required", "yes"),
    ((False, ("Image", "RentCivit", "Rent", "Sell"), True, True), "yes", "yes", "required", "yes"),
    ((True, (), True, True), "no", "yes", "not required", "yes"),
    ((True, ("Image",), True, True), "conditions", "yes", "not required", "yes"),
    ((True, ("Image", "RentCivit", "Rent"), True, True), "conditions", "yes", "not required", "yes"),
    ((True, ("Image", "RentCivit", "Rent", "Sell"), False, True), "yes", "conditions", "not required", "no"),
    ((True, ("Image", "RentCivit", "Rent", "Sell"), True, False), "yes", "conditions", "not required", "conditions"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "commercial", "sharing", "credit", "made_from_it"), PERMISSIONS)
def test_civitai_permissions(given, commercial, sharing, credit, made_from_it):
    fields = dict(zip(("no_credit", "commercial_use", "derivatives", "different_licence"), given, strict=True))
    added = card("MIT-0", origin="added", permissions=Permissions(**fields), names=("style@1",))
    verdict = effective_licence(added)
    assert (verdict.commercial, verdict.redistribution, verdict.credit) == (commercial, sharing, credit)
    blend = card("MIT-0", id="sha256:" + "b" * 64, parents=(added.id,))
    of_blend = effective_licence(blend, [added])
    assert (of_blend.commercial, of_blend.redistribution) == (commercial, made_from_it)
    assert "parent style@1" in " ".join(of_blend.reasons)


def test_an_adapter_may_be_passed_on_unchanged_where_only_changes_are_forbidden():
    added = card("MIT", origin="added", licence="CC-BY-ND-4.0")
    assert effective_licence(added).redistribution == "conditions"
    blend = card("MIT", id="sha256:" + "b" * 64, parents=(added.id,))
    assert effective_licence(blend, [added]).redistribution == "no"


def test_what_grandparents_were_trained_on_counts():
    grand = card("MIT", "CC-BY-NC-4.0", id="sha256:" + "1" * 64, names=("grand@1",))
    parent = card("MIT", id="sha256:" + "2" * 64, parents=(grand.id,), names=("parent@1",))
    child = card("MIT", id="sha256:" + "3" * 64, parents=(parent.id,))
    verdict = effective_licence(child, [parent, grand])
    assert verdict.commercial == "no"
    assert verdict.because("commercial") == (
        "data d0.jsonl, through grand@1: CC-BY-NC-4.0 (non-commercial use only; credit the source).",
    )
    assert effective_licence(child, [parent]).commercial == "unknown"  # the grandparent is not here


def test_parents_that_name_one_another_end():
    one = card("MIT", id="sha256:" + "1" * 64, parents=("sha256:" + "2" * 64,))
    two = card("CC-BY-4.0", id="sha256:" + "2" * 64, parents=(one.id,))
    assert effective_licence(one, [one, two]).commercial == "yes"


def test_a_licence_that_only_repeats_its_sources_is_no_source_of_its_own():
    parent = card("MIT", "CC-BY-4.0", licence="MIT AND CC-BY-4.0", id="sha256:" + "1" * 64)
    assert len(effective_licence(parent).sources) == 2
    stricter = parent.with_fields(licence="MIT AND CC-BY-4.0 AND CC-BY-NC-4.0")
    assert effective_licence(stricter).commercial == "no"


def test_of_a_family_without_a_base_nothing_is_known():
    family = BaseReference(name="sd15", source="family:sd15", components={}, family="sd15")
    bare = card("MIT").with_fields(base=family, origin="added", licence="MIT")
    assert effective_licence(bare).commercial == "unknown"


@pytest.mark.parametrize(("of_tuned", "commercial", "sharing"), [
    ("MIT", "yes", "yes"), ("CC-BY-NC-4.0", "no", "conditions"), ("CC-BY-ND-4.0", "conditions", "no"),
    (None, "unknown", "unknown"),
])  # fmt: skip
def test_what_was_extracted_is_bound_by_the_checkpoint(of_tuned, commercial, sharing):
    made = Combination(kind="extract", tuned="/home/me/tuned")
    verdict = effective_licence(card("MIT", origin="added", licence=of_tuned, combination=made))
    assert (verdict.commercial, verdict.redistribution) == (commercial, sharing)
    assert verdict.reasons[1].startswith("checkpoint /home/me/tuned: ")


def test_a_blend_is_bound_by_the_strictest_of_its_parts():
    free = card("MIT", id="sha256:" + "1" * 64, names=("free@1",))
    bound = card("MIT", "CC-BY-NC-4.0", id="sha256:" + "2" * 64, names=("bound@1",))
    made = Combination(kind="blend", weights={free.id: 0.5, bound.id: 0.5})
    blend = card("MIT", id="sha256:" + "3" * 64, origin="combined", parents=(free.id, bound.id), combination=made)
    assert effective_licence(blend, [free, bound]).commercial == "no"
    assert effective_licence(blend, [free]).commercial == "unknown"
    stored = blend.with_fields(licence=effective_licence(blend, [free, bound]).expression)
    assert len(effective_licence(stored, [free, bound]).sources) == 2  # base, and the data of one part


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.fault)
def test_lists_answer_as_the_command_does(case: Case):
    assert commercial_use(card(case.base, *case.data)) == case.commercial


@pytest.mark.parametrize(
    ("stated", "commercial"),
    [
        ("(MIT AND " * 1500 + "MIT" + ")" * 1500, "unknown"),
        ("(MIT AND " * 150 + "MIT" + ")" * 150, "yes"),
        (" AND ".join(f"(CC-BY-NC-4.0 OR MIT OR X{n})" for n in range(60)), "yes"),
        (" AND ".join(f"(X{n} OR Y{n})" for n in range(30)), "unknown"),
        (" OR ".join(f"Zq{n}" for n in range(1500)), "unknown"),
        ("x" * 200_000, "unknown"),
        ("WITH AND OR", "unknown"),
        ("MIT\x00 AND (((", "unknown"),
    ],
    ids=lambda text: text[:12],
)
def test_licences_made_to_take_long_are_read_soon(stated, commercial):
    begun = time.perf_counter()
    asked = card("MIT", stated)
    assert (effective_licence(asked).commercial, commercial_use(asked)) == (commercial, commercial)
    assert time.perf_counter() - begun < 5
