"""Calls every public method of the real tinker SDK's clients, and tells how each ended: `tinker_methods.py URL`.

It is run by the client's own packages, in the folder that holds the base `tiny`. A call is a method, or a method with
the arguments that matter; what ends well must pass its own check. Nothing of Haori is imported.
"""

import inspect
import json
import math
import re
import sys
import time
import urllib.request
import warnings

import numpy as np
import tinker
import torch
from tinker import types

URL = sys.argv[1]
CLIENTS = (tinker.ServiceClient, tinker.TrainingClient, tinker.SamplingClient, tinker.RestClient, tinker.AdminClient)
SECONDS = 5.0  # a refusal that takes longer was tried again
CONSOLE = "an address of the maker's console, which knows nothing of this server"
ids, tensor = types.ModelInput.from_ints, types.TensorData.from_torch
PROMPT = [5, 6, 7, 8, 9, 10]
DATA = [
    types.Datum(
        model_input=ids(PROMPT[:-1]),
        loss_fn_inputs={"target_tokens": tensor(torch.tensor(PROMPT[1:])), "weights": tensor(torch.ones(5))},
    )
] * 2
GREEDY = types.SamplingParams(max_tokens=4, temperature=0, stop=[])
STEP = types.AdamParams(learning_rate=5e-3)
ended = {}


def public_methods(client):
    """Return the names of a client's public methods; one and its async twin are one."""
    named = [name for name, what in inspect.getmembers(client, callable) if not name.startswith("_")]
    return sorted({name.removesuffix("_async") for name in named})


def call(name, work, check=lambda found: found is not None, alone=None):
    """Do a call and note how it ended; `alone` says what the client gives by itself, which no server can change."""
    began = time.monotonic()
    try:
        found = work()
    except Exception as error:
        ended[name] = {"outcome": "refused", "said": sentence(str(error)), "quick": time.monotonic() - began < SECONDS}
        return None
    ended[name] = {"outcome": "wrong"} if not check(found) else {"outcome": "supported"}
    if alone is not None and check(found):
        ended[name] = {"outcome": "client", "said": alone}
    return found


def sentence(said):
    """Return what a server said of an error, without the client's words around it and without ids."""
    detail = re.search(r"""['"]detail['"]: (['"])(.*?)\1(?:, |})""", said)
    failed = re.search(r"Request failed: (.*?) for self\.request_id", said, re.S)
    found = detail[2] if detail else failed[1] if failed else said
    return re.sub(r"[0-9a-f]{8}-[0-9a-f-]{27}", "ID", found.replace(URL, "URL"))


def loss(client):
    return client.forward(DATA, "cross_entropy").result().metrics["loss:sum"]


def weighted(logprobs, weights):
    return -(logprobs * weights).sum(), {}


def negative_sum(data, logprobs):
    return -sum(one.sum() for one in logprobs), {}


def new_trainer(service):
    return service.create_lora_training_client(base_model="tiny", rank=4, seed=3).result()


