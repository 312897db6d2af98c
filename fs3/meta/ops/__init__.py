"""The operations: one file each, a function of (transaction, request, context) to a response."""
