"""The training API's addresses for sampling, by the engine that serves."""

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request

from haori.jobs.sessions.records import SampleCall
from haori.jobs.sessions.samplers import Sampler, sampler_id
from haori.jobs.sessions.service import Turn
from haori.serve.request import AdapterMix, Sampling
from haori.server.access import Caller, caller_of
from haori.server.errors import ApiError
from haori.server.tinker.fields import CreateSamplingSession, Sample
from haori.server.tinker.routes_training import check_path
from haori.server.tinker.serving import claim_key, key_of, promised, training_of
from haori.server.tinker.targets import Targets, read_targets

__all__ = ["router"]

router = APIRouter(prefix="/api/v1", tags=["training"])


@dataclass(frozen=True)
class AskedCall(SampleCall):
    """A call with the fields that say how its answer is written."""

    asked: Sample | None = None
    table: Targets | None = field(default=None, compare=False)


@router.post("/create_sampling_session")
def create_sampling_session(asked: CreateSamplingSession, request: Request) -> dict[str, Any]:
    """Make a sampler of the base, of a checkpoint, or of a library adapter (`library:NAME`)."""
    service, caller = training_of(request), _sampler_of(request)
    service.clients.find(asked.session_id, caller.account)
    if asked.base_model is not None:
        service.check_base(asked.base_model)
    elif asked.model_path is None:
        raise ApiError(400, "Give base_model, or model_path of a checkpoint.", param="base_model")
    _check_use(caller, service.base.name, asked.model_path)
    identity = sampler_id(asked.session_id, asked.sampling_session_seq_id)
    path = asked.model_path
    if path is not None:
        path = service.sampled_path(identity, path, caller.account)
    claim_key(request, asked, identity)
    if not service.samplers.holds(identity, caller.account, path):
        mix = service.mix_of(identity, path, caller.account)
        service.samplers.add(identity, asked.session_id, caller.account, path, mix)
    return {"type": "create_sampling_session", "sampling_session_id": identity}


@router.get("/samplers/{sampler}")
def get_sampler(sampler: str, request: Request) -> dict[str, Any]:
    """Tell of a sampler."""
    service, caller = training_of(request), _sampler_of(request)
    found = _found(request, sampler, caller)
    path = None if found.path is None or found.path.startswith("live:") else found.path
    return {"sampler_id": found.id, "base_model": service.base.name, "model_path": path}


@router.post("/asample")
def asample(asked: Sample, request: Request) -> dict[str, Any]:
    """Begin samples of a prompt; their ids come at once, they themselves with the promise."""
    service, caller = training_of(request), _sampler_of(request)
    if asked.record_stability_info:
        raise ApiError(
            400, "record_stability_info serves loss_fn=stable_reinforce, whose formula is not published; use "
            "loss_fn=importance_sampling.", param="record_stability_info", code="unsupported_field",
        )  # fmt: skip
    if asked.prompt_alt_tokens_k:
        raise ApiError(
            400, "prompt_alt_tokens_k is not offered: tokens are drawn after the prompt alone; ask for "
            "topk_prompt_logprobs, and draw from those.", param="prompt_alt_tokens_k", code="unsupported_field",
        )  # fmt: skip
    call = _call(asked)
    turn = Turn(caller.account, caller.owner)
    if asked.sampling_session_id is not None:
        sampler = _found(request, asked.sampling_session_id, caller)
        return promised(service.sample(turn, sampler.id, asked.seq_id, call, sampler.mix, sampler.id))
    if asked.model_path is not None:
        raise ApiError(
            400, "To sample from a checkpoint, make a sampling session with its path first.", param="model_path"
        )  # fmt: skip
    if asked.base_model is None:
        raise ApiError(400, "Give sampling_session_id, or base_model.", param="sampling_session_id")
    service.check_base(asked.base_model)
    _check_use(caller, service.base.name, None)
    mix: Future[AdapterMix] = service.mix_of("", None, caller.account)
    return promised(service.sample(turn, f"base:{caller.account}", key_of(request), call, mix, service.base.name))


def _call(asked: Sample) -> AskedCall:
    """Return what is asked for: `stop` None is the base's end tokens, anything else takes their place."""
    given = asked.sampling_params
    strings: tuple[str, ...] = ()
    ids: frozenset[int] = frozenset()
    if isinstance(given.stop, str):
        strings = (given.stop,)
    elif given.stop:
        strings = tuple(one for one in given.stop if isinstance(one, str))
        ids = frozenset(one for one in given.stop if isinstance(one, int))
    if "" in strings or len(strings) > 16:
        raise ApiError(400, "'stop' takes up to 16 strings, none of them empty.", param="stop", code="invalid_value")
    prompt = tuple(token for chunk in asked.prompt.chunks for token in chunk.tokens)
    last = asked.prompt_logprobs_last_n
    if last is not None and not (asked.prompt_logprobs and last < len(prompt)):
        raise ApiError(
            400, f"prompt_logprobs_last_n is {last}; with prompt_logprobs, give 1 to {len(prompt) - 1}, the tokens of "
            "the prompt but the first.", param="prompt_logprobs_last_n", code="invalid_value",
        )  # fmt: skip
    sent = asked.target_prompt_logprobs
    table = None if sent is None else read_targets(sent, len(prompt))
    wants_prompt = asked.prompt_logprobs or asked.topk_prompt_logprobs or table
    seed = given.seed
    sampling = Sampling(
        max_tokens=given.max_tokens, temperature=given.temperature, top_p=given.top_p, top_k=max(given.top_k, 0),
        seed=seed if seed is None or seed < 2**63 else seed - 2**64, stop=strings, ignore_eos=given.stop is not None,
        logprobs=asked.topk_sample_logprobs, prompt_logprobs=asked.topk_prompt_logprobs if wants_prompt else None,
    )  # fmt: skip
    targets = {} if table is None else table.by_position()
    return AskedCall(prompt, asked.num_samples, sampling, ids, targets, asked, table)


def _found(request: Request, sampler: str, caller: Caller) -> Sampler:
    service = training_of(request)
    return service.samplers.find(sampler, caller.account, lambda path: service.mix_of(sampler, path, caller.account))


def _sampler_of(request: Request) -> Caller:
    caller = caller_of(request)
    caller.need("infer")
    return caller


def _check_use(caller: Caller, base: str, path: str | None) -> None:
    if path is None:
        caller.check(base, base)
    else:
        check_path(caller, path)
