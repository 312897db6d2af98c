"""The metadata service: a stateless server of the namespace over the key-value store."""
