"""Everything that can be set on a server, checked as a whole before anything starts.

The CLI and the tests build a `ServerConfig` and give it to `app.start_server`; nothing else holds settings. All faults
of a configuration are reported at once. Times are in seconds, sizes in bytes, unless a name says otherwise.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

METADATA_KEY = re.compile(r"(?!.*-bin$)[0-9a-z_.-]{1,128}")
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}")


BackendName = Literal["auto", "native", "triton", "torch"]
KvDtype = Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8"]
ComputeDtype = Literal["auto", "fp32", "fp16", "bf16"]
AttentionName = Literal["auto", "triton", "flash"]
Quantization = Literal["none", "int8", "fp8", "fp8-block"]


class ConfigError(ValueError):
    """A configuration that cannot be served. `problems` holds one sentence per fault."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class ServerConfig:
    """One server with one model.

    model: a catalogue name, a path, or `hf://owner/name@revision` (headrace.models.sources).
    """

    model: str = "smollm2-135m-instruct"
    model_name: str = ""  # the name clients use; "": made from `model`
    host: str = "127.0.0.1"
    port: int = 50051  # 0: any free port

    # Engine. 0 and "auto" mean: chosen from the model and the machine.
    backend: BackendName = "auto"
    kv_dtype: KvDtype = "auto"  # how keys and values are kept
    activation_bits: int = 8  # 8 or 16: of what meets quantised weights on the native back end
    compute_dtype: ComputeDtype = "auto"  # of activations and products on a GPU
    attention: AttentionName = "auto"  # which kernels compute attention on a GPU
    quantization: Quantization = "none"  # what the layers' matrices become at load on a GPU; none: as the file has them
    swap_space_gb: float = 4.0  # GiB of pinned host memory for the KV of preempted sequences, on a GPU
    gpu_memory_fraction: float = 0.92  # of the GPU's memory that weights, activations and KV blocks may take
    block_size: int = 0
    num_blocks: int = 0
    kv_cache_tokens: int = 0  # another way to say num_blocks
    kv_cache_bytes: int = 0
    max_num_batched_tokens: int = 0
    max_num_seqs: int = 64
    max_model_len: int = 0
    num_threads: int = 0
    enable_prefix_cache: bool = True

    # Admission: what may be in the server at once. A request with n > 1 counts n times.
    max_live_sequences: int = 256
    max_live_tokens: int = 1 << 20  # prompt + max_tokens, summed
    kv_overcommit: float = 16.0  # the same sum, at most so many times what the KV cache holds; 0: no such limit
    batch_share: float = 0.75  # of the sequences that may be here, how far batch requests may fill it
    slo_ttft: float = 0.0  # refuse what would wait longer for its first token, by forecast; 0: never
    slo_tpot: float = 0.0  # admit fewer while streams wait longer than that for each token; 0: never
    degrade_max_tokens: int = 0  # max_tokens is cut to it while the server is three quarters full; 0: never
    tenant_header: str = ""  # metadata key that names the tenant, as a trusted proxy sets it; "": one tenant
    max_generations_per_session: int = 64
    max_conversations_per_session: int = 64
    conversation_lease: float = 300.0  # how long the KV of a conversation stays cached after a turn

    # Time.
    default_deadline: float = 600.0  # for calls without one
    max_deadline: float = 3600.0  # longer ones are cut to it
    stall_timeout: float = 10.0  # a reader that is this long behind is cut off
    session_idle_timeout: float = 600.0  # a session in which nothing runs or is asked for is ended; 0: never
    resume_grace: float = 30.0  # a resumable generation goes on for so long without a reader
    resume_retention: float = 60.0  # its messages are kept for so long after its end
    lame_duck: float = 2.0  # from "health says NOT_SERVING" to "no new calls"
    drain_deadline: float = 30.0  # then for what runs
    progress_timeout: float = 5.0  # engine silent for this long: NOT_SERVING until it says something
    hang_timeout: float = 30.0  # engine silent for this long: killed
    max_connection_age: float = 1800.0  # then the client is asked to connect anew, which spreads connections
    max_connection_age_grace: float = 0.0  # for calls on such a connection; 0: as long as a call may last
    max_backoff: float = 10.0  # between engine restarts
    max_restarts_per_minute: int = 5  # more: the model is FAILED and stays so

    # Buffers.
    stream_buffer_tokens: int = 256
    resume_bytes: int = 64 << 20  # of kept messages, all generations together
    max_receive_bytes: int = 4 << 20

    # Operator's choices.
    enable_reflection: bool = True
    enable_channelz: bool = False
    log_format: Literal["text", "json"] = "text"
    metrics_port: int = 0  # where Prometheus may scrape, on `host`; 0: nowhere

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ConfigError(problems)

    @property
    def name(self) -> str:
        """The model's name in requests and in health."""
        if self.model_name:
            return self.model_name
        last = self.model.rstrip("/").rsplit("/", 1)[-1].split("@", 1)[0]
        return re.sub(r"[^A-Za-z0-9._-]", "-", last.removesuffix(".gguf")).lstrip(".-_") or "model"


