"""How it is federated: one short file per method, each ending in ``METHOD = Method(...)``."""
