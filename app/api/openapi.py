"""The API's description (OpenAPI 3.1), made of its routes and of what they take and give; and a page that shows it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import msgspec

from app.api.problems import KINDS, MEDIA, Problem
from app.api.schemas import LONGEST_ID
from app.api.security import Scope
from models.fields import Field
from models.pipeline import Pipeline
from models.streams import Stream

_REF = "#/components/schemas/{name}"
_ALWAYS = ("unauthorized", "forbidden", "rate", "invalid", "unavailable", "refused", "internal")


@dataclass(frozen=True)
class Route:
    """What a path takes and gives. scope: None where no token is asked for. body: of a request that has one.

    answer: a struct, or None for `media` that is text. kinds: of problems, beside those that every route has.
    also: other statuses with the same answer. bounded: whether a time-out ends it; else its handler
    has bounds of its own.
    """

    method: str
    path: str
    handle: Any
    summary: str
    scope: Scope | None = "read"
    query: Any = None
    body: Any = None
    answer: Any = None
    status: int = 200
    also: tuple[int, ...] = ()
    media: str = "application/json"
    kinds: tuple[str, ...] = ()
    bounded: bool = True
    tag: str = field(default="About")

    @property
    def plain_path(self) -> str:
        """The path without what aiohttp matches by.

        >>> Route("GET", "/v1/features/{entity}/{id:.+}", None, "").plain_path
        '/v1/features/{entity}/{id}'
        """
        return re.sub(r":[^}]+", "", self.path)


def document(pipeline: Pipeline, routes: Sequence[Route]) -> dict[str, Any]:
    """The whole description."""
    types = [Problem, *(t for r in routes for t in (r.query, r.body, r.answer) if _is_struct(t))]
    _, parts = msgspec.json.schema_components(types, ref_template=_REF)
    if "View" in parts:  # a value that there is none of is NaN, which JSON has as null
        parts["View"]["properties"]["value"] = {"anyOf": [{"type": "number"}, {"type": "null"}]}
    queries = {r.query.__name__ for r in routes if r.query is not None}
    schemas = {name: part for name, part in sorted(parts.items()) if name not in queries}
    paths: dict[str, Any] = {}
    for route in routes:
        if route.path == "/v1/events/{stream}":
            for name, schema in _published(pipeline).items():
                schemas[f"Event_{name}"] = schema
                told = paths.setdefault(f"/v1/events/{name}", {})
                told[route.method.lower()] = _operation(route, parts, pipeline) | {
                    "requestBody": _body({"anyOf": [_many(f"Event_{name}"), _ref(f"Event_{name}")]}),
                    "parameters": _parameters(route, parts, pipeline, left_out="stream"),
                    "operationId": f"publish_{name}",
                }
            continue
        paths.setdefault(route.plain_path, {})[route.method.lower()] = _operation(route, parts, pipeline)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"Headrace: {pipeline.name}",
            "version": metadata.version("headrace"),
            "description": "Look-ups of features and predictions, events in, predictions out.",
        },
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": schemas,
        },
    }


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _operation(route: Route, parts: dict[str, Any], pipeline: Pipeline) -> dict[str, Any]:
    good = (
        {"schema": _ref(route.answer.__name__)} if _is_struct(route.answer)
        else {"schema": {"type": "object" if route.media == "application/json" else "string"}}
    )  # fmt: skip
    answers: dict[str, Any] = {
        str(status): {"description": "As asked.", "content": {route.media: good}}
        for status in (route.status, *route.also)
    }
    kinds = (*route.kinds, *_ALWAYS) if route.scope else route.kinds
    for kind in kinds:
        status, title = KINDS[kind]
        answers.setdefault(
            str(status), {"description": f"{title}.", "content": {MEDIA: {"schema": _ref("Problem")}}}
        )
    told: dict[str, Any] = {
        "summary": route.summary,
        "tags": [route.tag],
        "operationId": f"{route.method.lower()}_{re.sub(r'[^a-z0-9]+', '_', route.plain_path).strip('_')}",
        "parameters": _parameters(route, parts, pipeline),
        "responses": dict(sorted(answers.items())),
    }
    if route.scope is None:
        told["security"] = []
    else:
        told["description"] = f"Scope: {route.scope}."
    if _is_struct(route.body):
        told["requestBody"] = _body(_ref(route.body.__name__))
    return told


def _parameters(
    route: Route, parts: dict[str, Any], pipeline: Pipeline, left_out: str = ""
) -> list[dict[str, Any]]:
    found = []
    for name in re.findall(r"\{(\w+)\}", route.plain_path):
        if name != left_out:
            schema: dict[str, Any] = {"type": "string", "minLength": 1, "maxLength": LONGEST_ID}
            if name == "entity":
                schema = {"type": "string", "enum": [entity.name for entity in pipeline.entities]}
            found.append({"name": name, "in": "path", "required": True, "schema": schema})
    if route.query is not None:
        part = parts[route.query.__name__]
        for name, given in part["properties"].items():
            schema = dict(given)
            described = schema.pop("description", "")
            schema = _without_null(schema)
            described = described or schema.pop("description", "")
            parameter = {
                "name": name,
                "in": "query",
                "required": name in part.get("required", ()),
                "schema": schema,
            }
            found.append(parameter | ({"description": described} if described else {}))
    return found


def _without_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A query leaves out what it has no value for."""
    if "anyOf" not in schema:
        return schema
    rest = [one for one in schema["anyOf"] if one != {"type": "null"}]
    return dict(rest[0]) if len(rest) == 1 else {"anyOf": rest}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": _REF.format(name=name)}