def of_service():
    """Call everything of a ServiceClient; return it with a training client and paths."""
    service = tinker.ServiceClient(base_url=URL, project_id="p", display_name="every method")
    call("ServiceClient.get_console_url", service.get_console_url, alone=CONSOLE)
    call("ServiceClient.get_telemetry", service.get_telemetry, lambda found: found is None)  # it is switched off
    call("ServiceClient.get_server_capabilities", service.get_server_capabilities,
         lambda found: "tiny" in [model.model_name for model in found.supported_models])  # fmt: skip
    trainer = call("ServiceClient.create_lora_training_client", lambda: new_trainer(service))
    call("ServiceClient.create_lora_training_client(optimizer=DimuonOptimizerConfig())",
         lambda: service.create_lora_training_client(
             base_model="tiny", rank=4, optimizer=types.DimuonOptimizerConfig()).result())  # fmt: skip
    of_training(service, trainer)
    path = trainer.save_state("kept").result().path
    before = loss(trainer)
    again = call("ServiceClient.create_training_client_from_state_with_optimizer",
                 lambda: service.create_training_client_from_state_with_optimizer(path).result(),
                 lambda found: loss(found) == before)  # fmt: skip
    call(
        "ServiceClient.create_training_client_from_state",
        lambda: service.create_training_client_from_state(path).result(),
        lambda found: loss(found) == before,
    )
    call("ServiceClient.create_training_client_from_state(weights_access_token='x')",
         lambda: service.create_training_client_from_state(path, weights_access_token="x").result())  # fmt: skip
    handle = call("ServiceClient.create_custom_loss",
                  lambda: service.create_custom_loss(weighted, {"logprobs": 1, "weights": 1}).result())  # fmt: skip
    call("TrainingClient.forward_backward_custom(loss_fn=LossHandle)",
         lambda: again.forward_backward_custom(DATA, handle).result().metrics["loss:sum"],
         lambda found: math.isclose(found, before, rel_tol=1e-5))  # fmt: skip
    call(
        "ServiceClient.create_sampling_client",
        lambda: service.create_sampling_client(model_path=trainer.save_weights_for_sampler("s").result().path).result(),
    )
    call("ServiceClient.create_sampling_client(record_stability_info=True)",
         lambda: service.create_sampling_client(base_model="tiny", record_stability_info=True).result()
         .sample(ids(PROMPT), 1, GREEDY).result())  # fmt: skip
    copied = call("ServiceClient.copy_weights", lambda: service.copy_weights(path, ttl_seconds=3600).result(),
                  lambda found: loss(service.create_training_client_from_state(found).result()) == before)  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call("ServiceClient.create_rest_client", service.create_rest_client)
    of_sampling(service, trainer)
    of_rest(service, trainer, path, copied)
    session = service.holder.get_session_id()
    call("ServiceClient.close", lambda: service.close("success", "done").result(), lambda found: found is None)
    return session


