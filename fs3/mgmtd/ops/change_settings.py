"""ChangeSettings: settings of the cluster that hold without a restart."""

from __future__ import annotations

from fs3.core import settings
from fs3.core.errors import error
from fs3.mgmtd.manager import Manager
from fs3.mgmtd.state import Change
from fs3.v1.frame_pb2 import Code
from fs3.v1.mgmtd_pb2 import ChangeSettingsRequest
from fs3.v1.routing_pb2 import Settings


async def change_settings(manager: Manager, request: ChangeSettingsRequest) -> Settings:
    """Set and unset, all or none; durable, and on its way to every service, when it returns.

    Raises INVALID_ARGUMENT for names and values that are none.
    """
    for name, value in request.values.items():
        settings.check(name, value)
    async with manager.lock:
        changed = Settings()
        changed.CopyFrom(manager.state.settings)
        for name in request.unset:
            if name not in changed.values and name not in settings.SETTINGS:
                raise error(Code.CODE_INVALID_ARGUMENT, f"there is no setting {name!r}")
            changed.values.pop(name, None)
        for name, value in request.values.items():
            changed.values[name] = value
        if changed != manager.state.settings:
            changed.version += 1
            await manager.commit(Change(settings=changed))
        return changed
