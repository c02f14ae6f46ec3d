"""llama.cpp in an environment of its own: one request, greedy; seconds are those from the first token to the last."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve


def to_q8_0(source: Path, out: Path) -> None:
    """Write the same model in llama.cpp's own 8-bit format."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0
    options.allow_requantize = True
    stage = out.with_name(f".{out.name}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(stage).encode(), options):
        raise RuntimeError(f"llama.cpp could not quantise {source.name}")
    stage.rename(out)


def decode(model: Any, prompt: list[int], new_tokens: int) -> tuple[float, int]:
    """Answer greedily; return the seconds and the tokens after the first."""
    import numpy as np

    def likeliest() -> int:
        return int(np.ctypeslib.as_array(model._ctx.get_logits_ith(-1), shape=(model.n_vocab(),)).argmax())

    model.reset()
    model._ctx.kv_cache_clear()
    model.eval(prompt)
    token = likeliest()
    started = time.perf_counter()
    for _ in range(new_tokens - 1):
        model.eval([token])
        token = likeliest()
    return time.perf_counter() - started, new_tokens - 1


def main(spec: dict[str, Any]) -> None:
    """Carry out orders until there are no more."""
    import llama_cpp

    file = Path(spec["gguf"])
    if not file.is_file():
        to_q8_0(Path(spec["source"]), file)
    threads = len(os.sched_getaffinity(0))
    model = llama_cpp.Llama(str(file), n_ctx=1024, n_threads=threads, n_threads_batch=threads, verbose=False)
    serve({"file_bytes": file.stat().st_size})
    for line in sys.stdin:
        order = json.loads(line)
        seconds, tokens = decode(model, order["groups"][0]["requests"][0][0], order["new_tokens"])
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
