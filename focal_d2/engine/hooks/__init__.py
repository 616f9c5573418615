"""The hooks of a training: one file for each hook, named by what it does."""
