"""The command `pyggml-adapt`: one file per sub-command."""
