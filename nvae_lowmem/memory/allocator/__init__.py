"""PyTorch's CUDA caching allocator, simulated to the byte, and recordings of the real one."""
