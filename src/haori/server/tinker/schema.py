"""The protobuf messages of the training API, declared here field by field (proto3, package `tinker_public`).

Only what is read or written is declared; protobuf passes over fields that it does not know.
"""

from functools import lru_cache
from typing import Any

__all__ = ["FLOAT32", "INT32", "INT64", "message"]

FLOAT32, INT64, INT32, BFLOAT16 = 1, 2, 3, 4

_PACKAGE = "tinker_public"
_ENUMS = {
    "StopReason": {"STOP_REASON_STOP": 0, "STOP_REASON_LENGTH": 1},
    "DType": {
        "DTYPE_UNSPECIFIED": 0, "DTYPE_FLOAT32": FLOAT32, "DTYPE_INT64": INT64, "DTYPE_INT32": INT32,
        "DTYPE_BFLOAT16": BFLOAT16,
    },
}  # fmt: skip
# Each field as `name number type`; a type is T, `repeated T`, `optional T`, `map K V`, or `oneof GROUP T`.
_MESSAGES = {
    "EncodedTextChunk": ["tokens 1 bytes"],
    "ImageChunk": ["data 1 bytes", "format 2 string"],
    "DmelChunk": ["dmel 1 bytes"],
    "Chunk": [
        "encoded_text 1 oneof chunk EncodedTextChunk", "image 2 oneof chunk ImageChunk", "dmel 3 oneof chunk DmelChunk",
    ],
    "SparseCsr": ["values 1 bytes", "crow_indices 2 bytes", "col_indices 3 bytes"],
    "Tensor": [
        "dense 1 oneof encoding bytes", "sparse_csr 2 oneof encoding SparseCsr", "dtype 3 DType",
        "shape 4 repeated int64",
    ],
    "SpanTokens": ["sequence_id 1 string", "offset 2 int64", "length 3 int64"],
    "ProvenanceSpan": ["prompt_tokens 1 oneof span SpanTokens", "sampled_tokens 2 oneof span SpanTokens"],
    "Datum": [
        "model_input 1 repeated Chunk", "loss_fn_inputs 2 map string Tensor",
        "model_input_spans 3 repeated ProvenanceSpan", "loss_fn_input_spans 4 repeated ProvenanceSpan",
    ],
    "LossConfigValue": ["number 1 oneof value double", "text 2 oneof value string"],
    "ForwardBackwardRequest": [
        "model_id 1 string", "seq_id 2 int32", "data 3 repeated Datum", "loss_fn 4 string",
        "loss_fn_config 5 map string double", "forward_only 6 bool", "loss_fn_config_v2 7 map string LossConfigValue",
    ],
    "BatchedTensor": ["data 1 bytes", "offsets 2 bytes", "dtype 3 DType", "trailing_shape 4 repeated int64"],
    "ArrayRecord": ["type_tag 1 string", "fields 2 map string BatchedTensor", "num_datums 3 int64"],
    "ForwardBackwardOutput": [
        "loss_fn_output_type 1 string", "loss_fn_outputs 2 repeated ArrayRecord", "metrics 3 map string double",
    ],
    "TopkLogprobs": ["token_ids 1 bytes", "logprobs 2 bytes", "k 3 uint32", "length 4 uint32"],
    "SampledSequence": [
        "stop_reason 1 StopReason", "tokens 2 bytes", "logprobs 3 optional bytes",
        "topk_sampled_logprobs 4 optional TopkLogprobs",
    ],
    "SampleResponse": [
        "sequences 1 repeated SampledSequence", "prompt_logprobs 2 optional bytes",
        "topk_prompt_logprobs 3 optional TopkLogprobs", "prompt_cache_hit_tokens 4 int32",
        "target_prompt_logprobs 5 optional Tensor",
    ],
}  # fmt: skip


def message(name: str) -> Any:
    """Return an empty message of a kind."""
    return _classes()[name]()


@lru_cache(maxsize=1)
def _classes() -> dict[str, Any]:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="haori_tinker.proto", package=_PACKAGE, syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for value, number in values.items():
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        declared = file.message_type.add(name=name)
        for field in fields:
            _declare(declared, *field.split(maxsplit=2))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}")) for name in _MESSAGES
    }


def _declare(declared: Any, name: str, number: str, described: str) -> None:
    """Add one field to a message."""
    words = described.split()
    field = declared.field.add(name=name, number=int(number), label=1)
    if words[0] == "map":
        entry = declared.nested_type.add(name="".join(part.capitalize() for part in name.split("_")) + "Entry")
        entry.options.map_entry = True
        _set_type(entry.field.add(name="key", number=1, label=1), words[1])
        _set_type(entry.field.add(name="value", number=2, label=1), words[2])
        field.label, field.type = 3, 11
        field.type_name = f".{_PACKAGE}.{declared.name}.{entry.name}"
        return
    if words[0] == "repeated":
        field.label = 3
    elif words[0] in ("oneof", "optional"):
        group = words[1] if words[0] == "oneof" else f"_{name}"
        groups = [one.name for one in declared.oneof_decl]
        if group not in groups:
            declared.oneof_decl.add(name=group)
            groups.append(group)
        field.oneof_index = groups.index(group)
        field.proto3_optional = words[0] == "optional"
    _set_type(field, words[-1])


def _set_type(field: Any, kind: str) -> None:
    scalars = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
    if kind in scalars:
        field.type = scalars[kind]
        return
    field.type = 14 if kind in _ENUMS else 11
    field.type_name = f".{_PACKAGE}.{kind}"
