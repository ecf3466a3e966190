"""COCO files as some tools write them, brought into the common form where what they mean is beyond doubt:

* lists as objects with ids for keys (LIVECell);
* whole numbers as text or with a fraction of zero (``"7"``, ``7.0``; CVAT, pandas), boxes as texts;
* names of categories that are numbers;
* ``coco_url`` in place of ``file_name`` (LVIS).
"""

from __future__ import annotations

import re
from typing import Any

_LISTS = ("images", "annotations", "categories")
_WHOLE = ("id", "image_id", "category_id", "width", "height")


def to_common_form(value: Any) -> None:
    """Change the content of a COCO file, in place; what is in no known form is left as it is."""
    for key in _LISTS if isinstance(value, dict) else ():
        if isinstance(entries := value.get(key), dict) and entries:
            value[key] = [
                {"id": number} | entry if isinstance(entry, dict) else entry
                for number, entry in entries.items()
            ]
        if isinstance(value.get(key), list):
            for entry in value[key]:
                if isinstance(entry, dict):
                    _entry_to_common_form(entry)


def _entry_to_common_form(entry: dict[str, Any]) -> None:
    for key in _WHOLE:
        if key in entry:
            entry[key] = _whole(entry[key])
    if type(entry.get("name")) in (int, float):
        entry["name"] = str(entry["name"])
    if isinstance(box := entry.get("bbox"), list):
        entry["bbox"] = [_number(side) for side in box]
    if isinstance(url := entry.get("coco_url"), str) and not entry.get("file_name"):
        entry["file_name"] = url.partition("://")[2].partition("/")[2]


def _whole(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.0+)?", value.strip()):
        return int(value.partition(".")[0])
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
