"""The storage service: the shell around the native engine."""
