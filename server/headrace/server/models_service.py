"""headrace.v1.ModelService: what this server has loaded, or is loading. Answers in every state."""

from __future__ import annotations

from headrace.server import convert, validate
from headrace.server.model_host import ModelHost
from headrace.server.rpc import Call, Implementation
from headrace.v1 import models_pb2


class ModelService:
    """One model per server; the contract allows for more."""

    def __init__(self, host: ModelHost) -> None:
        self._host = host

    def implementations(self) -> dict[str, Implementation]:
        """By method name."""
        return {"ListModels": self.list_models, "GetModel": self.get_model}

    async def list_models(self, _: models_pb2.ListModelsRequest, call: Call) -> models_pb2.ListModelsResponse:
        """All models."""
        return models_pb2.ListModelsResponse(models=[self._describe()])

    async def get_model(self, request: models_pb2.GetModelRequest, call: Call) -> models_pb2.GetModelResponse:
        """One model."""
        validate.check_model(request.model, self._host.name)
        return models_pb2.GetModelResponse(model=self._describe())

    def _describe(self) -> models_pb2.Model:
        host = self._host
        is_known = host.state in ("ready", "draining")
        info = host.info if is_known else None
        return convert.model(host.name, host.state, host.progress, info, host.context_length, host.backend)
