"""Writes results as the client reads them: in protobuf."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from haori.jobs.sessions.records import Sampled
from haori.serve.request import TokenLogprob
from haori.server.tinker.schema import FLOAT32, message
from haori.server.tinker.targets import Targets, write_targets

if TYPE_CHECKING:
    import numpy as np

    from haori.jobs.tenants.records import LossOutput

__all__ = ["write_loss_output", "write_sampled"]


_NO_LOGPROB = -99999.0  # the client's own sign for "none" among the likeliest tokens


def write_loss_output(output: "LossOutput") -> bytes:
    """Return a `ForwardBackwardOutput`; rows with other numbers of targets a token go into records of their own."""
    import numpy as np

    sent = message("ForwardBackwardOutput")
    sent.loss_fn_output_type = "ArrayRecord"
    for name, value in output.metrics.items():
        sent.metrics[name] = value
    run: list[np.ndarray[Any, Any]] = []
    for one in output.logprobs:
        if run and run[-1].shape[1:] != one.shape[1:]:
            _add_record(sent, run)
            run = []
        run.append(np.ascontiguousarray(one, "<f4"))
    if run:
        _add_record(sent, run)
    return bytes(sent.SerializeToString())


def _add_record(sent: Any, rows: "Sequence[np.ndarray[Any, Any]]") -> None:
    import numpy as np

    record = sent.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(rows))
    batched = record.fields["logprobs"]
    batched.data = b"".join(row.tobytes() for row in rows)
    batched.offsets = np.cumsum([0, *(row.nbytes for row in rows)]).astype("<i8").tobytes()
    batched.dtype = FLOAT32
    batched.trailing_shape.extend(rows[0].shape[1:])


def write_sampled(
    answers: Sequence[Sampled], *, prompt_logprobs: bool, top_prompt: int, top_sampled: int, last: int | None = None,
    targets: Targets | None = None,
) -> bytes:  # fmt: skip
    """Return a `SampleResponse`.

    Args:
        answers: One for each sample.
        prompt_logprobs: Whether those of the prompt were asked for; that of its first token is NaN.
        top_prompt: How many of the likeliest tokens at each position of the prompt are wanted.
        top_sampled: The same of the samples.
        last: How many positions at the end of the prompt are wanted; None for all.
        targets: Tokens of the prompt's positions that were asked for by id.
    """
    import numpy as np

    sent = message("SampleResponse")
    for answer in answers:
        sequence = sent.sequences.add(stop_reason=0 if answer.stopped else 1)
        sequence.tokens = np.asarray(answer.tokens, "<i4").tobytes()
        sequence.logprobs = np.asarray([one.logprob for one in answer.logprobs], "<f4").tobytes()
        if top_sampled:
            _write_top(sequence.topk_sampled_logprobs, answer.logprobs, top_sampled)
    first = answers[0]
    positions = [None, *first.prompt_logprobs]
    if last is not None:
        positions[:-last] = [None] * (len(positions) - last)
    if prompt_logprobs:
        values = [float("nan") if one is None else one.logprob for one in positions]
        sent.prompt_logprobs = np.asarray(values, "<f4").tobytes()
    if top_prompt:
        _write_top(sent.topk_prompt_logprobs, positions, top_prompt)
    if targets is not None:
        write_targets(sent.target_prompt_logprobs, targets, first.prompt_logprobs)
    sent.prompt_cache_hit_tokens = first.cached_tokens
    return bytes(sent.SerializeToString())


def _write_top(sent: Any, positions: Sequence[TokenLogprob | None], k: int) -> None:
    """Write the likeliest tokens of each position; where there are none, id 0 with a sign that clients know."""
    import numpy as np

    ids = np.zeros((len(positions), k), "<i4")
    logprobs = np.full((len(positions), k), _NO_LOGPROB, "<f4")
    for row, one in enumerate(positions):
        for column, (token, logprob) in enumerate([] if one is None else one.top[:k]):
            ids[row, column], logprobs[row, column] = token, logprob
    sent.token_ids, sent.logprobs = ids.tobytes(), logprobs.tobytes()
    sent.k, sent.length = k, len(positions)
