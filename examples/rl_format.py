"""Teach a model to answer in one short sentence, by reward alone: `python examples/rl_format.py [base] [steps]`.

Advantages are rewards less their mean over the answers to a question, as in GRPO (arXiv 2402.03300).
"""

import re
import sys

import matplotlib.pyplot as plt

import haori

base, steps = (sys.argv[1:] + ["smollm2-135m-instruct", "24"][len(sys.argv) - 1 :])[:2]
things = "the sea, a cat, winter, bread, the moon, a train, music, a garden, coffee, rain, a book, fire".split(", ")


def reward(text: str, ended: bool) -> float:
    """Return 1 for one sentence of at most ten words that the model ended itself, else 0."""
    is_sentence = re.fullmatch(r"[A-Z][^.!?\n]*\.", text) is not None
    return float(ended and is_sentence and len(text.split()) <= 10)


client = haori.training_client(base, rank=16, seed=0)
curve = []
for step in range(int(steps)):
    data, rewards = [], []
    for thing in (things[(3 * step + number) % len(things)] for number in range(3)):
        question = [{"role": "user", "content": f"Say something about {thing} in one short sentence."}]
        samples = client.sample(question, n=8, max_tokens=20, seed=1000 * step)
        scores = [reward(sample.text, sample.ended) for sample in samples]
        mean = sum(scores) / len(scores)
        data += [sample.datum(score - mean) for sample, score in zip(samples, scores, strict=True) if score != mean]
        rewards += scores
    curve.append(sum(rewards) / len(rewards))
    print(f"step {step:3}  reward {curve[-1]:.2f}", flush=True)
    if data:
        client.forward_backward(data, "importance_sampling")
        client.optim_step(learning_rate=3e-4, grad_clip_norm=1.0)
client.save("rl_format")
client.close()
plt.plot(curve, marker=".")
plt.gca().set(xlabel="optimizer step", ylabel="mean reward", ylim=(0, 1), title="One short sentence, by reward alone")
plt.savefig("rl_format.png", dpi=110)
