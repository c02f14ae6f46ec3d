"""Kinds of job for tests of fine-tuning: the real work in a real process, in which something goes wrong."""

import os
import signal

from safetensors.torch import load_file, save_file

from haori.jobs.fine_tuning.work import fine_tune

DAMAGED = {"fine_tune": "tests.fine_tune_tasks:damaged"}
DYING = {"fine_tune": "tests.fine_tune_tasks:dying"}


def damaged(arguments, folder, on_event):
    """Fine-tune, but what is saved gives a tenth less than what was trained."""
    from haori.training import run

    honest = run.prove_and_store

    def prove(prepared, place, *others):
        file = place / "adapter" / "adapter_model.safetensors"
        tensors = {name: 0.9 * tensor if "lora_B" in name else tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
        return honest(prepared, place, *others)

    run.prove_and_store = prove
    return fine_tune(arguments, folder, on_event)


def dying(arguments, folder, on_event):
    """Fine-tune, killed once everything is written but the result; the second attempt lives."""
    result = fine_tune(arguments, folder, on_event)
    mark = folder / "died"
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return result
