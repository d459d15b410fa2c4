"""Floor 2: sequences, KV blocks, scheduler, and the engine that steps them. Synchronous; one thread owns it."""
