"""Adapters of the library at work: find the base on the card, attach, answer, verify again, merge.

Finding a base by its card tries where it came from first, and takes only one whose content fits.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haori.core.errors import BaseError, HaoriError, InputError, LibraryError
from haori.core.hashing import hash_parts
from haori.core.methods import QloraMethod
from haori.core.records import MODEL_COMPONENT, AdapterCard, Check, Verification
from haori.library.adapter_names import refuse_base_name
from haori.library.contents import describes, is_single_file
from haori.library.prompt_formats import prompt_format, stored_template
from haori.library.store import Library, StoredAdapter

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase

    from haori.bases import Base
    from haori.core.quantization import Quantization
    from haori.data import PromptFormat

__all__ = ["OpenAdapter", "base_of", "merge_stored", "open_adapter", "require_writer", "verify_stored"]


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter attached to its base, ready to answer.

    Attributes:
        adapter: As the library has it.
        base: Its base.
        model: The base with the adapter.
        prompts: How it is spoken to.
    """

    adapter: StoredAdapter
    base: "Base"
    model: "PeftModel"
    prompts: "PromptFormat"

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """Return the base's tokenizer with the chat template that the adapter was trained with."""
        return self.prompts.tokenizer

    def answer(self, messages: "str | Sequence[Any]", **settings: Any) -> str:
        """Return the adapter's answer to a conversation, or to a single user message.

        Where the messages bring no system message, the one trained with is put in front.

        Args:
            messages: Text of the user, or messages of {role, content}.
            settings: Passed to `haori.bases.generate`: max_new_tokens, temperature, top_p, seed.
        """
        from haori.bases import generate

        require_writer(self.adapter)
        asked: list[Any] = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
        return generate(self.model, self.tokenizer, [self.prompts.prompt(asked)], **settings)[0]

    @contextmanager
    def strength(self, on: bool) -> Iterator[None]:
        """Run a block with the adapter on, or with the bare base."""
        if on:
            yield
        else:
            with self.model.disable_adapter():
                yield


def require_writer(stored: StoredAdapter) -> None:
    """Refuse a classifier, or an adapter for pictures, where text is to be written.

    Raises:
        LibraryError: It is one.
    """
    if stored.card.components != (MODEL_COMPONENT,):
        raise LibraryError(
            f"{stored.name!r} changes {', '.join(stored.card.components)} of a base of pictures and writes no text."
        )
    head = stored.card.head
    if head is not None:
        labels = ", ".join(head.labels[:6]) + (", ..." if len(head.labels) > 6 else "")
        raise LibraryError(
            f"{stored.name!r} is a classifier ({labels}) and writes no text; ask it with "
            f"`haori classify {stored.name} --text ...`."
        )


def open_adapter(
    name: str,
    *,
    base_spec: str | None = None,
    dtype: str = "auto",
    allow_different_weights: bool = False,
    library: Library | None = None,
) -> OpenAdapter:
    """Load an adapter of the library onto its base.

    Args:
        name: `support`, `support@2` or the first digits of an id.
        base_spec: Base to use instead of the one on the card.
        dtype: Dtype of the base; `auto` is fp32 for a classifier, whose head was trained in 32 bits.
        allow_different_weights: Accept a base of the same structure with other weights.
        library: The library; by default the one of this machine.

    Raises:
        LibraryError: There is no such adapter.
        BaseError: Its base is not on this machine and cannot be fetched.
        MismatchError: The base is another one.
    """
    from haori.bases import load_tokenizer
    from haori.library.attaching import attach

    stored = (library or Library()).get(name)
    if stored.card.components != (MODEL_COMPONENT,):
        require_writer(stored)
    base = base_of(stored.card, base_spec)
    refuse_base_name(name, base.name, stored.name)
    prompts = prompt_format(load_tokenizer(base), stored.path, stored.card)
    if dtype == "auto" and stored.card.head is not None:
        dtype = "fp32"
    model = attach(base, stored.path, card=stored.card, dtype=dtype, allow_different_weights=allow_different_weights)
    return OpenAdapter(stored, base, model, prompts)


def base_of(card: AdapterCard, spec: str | None = None) -> "Base":
    """Find the base that a card names, or the one given instead.

    Raises:
        BaseError: Nothing with a fitting name is here.
    """
    from haori.bases import find_base

    if spec is not None:
        return find_base(spec)
    wanted = card.base
    if not wanted.components:
        raise BaseError(
            f"The adapter was added without a base: only the family of its base, {wanted.name}, is known. Give the "
            "base itself with --base."
        )
    kind, _, location = wanted.source.partition(":")
    found: Base | None = None
    problem: HaoriError | None = None
    for candidate in [wanted.name] if kind == "wheel" else [location, wanted.name]:
        try:
            base = find_base(candidate, revision=wanted.revision if kind == "hub" else None)
        except HaoriError as error:
            problem = problem or error
            continue
        if wanted.is_same(base.reference(), card.components):
            return base
        found = found or base
    if found is None:
        raise BaseError(
            f"The base {wanted.name!r} ({wanted.source}, fingerprint {wanted.id}) of this adapter was not "
            f"found: {problem} Give it with --base."
        )
    return found