def of_training(service, trainer):
    call("TrainingClient.get_console_url", trainer.get_console_url, alone=CONSOLE)
    call("TrainingClient.get_telemetry", trainer.get_telemetry, lambda found: found is None)
    call("TrainingClient.get_info", trainer.get_info, lambda found: (found.is_lora, found.lora_rank) == (True, 4))
    call("TrainingClient.get_tokenizer", trainer.get_tokenizer, lambda found: found.encode("a b"))
    before = call("TrainingClient.forward", lambda: loss(trainer))
    call("TrainingClient.forward_backward", lambda: trainer.forward_backward(DATA, "cross_entropy").result(),
         lambda found: found.metrics["loss:sum"] == before)  # fmt: skip
    call("TrainingClient.optim_step", lambda: trainer.optim_step(STEP).result(), lambda found: loss(trainer) < before)
    call("TrainingClient.forward_backward_custom",
         lambda: trainer.forward_backward_custom(DATA, negative_sum).result().metrics,
         lambda found: math.isclose(found["loss:sum"], found["surrogate_loss:sum"], rel_tol=1e-5))  # fmt: skip
    trainer.optim_step(STEP).result()
    now = loss(trainer)
    path = call("TrainingClient.save_state", lambda: trainer.save_state("one", user_metadata={"a": "b"}).result().path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("load_state", "load_state_with_optimizer"):
            fresh = new_trainer(service)
            call(f"TrainingClient.{name}", lambda fresh=fresh, name=name: getattr(fresh, name)(path).result(),
                 lambda _, fresh=fresh: loss(fresh) == now)  # fmt: skip
    weights = call("TrainingClient.save_weights_for_sampler",
                   lambda: trainer.save_weights_for_sampler("two", ttl_seconds=3600).result().path)  # fmt: skip
    call("TrainingClient.create_sampling_client", lambda: trainer.create_sampling_client(weights).result())
    call(
        "TrainingClient.save_weights_and_get_sampling_client",
        lambda: trainer.save_weights_and_get_sampling_client().result(),
        lambda found: np.isclose(sum(found.compute_logprobs(ids(PROMPT)).result()[1:]) * -2, now, atol=0.5),
    )
    refused = {
        "save_weights_and_get_sampling_client(kind='inflight')":
            lambda fresh: fresh.save_weights_and_get_sampling_client(kind="inflight").result(),
        "forward_backward(loss_fn='stable_reinforce')":
            lambda fresh: fresh.forward_backward(DATA, "stable_reinforce").result(),
        "forward_backward(data=[ImageChunk])": lambda fresh: fresh.forward_backward([types.Datum(
            model_input=types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)]),
            loss_fn_inputs=DATA[0].loss_fn_inputs)], "cross_entropy").result(),
        "optim_step(optim_params=DimuonParams())":
            lambda fresh: fresh.optim_step(types.DimuonParams(learning_rate=1e-3)).result(),
        "save_weights_external(age_encryption_recipients=['age1'])":
            lambda fresh: fresh.save_weights_external("x", age_encryption_recipients=["age1"]).result(),
    }  # fmt: skip
    for name, work in refused.items():  # a training client takes nothing more after an error
        call(f"TrainingClient.{name}", lambda work=work: work(new_trainer(service)))
    for name in ("importance_sampling", "ppo", "cispo", "gspo", "dro"):
        inputs = DATA[0].loss_fn_inputs | {
            "logprobs": tensor(torch.full((5,), -2.0)), "advantages": tensor(torch.ones(5))}  # fmt: skip
        inputs = {key: value for key, value in inputs.items() if key != "weights"}
        if name == "gspo":
            inputs["sequence_ratio_mask"] = tensor(torch.ones(5))
        data = [types.Datum(model_input=DATA[0].model_input, loss_fn_inputs=inputs)]
        config = {"beta": 0.05} if name == "dro" else None
        call(
            f"TrainingClient.forward_backward(loss_fn='{name}')",
            lambda data=data, name=name, config=config: trainer.forward_backward(data, name, config).result(),
        )
    call("TrainingClient.save_weights_external",
         lambda: trainer.save_weights_external("out", ttl_seconds=3600).result().path)  # fmt: skip


