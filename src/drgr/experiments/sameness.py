"""Whether an experiment is still the one that a store of results was begun for."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from drgr.errors import ConfigError
from drgr.training import parse_config

Content = dict[str, Any]


def check_same(path: Path, *, before: Content, now: Content) -> None:
    """Checks that an experiment can go on with the results it has.

    It may have gained seeds, and methods after those that were there, whose runs are named by their
    place; nothing that was found before is worth less for them. Configurations of an earlier
    version count as what they mean in this one.

    Args:
        path: The store.
        before: What it was begun for; see ``Comparison.content``.
        now: What the experiment is.

    Raises:
        ConfigError: If it is another experiment, or anything else of it has changed.
    """
    if before["name"] != now["name"]:
        raise ConfigError(
            f"{path} is the store of experiment {before['name']!r}, not of {now['name']!r}; name "
            f"another directory with --directory"
        )
    changes = list(_differences(_grown(_as_of_now(before), now), now, ""))
    if changes:
        raise ConfigError(
            f"the experiment has changed since {path} was begun: {'; '.join(changes)}; undo that, "
            f"or name another directory with --directory"
        )


def _as_of_now(before: Content) -> Content:
    """Fills configurations with the defaults of settings that did not exist yet."""
    configurations = {name: _filled(one) for name, one in before["configurations"].items()}
    return before | {"configurations": configurations}


def _filled(configuration: Content) -> Content:
    try:
        return parse_config(configuration).model_dump(mode="json")
    except ConfigError:  # of settings that are gone: the comparison with what is there names them
        return configuration


def _grown(before: Content, now: Content) -> Content:
    """Returns what was before with the seeds and methods that were added."""
    grown = dict(before)
    if set(before["seeds"]) <= set(now["seeds"]):
        grown["seeds"] = now["seeds"]
    old, new = list(before["methods"]), list(now["methods"])[len(before["methods"]) :]
    if [*old, *new] == list(now["methods"]):
        for key in ("methods", "configurations"):
            grown[key] = now[key] | before[key]
        if before["tuning"] and now["tuning"]:
            spaces = now["tuning"]["methods"]
            added = {name: spaces[name] for name in new if name in spaces}
            grown["tuning"] = before["tuning"] | {"methods": before["tuning"]["methods"] | added}
    return grown


def _differences(before: Any, now: Any, path: str) -> Iterator[str]:
    """Names each place where two JSON values differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(key for key in now if key not in before)]:
            place = f"{path}.{key}" if path else str(key)
            if key not in now:
                yield f"{place} was {json.dumps(before[key])} and is gone"
            elif key not in before:
                yield f"{place} is new: {json.dumps(now[key])}"
            else:
                yield from _differences(before[key], now[key], place)
    elif before != now:
        yield f"{path} was {json.dumps(before)} and is {json.dumps(now)}"
