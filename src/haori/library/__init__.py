"""The library: adapters on disk, the proof of each, and what may be done with them.

The only meeting place of the project: training writes adapters here, everything else reads them. Importing this
package is light; each name is loaded when it is first used.
"""

from typing import TYPE_CHECKING

from haori.core.lazy_exports import lazy_exports

if TYPE_CHECKING:
    from haori.library.adapter_files import AdapterFiles, inspect_adapter
    from haori.library.adapter_names import name_for
    from haori.library.attaching import attach, attach_files, check_base
    from haori.library.bill_of_materials import model_bom
    from haori.library.combining.blending import BlendOptions
    from haori.library.combining.stored import Combined, blend_stored, extract_stored, resize_stored
    from haori.library.compatibility import Compatibility, check_compatibility, compatibility_table
    from haori.library.exporting import export_stored
    from haori.library.families import reference_of
    from haori.library.format_export import convert_adapter, convert_stored
    from haori.library.format_folders import export_in_format
    from haori.library.formats.peft import export_peft
    from haori.library.importer import import_adapter
    from haori.library.licences.attribution import attribution_text
    from haori.library.licences.verdict import LicenceVerdict, effective_licence
    from haori.library.lineage import ancestors, lineage_tree
    from haori.library.merge import Merged, merge_adapter
    from haori.library.model_cards.text import model_card_of, render_model_card, write_model_card
    from haori.library.opened import OpenAdapter, base_of, merge_stored, open_adapter, verify_stored
    from haori.library.prompt_formats import joint_format, prompt_format, stored_template
    from haori.library.proof.logits import (
        LogitDifference,
        adapter_probes,
        compare_logits,
        default_probes,
        live_probe_logits,
    )
    from haori.library.proof.model import verify_model
    from haori.library.proof.verify import require_passed, verify_adapter
    from haori.library.show import card_table, licence_line, licence_table, list_table, verification_table
    from haori.library.signing import (
        is_key_encrypted,
        sign_stored,
        signed_with,
        verify_signed_folder,
        verify_stored_signature,
    )
    from haori.library.specs import Names
    from haori.library.store import Library, Rebuilt, StoredAdapter, adapter_id, check_name, draft_card

__all__ = [
    "AdapterFiles",
    "BlendOptions",
    "Combined",
    "Compatibility",
    "Library",
    "LicenceVerdict",
    "LogitDifference",
    "Merged",
    "Names",
    "OpenAdapter",
    "Rebuilt",
    "StoredAdapter",
    "adapter_id",
    "adapter_probes",
    "ancestors",
    "attach",
    "attach_files",
    "attribution_text",
    "base_of",
    "blend_stored",
    "card_table",
    "check_base",
    "check_compatibility",
    "check_name",
    "compare_logits",
    "compatibility_table",
    "convert_adapter",
    "convert_stored",
    "default_probes",
    "draft_card",
    "effective_licence",
    "export_in_format",
    "export_peft",
    "export_stored",
    "extract_stored",
    "import_adapter",
    "inspect_adapter",
    "is_key_encrypted",
    "joint_format",
    "licence_line",
    "licence_table",
    "lineage_tree",
    "list_table",
    "live_probe_logits",
    "merge_adapter",
    "merge_stored",
    "model_bom",
    "model_card_of",
    "name_for",
    "open_adapter",
    "prompt_format",
    "reference_of",
    "render_model_card",
    "require_passed",
    "resize_stored",
    "sign_stored",
    "signed_with",
    "stored_template",
    "verification_table",
    "verify_adapter",
    "verify_model",
    "verify_signed_folder",
    "verify_stored",
    "verify_stored_signature",
    "write_model_card",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "adapter_files": ("AdapterFiles", "inspect_adapter"),
        "adapter_names": ("name_for",),
        "licences.attribution": ("attribution_text",),
        "attaching": ("attach", "attach_files", "check_base"),
        "bill_of_materials": ("model_bom",),
        "compatibility": ("Compatibility", "check_compatibility", "compatibility_table"),
        "format_export": ("convert_adapter", "convert_stored"),
        "combining.blending": ("BlendOptions",),
        "combining.stored": ("Combined", "blend_stored", "extract_stored", "resize_stored"),
        "exporting": ("export_stored",),
        "families": ("reference_of",),
        "format_folders": ("export_in_format",),
        "formats.peft": ("export_peft",),
        "importer": ("import_adapter",),
        "licences.verdict": ("LicenceVerdict", "effective_licence"),
        "lineage": ("ancestors", "lineage_tree"),
        "proof.logits": ("LogitDifference", "adapter_probes", "compare_logits", "default_probes", "live_probe_logits"),
        "merge": ("Merged", "merge_adapter"),
        "model_cards.text": ("model_card_of", "render_model_card", "write_model_card"),
        "proof.model": ("verify_model",),
        "opened": ("OpenAdapter", "base_of", "merge_stored", "open_adapter", "verify_stored"),
        "prompt_formats": ("joint_format", "prompt_format", "stored_template"),
        "show": ("card_table", "licence_line", "licence_table", "list_table", "verification_table"),
        "signing": (
            "is_key_encrypted",
            "sign_stored",
            "signed_with",
            "verify_signed_folder",
            "verify_stored_signature",
        ),
        "specs": ("Names",),
        "store": ("Library", "Rebuilt", "StoredAdapter", "adapter_id", "check_name", "draft_card"),
        "proof.verify": ("require_passed", "verify_adapter"),
    },
)
