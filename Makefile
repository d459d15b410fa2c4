# Everything a newcomer types. `make serve` on a fresh machine sets itself up first; a second run is quick.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# torch's CPU build where the index offers one; TORCH=torch takes whatever is newest (a CUDA build on Linux).
TORCH  ?= torch==2.13.0

.PHONY: protos
protos: $(VENV)/.installed
	rm -f protos/headrace/v1/*_pb2*.py*
	$(BIN)/python -m grpc_tools.protoc -Iprotos --python_out=protos --grpc_python_out=protos \
		--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
		--mypy_out=quiet:protos --mypy_grpc_out=quiet:protos \
		protos/headrace/v1/inference.proto protos/headrace/v1/models.proto
