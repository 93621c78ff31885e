"""What a run is made of: the sections of a profile, TOML in and out, the published recipes."""
