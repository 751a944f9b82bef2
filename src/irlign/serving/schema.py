"""The OpenAPI document of the server, made from the models that read the requests."""

from typing import Any

from pydantic.json_schema import models_json_schema

from irlign.machine import versions
from irlign.serving.protocol import NO_EFFECT, UNSERVED, Chat, Completion, Sampled, Score

ERRORS = {
    400: "what was asked is not served, or the body is no request",
    401: "the API key is missing or wrong",
    404: "no such model",
    408: "the body did not arrive in time",
    413: "the body is too large",
    429: "too many requests wait; Retry-After says when to come back",
    500: "an error of the server's own",
    502: "the upstream failed",
    503: "the server is shutting down",
}
POSTS: dict[str, tuple[type[Sampled] | type[Score], str]] = {
    "/v1/chat/completions": (Chat, "An answer to a conversation"),
    "/v1/completions": (Completion, "An answer to a text, or to each of several"),
    "/v1/score": (Score, "The reward of answers"),
}
GETS = {"/v1/models": "The one model", "/health": "Whether the server runs"}
TEXT = {"type": "string"}


def document(model: str, reward: str) -> dict[str, Any]:
    """OpenAPI 3.1: what is read and what is answered under each path, for the model and the reward that are served."""
    _, found = models_json_schema([(kind, "validation") for kind, _ in POSTS.values()], ref_template="#/components/schemas/{model}")
    schemas = {name: _optional_may_be_null(schema) for name, schema in found["$defs"].items()}
    for kind, _ in POSTS.values():
        properties = schemas[kind.__name__]["properties"]
        properties["model"] = {"enum": [model] if kind is not Score else list(dict.fromkeys([model, reward, None]))}
        properties |= {name: {} for name in NO_EFFECT}
        properties |= {name: {"enum": [None, *values]} for name, values in UNSERVED.items() if name not in kind.model_fields}
    schemas["Error"] = _object(error=_object(message=TEXT, type=TEXT, param={}, code={}))
    paths: dict[str, Any] = {path: {"get": {"summary": text, "responses": _responses()}} for path, text in GETS.items()}
    for path, (kind, text) in POSTS.items():
        body = {"required": True, "content": _json(kind.__name__)}
        streamed: dict[str, Any] = {} if kind is Score else {"text/event-stream": {"schema": {}}}
        paths[path] = {"post": {"summary": text, "requestBody": body, "responses": _responses(streamed)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "irlign", "version": versions().get("irlign", "")},
        "paths": paths,
        "components": {"schemas": schemas},
    }


def _optional_may_be_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that may be left out may be null too: both are what was not said."""
    required = schema.get("required", [])
    fields = {name: of if name in required else {"anyOf": [of, {"type": "null"}]} for name, of in schema.get("properties", {}).items()}
    return {**schema, "properties": fields}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _responses(more: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer, and every error."""
    done = {"description": "the answer", "content": {"application/json": {"schema": {"type": "object"}}, **(more or {})}}
    return {"200": done, **{str(status): {"description": text, "content": _json("Error")} for status, text in ERRORS.items()}}
