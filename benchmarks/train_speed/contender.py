"""One system that trains SmolLM2 step by step on command: Haori, or PEFT with the Trainer of transformers.

Both get the same rows in the same steps. A step is measured from taking its rows to the optimizer's update.
"""

import json
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve

warnings.filterwarnings("ignore")


def say(seconds: float, tokens: int, loss: float) -> None:
    """Report a step."""
    import torch

    from haori.training.memory import peak_memory_bytes

    peak = peak_memory_bytes("cuda" if torch.cuda.is_available() else "cpu")
    print(json.dumps({"seconds": seconds, "tokens": tokens, "loss": loss, "peak_bytes": peak}), flush=True)


def prepared_of(spec: dict[str, Any]) -> Any:
    """Prepare the recipe of a spec: data, base, targets."""
    from haori.tasks.recipe import recipe_from
    from haori.training import prepare

    return prepare(recipe_from(spec["recipe"]))


def steps_of(prepared: Any) -> list[list[list[int]]]:
    """Return the optimizer steps of the first epoch."""
    from haori.training.batches import epoch_steps

    return epoch_steps(list(prepared.train.costs), prepared.recipe.training, 0)


def run_haori(spec: dict[str, Any]) -> None:
    """Train through the loop that `haori train` uses."""
    from haori.training.session import opened_loop

    prepared = prepared_of(spec)
    steps = steps_of(prepared)
    with tempfile.TemporaryDirectory() as folder, opened_loop(prepared, Path(folder)) as loop:
        serve({"steps": len(steps)})
        for index, _ in enumerate(sys.stdin):
            rows = steps[index % len(steps)]
            started = time.perf_counter()
            loop.step(rows, last_of_epoch=False)  # ends by reading the loss, so a GPU has finished too
            seconds = time.perf_counter() - started
            line = loop.measurements.series("train")[-1]
            say(seconds, int(line["tokens"]), line["loss"])


def run_peft(spec: dict[str, Any]) -> None:
    """Train through PEFT and the Trainer, with the settings of the spec."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.helpers import disable_input_dtype_casting
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )
    from transformers.utils import logging

    logging.set_verbosity_error()
    prepared = prepared_of(spec)
    steps = [[row for micro in step for row in micro] for step in steps_of(prepared)]
    lengths = list(prepared.train.costs)
    options = spec["options"]
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        prepared.base.path, dtype=getattr(torch, options["base"]), attn_implementation=options["attention"],
        device_map={"": prepared.device}, quantization_config=four_bit if options.get("four_bit") else None,
    )  # fmt: skip
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(model, config, autocast_adapter_dtype=options["adapter"] == "float32")
    data = [
        {"input_ids": row["input_ids"], "labels": row["labels"], "attention_mask": [1] * row["length"]}
        for row in prepared.split.train
    ]

    class Told(TrainerCallback):  # type: ignore[misc]
        """Waits for the command before each step and reports after it."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not sys.stdin.readline():
                sys.exit(0)
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = time.perf_counter() - self.started
            rows = steps[(state.global_step - 1) % len(steps)]
            say(seconds, sum(lengths[row] for row in rows), 0.0)

    class Same(Trainer):  # type: ignore[misc]
        """The Trainer on given steps."""

        def get_train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(data, batch_sampler=steps, collate_fn=self.data_collator)

    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(), max_steps=100_000, learning_rate=5e-4, use_cpu=prepared.device == "cpu",
        report_to=[],
        bf16=options["autocast"], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(prepared.processor, padding=True)
    trainer = Same(model=model, args=arguments, data_collator=collator, train_dataset=data, callbacks=[Told()])
    serve({"steps": len(steps)})
    with disable_input_dtype_casting(model) if not options["cast"] else nullcontext():
        trainer.train()


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    {"haori": run_haori, "peft": run_peft}[wanted["system"]](wanted)
