"""What the command line does besides running stages: one file a verb."""