# Name, least, most (both included).
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("port", 0, 65535),
    ("metrics_port", 0, 65535),
    ("block_size", 0, 256),
    ("num_blocks", 0, 1 << 24),
    ("kv_cache_tokens", 0, 1 << 31),
    ("gpu_memory_fraction", 0.05, 1.0),
    ("swap_space_gb", 0, 4096),
    ("kv_cache_bytes", 0, 1 << 44),
    ("max_num_batched_tokens", 0, 65536),
    ("max_num_seqs", 1, 4096),
    ("max_model_len", 0, 1 << 20),
    ("num_threads", 0, 1024),
    ("max_live_sequences", 1, 65536),
    ("max_live_tokens", 1, 1 << 40),
    ("kv_overcommit", 0, 1000),
    ("batch_share", 0, 1),
    ("slo_ttft", 0, 3600),
    ("slo_tpot", 0, 3600),
    ("degrade_max_tokens", 0, 1 << 20),
    ("max_generations_per_session", 1, 4096),
    ("max_conversations_per_session", 1, 4096),
    ("conversation_lease", 0, 86400),
    ("session_idle_timeout", 0, 86400),
    ("default_deadline", 0.001, 86400 * 7),
    ("max_deadline", 0.001, 86400 * 7),
    ("stall_timeout", 0.01, 3600),
    ("resume_grace", 0, 3600),
    ("resume_retention", 0, 3600),
    ("resume_bytes", 0, 1 << 40),
    ("lame_duck", 0, 600),
    ("drain_deadline", 0, 86400),
    ("progress_timeout", 0.1, 3600),
    ("hang_timeout", 0.1, 3600),
    ("max_connection_age", 1, 86400 * 365),
    ("max_connection_age_grace", 0, 86400 * 7),
    ("max_backoff", 0.1, 3600),
    ("max_restarts_per_minute", 0, 1000),
    ("stream_buffer_tokens", 2, 1 << 20),
    ("max_receive_bytes", 1024, 64 << 20),
)
_CHOICES: dict[str, tuple[str, ...]] = {
    "backend": get_args(BackendName),
    "kv_dtype": get_args(KvDtype),
    "compute_dtype": get_args(ComputeDtype),
    "attention": get_args(AttentionName),
    "quantization": get_args(Quantization),
    "log_format": ("text", "json"),
}
_TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool}


def _problems(config: ServerConfig) -> list[str]:
    problems = _type_problems(config)
    if problems:
        return problems
    for name, least, most in _RANGES:
        value = getattr(config, name)
        if not least <= value <= most:
            problems.append(f"{name} must be from {least:g} to {most:g}, not {value:g}")
    if not config.model:
        problems.append("model must not be empty")
    if config.model_name and not MODEL_NAME.fullmatch(config.model_name):
        problems.append("model_name must be 1 to 128 letters, digits or ._:/@- and begin with a letter or digit")
    if not config.host:
        problems.append("host must not be empty")
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in choices:
            problems.append(f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}")
    if config.tenant_header and not METADATA_KEY.fullmatch(config.tenant_header):
        problems.append("tenant_header must be a metadata key: lower-case letters, digits or -_. and not end in -bin")
    if config.activation_bits not in (8, 16):
        problems.append("activation_bits must be 8 or 16")
    if config.default_deadline > config.max_deadline:
        problems.append("default_deadline must not be over max_deadline")
    return problems


def _type_problems(config: ServerConfig) -> list[str]:
    problems = []
    for field in fields(config):
        value = getattr(config, field.name)
        wanted = _TYPES.get(str(field.type), str)
        is_bool_elsewhere = isinstance(value, bool) and wanted is not bool
        if not isinstance(value, wanted) or is_bool_elsewhere:  # type: ignore[arg-type]
            problems.append(f"{field.name} must be of type {field.type}")
    return problems
