"""Runs a recipe of tinker-cookbook as it is: `tinker_recipes.py sl_loop key=value...`.

Only the data set, which would come from a hub, is put in its place; the tokenizer is found in the folder of the model's
name, as the guide says.
"""

import sys

import chz
import datasets

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
    name, *arguments = sys.argv[1:]
    datasets.load_dataset = load_dataset
    if name == "sl_loop":
        from tinker_cookbook.recipes import sl_loop as recipe
    else:
        from tinker_cookbook.recipes import rl_loop as recipe
    sys.argv = [name, *arguments]
    chz.nested_entrypoint(recipe.main)


if __name__ == "__main__":
    main()
