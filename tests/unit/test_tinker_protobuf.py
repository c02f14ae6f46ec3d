"""The protobuf of the training API, both ways against the classes that the client itself is shipped with."""

import json

import numpy as np
import pytest

from haori.core.errors import DataError
from haori.jobs.sessions.records import Sampled
from haori.jobs.tenants.records import LossOutput
from haori.serve.request import TokenLogprob
from haori.server.tinker.decoding import read_forward
from haori.server.tinker.encoding import write_loss_output, write_sampled
from haori.server.tinker.schema import message
from tests.tinker_venv import tinker_clients  # noqa: F401 - a fixture

THEIRS = """
import sys
import numpy as np, json
from tinker import types
from tinker.proto import request_conv, response_conv
from pathlib import Path

folder = Path(sys.argv[1])
tensor = types.TensorData
data = [
    types.Datum(
        model_input=types.ModelInput(
            chunks=[types.EncodedTextChunk(tokens=[1, 2]), types.EncodedTextChunk(tokens=[3])]
        ),
        loss_fn_inputs={
            "target_tokens": tensor(data=[2, 3, 4], dtype="int64", shape=[3]),
            "weights": tensor(data=[0.5, -1.25, 0.0], dtype="float32", shape=[3]),
        },
    ),
    types.Datum(
        model_input=types.ModelInput.from_ints([7, 8]),
        loss_fn_inputs={
            "target_tokens": tensor(data=[8, 9, 1, 2], dtype="int64", shape=[2, 2]),
            "weights": tensor(
                data=[0.75, 0.25], dtype="float32", shape=[2, 2], sparse_crow_indices=[0, 1, 2],
                sparse_col_indices=[1, 0],
            ),
        },
    ),
]
asked = types.ForwardBackwardRequest(
    forward_backward_input=types.ForwardBackwardInput(
        data=data, loss_fn="ppo", loss_fn_config={"clip_low_threshold": 0.9, "mode": "x"}
    ),
    model_id="s:train:0", seq_id=7,
)
(folder / "request.bin").write_bytes(request_conv.forward_backward_request_to_proto(asked).SerializeToString())
loss = response_conv.deserialize_forward_backward_output((folder / "loss.bin").read_bytes())
sample = response_conv.deserialize_sample_response((folder / "sample.bin").read_bytes())
print(json.dumps({
    "metrics": loss.metrics,
    "logprobs": [[one["logprobs"].data.tolist() if hasattr(one["logprobs"].data, "tolist") else one["logprobs"].data,
                  one["logprobs"].shape] for one in loss.loss_fn_outputs],
    "sequences": [[one.stop_reason, one.tokens, one.logprobs, one.topk_logprobs] for one in sample.sequences],
    "prompt": sample.prompt_logprobs, "top_prompt": sample.topk_prompt_logprobs,
    "cached": sample.prompt_cache_hit_tokens,
}))
"""


def test_the_clients_own_classes_read_what_we_write_and_we_read_what_they_write(tinker_clients, tmp_path):  # noqa: F811
    loss = LossOutput(
        [np.float32([-0.5, -1.5, -2.5]), np.float32([[-1, -2], [-3, -4]]), np.float32([-9])], {"loss:sum": 2.125}
    )
    (tmp_path / "loss.bin").write_bytes(write_loss_output(loss))
    top = TokenLogprob(5, -0.25, ((5, -0.25), (6, -1.75)))
    answers = [
        Sampled([5, 6], [top, TokenLogprob(6, -3.5, ((5, -0.5), (6, -3.5)))], (TokenLogprob(2, -4.5),), True, 3),
        Sampled([7], [TokenLogprob(7, -1.0, ((7, -1.0), (8, -2.0)))], (), False),
    ]
    (tmp_path / "sample.bin").write_bytes(write_sampled(answers, prompt_logprobs=True, top_prompt=0, top_sampled=2))
    script = tmp_path / "theirs.py"
    script.write_text(THEIRS)
    said = json.loads(tinker_clients.run(script, tmp_path).strip().splitlines()[-1])
    assert said["metrics"] == {"loss:sum": 2.125}
    assert said["logprobs"] == [[[-0.5, -1.5, -2.5], [3]], [[-1, -2, -3, -4], [2, 2]], [[-9], [1]]]
    assert said["sequences"] == [
        ["stop", [5, 6], [-0.25, -3.5], [[[5, -0.25], [6, -1.75]], [[5, -0.5], [6, -3.5]]]],
        ["length", [7], [-1.0], [[[7, -1.0], [8, -2.0]]]],
    ]
    assert said["prompt"] == [None, -4.5]
    assert said["top_prompt"] is None
    assert said["cached"] == 3
    asked = read_forward((tmp_path / "request.bin").read_bytes())
    assert (asked.model_id, asked.seq_id, asked.loss, asked.forward_only) == ("s:train:0", 7, "ppo", False)
    assert asked.config == {"clip_low_threshold": 0.9, "mode": "x"}
    first, second = asked.data
    assert first.tokens.tolist() == [1, 2, 3]
    assert first.inputs["target_tokens"].tolist() == [2, 3, 4]
    assert first.inputs["weights"].tolist() == [0.5, -1.25, 0.0]
    assert second.inputs["target_tokens"].tolist() == [[8, 9], [1, 2]]
    assert second.inputs["weights"].tolist() == [[0, 0.75], [0.25, 0]]


