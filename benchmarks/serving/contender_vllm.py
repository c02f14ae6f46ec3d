"""vLLM on the CPU, in an environment of its own: eager, bf16, adapters through its own LoRA support."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve
from workload import RANK, adapter_folder


def load(spec: dict[str, Any]) -> Any:
    """Start vLLM within this process."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    }  # fmt: skip
    from vllm import LLM

    loaded = spec["loaded"]
    adapters = {"enable_lora": True, "max_loras": loaded, "max_lora_rank": RANK} if loaded else {}
    return LLM(
        spec["base"], dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=spec["in_flight"],
        enable_prefix_caching=False, **adapters,
    )  # fmt: skip


def main(spec: dict[str, Any]) -> None:
    """Carry out orders until there are no more."""
    llm = load(spec)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    root = Path(spec["adapters"])
    named = [LoRARequest(str(n), n + 1, str(adapter_folder(root, n))) for n in range(spec["loaded"])]
    serve({})
    for line in sys.stdin:
        order = json.loads(line)
        requests = order["groups"][0]["requests"]
        sampling = SamplingParams(temperature=0.0, max_tokens=order["new_tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
        chosen = [None if adapter is None else named[adapter] for _, adapter in requests] if named else None
        started = time.perf_counter()
        outputs = llm.generate(prompts, sampling, lora_request=chosen, use_tqdm=False)
        seconds = time.perf_counter() - started
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
