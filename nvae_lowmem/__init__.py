"""nvae-lowmem: deep hierarchical VAEs (NVAE) trained on small GPUs."""

__version__ = "0.1.0"
