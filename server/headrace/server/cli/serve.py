"""`headrace serve`: fetches the model, starts the server, says what to try next, and drains on SIGTERM or Ctrl-C."""

from __future__ import annotations

from contextlib import closing

from headrace.server.cli import serve_options as option


def serve(
    model: option.Model = "smollm2-135m-instruct",
    name: option.Name = "",
    host: option.Host = "127.0.0.1",
    port: option.Port = 50051,
    threads: option.Threads = 0,
    backend: option.Backend = "auto",
    max_num_seqs: option.MaxNumSeqs = 64,
    max_num_batched_tokens: option.MaxNumBatchedTokens = 0,
    max_model_len: option.MaxModelLen = 0,
    kv_cache_tokens: option.KvCacheTokens = 0,
    kv_dtype: option.KvDtype = "auto",
    activation_bits: option.ActivationBits = 8,
    compute_dtype: option.ComputeDtype = "auto",
    attention: option.Attention = "auto",
    quantization: option.Quantization = "none",
    gpu_memory_fraction: option.GpuMemoryFraction = 0.92,
    swap_space_gb: option.SwapSpaceGb = 4.0,
    prefix_cache: option.PrefixCache = True,
    max_live_sequences: option.MaxLiveSequences = 256,
    max_live_tokens: option.MaxLiveTokens = 1 << 20,
    default_deadline: option.DefaultDeadline = 600.0,
    max_deadline: option.MaxDeadline = 3600.0,
    progress_timeout: option.ProgressTimeout = 5.0,
    hang_timeout: option.HangTimeout = 30.0,
    max_connection_age: option.MaxConnectionAge = 1800.0,
    max_connection_age_grace: option.MaxConnectionAgeGrace = 0.0,
    slo_ttft: option.SloTtft = 0.0,
    slo_tpot: option.SloTpot = 0.0,
    batch_share: option.BatchShare = 0.75,
    degrade_max_tokens: option.DegradeMaxTokens = 0,
    kv_overcommit: option.KvOvercommit = 16.0,
    tenant_header: option.TenantHeader = "",
    stall_timeout: option.StallTimeout = 10.0,
    session_idle_timeout: option.SessionIdleTimeout = 600.0,
    conversation_lease: option.ConversationLease = 300.0,
    resume_grace: option.ResumeGrace = 30.0,
    resume_retention: option.ResumeRetention = 60.0,
    resume_bytes: option.ResumeBytes = 64 << 20,
    lame_duck: option.LameDuck = 2.0,
    drain_deadline: option.DrainDeadline = 30.0,
    reflection: option.Reflection = True,
    channelz: option.Channelz = False,
    metrics_port: option.MetricsPort = 0,
    log_format: option.LogFormat = "text",
    log_level: option.LogLevel = "info",
    as_json: option.Json = False,
) -> None:
    """Serve a model over gRPC until SIGTERM or Ctrl-C, then drain. Every option is also an environment variable.

    - **headrace serve** (the default model on 127.0.0.1:50051)

    - **headrace serve --model ./model.gguf --host 0.0.0.0 --port 8001**

    - **HEADRACE_MAX_NUM_SEQS=8 headrace serve --json**
    """
    from headrace.server.spawn import spawn_engine

    with closing(spawn_engine()) as engine:  # first of all: it imports what it needs while we do
        from headrace.server.cli import running
        from headrace.server.config import ServerConfig

        config = ServerConfig(
            model=model,
            model_name=name,
            host=host,
            port=port,
            num_threads=threads,
            backend=backend,
            kv_dtype=kv_dtype,
            activation_bits=activation_bits,
            compute_dtype=compute_dtype,
            attention=attention,
            quantization=quantization,
            gpu_memory_fraction=gpu_memory_fraction,
            swap_space_gb=swap_space_gb,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            kv_cache_tokens=kv_cache_tokens,
            enable_prefix_cache=prefix_cache,
            max_live_sequences=max_live_sequences,
            max_live_tokens=max_live_tokens,
            default_deadline=default_deadline,
            max_deadline=max_deadline,
            progress_timeout=progress_timeout,
            hang_timeout=hang_timeout,
            max_connection_age=max_connection_age,
            max_connection_age_grace=max_connection_age_grace,
            slo_ttft=slo_ttft,
            slo_tpot=slo_tpot,
            batch_share=batch_share,
            degrade_max_tokens=degrade_max_tokens,
            kv_overcommit=kv_overcommit,
            tenant_header=tenant_header,
            stall_timeout=stall_timeout,
            session_idle_timeout=session_idle_timeout,
            conversation_lease=conversation_lease,
            resume_grace=resume_grace,
            resume_retention=resume_retention,
            resume_bytes=resume_bytes,
            lame_duck=lame_duck,
            drain_deadline=drain_deadline,
            enable_reflection=reflection,
            enable_channelz=channelz,
            log_format=log_format,
            metrics_port=metrics_port,
        )
        running.serve_until_told(config, engine, log_level, as_json=as_json)
