"""The only rooms that import torch, transformers and vllm; each engine runs in a process of its own."""
