"""The engine's runner with weights in one format: says how likely the general text that comes with the package is.

Passages are read token by token, 16 at a time, as answers are: the steps and kernels are those of decoding.
"""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from provenance import serve

warnings.filterwarnings("ignore")
_TOGETHER = 16
_LONGEST = 200


def main(spec: dict[str, Any]) -> None:
    """Measure whenever told to."""
    from haori.bases import find_base, load_tokenizer
    from haori.serve import EngineLimits
    from haori.serve.opening import open_runner
    from haori.tasks.causal_lm.forgetting_texts import general_texts

    base = find_base(spec["base"])
    limits = EngineLimits(context_length=2048)
    runner = open_runner(base, limits, weights=spec["weights"], cache_bytes=1 << 30).runner
    tokenizer = load_tokenizer(base)
    texts = [tokenizer(passage.text)["input_ids"][:_LONGEST] for passage in general_texts()]
    serve({})
    for _ in sys.stdin:
        nats = tokens = 0.0
        for start in range(0, len(texts), _TOGETHER):
            nats += read(runner, texts[start : start + _TOGETHER])
        tokens = sum(len(text) - 1 for text in texts)
        print(json.dumps({"perplexity": math.exp(nats / tokens), "tokens": tokens}), flush=True)


def read(runner: Any, texts: list[list[int]]) -> float:
    """Return minus the log-probability of passages, first tokens left out."""
    import torch

    from haori.serve.engine.runner import Run

    places = [runner.cache.open(len(text)) for text in texts]
    nats = 0.0
    for at in range(max(map(len, texts)) - 1):
        going = [number for number, text in enumerate(texts) if len(text) > at + 1]
        logits = runner.step([Run(places[number], at, [texts[number][at]], ()) for number in going])
        wanted = torch.tensor([texts[number][at + 1] for number in going])
        nats += float(torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum"))
    for place in places:
        runner.cache.close(place)
    return nats


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
