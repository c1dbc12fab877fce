"""Runs models: host, sessions, engine, KV cache and sampling."""