def verify_stored(library: Library, name: str, *, base_spec: str | None = None) -> Verification:
    """Verify a stored adapter again and keep the result on its card.

    Besides what `verify_adapter` checks, the chat template must be the one trained with. An adapter trained over a
    quantised base is verified over the same.
    """
    from haori.bases import load_tokenizer
    from haori.data import template_hash
    from haori.library.attaching import check_base
    from haori.library.proof.verify import verify_adapter

    stored = library.get(name)
    if is_single_file(stored.path):
        found = _verify_file(stored, base_spec)
        library.update(stored.name, verification=found)
        return found
    base = base_of(stored.card, base_spec)
    check_base(stored.card, base.reference())
    found = verify_adapter(base, stored.path, quantization=_quantization(stored.card))
    if stored.card.template_hash is not None:
        tokenizer = load_tokenizer(base)
        template = stored_template(stored.path)
        used = template_hash(tokenizer) if template is None else hash_parts([template])
        same = stored.card.template_hash == used
        said = "is the one trained with" if same else "is not the one trained with, so answers would differ"
        whose = "the base's chat template" if template is None else "the chat template kept with the adapter"
        check = Check(name="chat template", passed=same, detail=f"{whose} {said}")
        found = found.with_fields(checks=(*found.checks, check), passed=found.passed and same)
    found = _with_earlier(found, stored.card.verification)
    library.update(stored.name, verification=found)
    return found


def _verify_file(stored: StoredAdapter, base_spec: str | None) -> Verification:
    """Prove an adapter of one file again: from the file, and on its base where that is known or given."""
    from haori.library.attaching import check_base
    from haori.library.families import tell_family
    from haori.library.formats.format import open_source
    from haori.library.formats.registry import format_of
    from haori.library.proof.checks import failed, verification_of
    from haori.library.single_file import verify_file

    base = base_of(stored.card, base_spec) if base_spec is not None or stored.card.base.components else None
    if base is not None and stored.card.base.components:
        check_base(stored.card, base.reference())
    if not describes(stored.card, stored.path):
        said = "they are not those that the card describes: they were changed"
        return verification_of([failed("files", said)], "fp32")
    source = open_source(stored.path)
    updates = format_of(source).read(source)
    return verify_file(updates, len(source.tensors), base, tell_family(updates), label=stored.name)


def _quantization(card: AdapterCard) -> "Quantization | None":
    """Return how the base was quantised in training; the recipe is read only where that says something."""
    from haori.adapters.loading import loading_of

    recipe = card.recipe_data if card.method_kind == "qlora" else None
    if recipe is None:
        return None
    method = QloraMethod.model_validate_json(json.dumps(recipe["method"]))
    return loading_of(method, recipe["training"]["dtype"]).quantization


def _with_earlier(found: Verification, earlier: Verification | None) -> Verification:
    """Keep what only the run itself could check: the files are the same, so it holds still."""
    if earlier is None or earlier.dtype != found.dtype:
        return found
    held = {check.name: check for check in earlier.checks if check.passed}
    checks = [held.get(c.name, c) if c.passed and c.detail.startswith("skipped") else c for c in found.checks]
    return found.with_fields(checks=tuple(checks))


def merge_stored(
    name: str,
    out: Path,
    *,
    base_spec: str | None = None,
    dtype: str | None = None,
    stream: bool = False,
    allow_different_weights: bool = False,
    library: Library | None = None,
) -> Path:
    """Merge a stored adapter into its base and write the result to a new folder.

    A base of images is merged tensor by tensor on disk, and so is a text model that does not fit in memory three times;
    any other text model is loaded, and proved by what it computes.

    Args:
        name: The adapter.
        out: The new folder.
        base_spec: Base to use instead of the one on the card.
        dtype: `bf16` or `fp16`, bf16 by default; on disk every tensor keeps its own.
        stream: Merge on disk in any case.
        allow_different_weights: Accept a base of the same structure with other weights.
        library: The library; by default the one of this machine.

    Raises:
        InputError: A dtype was given where every tensor keeps its own.
        BaseError: The base is quantised: merging would change the result.
        MismatchError: The base is another one.
        VerificationError: The merged model does not answer as base and adapter do.
    """
    from haori.library.checkpoints.stored import merge_on_disk, needs_disk
    from haori.library.merge import merge_adapter

    stored = (library or Library()).get(name)
    base = base_of(stored.card, base_spec)
    if stream or needs_disk(base):
        if dtype is not None:
            raise InputError(f"{base.name!r} is merged tensor by tensor, and each keeps its dtype; leave --dtype out.")
        merge_on_disk(stored, base, out, allow_different_weights=allow_different_weights)
        return out
    merge_adapter(
        base, stored.path, out, dtype=dtype or "bf16", card=stored.card,
        allow_different_weights=allow_different_weights,
    )  # fmt: skip
    return out
