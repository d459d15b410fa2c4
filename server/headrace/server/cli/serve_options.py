"""The options of `headrace serve`: settings of ServerConfig that an operator turns, environment variables too.

ServerConfig checks the values, all at once; what is written here is the name, the help and where it is listed.
"""

from __future__ import annotations

from typing import Annotated, Literal

import typer

_ENGINE, _LIMITS, _TIMES, _OPERATION = "Engine", "Limits", "Times (seconds)", "Operation"

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        envvar="HEADRACE_MODEL",
        help="A name from `headrace models`, a GGUF file, a Hugging Face directory, or hf://owner/name[@revision].",
    ),
]
Name = Annotated[
    str, typer.Option("--name", envvar="HEADRACE_NAME", help="Name that clients use. Default: made from the model.")
]
Host = Annotated[str, typer.Option("--host", envvar="HEADRACE_HOST", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", "-p", envvar="HEADRACE_PORT", help="0 takes any free port.")]
Threads = Annotated[
    int,
    typer.Option(
        "--threads",
        envvar="HEADRACE_THREADS",
        rich_help_panel=_ENGINE,
        help="Threads that compute. 0: as `headrace doctor` says.",
    ),
]
Backend = Annotated[
    Literal["auto", "native", "triton", "torch"],
    typer.Option(
        "--backend",
        envvar="HEADRACE_BACKEND",
        rich_help_panel=_ENGINE,
        help="What computes: triton on an NVIDIA GPU, the native library on the CPU, or the slow torch reference. "
        "auto: as `headrace doctor` says.",
    ),
]
KvDtype = Annotated[
    Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8"],
    typer.Option(
        "--kv-dtype",
        envvar="HEADRACE_KV_DTYPE",
        rich_help_panel=_ENGINE,
        help="How keys and values are kept: less memory, more tokens. auto: fp16; fp32 with torch; on a GPU, which "
        "alone takes fp8, the compute dtype.",
    ),
]
ActivationBits = Annotated[
    int,
    typer.Option(
        "--activation-bits",
        envvar="HEADRACE_ACTIVATION_BITS",
        rich_help_panel=_ENGINE,
        min=8,
        max=16,
        help="Precision of what meets quantised weights: 8, or 16: the tokens of a float32 model, slower in batches.",
    ),
]
ComputeDtype = Annotated[
    Literal["auto", "fp32", "fp16", "bf16"],
    typer.Option(
        "--compute-dtype",
        envvar="HEADRACE_COMPUTE_DTYPE",
        rich_help_panel=_ENGINE,
        help="Precision of activations and products on a GPU. auto: bf16; fp16 with an fp8 KV cache.",
    ),
]
Attention = Annotated[
    Literal["auto", "triton", "flash"],
    typer.Option(
        "--attention",
        envvar="HEADRACE_ATTENTION",
        rich_help_panel=_ENGINE,
        help="Attention kernels on a GPU: our own, or flash-attn where it is installed.",
    ),
]
Quantization = Annotated[
    Literal["none", "int8", "fp8", "fp8-block"],
    typer.Option(
        "--quantization",
        envvar="HEADRACE_QUANTIZATION",
        rich_help_panel=_ENGINE,
        help="On a GPU: weights of the layers, and what they multiply, in 8 bits. int8 and fp8 scale each row, "
        "fp8-block 128 by 128; fp8 needs an Ada, Hopper or newer. none: weights as the file stores them.",
    ),
]
GpuMemoryFraction = Annotated[
    float,
    typer.Option(
        "--gpu-memory-fraction",
        envvar="HEADRACE_GPU_MEMORY_FRACTION",
        rich_help_panel=_ENGINE,
        help="Share of the GPU's memory for weights, activations and the KV cache, which gets what is left.",
    ),
]
SwapSpaceGb = Annotated[
    float,
    typer.Option(
        "--swap-space-gb",
        envvar="HEADRACE_SWAP_SPACE_GB",
        rich_help_panel=_ENGINE,
        help="GiB of host memory for the KV of preempted sequences, on a GPU. 0: it is computed again.",
    ),
]
MaxNumSeqs = Annotated[
    int,
    typer.Option(
        "--max-num-seqs", envvar="HEADRACE_MAX_NUM_SEQS", rich_help_panel=_ENGINE, help="Sequences that run at once."
    ),
]
MaxNumBatchedTokens = Annotated[
    int,
    typer.Option(
        "--max-num-batched-tokens",
        envvar="HEADRACE_MAX_NUM_BATCHED_TOKENS",
        rich_help_panel=_ENGINE,
        help="Token budget of a step: more fills prompts faster, less keeps streams even. 0: what suits the back end.",
    ),
]
MaxModelLen = Annotated[
    int,
    typer.Option(
        "--max-model-len",
        envvar="HEADRACE_MAX_MODEL_LEN",
        rich_help_panel=_ENGINE,
        help="Most tokens of a prompt and its output. 0: the model's context.",
    ),
]
KvCacheTokens = Annotated[
    int,
    typer.Option(
        "--kv-cache-tokens",
        envvar="HEADRACE_KV_CACHE_TOKENS",
        rich_help_panel=_ENGINE,
        help="Tokens whose keys and values are kept. 0: chosen by the engine.",
    ),
]
PrefixCache = Annotated[
    bool,
    typer.Option(
        "--prefix-cache/--no-prefix-cache",
        envvar="HEADRACE_PREFIX_CACHE",
        rich_help_panel=_ENGINE,
        help="Reuse the blocks of prompts that begin alike.",
    ),
]
MaxLiveSequences = Annotated[
    int,
    typer.Option(
        "--max-live-sequences",
        envvar="HEADRACE_MAX_LIVE_SEQUENCES",
        rich_help_panel=_LIMITS,
        help="Sequences that may run or wait; more are refused with RESOURCE_EXHAUSTED.",
    ),
]
MaxLiveTokens = Annotated[
    int,
    typer.Option(
        "--max-live-tokens",
        envvar="HEADRACE_MAX_LIVE_TOKENS",
        rich_help_panel=_LIMITS,
        help="Tokens of their prompts and outputs together.",
    ),
]
DefaultDeadline = Annotated[
    float,
    typer.Option(
        "--default-deadline",
        envvar="HEADRACE_DEFAULT_DEADLINE",
        rich_help_panel=_TIMES,
        help="For calls that set none.",
    ),
]
StallTimeout = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        envvar="HEADRACE_STALL_TIMEOUT",
        rich_help_panel=_TIMES,
        help="A reader that is this long behind is cut off.",
    ),
]
ResumeGrace = Annotated[
    float,
    typer.Option(
        "--resume-grace",
        envvar="HEADRACE_RESUME_GRACE",
        rich_help_panel=_TIMES,
        help="A resumable generation goes on for so long after its client vanished.",
    ),
]
ResumeRetention = Annotated[
    float,
    typer.Option(
        "--resume-retention",
        envvar="HEADRACE_RESUME_RETENTION",
        rich_help_panel=_TIMES,
        help="The messages of a resumable generation are kept for so long after its end.",
    ),
]
ResumeBytes = Annotated[
    int,
    typer.Option(
        "--resume-bytes",
        envvar="HEADRACE_RESUME_BYTES",
        rich_help_panel=_LIMITS,
        help="Memory for the messages of resumable generations.",
    ),
]
MaxDeadline = Annotated[
    float,
    typer.Option(
        "--max-deadline",
        envvar="HEADRACE_MAX_DEADLINE",
        rich_help_panel=_TIMES,
        help="Longer deadlines of calls are cut to it.",
    ),
]
ProgressTimeout = Annotated[
    float,
    typer.Option(
        "--progress-timeout",
        envvar="HEADRACE_PROGRESS_TIMEOUT",
        rich_help_panel=_TIMES,
        help="Health says NOT_SERVING while the engine has made no progress for so long.",
    ),
]
HangTimeout = Annotated[
    float,
    typer.Option(
        "--hang-timeout",
        envvar="HEADRACE_HANG_TIMEOUT",
        rich_help_panel=_TIMES,
        help="An engine without progress for so long is killed, and another started.",
    ),
]
MaxConnectionAge = Annotated[
    float,
    typer.Option(
        "--max-connection-age",
        envvar="HEADRACE_MAX_CONNECTION_AGE",
        rich_help_panel=_TIMES,
        help="Then a client is asked to connect anew, so that connections spread over new replicas.",
    ),
]
MaxConnectionAgeGrace = Annotated[
    float,
    typer.Option(
        "--max-connection-age-grace",
        envvar="HEADRACE_MAX_CONNECTION_AGE_GRACE",
        rich_help_panel=_TIMES,
        help="For the calls on such a connection. 0: as long as --max-deadline.",
    ),
]
SloTtft = Annotated[
    float,
    typer.Option(
        "--slo-ttft",
        envvar="HEADRACE_SLO_TTFT",
        rich_help_panel=_LIMITS,
        help="Seconds: refuse what would wait longer for its first token, by forecast. 0: never.",
    ),
]
SloTpot = Annotated[
    float,
    typer.Option(
        "--slo-tpot",
        envvar="HEADRACE_SLO_TPOT",
        rich_help_panel=_LIMITS,
        help="Seconds: admit fewer sequences while streams wait longer than that for each token. 0: never.",
    ),
]
BatchShare = Annotated[
    float,
    typer.Option(
        "--batch-share",
        envvar="HEADRACE_BATCH_SHARE",
        rich_help_panel=_LIMITS,
        help="How full the server may be, of the sequences it admits, for it to take another batch request.",
    ),
]
DegradeMaxTokens = Annotated[
    int,
    typer.Option(
        "--degrade-max-tokens",
        envvar="HEADRACE_DEGRADE_MAX_TOKENS",
        rich_help_panel=_LIMITS,
        help="Cut max_tokens to this while the server is three quarters full; the initial metadata says so. 0: never.",
    ),
]
KvOvercommit = Annotated[
    float,
    typer.Option(
        "--kv-overcommit",
        envvar="HEADRACE_KV_OVERCOMMIT",
        rich_help_panel=_LIMITS,
        help="Admit prompts and outputs of at most so many times what the KV cache holds. 0: no such limit.",
    ),
]
TenantHeader = Annotated[
    str,
    typer.Option(
        "--tenant-header",
        envvar="HEADRACE_TENANT_HEADER",
        rich_help_panel=_LIMITS,
        help="Metadata key that names the tenant, set by a proxy you trust; they get fair shares. Unset: one tenant.",
    ),
]
SessionIdleTimeout = Annotated[
    float,
    typer.Option(
        "--session-idle-timeout",
        envvar="HEADRACE_SESSION_IDLE_TIMEOUT",
        rich_help_panel=_TIMES,
        help="A session in which nothing runs and nothing is asked for is ended after that. 0: never.",
    ),
]
ConversationLease = Annotated[
    float,
    typer.Option(
        "--conversation-lease",
        envvar="HEADRACE_CONVERSATION_LEASE",
        rich_help_panel=_TIMES,
        help="How long a conversation's KV stays cached after a turn, unless memory is short.",
    ),
]
LameDuck = Annotated[
    float,
    typer.Option(
        "--lame-duck",
        envvar="HEADRACE_LAME_DUCK",
        rich_help_panel=_TIMES,
        help="Told to stop: from health saying NOT_SERVING to refusing new calls.",
    ),
]
DrainDeadline = Annotated[
    float,
    typer.Option(
        "--drain-deadline", envvar="HEADRACE_DRAIN_DEADLINE", rich_help_panel=_TIMES, help="Then for what still runs."
    ),
]
Reflection = Annotated[
    bool,
    typer.Option(
        "--reflection/--no-reflection",
        envvar="HEADRACE_REFLECTION",
        rich_help_panel=_OPERATION,
        help="Let grpcurl and others ask what the server offers.",
    ),
]
Channelz = Annotated[
    bool,
    typer.Option(
        "--channelz/--no-channelz",
        envvar="HEADRACE_CHANNELZ",
        rich_help_panel=_OPERATION,
        help="Offer gRPC's own connection statistics.",
    ),
]
MetricsPort = Annotated[
    int,
    typer.Option(
        "--metrics-port",
        envvar="HEADRACE_METRICS_PORT",
        rich_help_panel=_OPERATION,
        help="Serve /metrics over HTTP on this port of --host for Prometheus. 0: do not.",
    ),
]
LogFormat = Annotated[
    Literal["text", "json"],
    typer.Option(
        "--log-format",
        envvar="HEADRACE_LOG_FORMAT",
        rich_help_panel=_OPERATION,
        help="Form of the log on standard error.",
    ),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"],
    typer.Option(
        "--log-level",
        envvar="HEADRACE_LOG_LEVEL",
        rich_help_panel=_OPERATION,
        help="What is logged at least; every request is an info.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="When ready, print one line of JSON: target, model, process id.")]
