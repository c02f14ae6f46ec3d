"""What weights in fewer bits cost in quality: perplexity of general text in each format."""

from typing import Any

from setting import Setting

_FORMATS = ("fp32", "bf16", "int8", "int4")


def weights_part(setting: Setting) -> dict[str, Any]:
    """Measure the perplexity of the general text that comes with the package in each format."""
    found: dict[str, Any] = {}
    for form in _FORMATS:
        with setting.contenders({form: ("perplexity", setting.spec(weights=form))}) as race:
            done = race.turn(form, {})
        if done is not None:
            found[form] = done
            print(f"  {form:5} perplexity {done['perplexity']:.3f} over {done['tokens']:.0f} tokens", flush=True)
    return found
