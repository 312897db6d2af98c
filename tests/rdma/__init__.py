"""Tests over real RDMA verbs, in a kernel of their own: `make test-rdma`."""