def of_sampling(service, trainer):
    sampler = call("SamplingClient.create",
                   lambda: tinker.SamplingClient.create(service.holder, base_model="tiny").result())  # fmt: skip
    call("SamplingClient.get_base_model", sampler.get_base_model, lambda found: found == "tiny")
    call("SamplingClient.get_tokenizer", sampler.get_tokenizer, lambda found: found.encode("a b"))
    call("SamplingClient.get_telemetry", sampler.get_telemetry, lambda found: found is None)
    sampled = call("SamplingClient.sample", lambda: sampler.sample(ids(PROMPT), 2, GREEDY).result(),
                   lambda found: [len(one.tokens) for one in found.sequences] == [4, 4])  # fmt: skip
    plain = call("SamplingClient.compute_logprobs", lambda: sampler.compute_logprobs(ids(PROMPT)).result(),
                 lambda found: found[0] is None and len(found) == 6)  # fmt: skip
    call("SamplingClient.compute_logprobs(prompt_logprobs_last_n=2)",
         lambda: sampler.compute_logprobs(ids(PROMPT), prompt_logprobs_last_n=2).result(),
         lambda found: found == [None] * 4 + plain[4:])  # fmt: skip

    def asked(**more):
        return lambda: sampler.sample(ids(PROMPT), 1, GREEDY, **more).result()

    call("SamplingClient.sample(include_prompt_logprobs=True)", asked(include_prompt_logprobs=True),
         lambda found: found.prompt_logprobs == plain)  # fmt: skip
    top = call(
        "SamplingClient.sample(topk_prompt_logprobs=3)",
        asked(topk_prompt_logprobs=3),
        lambda found: [one and len(one) for one in found.topk_prompt_logprobs] == [None, 3, 3, 3, 3, 3],
    )
    call("SamplingClient.sample(topk_sample_logprobs=2)", asked(topk_sample_logprobs=2),
         lambda found: found.sequences[0].topk_logprobs[0][0][0] == sampled.sequences[0].tokens[0])  # fmt: skip
    table = torch.tensor([[token, one[1][0]] for token, one in
                          zip(PROMPT[1:], top.topk_prompt_logprobs[1:], strict=True)])  # fmt: skip
    wanted = torch.tensor([[mine, one[1][1]] for mine, one in
                           zip(plain[1:], top.topk_prompt_logprobs[1:], strict=True)])  # fmt: skip
    call("SamplingClient.sample(target_prompt_logprobs=...)", asked(target_prompt_logprobs=tensor(table)),
         lambda found: torch.allclose(found.target_prompt_logprobs.to_torch(), wanted, atol=1e-5))  # fmt: skip
    table[:3] = -1
    sparse = types.TensorData.from_torch_sparse(table, pad_value=-1)
    call(
        "SamplingClient.sample(target_prompt_logprobs=sparse)",
        asked(target_prompt_logprobs=sparse),
        lambda found: torch.allclose(found.target_prompt_logprobs.to_torch()[3:], wanted[3:], atol=1e-5),
    )
    call("SamplingClient.sample(prompt_alt_tokens_k=2)", asked(prompt_alt_tokens_k=2))
    image = types.ModelInput(chunks=[types.ImageChunk(data=b"x", format="png", expected_tokens=1)])
    call("SamplingClient.sample(prompt=[ImageChunk])", lambda: sampler.sample(image, 1, GREEDY).result())
    trained = trainer.save_weights_and_get_sampling_client().result()
    handle = call("SamplingClient.get_sampler_handle", trained.get_sampler_handle)
    mine = trained.sample(ids(PROMPT), 1, GREEDY).result().sequences[0].tokens
    call("SamplingClient.from_sampler_handle",
         lambda: tinker.SamplingClient.from_sampler_handle(handle, api_key="tml-local"),
         lambda found: found.sample(ids(PROMPT), 1, GREEDY).result().sequences[0].tokens == mine)  # fmt: skip
    from tinker.lib.api_future_impl import QueueState

    call("SamplingClient.on_queue_state_change", lambda: sampler.on_queue_state_change(QueueState.ACTIVE, None),
         lambda found: found is None)  # fmt: skip


