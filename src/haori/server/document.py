"""The OpenAPI document: FastAPI's own, put right where this server does otherwise."""

from typing import Any

from fastapi import FastAPI

__all__ = ["correct_document"]

_UNUSED = ("HTTPValidationError", "ValidationError")


def correct_document(app: FastAPI) -> None:
    """Make an app's document say that requests are refused with 400, and how a key is sent."""
    generate = app.openapi

    def corrected() -> dict[str, Any]:
        if app.openapi_schema is not None:
            return app.openapi_schema
        document = generate()
        for methods in document["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
        parts = document["components"]
        for name in _UNUSED:
            parts["schemas"].pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}, {}]  # or none, on loopback
        return document

    app.openapi = corrected  # type: ignore[method-assign]  # FastAPI's documented way
