"""The routes that answer at once: ``/v1/models``, ``/tokenize`` and ``/detokenize``."""

from __future__ import annotations

from typing import Any, Protocol

from fastapi import APIRouter, Request

from deployments.adapters import served_to
from deployments.answering import read_json_body
from omnilmm.api.openapi import detokenize_operation, model_operation, models_operation, tokenize_operation
from omnilmm.api.refusals import validate
from omnilmm.api.requests import MESSAGE_UNIONS
from omnilmm.api.responses import model_list, model_object
from omnilmm.api.tokens import DetokenizeRequest, TokenizeRequest, tokenized
from omnilmm.errors import InvalidRequest
from omnilmm.flow import ChatFlow
from omnilmm.messages import ChatRequest, Conversation
from omnilmm.prompt.detokenize import Detokenizer
from omnilmm.tenancy.keys import Tenant


class LookupService(Protocol):
    """What the routes need of the router. `started` is a Unix time in seconds."""

    flows: dict[str, ChatFlow]
    started: int
    max_body_bytes: int


def add_routes(routes: APIRouter, service: LookupService) -> None:
    """Add the routes to a router whose dependencies have put the tenant into `request.state`."""

    @routes.get("/v1/models", openapi_extra=models_operation())
    async def list_models(request: Request) -> dict[str, Any]:
        tenant: Tenant = request.state.tenant
        mine = [name for name in served_to(tenant, service.flows) if tenant.may_use(name)]
        return dict(model_list(model_object(name, created=service.started) for name in mine))

    @routes.get("/v1/models/{model}", openapi_extra=model_operation())
    async def retrieve_model(model: str, request: Request) -> dict[str, Any]:
        request.state.tenant.check_model(model, served_to(request.state.tenant, service.flows))
        return dict(model_object(model, created=service.started))

    @routes.post("/tokenize", openapi_extra=tokenize_operation())
    async def tokenize(request: Request) -> dict[str, Any]:
        document = await read_json_body(request, service.max_body_bytes)
        asked = validate(TokenizeRequest, document, MESSAGE_UNIONS)
        request.state.tenant.check_model(asked.model, served_to(request.state.tenant, service.flows))
        flow = service.flows[asked.model]
        conversation = asked.conversation()
        prompt = flow.count(ChatRequest("tokenize", conversation or Conversation(()), raw=asked.prompt))
        spell = flow.card.template.tokenizer.token_bytes
        return dict(
            tokenized(
                prompt.ids,
                max_context=flow.card.max_context,
                image_tokens=sum(span.length for span in prompt.spans),
                texts=[spell(i).decode("utf-8", "replace") for i in prompt.ids] if asked.return_token_strs else None,
            )
        )

    @routes.post("/detokenize", openapi_extra=detokenize_operation())
    async def detokenize(request: Request) -> dict[str, Any]:
        document = await read_json_body(request, service.max_body_bytes)
        asked = validate(DetokenizeRequest, document, frozenset())
        request.state.tenant.check_model(asked.model, served_to(request.state.tenant, service.flows))
        card = service.flows[asked.model].card
        if any(token_id >= card.vocab_size for token_id in asked.tokens):
            raise InvalidRequest(f"Token ids of this model are below {card.vocab_size}.", param="tokens")
        words = Detokenizer(card.template.tokenizer, skip_special=False)
        return {"prompt": words.push(asked.tokens) + words.flush()}
