"""What has ids: users and items, both 64-bit integers (`pipelines.contracts.ids`)."""

from feast import Entity, ValueType

__all__ = ["item", "user"]

user = Entity(name="user", join_keys=["user"], value_type=ValueType.INT64, description="who acts")
item = Entity(name="item", join_keys=["item"], value_type=ValueType.INT64, description="what is acted on")
