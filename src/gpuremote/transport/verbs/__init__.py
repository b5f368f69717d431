"""RDMA verbs, as far as this package needs them, whoever provides them."""
