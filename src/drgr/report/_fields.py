"""Typed access to JSON content that may be incomplete or wrong."""

import math
from collections.abc import Mapping
from typing import final


@final
class Fields:
    """One JSON object; each access either returns the wanted type or leaves the value out.

    A missing or null value is silently ``None``, since a run may not have measured it. A value of
    the wrong type and a number that is not finite are ``None`` too, but are written down in
    ``notes``, so that a report can say what it does not show.

    Args:
        content: a decoded JSON value; anything but an object counts as an empty one, with a note.
        place: where it stands, for the notes.
        notes: the list that notes are appended to, shared by all fields of a run.
    """

    def __init__(self, content: object, *, place: str, notes: list[str]) -> None:
        self._place = place
        self._notes = notes
        self._content: Mapping[str, object] = {}
        if isinstance(content, dict):
            self._content = content
        elif content is not None:
            self._reject(content, "an object")

    def number(self, key: str) -> float | None:
        """Returns the finite number at ``key``."""
        return self._as_number(self._content.get(key), key)

    def text(self, key: str) -> str | None:
        """Returns the text at ``key``; a list of texts is joined by blanks."""
        value = self._content.get(key)
        if isinstance(value, list) and all(isinstance(part, str) for part in value):
            return " ".join(value)
        if value is None or isinstance(value, str):
            return value
        self._reject(value, "a text", key)
        return None

    def flag(self, key: str) -> bool | None:
        """Returns the boolean at ``key``."""
        value = self._content.get(key)
        if value is None or isinstance(value, bool):
            return value
        self._reject(value, "true or false", key)
        return None

    def numbers(self, key: str) -> dict[str, float | None]:
        """Returns the name -> number mapping at ``key``, in the file's order."""
        inner = self.child(key)
        return {name: inner.number(name) for name in inner.names()}

    def texts(self, key: str) -> dict[str, str]:
        """Returns the name -> value mapping at ``key`` with every value as text."""
        inner = self.child(key)
        return {name: str(value) for name, value in inner._content.items() if value is not None}

    def counts(self, key: str) -> tuple[float | None, ...]:
        """Returns the list of numbers at ``key``."""
        return tuple(
            self._as_number(value, f"{key}[{index}]") for index, value in enumerate(self._list(key))
        )

    def child(self, key: str) -> "Fields":
        """Returns the object at ``key``."""
        return Fields(self._content.get(key), place=self._place_of(key), notes=self._notes)

    def children(self, key: str) -> list["Fields"]:
        """Returns the list of objects at ``key``."""
        return [
            Fields(value, place=self._place_of(f"{key}[{index}]"), notes=self._notes)
            for index, value in enumerate(self._list(key))
        ]

    def names(self) -> tuple[str, ...]:
        """Returns the object's keys in the file's order."""
        return tuple(self._content)

    def _list(self, key: str) -> list[object]:
        value = self._content.get(key)
        if value is None:
            return []
        if isinstance(value, list):
            return value
        self._reject(value, "a list", key)
        return []

    def _as_number(self, value: object, key: str) -> float | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            self._reject(value, "a number", key)
            return None
        if isinstance(value, int) and value.bit_length() > 1000:
            self._reject("an integer beyond float64", "a finite number", key)
            return None
        if not math.isfinite(value):
            self._reject(value, "a finite number", key)
            return None
        return float(value)

    def _place_of(self, key: str) -> str:
        return f"{self._place}, {key}"

    def _reject(self, value: object, wanted: str, key: str | None = None) -> None:
        place = self._place if key is None else self._place_of(key)
        shown = repr(value)
        shown = shown if len(shown) <= 40 else shown[:37] + "..."
        self._notes.append(f"{place}: must be {wanted}, got {shown}; left out.")
