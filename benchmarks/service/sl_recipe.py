"""Runs tinker-cookbook's supervised loop as it is: `sl_recipe.py TOKENIZER MODEL ROWS.jsonl key=value...`.

Only what would come from a hub is local: the data set, and the tokenizer of the model's name.
"""

import json
import sys
from pathlib import Path
from typing import Any

import chz
import datasets
from tinker_cookbook import tokenizer_utils
from tinker_cookbook.recipes import sl_loop
from transformers import AutoTokenizer


def main() -> None:
    """Run it."""
    tokenizer, model, rows, *arguments = sys.argv[1:]
    held = [json.loads(line) for line in Path(rows).read_text().splitlines()]

    def load_dataset(*_: Any, **__: Any) -> datasets.DatasetDict:
        return datasets.DatasetDict(train=datasets.Dataset.from_list(held))

    datasets.load_dataset = load_dataset
    tokenizer_utils.register_tokenizer(model, lambda: AutoTokenizer.from_pretrained(tokenizer))
    sys.argv = ["sl_loop", f"model_name={model}", *arguments]
    chz.nested_entrypoint(sl_loop.main)


if __name__ == "__main__":
    main()
