"""Floor 1: model files, tokenizers and configurations; turns a file on disk into weights and a step program."""
