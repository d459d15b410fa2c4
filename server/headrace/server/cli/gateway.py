"""`headrace gateway`: OpenAI's API, and what platforms probe, over HTTP in front of a gRPC server. Stateless."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer
from headrace.server.cli import output


def gateway(
    target: Annotated[
        str, typer.Option("--target", envvar="HEADRACE_TARGET", help="The gRPC server, or the Envoy before many.")
    ] = "127.0.0.1:50051",
    host: Annotated[
        str, typer.Option("--host", envvar="HEADRACE_HTTP_HOST", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option("--port", "-p", envvar="HEADRACE_HTTP_PORT", help="Port. Default: AIP_HTTP_PORT, else 8080."),
    ] = 0,
    timeout: Annotated[
        Optional[float], typer.Option("--timeout", help="Seconds that a call may take. Default: the server's.")  # noqa: UP045
    ] = None,
) -> None:
    """Serve HTTP in front of a Headrace server: /v1/chat/completions, /v1/completions, /v1/models, /health, /ready,
    SageMaker's /ping and /invocations, and Vertex AI's routes (AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE).

    - **headrace gateway**, then **curl localhost:8080/v1/models**
    """
    try:
        import uvicorn
        from headrace.server.gateway.app import GatewaySettings, create_app
    except ImportError as error:
        raise output.CommandError(f"{error.name} is missing: pip install 'headrace[server,gateway]'") from None
    settings = GatewaySettings(
        target=target,
        timeout=timeout,
        health_route=os.environ.get("AIP_HEALTH_ROUTE", ""),
        predict_route=os.environ.get("AIP_PREDICT_ROUTE", ""),
    )
    chosen = port or int(os.environ.get("AIP_HTTP_PORT") or 8080)
    uvicorn.run(create_app(settings), host=host, port=chosen, log_level="info", timeout_graceful_shutdown=30)
