"""The HTTP gateway: OpenAI's API and what platforms probe, over the public gRPC client. Stateless; several may run.

`app.create_app` makes the ASGI application, `cli/gateway.py` runs it. Nothing here knows the engine: what a request may
hold is checked by the gRPC server, once for every protocol; pydantic only gives JSON its shape.
"""
