"""The library: what `import nvae_lowmem as nl` offers. Its names are listed in `nvae_lowmem.PUBLIC`."""
