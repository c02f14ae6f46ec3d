"""Keeps log lines, warnings and progress bars of transformers and diffusers off the screen while they load or generate.

The settings are process-wide while the block runs and are put back afterwards.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["quiet_diffusers", "quiet_transformers"]


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers inside the block; errors still raise."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Silence diffusers and transformers inside the block; errors still raise."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # critical: what matters is checked, and raised as an error of ours
    logging.disable_progress_bar()
    try:
        with quiet_transformers():
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