def _many(name: str) -> dict[str, Any]:
    return {"type": "array", "items": _ref(name), "minItems": 1}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _published(pipeline: Pipeline) -> dict[str, Any]:
    """What each stream, and what is said of events, looks like."""
    found = {stream.name: _event(stream) for stream in pipeline.streams}
    stream = pipeline.stream
    for name, said in (("labels", pipeline.labels), ("reversals", pipeline.reversals)):
        if said is None or name in found:
            continue
        whole = {k for e in pipeline.entities for k in e.keys if k in stream.fields}
        names = list(dict.fromkeys([stream.id, stream.time, *sorted(whole)]))
        properties = {n: _of_field(stream.fields[n]) for n in names}
        properties[said.known] = _of_field(stream.fields[stream.time])
        required = [stream.id, said.known] if said.looked_up else [*names, said.known]
        if name == "labels" and pipeline.labels is not None:
            properties[pipeline.labels.field] = {"enum": [0, 1, None]}
            required.append(pipeline.labels.field)
        found[name] = {"type": "object", "properties": properties, "required": required}
    return found


def _event(stream: Stream) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {f.name: _of_field(f) for f in stream.fields.values()},
        "required": [f.name for f in stream.fields.values() if not f.optional],
    }


def _of_field(of: Field) -> dict[str, Any]:
    match of.type:
        case "int":
            schema: dict[str, Any] = {"type": "integer"}
        case "timestamp":
            schema = {"type": "string", "format": "date-time"} if of.unit == "iso" else {"type": "integer"}
            schema["description"] = "RFC 3339" if of.unit == "iso" else f"{of.unit} since 1970"
        case "decimal":
            schema = {"type": "number", "description": f"at most {len(str(of.divisor)) - 1} decimals"}
        case "float":
            schema = {"type": "number"}
        case _:
            schema = {"type": "string"}
    return {"anyOf": [schema, {"type": "null"}]} if of.optional else schema


# --- the page ----------------------------------------------------------------------------------

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem}h2{margin-top:2rem;border-bottom:1px solid}
h3 code{word-break:break-all}
table{border-collapse:collapse;width:100%;display:block;overflow-x:auto}
td,th{border:1px solid #8888;padding:.25rem .5rem;text-align:left;vertical-align:top}
pre{overflow-x:auto;border:1px solid #8888;padding:.5rem}
details{margin:.25rem 0}
"""


def page(described: dict[str, Any]) -> str:
    """The description as HTML that loads nothing."""
    tags: dict[str, list[str]] = {}
    for path, methods in described["paths"].items():
        for method, told in methods.items():
            tags.setdefault(told["tags"][0], []).append(_shown(method.upper(), path, told))
    sections = "".join(f"<h2>{_e(tag)}</h2>{''.join(shown)}" for tag, shown in tags.items())
    kinds = "".join(
        f'<tr id="{kind}"><td><code>/docs#{kind}</code></td><td>{status}</td><td>{_e(title)}</td></tr>'
        for kind, (status, title) in KINDS.items()
    )
    schemas = "".join(
        f'<details id="schema-{_e(name)}"><summary><code>{_e(name)}</code></summary>{_schema_shown(schema)}</details>'
        for name, schema in described["components"]["schemas"].items()
    )
    title = _e(described["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{STYLE}</style></head>'
        f"<body><main><h1>{title} {_e(described['info']['version'])}</h1>"
        f"<p>{_e(described['info']['description'])} "
        'The same for machines: <a href="/openapi.json">openapi.json</a>. Each request carries '
        "<code>Authorization: Bearer TOKEN</code> where tokens are set.</p>"
        f"{sections}<h2>Problems</h2><table><tr><th>type</th><th>status</th><th>what</th></tr>{kinds}</table>"
        f"<h2>Schemas</h2>{schemas}</main></body></html>"
    )


def _shown(method: str, path: str, told: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{_e(p['name'])}</code></td><td>{p['in']}</td><td>{_type(p['schema'])}</td>"
        f"<td>{_e(p.get('description', ''))}{' (required)' if p['required'] else ''}</td></tr>"
        for p in told["parameters"]
    )
    table = (
        f"<table><tr><th>name</th><th>in</th><th>type</th><th>what</th></tr>{rows}</table>" if rows else ""
    )
    body = ""
    if "requestBody" in told:
        (content,) = told["requestBody"]["content"].values()
        body = f"<p>Body: {_type(content['schema'])}</p>"
    answers = "".join(
        f"<li><code>{status}</code> {_e(answer['description'])} "
        + " ".join(_type(content["schema"]) for content in answer["content"].values())
        + "</li>"
        for status, answer in told["responses"].items()
    )
    return (
        f"<h3><code>{method} {_e(path)}</code></h3><p>{_e(told['summary'])} {_e(told.get('description', ''))}</p>"
        f"{table}{body}<details><summary>Answers</summary><ul>{answers}</ul></details>"
    )


def _schema_shown(schema: dict[str, Any]) -> str:
    text = _e(schema.get("description", ""))
    rows = "".join(
        f"<tr><td><code>{_e(name)}</code></td><td>{_type(part)}</td><td>{_e(part.get('description', ''))}</td></tr>"
        for name, part in schema.get("properties", {}).items()
    )
    return f"<p>{text}</p><table><tr><th>name</th><th>type</th><th>what</th></tr>{rows}</table>"


def _type(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        name = _e(schema["$ref"].rpartition("/")[2])
        return f'<a href="#schema-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(one) for one in schema["anyOf"])
    if "enum" in schema:
        return _e(", ".join("null" if v is None else str(v) for v in schema["enum"]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"array of {_type(schema.get('items', {}))}"
    return _e(" or ".join(kind) if isinstance(kind, list) else kind)


def _e(text: Any) -> str:
    return html.escape(str(text))
