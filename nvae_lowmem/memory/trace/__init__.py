"""The step that trains, run on tensors without storage: every allocation and free."""
