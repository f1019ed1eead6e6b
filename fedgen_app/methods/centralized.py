"""Centralised training: one client owns all the data and takes everyone's steps; the upper bound, and no federation."""

from __future__ import annotations

from fedgen_app.federation.method import Method
from fedgen_app.federation.robust import only

METHOD = Method(pooled=True, refuses=only(because="there is one client", layer_wise=False))
