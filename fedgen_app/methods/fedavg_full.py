"""FedAvg of the whole model (McMahan et al. 2017, arXiv 1602.05629): every weight is trained and travels.

The reference that adapters are compared with; for small backbones.
"""

from __future__ import annotations

from fedgen_app.federation.method import Method

METHOD = Method(weights="model")
