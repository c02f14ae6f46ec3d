"""The GPU row of benchmarks/serving: the engine's fast runner with its weights on the GPU, against PEFT's mixed batch.

The 1B shape in bf16, 32 requests in flight, 64 new tokens each, greedy, prompts of 128 words; the base, then 1 and 8
distinct adapters of rank 16 on all linear layers. Both systems take turns in this process on the same requests.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "serving")]
from bases import WORDS, write_base
from contender_haori import Load
from provenance import median
from workload import adapter_folder

if TYPE_CHECKING:
    from haori.bases import Base
    from haori.serve import TextEngine

RANK = 16
DISTINCT = (0, 1, 8)
_B_DEVIATION = 0.02


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", choices=["real", "tiny"], default="real")
    parser.add_argument("--home", type=Path, required=True, help="folder for base and adapters")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system that count")
    return parser.parse_args()


def write_adapters(base: "Base", root: Path) -> None:
    """Write random adapters of rank 16 on all linear layers, in bf16."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base.path))
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    shapes = {
        name.replace(".default", ""): value.shape
        for name, value in get_peft_model(empty, config).named_parameters()
        if "lora_" in name
    }
    for number in range(max(DISTINCT)):
        _write_adapter(adapter_folder(root, number), shapes, config, number)


def _write_adapter(folder: Path, shapes: dict[str, Any], config: Any, seed: int) -> None:
    import torch
    from safetensors.torch import save_file

    if folder.is_dir():
        return
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator)
        .mul_(_B_DEVIATION if "lora_B" in name else shape[1] ** -0.5)
        .bfloat16()
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def open_engine_on(device: str, base: "Base", root: Path, in_flight: int) -> "TextEngine":
    """Open the engine with the fast runner's weights on a device."""
    import torch

    from haori.bases import load_model, load_tokenizer
    from haori.library import inspect_adapter
    from haori.serve import EngineLimits
    from haori.serve.adapters.reading import read_adapter_weights
    from haori.serve.engine.engine import TextEngine
    from haori.serve.models.base_files import BaseFiles
    from haori.serve.models.llama_plan import plan_llama
    from haori.serve.models.llama_runner import LlamaRunner
    from haori.serve.models.llama_weights import lay_out_llama

    plan = plan_llama(load_model(base, dtype="bf16", device="cpu"))
    files = BaseFiles(base.path, plan.linears)
    weights = lay_out_llama(plan, lambda name: files.tensor(name).to(device), "bf16", torch.bfloat16, 2048)
    runner = LlamaRunner(weights, cache_bytes=4 << 30)
    limits = EngineLimits(context_length=2048, running=in_flight, prefix_bytes=0, adapter_bytes=4 << 30)

    def find(adapter: str) -> Any:
        return inspect_adapter(adapter_folder(root, int(adapter)))

    def read(found: Any, adapter: str) -> Any:
        return read_adapter_weights(found, files, adapter=adapter, dtype=torch.bfloat16)

    vocabulary = int(weights.embedding.shape[0])
    return TextEngine(
        base, load_tokenizer(base), runner, find, read, stop_tokens=frozenset(), limits=limits, vocabulary=vocabulary
    )


class Peft:
    """PEFT on transformers' generate, with all adapters loaded."""

    def __init__(self, device: str, base: "Base", root: Path) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16).to(device).eval()
        model.generation_config.eos_token_id = None  # answers are of one length
        model = PeftModel.from_pretrained(model, adapter_folder(root, 0), "0", autocast_adapter_dtype=False)
        for number in range(1, max(DISTINCT)):
            model.load_adapter(adapter_folder(root, number), str(number), autocast_adapter_dtype=False)
        self.model, self.device = model.eval(), device

    def run(self, requests: list[tuple[list[int], int | None]], new_tokens: int) -> tuple[int, float]:
        """Answer one batch; return how many tokens were made, and seconds."""
        import torch

        ids = torch.tensor([prompt for prompt, _ in requests], device=self.device)
        names = ["__base__" if adapter is None else str(adapter) for _, adapter in requests]
        started = time.perf_counter()
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens, do_sample=False,
                pad_token_id=0, adapter_names=names,
            )  # fmt: skip
        made = int(out[:, ids.shape[1] :].numel())
        out.cpu()
        return made, time.perf_counter() - started


def main() -> None:
    """Let both take turns, and print tokens/s and ratios."""
    given = arguments()
    os.environ["HAORI_HOME"] = str(given.home)
    import torch

    from haori.bases import find_base

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape, in_flight, words, new_tokens = ("1B", 32, 128, 64) if given.shapes == "real" else ("tiny", 4, 8, 4)
    base = find_base(str(write_base(given.home / shape, shape)))
    root = given.home / f"adapters-{shape}"
    write_adapters(base, root)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(7, 7 + len(WORDS), (in_flight, words), generator=generator).tolist()
    engine, peft = open_engine_on(device, base, root, in_flight), Peft(device, base, root)
    rates: dict[str, dict[str, list[float]]] = {f"adapters{n}": {"haori": [], "peft": []} for n in DISTINCT}
    for turn in range(1 + given.rounds):
        for distinct in DISTINCT:
            wanted = [(prompt, row % distinct if distinct else None) for row, prompt in enumerate(prompts)]
            started = time.perf_counter()
            order = {"groups": [{"requests": wanted, "in_flight": in_flight}], "new_tokens": new_tokens}
            ours = sum(len(answer.tokens) for answer in Load(engine, order).run())
            our_s = time.perf_counter() - started
            theirs, their_s = peft.run(wanted, new_tokens)
            if turn:
                rates[f"adapters{distinct}"]["haori"].append(ours / our_s)
                rates[f"adapters{distinct}"]["peft"].append(theirs / their_s)
    engine.close()
    found = {
        name: {
            **{system: {"tokens_per_s": median(samples), "samples": samples} for system, samples in by.items()},
            "ratio": median(by["haori"]) / median(by["peft"]),
        }
        for name, by in rates.items()
    }
    print(json.dumps({"device": device, "shape": shape, "in_flight": in_flight, **found}))


if __name__ == "__main__":
    main()
