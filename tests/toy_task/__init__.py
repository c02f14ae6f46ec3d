"""A deliberately tiny task of another shape than the shipped ones: one number per text, learnt by squared error.

Rows are `{"text": ..., "sign": -1 or 1}`; the model's answer is the logit of one token after the last character. A test
copies this folder into `haori/tasks/toy`, adds the line of the registry, and uses it like any other task.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from haori.core.errors import DataError
from haori.core.hashing import hash_data
from haori.core.records import DataReference
from haori.data.section import DataSection
from haori.tasks.recipe import Recipe, TokenTraining
from haori.tasks.task import Choice, LossSum, Size, Task
from haori.tasks.token_budgets import Lengths, choose_budgets

__all__ = ["RECIPE", "TASK"]

_TOKEN = 7


class Row(NamedTuple):
    index: int
    origin: str
    text: str
    sign: int

    @property
    def reference(self) -> str:
        return "+" if self.sign > 0 else "-"

    @property
    def trained_tokens(self) -> int:
        return 1


class Rows(list):
    """A part of the split, which can be picked from by row number."""

    def select(self, places: Sequence[int]) -> "Rows":
        return Rows(self[place] for place in places)


@dataclass(frozen=True)
class ToySplit:
    source: str
    train: Rows
    validation: Rows
    notes: tuple[str, ...] = ()
    refused: bool = False

    def reference(self) -> DataReference:
        rows = {"train": len(self.train), "validation": len(self.validation)}
        content = hash_data([[row.text, row.sign] for row in (*self.train, *self.validation)])
        return DataReference(source=self.source, hash=content, format="toy", rows=rows)

    def table(self) -> str:
        return f"{len(self.train)} training rows, {len(self.validation)} held out"


class ToyRecipe(Recipe):
    task: Literal["toy"] = Field(default="toy", description="What is learnt.")
    data: DataSection
    training: TokenTraining = Field(default_factory=TokenTraining)


class Batch(NamedTuple):
    ids: Any
    mask: Any
    last: Any
    signs: Any
    weight: int
    rows: tuple[int, ...]


class ToyObjective:
    separable = True

    def __init__(self, data: Rows, tokenizer: Any) -> None:
        self.data = data
        self.encoded = [list(tokenizer(row.text)["input_ids"]) for row in data]
        self.costs = [len(ids) for ids in self.encoded]

    def begin(self, model: Any) -> None:
        pass

    def batch(self, rows: Sequence[int], device: Any = "cpu") -> Batch:
        import torch

        found = [self.encoded[row] for row in rows]
        width = max(map(len, found))
        ids = torch.tensor([one + [0] * (width - len(one)) for one in found], device=device)
        mask = torch.tensor([[1] * len(one) + [0] * (width - len(one)) for one in found], device=device)
        signs = torch.tensor([float(self.data[row].sign) for row in rows], device=device)
        return Batch(ids, mask, mask.sum(1) - 1, signs, 1, tuple(rows))

    def blank(self, batch: Batch) -> Batch:
        return batch._replace(weight=0)

    def size(self, batch: Batch) -> Size:
        return Size(batch.weight * len(batch.rows), int(batch.mask.sum()))

    def loss(self, model: Any, batch: Batch) -> LossSum:
        import torch

        each = (answers(model, batch.ids, batch.mask, batch.last) - batch.signs).square() * batch.weight
        right = ((each < 1).float() * batch.weight).sum().detach()
        return LossSum(each.sum(), batch.weight * len(each), each.detach(), torch.arange(len(each)), {"right": right})

    def part(self, batch: Batch, places: Sequence[int]) -> Batch:
        chosen = list(places)
        tensors = (one[chosen] for one in (batch.ids, batch.mask, batch.last, batch.signs))
        return Batch(*tensors, batch.weight, tuple(batch.rows[place] for place in chosen))

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"input_ids": batch.ids, "attention_mask": batch.mask}

    def origins(self, rows: Sequence[int]) -> list[str]:
        return [self.data[row].origin for row in rows]


def answers(model: Any, ids: Any, mask: Any, last: Any) -> Any:
    logits = model(input_ids=ids, attention_mask=mask).logits
    return logits[range(len(ids)), last, _TOKEN].float()


class ToyExamination:
    labels = ("+", "-")

    def __init__(self, rows: Sequence[Row], tokenizer: Any) -> None:
        self.rows = list(rows)
        self.objective = ToyObjective(Rows(rows), tokenizer)

    def score(self, model: Any, system: str) -> Any:
        import numpy as np
        import torch

        from haori.metrics.statistics import mean_sums
        from haori.tasks.examination import Answer, Measured, Scores

        with torch.no_grad():
            batch = self.objective.batch(range(len(self.rows)))
            values = answers(model, batch.ids, batch.mask, batch.last).tolist()
        right = np.array([(value > 0) == (row.sign > 0) for value, row in zip(values, self.rows, strict=True)])
        given = {
            row.index: Answer(label="+" if v > 0 else "-", score=v) for v, row in zip(values, self.rows, strict=True)
        }
        return Scores({"accuracy": Measured(float(right.mean()), mean_sums(right))}, given, {"accuracy": right})

    def notes(self, adapter: Any, base: Any) -> list[str]:
        return ["An answer is the sign of one logit."]

    def sampled(self, scores: Any) -> list[Row]:
        return self.rows

    def prompt(self, row: Row) -> tuple[Any, ...]:
        from haori.tasks.examination import Turn

        return (Turn("text", row.text),)

    def answers(self, model: Any, system: str, rows: Sequence[Row], scores: Any) -> list[Any]:
        return [scores.answers[row.index] for row in rows]

    def sample_note(self) -> str:
        return ""


class Toy(Task):
    kind = "toy"
    title = "the sign of a text"
    unit = "tokens"
    counted = "rows"

    def peft_type(self, recipe):
        return "CAUSAL_LM"

    def check(self, recipe: Any, base: Any) -> None:
        pass

    def rows(self, recipe: Any, base: Any, processor: Any, *, tolerant: bool = False) -> ToySplit:
        found, _, _ = self.read(recipe.data)
        held = max(1, round(recipe.data.validation_share * len(found))) if recipe.data.validation_share else 0
        return ToySplit(recipe.data.path, Rows(found[held:]), Rows(found[:held]))

    def show(self, rows: Any, processor: Any, count: int) -> list[Any]:
        return [f"{row.text} -> {row.reference}" for row in rows[:count]]

    def resolve(self, recipe: Any, split: Any, base: Any, device: str) -> tuple[Any, tuple[Choice, ...]]:
        lengths = Lengths.of([len(row.text) for row in split.train], [len(row.text) for row in split.validation])
        training, choices = choose_budgets(recipe.training, lengths, device)
        return recipe.model_copy(update={"training": training}), choices

    def objective(self, rows: Any, processor: Any, recipe: Any) -> ToyObjective:
        return ToyObjective(rows, processor)

    def probes(self, processor: Any, recipe: Any, split: Any) -> list[Any]:
        return [list(processor(row.text)["input_ids"]) for row in split.train[:3]]

    def read(self, section: Any) -> tuple[list[Row], DataReference, tuple[str, ...]]:
        path = Path(section.path)
        if not path.is_file():
            raise DataError(f"There is no file {section.path!r}.")
        found = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            row = json.loads(line)
            if not isinstance(row.get("text"), str) or row.get("sign") not in (-1, 1):
                raise DataError(f"{path.name}:{number} needs a text and a sign of -1 or 1.")
            found.append(Row(number - 1, f"{path.name}:{number}", row["text"], row["sign"]))
        return found, ToySplit(section.path, Rows(found), Rows()).reference(), ()

    def held_out(self, split: Any) -> list[Row]:
        return list(split.validation)

    def examine(self, model: Any, processor: Any, rows: Any, options: Any) -> ToyExamination:
        return ToyExamination(rows, processor)

    def statistics(self, rows: Any, labels: Any) -> dict[str, Any]:
        from haori.metrics.statistics import mean_sums

        return {"accuracy": mean_sums([row.label == row.reference for row in rows])}


RECIPE = ToyRecipe
TASK = Toy()
