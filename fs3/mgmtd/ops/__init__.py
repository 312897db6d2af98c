"""One file per RPC of the cluster manager."""
