"""`haori serve` as a process of its own, and adapters whose answers differ."""

import re
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager

import httpx

from tests.library_samples import save_stock, stock_model


def strong_lora(base, folder, seed):
    """An adapter that changes what the base says."""
    from peft import LoraConfig

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    return save_stock(stock_model(base, config, seed=seed, scale=0.4), folder)


@contextmanager
def serving(*arguments):
    """Yield the process, its address, and the command that it printed, once it is ready."""
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - a pipe that nobody reads fills up, and the server waits
    process = subprocess.Popen(
        [sys.executable, "-m", "haori.cli.app", "serve", "--port", "0", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip
    process.log = log
    first = process.stdout.readline()
    found = re.search(r"http://\S+:\d+", first)
    assert found, first + said(process)
    url, command = found[0], process.stdout.readline().strip()
    try:
        for _ in range(1200):
            if httpx.get(f"{url}/health").status_code == 200:
                break
            time.sleep(0.05)
        yield process, url, command
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()
        log.close()


def said(process):
    """What a server wrote on standard error."""
    process.log.seek(0)
    return process.log.read()
