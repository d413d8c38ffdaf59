"""On a device: GGUF files for llama.cpp, and what else serves a compressed base with its adapters without calora."""
