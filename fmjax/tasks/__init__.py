"""What experiments of one kind share, beside the harness that is the same for all."""
