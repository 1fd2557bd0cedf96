"""What a run will take, and whether this machine has it."""
