"""What happens during training beside its steps: one file a hook, named by what it does."""
