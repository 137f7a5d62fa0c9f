"""Commands: one module a command, its flags and what it prints; the work is done in the stages."""
