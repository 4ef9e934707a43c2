"""What the verb `doctor` looks for in a run before it costs a week: one small function a check."""
