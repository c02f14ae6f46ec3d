"""The device of these tests: the GPU, or with HAORI_GPU_TESTS_ON=cpu the CPU, to see that each test runs at all."""

import os

import pytest
import torch


@pytest.fixture
def device() -> str:
    if os.environ.get("HAORI_GPU_TESTS_ON") == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    return "cuda"