def request(change=lambda datum: None, **fields):
    sent = message("ForwardBackwardRequest")
    sent.model_id, sent.seq_id, sent.loss_fn = "s:train:0", 1, "cross_entropy"
    datum = sent.data.add()
    datum.model_input.add().encoded_text.tokens = np.int32([1, 2, 3]).tobytes()
    weights = datum.loss_fn_inputs["weights"]
    weights.dense, weights.dtype = np.float32([1, 1, 1]).tobytes(), 1
    weights.shape.append(3)
    change(datum)
    for name, value in fields.items():
        setattr(sent, name, value)
    return sent.SerializeToString()


def weights(**values):
    def change(datum):
        tensor = datum.loss_fn_inputs["weights"]
        for name, value in values.items():
            if name == "shape":
                del tensor.shape[:]
                tensor.shape.extend(value)
            else:
                setattr(tensor, name, value)

    return change


def sparse(crow, columns, shape, values=(1.0,)):
    def change(datum):
        tensor = datum.loss_fn_inputs["weights"]
        tensor.sparse_csr.values = np.float32(values).tobytes()
        tensor.sparse_csr.crow_indices = np.int64(crow).tobytes()
        tensor.sparse_csr.col_indices = np.int64(columns).tobytes()
        del tensor.shape[:]
        tensor.shape.extend(shape)

    return change


def picture(datum):
    datum.model_input.add().image.data = b"x"


def no_tokens(datum):
    del datum.model_input[:]


def ragged(datum):
    datum.model_input[0].encoded_text.tokens = b"12345"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"\xff\xff\xff", "no ForwardBackwardRequest"),
        (request(picture), "a picture"),
        (request(no_tokens), "no model_input"),
        (request(ragged), "5 bytes"),
        (request(loss_fn=""), "names no loss"),
        (request(weights(dtype=4)), "the type 4"),
        (request(weights(dtype=2)), "12 bytes; each value takes 8"),
        (request(weights(shape=[2])), "3 values for the shape"),
        (request(weights(shape=[-3])), "the shape [-3]"),
        (request(weights(shape=[1, 3, 1])), "one or two dimensions"),
        (request(weights(shape=[1 << 40, 1 << 40])), "3 values for the shape"),
        (request(weights(dense=np.float32([1, np.nan, 1]).tobytes())), "NaN or infinity"),
        (request(weights(dense=np.float32([1, np.inf, 1]).tobytes())), "NaN or infinity"),
        (request(sparse([0, 1], [0], [1 << 32, 1 << 32])), "unfolds to more"),
        (request(sparse([0, 1], [5], [1, 2])), "do not fit"),
        (request(sparse([0, 9], [0], [1, 2])), "do not fit"),
        (request(sparse([1, 0], [0], [1, 2])), "do not fit"),
    ],
)  # fmt: skip
def test_what_cannot_be_rows_is_refused_by_a_sentence(body, said):
    with pytest.raises(DataError, match=said.replace("[", r"\[")):
        read_forward(body)


def test_what_is_left_alone_is_read():
    assert read_forward(request()).data[0].tokens.tolist() == [1, 2, 3]
