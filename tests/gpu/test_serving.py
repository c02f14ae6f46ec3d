"""The fast runner with its weights on a GPU: every row gets what the slow runner gives it on the CPU."""

from typing import Any

import pytest
import torch

from haori.serve.adapters.reading import AdapterWeights
from haori.serve.engine.runner import Run
from tests.serve_models import runners, zoo

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "qwen2", "qwen3"])
def test_a_batch_of_adapters_and_blends_equals_the_slow_runner(kind: str, device: str):
    made: list[AdapterWeights] = []

    def adapters(model: Any) -> list[AdapterWeights]:
        made.extend(zoo(model))
        return made

    fast, slow = runners(kind, adapters, device=device)
    mixes = [(), *(((adapter.id, 1.0),) for adapter in made), ((made[0].id, 0.4), (made[1].id, -0.5))]
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (5 + 3 * row,), generator=generator).tolist() for row in range(len(mixes))]
    places = [[runner.cache.open(len(prompt) + 4) for prompt in prompts] for runner in (fast, slow)]
    read = [0] * len(prompts)
    for _ in range(4):
        logits = [
            runner.step(
                [
                    Run(place, start, prompt[start:], mix)
                    for place, start, prompt, mix in zip(own, read, prompts, mixes, strict=True)
                ]
            ).cpu()
            for runner, own in zip((fast, slow), places, strict=True)
        ]
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)
        read = [len(prompt) for prompt in prompts]
        for prompt, token in zip(prompts, logits[1].argmax(-1).tolist(), strict=True):
            prompt.append(token)
        for runner, own in zip((fast, slow), places, strict=True):
            assert all(runner.cache.extend(place, len(prompt)) for place, prompt in zip(own, prompts, strict=True))
