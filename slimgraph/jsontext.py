"""JSON as other programs read it: without NaN and infinity, which JSON does not have."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["finite", "json_text"]


def json_text(data: Any) -> str:
    """The data as JSON, one key a line; NaN and infinity become null.

    >>> print(json_text({"value": float("nan")}))
    {
     "value": null
    }
    """
    return json.dumps(finite(data), indent=1, allow_nan=False)


def finite(data: Any) -> Any:
    """The data with null in place of NaN and infinity, which JSON does not know."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
