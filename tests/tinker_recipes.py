"""Runs a recipe of tinker-cookbook as it is: `tinker_recipes.py sl_loop TOKENIZER MODEL key=value...`.

Only what would come from a hub is local: the data set, and the tokenizer of the model's name.
"""

import sys

import chz
import datasets
from tinker_cookbook import tokenizer_utils
from transformers import AutoTokenizer

ROWS = 32


def said(role, content):
    return {"role": role, "content": content}


def load_dataset(name, *_, **__):
    if name == "HuggingFaceH4/no_robots":
        rows = [
            {"messages": [said("user", f"Is {n} odd?"), said("assistant", "yes" if n % 2 else "no")]}
            for n in range(ROWS)
        ]  # fmt: skip
    elif name == "openai/gsm8k":
        rows = [{"question": f"What is {n} + 1?", "answer": f"It is #### {n + 1}"} for n in range(ROWS)]
    else:
        raise AssertionError(f"the recipe asks for {name}")
    return datasets.DatasetDict(train=datasets.Dataset.from_list(rows))


def main():
    name, tokenizer, model, *arguments = sys.argv[1:]
    datasets.load_dataset = load_dataset
    tokenizer_utils.register_tokenizer(model, lambda: AutoTokenizer.from_pretrained(tokenizer))
    if name == "sl_loop":
        from tinker_cookbook.recipes import sl_loop as recipe
    else:
        from tinker_cookbook.recipes import rl_loop as recipe
    sys.argv = [name, f"model_name={model}", *arguments]
    chz.nested_entrypoint(recipe.main)


if __name__ == "__main__":
    main()
