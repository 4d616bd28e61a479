"""What one process changed in Feast's registry, applied to what another one has written meanwhile.

```
base ──── changed here ────► changed
  └────── written there ───► there ─── take_changes ──► both
```

Objects (views, entities, sources …) are told apart by project and name. Where both sides changed the same object, its
fields are compared one by one: `feast apply` may alter a view's schema while `feast materialize` sets its state. Only
a field that both changed to something else is decided, in favour of who commits last.
"""

from typing import Any

from feast.protos.feast.core.FeatureViewVersion_pb2 import FeatureViewVersionHistory
from feast.protos.feast.core.Registry_pb2 import Registry
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

__all__ = ["take_changes"]

_NAMED_IN = {Registry.DESCRIPTOR.full_name, FeatureViewVersionHistory.DESCRIPTOR.full_name}
_NAMES = ("project", "name", "project_id", "feature_view_name", "version_number")
_PARTS = ("spec", "meta", "feature_view_version_history")  # merged field by field; every other message is one value


def take_changes(there: Message, *, base: Message, changed: Message) -> None:
    """Make in `there` the changes that lead from `base` to `changed`; all three are of one type."""
    for field in there.DESCRIPTOR.fields:
        old, new = getattr(base, field.name), getattr(changed, field.name)
        if old == new:
            continue
        if there.DESCRIPTOR.full_name in _NAMED_IN and field.is_repeated:
            _set(there, field.name, _merged_objects(getattr(there, field.name), old, new))
        elif field.name in _PARTS:
            take_changes(getattr(there, field.name), base=old, changed=new)
        elif _is_list(field) and old == new[: len(old)]:  # such as materialization intervals: both sides append
            getattr(there, field.name).extend(new[len(old) :])
        elif field.has_presence and not changed.HasField(field.name):
            there.ClearField(field.name)
        else:
            _set(there, field.name, new)


def _merged_objects(there: Any, old: Any, new: Any) -> list[Message]:
    """The objects of `there`, in their order, and then what is new; what either side deleted stays deleted."""
    before, after, merged = _by_name(old), _by_name(new), _by_name(there)
    for name in before.keys() - after.keys():
        merged.pop(name, None)
    for name, message in after.items():
        if name in merged:
            take_changes(merged[name], base=before.get(name, type(message)()), changed=message)
        elif name not in before:
            merged[name] = message
    return list(merged.values())


def _by_name(objects: Any) -> dict[tuple, Message]:
    return {_name(each): each for each in objects}


def _name(message: Message) -> tuple:
    named = message.spec if "spec" in message.DESCRIPTOR.fields_by_name else message
    return tuple(getattr(named, name) for name in _NAMES if name in named.DESCRIPTOR.fields_by_name)


def _is_list(field: FieldDescriptor) -> bool:
    return field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry)


def _set(message: Message, name: str, value: Any) -> None:
    fresh = type(message)(**{name: value})
    message.ClearField(name)
    message.MergeFrom(fresh)
