"""Messages and tools of a row, without the None that `datasets` put where another row has a key."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

NAME = "sgp.Collator"
NULLABLE = ("default", "const")
"""What may be null in the JSON schema of a tool."""


def tools_of(example: Mapping[str, Any]) -> Any:
    """An example's tools, a list or None.

    Example:
        >>> tools_of({"tools": '[{"name": "find"}]'})
        [{'name': 'find'}]

    Raises:
        ValueError: text that is not JSON.
    """
    tools = example.get("tools")
    if not isinstance(tools, str):
        return _without_none(tools, keep=NULLABLE)
    try:
        return json.loads(tools)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{NAME}: tools is {tools[:60]!r}, which is not valid JSON ({error}); expected a list "
            "of tools, this list as JSON, or None"
        ) from None


def _without_none(value: Any, *, keep: Sequence[str] = ()) -> Any:
    """The value without the keys of its mappings that are None."""
    if isinstance(value, Mapping):
        return {
            k: _without_none(v, keep=keep) for k, v in value.items() if v is not None or k in keep
        }
    if isinstance(value, list):
        return [_without_none(v, keep=keep) for v in value]
    return value


def messages_of(example: Mapping[str, Any], name: str) -> Any:
    """The messages of a column.

    Example:
        >>> messages_of({"messages": [{"role": "user", "content": "Go", "name": None}]}, "messages")
        [{'role': 'user', 'content': 'Go'}]
    """
    required: dict[str, Sequence[str]] = {}
    tools = tools_of(example)
    for tool in tools if isinstance(tools, list) else []:
        function = tool.get("function", tool) if isinstance(tool, Mapping) else None
        parameters = function.get("parameters") if isinstance(function, Mapping) else None
        if isinstance(function, Mapping) and isinstance(
            parameters, Mapping
        ):  # neither JSON nor code
            required[function.get("name", "")] = parameters.get("required") or ()
    messages = example[name]
    return [_message(m, required) for m in messages] if isinstance(messages, list) else messages


def _message(message: Any, required: dict[str, Sequence[str]]) -> Any:
    if not isinstance(message, Mapping):
        return message
    found = {k: v for k, v in message.items() if v is not None or k == "content"}
    if isinstance(found.get("content"), list):
        found["content"] = _without_none(found["content"])
    if isinstance(found.get("tool_calls"), list):
        found["tool_calls"] = [_call(call, required) for call in found["tool_calls"]]
    return found


def _call(call: Any, required: dict[str, Sequence[str]]) -> Any:
    """A call of OpenAI's form, with a `function` inside, or a name and arguments alone."""
    if not isinstance(call, Mapping):
        return call
    found = {k: v for k, v in call.items() if v is not None or k == "arguments"}
    if "function" in found:
        found["function"] = _call(found["function"], required)
    if isinstance(found.get("arguments"), Mapping):
        keep = required.get(found.get("name", ""), ())
        found["arguments"] = {
            k: _without_none(v) for k, v in found["arguments"].items() if v is not None or k in keep
        }
    return found