def of_rest(service, trainer, path, copied):
    rest = tinker.RestClient(base_url=URL)
    run, session = trainer.model_id, service.holder.get_session_id()
    sampler = f"{session}:sample:0"
    call("RestClient.get_telemetry", rest.get_telemetry, lambda found: found is None)
    call("RestClient.get_server_capabilities", lambda: rest.get_server_capabilities().result(),
         lambda found: found.supported_models[0].max_context_length > 0)  # fmt: skip
    call("RestClient.get_training_run", lambda: rest.get_training_run(run).result(),
         lambda found: (found.lora_rank, found.base_model) == (4, "tiny"))  # fmt: skip
    call("RestClient.get_training_run(access_scope='accessible')",
         lambda: rest.get_training_run(run, access_scope="accessible").result())  # fmt: skip
    call("RestClient.get_training_run_by_tinker_path", lambda: rest.get_training_run_by_tinker_path(path).result(),
         lambda found: found.training_run_id == run)  # fmt: skip
    call(
        "RestClient.get_weights_info_by_tinker_path",
        lambda: rest.get_weights_info_by_tinker_path(copied).result(),
        lambda found: found.lora_rank == 4,
    )
    call("RestClient.list_training_runs", lambda: rest.list_training_runs(limit=2).result(),
         lambda found: len(found.training_runs) == 2 < found.cursor.total_count)  # fmt: skip
    call("RestClient.list_training_runs(project_id='p')", lambda: rest.list_training_runs(project_id="p").result())
    call(
        "RestClient.list_checkpoints",
        lambda: rest.list_checkpoints(run).result(),
        lambda found: {one.checkpoint_type for one in found.checkpoints} == {"training", "sampler", "external"},
    )
    call("RestClient.list_user_checkpoints", lambda: rest.list_user_checkpoints().result(),
         lambda found: copied in [one.tinker_path for one in found.checkpoints])  # fmt: skip
    call("RestClient.get_session", lambda: rest.get_session(session).result(),
         lambda found: run in found.training_run_ids and found.display_name == "every method")  # fmt: skip
    call("RestClient.list_sessions", lambda: rest.list_sessions().result(), lambda found: session in found.sessions)
    call("RestClient.get_sampler", lambda: rest.get_sampler(sampler).result(), lambda found: found.base_model == "tiny")
    again = call("RestClient.copy_weights", lambda: rest.copy_weights(copied, "p").result())
    call("RestClient.copy_weights(weights_access_token='x')",
         lambda: rest.copy_weights(copied, "p", weights_access_token="x").result())  # fmt: skip
    call(
        "RestClient.publish_checkpoint_from_tinker_path",
        lambda: rest.publish_checkpoint_from_tinker_path(again).result(),
        lambda _: of(rest, again).public,
    )
    call(
        "RestClient.unpublish_checkpoint_from_tinker_path",
        lambda: rest.unpublish_checkpoint_from_tinker_path(again).result(),
        lambda _: not of(rest, again).public,
    )
    call(
        "RestClient.set_checkpoint_ttl_from_tinker_path",
        lambda: rest.set_checkpoint_ttl_from_tinker_path(again, 7200).result(),
        lambda _: of(rest, again).expires_at,
    )
    exported = f"tinker://{run}/external_weights/out"
    call("RestClient.get_external_weights_urls", lambda: rest.get_external_weights_urls(exported).result(), downloaded)
    call(
        "RestClient.delete_checkpoint_from_tinker_path",
        lambda: rest.delete_checkpoint_from_tinker_path(again).result(),
        lambda _: of(rest, again) is None,
    )
    call("RestClient.delete_checkpoint", lambda: rest.delete_checkpoint(run, "external_weights/out").result(),
         lambda _: of(rest, exported) is None)  # fmt: skip
    call("RestClient.assign_session_project", lambda: rest.assign_session_project(session, "p").result())
    call("RestClient.export_session_trace", lambda: rest.export_session_trace(session).result())
    call("RestClient.whoami", lambda: rest.whoami().result())
    call("RestClient.search_sessions", lambda: rest.search_sessions(types.SessionSearchRequest()).result())
    admin = tinker.AdminClient(base_url=URL)
    call("AdminClient.get_telemetry", admin.get_telemetry, lambda found: found is None)
    for name, client in (("RestClient", rest), ("AdminClient", admin)):
        call(f"{name}.get_audit_log", lambda client=client: client.get_audit_log().result())
        call(f"{name}.get_billing_usage",
             lambda client=client: client.get_billing_usage("2026-01-01", "2026-01-02").result())  # fmt: skip
        call(f"{name}.get_current_checkpoint_storage_usage",
             lambda client=client: client.get_current_checkpoint_storage_usage().result())  # fmt: skip


def of(rest, path):
    """Return a checkpoint as the server lists it."""
    listed = rest.list_user_checkpoints(limit=1000).result().checkpoints
    return next((one for one in listed if one.tinker_path == path), None)


def downloaded(found):
    """Say whether the addresses give the files of a LoRA adapter to a plain request."""
    names = {"adapter_config.json", "adapter_model.safetensors"}
    got = {name: urllib.request.urlopen(found.urls[name]).read() for name in names}
    return json.loads(got["adapter_config.json"])["r"] == 4 and len(got["adapter_model.safetensors"]) > 1000


def main():
    warnings.simplefilter("ignore")
    of_service()
    public = {f"{client.__name__}.{name}" for client in CLIENTS for name in public_methods(client)}
    print(json.dumps({"sdk": tinker.__version__, "public": sorted(public), "ended": ended}))


if __name__ == "__main__":
    main()
