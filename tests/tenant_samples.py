"""Rows, tenants and oracles in float64 for the tests of training sessions."""

import copy

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from haori.bases import find_base, load_model
from haori.jobs.tenants.records import AdapterSpec, Datum

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def rows(lengths, seed=0, vocabulary=300, *, kind="cross_entropy", soft=0):
    """Draw rows with whatever a loss reads; ratios spread so that every clip acts on some tokens."""
    draw = np.random.default_rng(seed)
    found = []
    for length in lengths:
        shape = (length, soft) if soft else (length,)
        inputs = {"target_tokens": draw.integers(5, vocabulary, shape)}
        if kind == "cross_entropy":
            inputs["weights"] = (draw.random(shape) * (draw.random(shape) > 0.4)).astype(np.float32)
        else:
            inputs["logprobs"] = (-6 + draw.normal(0, 0.5, shape)).astype(np.float32)
            inputs["advantages"] = (draw.normal(0, 1, shape) * (np.arange(length) > 1)).astype(np.float32)
        if kind == "gspo":
            inputs["sequence_ratio_mask"] = (np.arange(length) > 1).astype(np.float32)
        found.append(Datum(draw.integers(5, vocabulary, length), inputs))
    return found


class Oracle:
    """Stock PEFT in float64, one row at a time, with losses written as their papers do, for autograd."""

    def __init__(self, base, spec: AdapterSpec, targets=None):
        model = load_model(find_base(str(base)), dtype="fp32", device="cpu")
        torch.manual_seed(spec.seed)
        names = targets or [*ALL, *(["lm_head"] if spec.train_unembed else [])]
        self.peft = get_peft_model(model, LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=names))
        self.fresh = copy.deepcopy(self.factors())
        self.peft = self.peft.double()

    def factors(self):
        return {
            name.replace("base_model.model.", "").replace(".default.weight", ""): value.detach()
            for name, value in self.peft.named_parameters()
            if "lora_" in name
        }

    def gradients(self):
        return {
            name.replace("base_model.model.", "").replace(".default.weight", ""): value.grad
            for name, value in self.peft.named_parameters()
            if "lora_" in name
        }

    def set(self, factors):
        with torch.no_grad():
            for name, value in self.factors().items():
                value.copy_(factors[name])

    def logprobs(self, datum):
        logits = self.peft(input_ids=torch.from_numpy(datum.tokens)[None], use_cache=False).logits[0]
        targets = torch.from_numpy(datum.inputs["target_tokens"])
        flat = targets[:, None] if targets.dim() == 1 else targets
        return torch.log_softmax(logits, -1).gather(1, flat).view(targets.shape)

    def backward(self, data, loss, config, *, scale=1.0):
        total, scored = 0.0, []
        for datum in data:
            logp = self.logprobs(datum)
            value = scale * formula(
                loss, logp, {k: torch.from_numpy(v).double() for k, v in datum.inputs.items()}, config
            )
            if value.requires_grad:
                value.backward()
            total += float(value.detach())
            scored.append(logp.detach().float().numpy())
        return total, scored


def formula(loss, logp, given, config):
    if loss == "cross_entropy":
        return -(logp * given["weights"]).sum()
    q, advantages = given["logprobs"], given["advantages"]
    ratio = torch.exp(logp - q)
    low, high = config.get("clip_low_threshold"), config.get("clip_high_threshold")
    if loss == "importance_sampling":
        return -(ratio * advantages).sum()
    if loss == "cispo":
        return -(torch.clamp(ratio, low, high).detach() * logp * advantages).sum()
    if loss == "dro":
        return -(logp * advantages - 0.5 * config["beta"] * (logp - q) ** 2).sum()
    if loss == "gspo":
        mean = (logp.detach() - q)[given["sequence_ratio_mask"] != 0].mean()
        ratio = torch.exp(mean + logp - logp.detach())
    return -torch.min(ratio * advantages, torch.clamp(ratio, low, high) * advantages).sum()
