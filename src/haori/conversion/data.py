"""Formats of data as other tools name them: what each is here, and what of it differs."""

from haori.conversion.draft import Draft

__all__ = ["carry_alpaca", "carry_messages", "combine_files", "combine_pairs", "combine_system"]

_TEMPLATE = "the prompt is made by the base's chat template, not by Alpaca's own words"
_BUILDERS = frozenset({"json", "csv", "parquet", "text", "arrow"})
_PAIRS = {
    "prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "completion": "completion",
    "response": "completion", "label": "label", "system": "system",
}  # fmt: skip
_SYSTEM = ("system", "system_prompt")


def carry_alpaca(draft: Draft, *names: str) -> None:
    """Carry facts that say that rows hold instruction, input and output."""
    draft.carry(names, {"data.format": "alpaca"}, _TEMPLATE)


def carry_messages(draft: Draft, names: tuple[str, ...], column: str) -> None:
    """Carry facts that say that a column holds messages."""
    known = {"messages": "messages", "conversations": "sharegpt"}.get(column)
    draft.carry(names, {"data.format": known} if known else {"data.columns.messages": column})


def combine_files(draft: Draft) -> None:
    """Settle the fact `files`: local files beside the name of a builder of `datasets`, such as `json`."""
    files = draft.value("files")
    if not draft.has("data") or draft.value("data") not in _BUILDERS:
        draft.leave("files", "single files of a dataset cannot be chosen", "download it and name the file in data.path")
    elif isinstance(files, str) or (isinstance(files, list) and len(files) == 1 and isinstance(files[0], str)):
        draft.carry(("files", "data"), {"data.path": files if isinstance(files, str) else files[0]})
    else:
        draft.leave("files", "a recipe reads one file or folder", "put the files into one folder, as data.path")
        draft.unneeded("data", "it names no data, but how to read it")
        draft.no_data = "it names several files; put them into one folder"


def combine_pairs(draft: Draft) -> None:
    """Carry facts that name the columns of preferred answers; their format is found from them."""
    for name, role in _PAIRS.items():
        if draft.has(f"column_{name}"):
            draft.carry(f"column_{name}", {f"data.columns.{role}": draft.value(f"column_{name}")})
    for name in ("type", "formatting", "column_query", "column_history", "column_messages"):
        draft.leave(name, "prompts and answers are known by their columns", "data.columns, or the usual names")


def combine_system(draft: Draft, name: str) -> None:
    """Settle a fact that names the column of the system message."""
    mapped = any(key in draft.ours for key in ("data.columns.prompt", "data.columns.messages"))
    if mapped:
        draft.carry(name, {"data.columns.system": draft.value(name)} if draft.has(name) else {})
    elif draft.value(name) in _SYSTEM:
        draft.unneeded(name, "the column is read by its name")
    else:
        draft.leave(name, "beside a known format the column is named system or system_prompt", "rename the column")
