"""PEFT on transformers' generate: static batches; requests with different adapters through `adapter_names`."""

import json
import sys
import time
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve
from workload import Request, adapter_folder

warnings.filterwarnings("ignore")


def load(spec: dict[str, Any]) -> Any:
    """Load the base in bf16 and the adapters over it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(spec["base"], dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None  # answers are of one length
    root = Path(spec["adapters"])
    for number in range(spec["loaded"]):
        folder = adapter_folder(root, number)
        if number:
            model.load_adapter(folder, str(number), autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        else:
            model = PeftModel.from_pretrained(model, folder, "0", autocast_adapter_dtype=False)
    return model.eval()


def generate(model: Any, requests: list[Request], new_tokens: int) -> int:
    """Answer one batch; return how many tokens were made."""
    import torch

    longest = max(len(prompt) for prompt, _ in requests)
    ids = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(requests):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    adapters = {adapter for _, adapter in requests}
    context: Any = nullcontext()
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0}
    if len(adapters) > 1:
        options["adapter_names"] = ["__base__" if adapter is None else str(adapter) for _, adapter in requests]
    elif None not in adapters:
        model.set_adapter(str(next(iter(adapters))))  # faster than naming the same adapter for every row
    elif hasattr(model, "disable_adapter"):
        context = model.disable_adapter()
    with torch.inference_mode(), context:
        out = model.generate(input_ids=ids, attention_mask=mask, **options)
    return int(out.shape[0] * (out.shape[1] - longest))


def main(spec: dict[str, Any]) -> None:
    """Carry out orders until there are no more."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    model = load(spec)
    serve({})
    for line in sys.stdin:
        order = json.loads(line)
        started = time.perf_counter()
        tokens = generate(model, order["groups"][0]["requests"], order["new_tokens"])
        print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
