"""What is wrong with a request, in one sentence: where, what is wanted, what came; no value of a client is quoted."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_NO_TOOLS = "tool calling is not offered by this server; leave it out"
_ABSENT = {  # fields of OpenAI's that are taken only at the value that means nothing
    "tools": _NO_TOOLS,
    "tool_choice": _NO_TOOLS,
    "functions": _NO_TOOLS,
    "function_call": _NO_TOOLS,
    "n": "one answer a request is what this server gives; leave it out, or ask several times",
    "logprobs": "log probabilities are not offered by this server; leave it out",
    "logit_bias": "biases of tokens are not offered by this server; leave it out",
    "frequency_penalty": "penalties are not offered by this server; leave it out",
    "presence_penalty": "penalties are not offered by this server; leave it out",
    "response_format": "answers are plain text on this server; leave it out",
    "store": "answers are not kept by this server; leave it out",
}
_PARTS = {"image_url": "images", "input_audio": "audio", "file": "files"}  # of a message's content
_WANTED = {  # by pydantic's names of errors
    "string_type": "a string",
    "list_type": "an array",
    "dict_type": "an object",
    "model_type": "an object",
    "model_attributes_type": "an object",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "none_required": "null",
}


def refusal(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[str, str | None]:
    """Message and OpenAI's `param` of what pydantic found: the first field's, and of its errors the innermost.

    body: as it was parsed. A field that may have several forms, of which none fits, has an error for each of them.
    """
    located = [(_path(error, body), error) for error in errors]
    first = located[0][0]
    if not first and errors[0]["type"] == "json_invalid":
        reason = str(errors[0].get("ctx", {}).get("error", "")).rstrip(" :")
        where = f", at character {errors[0]['loc'][1] + 1}" if len(errors[0]["loc"]) > 1 else ""
        return f"the body is not valid JSON ({reason}{where}); send one JSON object", None
    own = [(path, error) for path, error in located if path[: len(first)] == first]
    path = max((path for path, _ in own), key=len)
    there = [error for other, error in own if other == path]
    param = _written(path)[:500] or None
    return f"{f'{param}:' if param else 'the body'} {_sentence(path, there)}"[:1000], param


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """Where an error is, in the body itself: pydantic's place without its names for the forms a field may have."""
    where, *place = error["loc"] or ("body",)
    if error["type"] == "json_invalid":
        return []
    if where != "body":
        return place
    path: list[str | int] = []
    for number, part in enumerate(place, 1):
        is_named = isinstance(body, dict) and part in body
        if is_named or (isinstance(body, list) and isinstance(part, int) and part < len(body)):
            path.append(part)
            body = body[part]
        elif number == len(place) and error["type"] == "missing":
            path.append(part)
    return path


def _written(path: Sequence[str | int]) -> str:
    """A path as OpenAI writes it: messages[0].content[1].text."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _sentence(path: Sequence[str | int], errors: Sequence[Mapping[str, Any]]) -> str:
    wanted = [_WANTED[error["type"]] for error in errors if error["type"] in _WANTED]
    error = next((error for error in errors if error["type"] not in _WANTED), errors[0])
    kind, given = error["type"], error.get("input")
    if path and path[0] in _ABSENT:
        return _ABSENT[str(path[0])]
    if path and path[-1] == "type" and kind == "literal_error" and "content" in path:
        called = f"{_PARTS[given]} are" if isinstance(given, str) and given in _PARTS else "this kind of part is"
        return f"{called} not read by this server, only parts of type 'text'; leave the part out"
    if kind == "missing":
        return "is missing" if path else "is missing; send a JSON object"
    if kind == "string_unicode":
        return "holds what is no valid Unicode (a lone surrogate)"
    if kind == "extra_forbidden":
        return "is no field of this request; leave it out"
    if kind == "string_pattern_mismatch":
        return "holds no word" if error["ctx"]["pattern"] == r"\S" else "must hold no control characters"
    if kind in _WANTED:
        return f"must be {' or '.join(dict.fromkeys(wanted))}, got {_kind(given)}"
    words = re.sub(r"^(Value error, |\w+ (?=should ))", "", str(error["msg"])).replace(" after validation", "")
    return words.replace("should ", "must ", 1)


def _kind(value: Any) -> str:
    """What a value of JSON is called."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, float):
        return "a number" if value.is_integer() else "a number with a fraction"
    kinds = {str: "a string", int: "a number", list: "an array", dict: "an object"}
    return kinds.get(type(value), "something else")
