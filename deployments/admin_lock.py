"""What stands in front of every route that is the admin's."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import Depends, Request

from omnilmm.tenancy.keys import AdminKeys, KeyBook


class Locked(Protocol):
    """What the lock needs of the router."""

    keys: KeyBook
    admins: AdminKeys


def admin_lock(service: Locked) -> Any:
    """A FastAPI dependency: whoever asks is the admin, or is refused as `AdminKeys.authenticate` says."""

    def admin(request: Request) -> None:
        peer = request.client.host if request.client else None
        service.admins.authenticate(request.headers.getlist("authorization"), peer, service.keys)

    return Depends(admin)
