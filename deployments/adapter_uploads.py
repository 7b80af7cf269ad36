"""``/admin/v1/adapters``: whoever runs the server puts adapters beside its models, and takes them away again.

An upload streams into a folder of its own, is held against the model, and appears under its name at once and whole
(`deployments.adapter_folder`). The router that took it serves it when it answers; the others find it within seconds.
"""

from __future__ import annotations

from typing import Any, Final, Protocol

from fastapi import APIRouter, Request

from deployments.adapter_folder import AdapterFolder, Incoming, Record
from deployments.adapters import AdapterHost, Found
from deployments.admin_lock import Locked, admin_lock
from deployments.database import blocking
from deployments.multipart import Form, receive_form
from omnilmm.errors import ConfigError, InvalidRequest, NotFound, PayloadTooLarge
from omnilmm.tenancy.keys import KeyBook
from omnilmm.tenancy.profile import check_name

MAX_SETTINGS_BYTES: Final = 16 * 1024
"""What adapter_config.json may have here; peft writes about one thousand."""
_MAX_AROUND_BYTES: Final = 128 * 1024  # of a form, beside the file
_MAX_TENANTS: Final = 100


class AdapterService(Locked, Protocol):
    """What the routes need of the router. `adapters` are by the model's name."""

    adapters: dict[str, AdapterHost]

    async def refresh_adapters(self) -> None:
        """Serve what is in the folders now."""
        ...


def adapter_routes(service: AdapterService) -> APIRouter:
    """Routes behind the admin's lock; include the router before the catch-all."""
    routes = APIRouter(dependencies=[admin_lock(service)], include_in_schema=False)

    @routes.get("/admin/v1/adapters")
    async def list_adapters() -> dict[str, Any]:
        await service.refresh_adapters()
        hosts = service.adapters.items()
        data = [_adapter(model, name, found) for model, host in hosts for name, found in host.found.items()]
        return {"object": "list", "data": data}

    @routes.post("/admin/v1/adapters/{model}", status_code=201)
    async def upload_adapter(model: str, request: Request) -> dict[str, Any]:
        host = _host(service, model)
        folder = await _open(host)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > folder.max_bytes + _MAX_AROUND_BYTES:
            raise PayloadTooLarge("The adapter has more bytes than one for this model can have.", code="file_too_large")
        with folder.receive() as incoming:
            form = await receive_form(
                request.headers.get("content-type"),
                request.stream(),
                write=incoming.write,
                max_field_bytes=MAX_SETTINGS_BYTES,
            )
            name, record = await _put(service, host, folder, incoming, form)
        await service.refresh_adapters()
        return _adapter(model, name, Found(_owners(host, name, record), record))

    @routes.get("/admin/v1/adapters/{model}/{name}")
    async def show_adapter(model: str, name: str) -> dict[str, Any]:
        host = _host(service, model)
        await service.refresh_adapters()
        if name not in host.found:
            raise NotFound("There is no adapter of this name.", code="adapter_not_found")
        return _adapter(model, name, host.found[name])

    @routes.delete("/admin/v1/adapters/{model}/{name}")
    async def delete_adapter(model: str, name: str) -> dict[str, Any]:
        folder = await _open(_host(service, model))
        await blocking(folder.remove, name)
        await service.refresh_adapters()
        return {"object": "adapter", "id": f"{model}:{name}", "status": "deleted"}

    return routes


async def _put(
    service: AdapterService, host: AdapterHost, folder: AdapterFolder, incoming: Incoming, form: Form
) -> tuple[str, Record]:
    """Check the form's fields and give what came in its name."""
    fields = dict(form.fields)
    name, settings, tenants = (fields.pop(field, None) for field in ("name", "adapter_config", "tenants"))
    for field in fields:
        raise InvalidRequest("A field of the form is unknown.", param=field[:64], code="unknown_parameter")
    if name is None:
        raise InvalidRequest("'name' is required.", param="name", code="missing_required_parameter")
    if settings is None:
        told = "'adapter_config' is required: what is in adapter_config.json."
        raise InvalidRequest(told, param="adapter_config", code="missing_required_parameter")
    if name in host.settings.paths:
        raise InvalidRequest("The configuration has an adapter of this name.", param="name", code="already_exists")
    owners = None if tenants is None else _check_tenants(service.keys, tenants)
    return name, await blocking(folder.put, incoming, name, settings.encode(), owners)


def _check_tenants(keys: KeyBook, listed: str) -> tuple[str, ...]:
    """Names with commas between them, each of a tenant there is."""
    names = sorted({check_name(name.strip(), "tenants") for name in listed.split(",")})
    if len(names) > _MAX_TENANTS:
        raise InvalidRequest(f"'tenants' may name {_MAX_TENANTS}.", param="tenants", code="array_above_max_length")
    for name in names:
        try:
            keys.tenant(name)
        except NotFound:
            raise InvalidRequest(
                "'tenants' names one there is not.", param="tenants", code="tenant_not_found"
            ) from None
    return tuple(names)


def _host(service: AdapterService, model: str) -> AdapterHost:
    if model not in service.adapters:
        raise NotFound("There is no model of this name that has adapters.", code="model_not_found")
    return service.adapters[model]


async def _open(host: AdapterHost) -> AdapterFolder:
    try:
        return await blocking(host.open_folder)
    except ConfigError:
        raise InvalidRequest(
            "The model's settings name no folder of adapters that is there.", code="uploads_not_possible"
        ) from None


def _owners(host: AdapterHost, name: str, record: Record) -> frozenset[str] | None:
    owners = host.settings.tenants.get(name, record.tenants)
    return None if owners is None else frozenset(owners)


def _adapter(model: str, name: str, found: Found) -> dict[str, Any]:
    record = found.record
    return {
        "object": "adapter",
        "id": f"{model}:{name}",
        "model": model,
        "name": name,
        "tenants": None if found.owners is None else sorted(found.owners),
        "uploaded": record is not None,
        "created_at": None if record is None else record.created_at,
        "rank": None if record is None else record.rank,
        "bytes": None if record is None else record.num_bytes,
        "digest": None if record is None else record.digest,
    }
